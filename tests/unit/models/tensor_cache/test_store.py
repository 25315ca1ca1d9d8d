"""Kept tensors: what came is there after a kill, what changed is not, and the last room on the disk is nobody's."""

import os
import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.library.library import scan
from mesh_llm.models.tensor_cache.store import CachedTensors, TensorCache, cached_models

PRINT = "ab" * 16
FIRST, SECOND, THIRD = (bytes([number]) * (1000 + number) for number in (1, 2, 3))


def keep(kept: CachedTensors, *contents: bytes) -> None:
    for content in contents:
        arriving = kept.begin()
        assert arriving is not None
        arriving.write(content[:500])
        arriving.write(content[500:])
        arriving.keep(blake3(content).digest())


def held(kept: CachedTensors) -> set[bytes]:
    """The contents, as they are read."""
    found = [kept.holding(digest) for digest in kept.digests()]
    return {tensor.read(0, tensor.size) for tensor in found if tensor is not None}


def opened(directory: Path) -> CachedTensors:
    return CachedTensors(directory, "m", PRINT)


def test_what_came_is_there_after_a_kill_and_one_at_a_time_comes(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    keep(kept, FIRST, SECOND)
    arriving = kept.begin()
    assert arriving is not None
    assert kept.begin() is None
    arriving.write(THIRD)
    # Killed here: neither is anything noted, nor has the third an end.
    again = opened(tmp_path)
    assert held(again) == {FIRST, SECOND}
    keep(again, THIRD, FIRST)
    assert held(again) == {FIRST, SECOND, THIRD}
    assert again.size_bytes == len(FIRST) + len(SECOND) + len(THIRD)
    assert held(opened(tmp_path)) == {FIRST, SECOND, THIRD}


def test_what_is_dropped_leaves_nothing_behind(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    keep(kept, FIRST)
    size = kept.path.stat().st_size
    arriving = kept.begin()
    assert arriving is not None
    arriving.write(SECOND)
    arriving.drop()
    # Whoever was still writing changes nothing any more.
    arriving.write(THIRD)
    arriving.keep(blake3(SECOND).digest())
    assert kept.path.stat().st_size == size
    keep(kept, THIRD)
    assert held(opened(tmp_path)) == {FIRST, THIRD}


@pytest.mark.parametrize("noted", [False, True])
def test_a_changed_file_is_read_again_and_what_is_wrong_is_left_out(tmp_path: Path, *, noted: bool) -> None:
    kept = opened(tmp_path)
    keep(kept, FIRST, SECOND, THIRD)
    if noted:
        kept.note()
    place = kept.holding(blake3(SECOND).digest())
    assert place is not None
    with kept.path.open("r+b") as file:
        file.seek(place.offset + 7)
        file.write(b"!")
    os.utime(kept.path, ns=(1, 1))
    assert held(opened(tmp_path)) == {FIRST, THIRD}


def test_a_file_that_looks_the_same_is_trusted_until_it_is_used(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    keep(kept, FIRST, SECOND)
    kept.note()
    status = kept.path.stat()
    place = kept.holding(blake3(SECOND).digest())
    assert place is not None
    with kept.path.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"!")
    os.utime(kept.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = opened(tmp_path)
    assert len(list(again.digests())) == 2
    again.forget(place.digest)
    assert held(again) == held(opened(tmp_path)) == {FIRST}


def test_a_cut_file_and_a_cut_index(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    keep(kept, FIRST, SECOND)
    os.truncate(kept.path, kept.path.stat().st_size - 1)
    assert held(opened(tmp_path)) == {FIRST}
    kept = opened(tmp_path)
    keep(kept, THIRD)
    index = kept.path.with_name(kept.path.name + ".index")
    index.write_bytes(index.read_bytes()[:-1])
    assert held(opened(tmp_path)) == {FIRST}
    index.write_bytes(b"nonsense\n" + bytes(200))
    assert held(opened(tmp_path)) == set()


def test_nothing_takes_it_for_a_model(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    keep(kept, FIRST)
    with pytest.raises(GgufError):
        read_header(kept.path)
    library = scan([tmp_path], builtin=False)
    assert (library.models, library.unusable) == ({}, ())


def test_room_is_made_by_what_was_not_used_for_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("11" * 16, "22" * 16, "33" * 16)):
        keep(CachedTensors(tmp_path, f"m{number}", name), FIRST)
        os.utime(tmp_path / f"{name}.tensors.index", (1000 + number, 1000 + number))
    shelf = TensorCache(tmp_path)
    free = [10**9, 10**9, 10**12]
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(_: Path) -> object:
        return usage._replace(total=10**12, free=free.pop(0) if len(free) > 1 else free[0])

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    assert shelf.make_room(10**6, ["22" * 16])
    assert [part.model for part in cached_models(tmp_path)] == ["m1"]
    free[:] = [10**9]
    assert not shelf.make_room(10**6, ["22" * 16])
    assert [part.model for part in cached_models(tmp_path)] == ["m1"]
    shelf.sweep()
    assert cached_models(tmp_path) == []


def test_what_was_removed_meanwhile_begins_anew(tmp_path: Path) -> None:
    shelf = TensorCache(tmp_path)
    assert shelf.open("m", "../../evil") is None
    kept = shelf.open("m", PRINT)
    assert kept is not None
    keep(kept, FIRST)
    assert shelf.open("m", PRINT) is kept
    (part,) = cached_models(tmp_path)
    part.remove()
    shelf.note()
    again = shelf.open("m", PRINT)
    assert again is not None
    assert held(again) == set()
