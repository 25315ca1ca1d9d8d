"""Files that keep a state: read within bounds, and written soon after a change."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from mesh_llm.runtime.state_file import StateFile, read_state, write_state
from mesh_llm.runtime.supervision import TaskScope

ABOUT = "what a test counts"


class Counts(msgspec.Struct):
    """A state."""

    used: int = 0


def read(path: Path | None, most: int = 100) -> tuple[Counts | None, str]:
    return read_state(path, Counts, most, ABOUT)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_state(tmp_path / "counts.json", Counts(7), ABOUT)
    assert read(tmp_path / "counts.json") == (Counts(7), "")


def test_without_a_file_there_is_nothing_wrong(tmp_path: Path) -> None:
    assert read(tmp_path / "none.json") == (None, "")
    assert read(None) == (None, "")


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (b"", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b'{"used": "many"}', "is damaged"),
        (b'{"used": 7}' + b" " * 90, "is too large"),
    ],
)
def test_a_damaged_file_is_not_used(tmp_path: Path, content: bytes, damage: str) -> None:
    path = tmp_path / "counts.json"
    path.write_bytes(content)
    assert read(path) == (None, damage)


def test_a_file_of_just_the_most_bytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_bytes(b'{"used": 7}' + b" " * 89)
    assert read(path) == (Counts(7), "")


def test_a_path_that_cannot_be_read_or_written_stops_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == (None, "cannot be read")
    (tmp_path / "file").write_bytes(b"")
    write_state(tmp_path / "file" / "counts.json", Counts(7), ABOUT)
    assert (tmp_path / "file").read_bytes() == b""


async def test_a_change_is_saved(tmp_path: Path) -> None:
    path, state, asked = tmp_path / "counts.json", Counts(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def present() -> Counts:
        loop.call_soon_threadsafe(asked.set)
        return state

    file = StateFile(path, ABOUT, present)
    scope = TaskScope("test")
    saving = scope.spawn(file.keep(), "keep")
    state.used = 3
    file.changed()
    async with asyncio.timeout(10.0):
        await asked.wait()
    await scope.close()
    assert saving.done()
    state.used = 4
    file.save()
    assert read(path) == (Counts(4), "")


def test_nothing_is_written_where_there_is_no_state_or_no_path(tmp_path: Path) -> None:
    StateFile(tmp_path / "counts.json", ABOUT, lambda: None).save()
    StateFile(None, ABOUT, lambda: Counts(7)).save()
    assert list(tmp_path.iterdir()) == []
