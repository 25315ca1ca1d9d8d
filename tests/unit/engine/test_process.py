"""Child processes: their environment, and their logs."""

import errno
import io
import os
import sys
from collections.abc import Generator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.support.core_values import config

from mesh_llm.core.node import Node
from mesh_llm.core.types.events import Tick
from mesh_llm.daemon import journal as journal_module
from mesh_llm.daemon.journal import Journal, replay
from mesh_llm.engine import process as process_module
from mesh_llm.engine.process import (
    Command,
    LogFile,
    Tail,
    child_environment,
    listening_port,
    log_name,
    python_module,
    run,
)
from mesh_llm.runtime.supervision import Supervision, current_supervision, use_supervision


def test_never_grows_past_its_bound_and_keeps_the_newest(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "logs" / "a.log", max_bytes=100, backups=2)
    for number in range(100):
        log.write(f"line {number:04}\n".encode())
    log.close()
    files = sorted(path.name for path in log.path.parent.iterdir())
    assert files == ["a.log", "a.log.1", "a.log.2"]
    assert all(path.stat().st_size <= 100 for path in log.path.parent.iterdir())
    text = "".join((log.path.parent / name).read_text() for name in ("a.log.2", "a.log.1", "a.log"))
    assert text.endswith("line 0098\nline 0099\n")
    # Nothing is lost in between.
    numbers = [int(line.split()[1]) for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 100))


def test_goes_on_after_a_restart(tmp_path: Path) -> None:
    for text in (b"one\n", b"two\n"):
        log = LogFile(tmp_path / "a.log")
        log.write(text)
        log.close()
    assert (tmp_path / "a.log").read_bytes() == b"one\ntwo\n"


def test_one_huge_write_is_bounded_too(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log", max_bytes=10, backups=1)
    log.write(b"0123456789" * 5 + b"end")
    log.close()
    assert (tmp_path / "a.log").read_bytes() == b"end"
    assert (tmp_path / "a.log.1").read_bytes() == b"0123456789"


def test_tail_has_whole_lines_without_colours() -> None:
    tail = Tail(lines=3)
    assert tail.feed(b"one\ntw") == [b"one"]
    assert tail.feed(b"o\n\x1b[31mthree\x1b[0m\n\n") == [b"two", b"\x1b[31mthree\x1b[0m", b""]
    tail.feed(b"four \xff")
    tail.finish()
    assert tail.text() == "two\nthree\nfour �"
    assert tail.text(lines=1) == "four �"


def test_tail_does_not_keep_an_endless_line() -> None:
    tail = Tail()
    for _ in range(100):
        tail.feed(b"." * 65536)
    tail.finish()
    assert 0 < len(tail.text()) <= 2000


@pytest.mark.parametrize(
    ("name", "safe"),
    [("qwen2.5-3b", "qwen2.5-3b"), ("../../etc/passwd", "etc_passwd"), ("a/b c", "a_b_c"), ("..", "engine")],
)
def test_names_of_models_are_no_paths(name: str, safe: str) -> None:
    assert log_name(name) == safe


class Disk:
    """A disk that takes so many bytes more, behind `FileIO`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 30
        disk = self

        class Limited(io.FileIO):
            def write(self, data: Any, /) -> int:
                size = min(disk.room, len(data))
                if not size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                disk.room -= size
                return super().write(memoryview(data)[:size])

        monkeypatch.setattr(process_module, "FileIO", Limited)
        monkeypatch.setattr(journal_module, "FileIO", Limited)


@pytest.fixture
def told() -> Generator[list[str]]:
    texts: list[str] = []
    use_supervision(Supervision(lambda _, text: texts.append(text)))
    yield texts
    use_supervision(None)


def test_a_full_disk_loses_lines_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    disk = Disk(monkeypatch)
    log = LogFile(tmp_path / "a.log")
    log.write(b"before\n")
    disk.room = 3
    for _ in range(100):
        log.write(b"while it is full\n")
    assert len(told) == 1
    assert "The log a.log cannot be written: No space left on device" in told[0]
    assert [problem.what for problem in current_supervision().problems] == ["the log a.log"]
    disk.room = 1 << 20
    log.write(b"after\n")
    assert (tmp_path / "a.log").read_bytes() == b"before\nwhi\n--- 1700 bytes could not be written here\nafter\n"
    assert current_supervision().problems == ()
    assert len(told) == 2
    log.close()
    log.write(b"too late\n")


def test_without_descriptors_it_is_opened_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(process_module, "FileIO", none_left)
    log = LogFile(tmp_path / "a.log", max_bytes=100)
    log.write(b"lost\n")
    with pytest.raises(OSError, match="Too many open files"):
        LogFile(tmp_path / "b.log", must_open=True)
    monkeypatch.undo()
    log.write(b"x" * 50)
    # The turn of the file fails, and is made up for.
    monkeypatch.setattr(process_module, "FileIO", none_left)
    log.write(b"y" * 80)
    monkeypatch.undo()
    log.write(b"z" * 10)
    log.close()
    text = (tmp_path / "a.log").read_bytes()
    assert text.endswith(b"z" * 10)
    assert b"80 bytes could not be written here" in text


@pytest.mark.usefixtures("told")
def test_a_journal_waits_for_room_and_has_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    node = Node(config("m"), Random(7))
    journal = Journal(tmp_path / "journal", node.config, 7)

    def record(now: float) -> None:
        journal.record(now, Tick(), node.handle(Tick(), now))

    record(1.0)
    disk.room = 10
    for now in (2.0, 3.0, 4.0):
        record(now)
    assert [problem.what for problem in current_supervision().problems] == ["the journal"]
    disk.room = 1 << 20
    record(5.0)
    assert current_supervision().problems == ()
    journal.close()
    outcome = replay(tmp_path / "journal")
    assert (outcome.events, outcome.difference) == (5, None)


def test_a_journal_that_waits_for_too_long_ends_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MOST_WAITING", 200)
    disk = Disk(monkeypatch)
    node = Node(config("m"), Random(7))
    journal = Journal(tmp_path / "journal", node.config, 7)
    journal.record(1.0, Tick(), node.handle(Tick(), 1.0))
    disk.room = 5
    for now in range(2, 50):
        journal.record(now, Tick(), node.handle(Tick(), now))
    assert journal.full
    assert replay(tmp_path / "journal").events == 1


def test_children_do_not_see_what_would_change_them_or_is_secret() -> None:
    parent = {
        "PATH": "/bin",
        "LLAMA_ARG_HOST": "0.0.0.0",
        "LLAMA_API_KEY": "k",
        "MESH_LLM_API_KEY": "k",
        "HF_TOKEN": "t",
        "GGML_RPC_DEBUG": "1",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    seen = child_environment(Command(argv=("x",), env={"EXTRA": "1"}), parent)
    assert seen == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "GGML_NO_BACKTRACE": "1",
        "PYTHONUNBUFFERED": "1",
        "EXTRA": "1",
    }


@pytest.mark.parametrize(
    ("line", "port"),
    [
        (b"0.00.101.220 I srv  llama_server: listening on http://127.0.0.1:41234", 41234),
        (b"main: server is listening on http://127.0.0.1:8080 - starting the main loop", 8080),
        (b"main: HTTP server is listening, hostname: 127.0.0.1, port: 8081, http threads: 15", 8081),
        (b"listening on http://0.0.0.0:8080", None),
        (b"listening on http://127.0.0.1:808012", None),
        (b"loading model", None),
    ],
)
def test_finds_the_port_in_a_servers_output(line: bytes, port: int | None) -> None:
    assert listening_port(line) == port


def test_modules_run_from_where_this_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    argv, env = python_module("mesh_llm.x", "arg")
    assert argv == (sys.executable, "-P", "-m", "mesh_llm.x", "arg")
    root, _, rest = env["PYTHONPATH"].partition(":")
    assert rest == "/elsewhere"
    assert sys.modules["mesh_llm"].__file__ == f"{root}/mesh_llm/__init__.py"


def test_what_hides_cards_is_inherited_also_where_little_is() -> None:
    parent = {"GGML_VK_VISIBLE_DEVICES": "1", "GGML_SCHED_DEBUG": "2", "CUDA_VISIBLE_DEVICES": "0"}
    kept = child_environment(Command(argv=("x",)), parent)
    assert (kept["GGML_VK_VISIBLE_DEVICES"], kept["CUDA_VISIBLE_DEVICES"]) == ("1", "0")
    assert "GGML_SCHED_DEBUG" not in kept
    assert child_environment(Command(argv=("x",), keeps=("PATH",)), parent)["GGML_VK_VISIBLE_DEVICES"] == "1"


async def test_what_a_program_printed_before_it_was_ended_is_kept() -> None:
    done = await run(("/bin/sh", "-c", "echo begun; exec sleep 600"), {}, 2.0)
    assert (done.code, done.stdout) == (None, b"begun\n")
    assert b"did not end within 2 s" in done.stderr
