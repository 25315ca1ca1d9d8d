"""The frame of `bench conform`: outcomes are read, and the tables are written."""

from pathlib import Path

import pytest
from bench.conform.places import CLIENT, ENGINE, NODE
from bench.conform.report import BEGIN, END, Outcome, Result, tables, write
from bench.conform.suites import ALL, HERE

RESULT = Result(
    "a client",
    "lib 1.0",
    {
        NODE: [Outcome("one", passed=True), Outcome("two", passed=False, reason="it | broke")],
        CLIENT: [Outcome("one", passed=True), Outcome("two", passed=True)],
        ENGINE: [Outcome("one", passed=True), Outcome("two", passed=True)],
    },
)


def test_the_tables() -> None:
    written = tables([RESULT])
    assert "| a client | lib 1.0 | 1 of 2 | 2 of 2 | 2 of 2 |" in written
    assert "| a client | two | no | yes | yes | it / broke |" in written
    assert "| one |" not in written
    assert [outcome.case for outcome in RESULT.worse] == ["two"]


def test_the_tables_of_a_client_that_the_engine_does_not_know() -> None:
    outcomes = [Outcome("one", passed=True), Outcome("two", passed=False, reason="it broke")]
    result = Result("a client", "lib 1.0", {NODE: outcomes, CLIENT: outcomes})
    written = tables([result])
    assert "| a client | lib 1.0 | 1 of 2 | 1 of 2 | - |" in written
    assert "| a client | two | no | no | - | it broke |" in written
    assert "| one |" not in written
    assert not result.worse


def test_the_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}{END}after\n")
    for _ in range(2):
        write(page, [RESULT])
        text = page.read_text()
        assert (text.startswith("before\n"), text.endswith("after\n")) == (True, True)
        assert text.count("| a client | lib 1.0 |") == 1
    write(page, [Result("another", "lib 2.0", {NODE: [Outcome("three", passed=False, reason="it broke")]})])
    text = page.read_text()
    assert text.index("| a client | lib 1.0 |") < text.index("| another | lib 2.0 |") < text.index("| a client | two |")
    assert text.count("| Client | Case |") == 1
    write(page, [Result("another", "lib 2.1", {NODE: [Outcome("three", passed=True)]})])
    text = page.read_text()
    assert ("lib 2.0" in text, "| three |" in text, "| a client | two |" in text) == (False, False, True)
    page.write_text("no place")
    with pytest.raises(ValueError, match="no place"):
        write(page, [RESULT])


def test_every_suite_has_its_program_and_its_lock() -> None:
    for suite in ALL:
        assert (HERE / "clients" / suite.program).exists()
        assert not suite.lock or (HERE / "locks" / suite.lock).exists()
