from pathlib import Path

import pytest

from mesh_llm.engine.log_file import LogFile, Tail, log_name


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
