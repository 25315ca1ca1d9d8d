"""The directory of saved prompt caches: bounded, least recently used first, and never in the way."""

import errno
import os
from io import BytesIO
from pathlib import Path

import pytest

from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.engine.prompt_cache import store as module
from mesh_llm.engine.prompt_cache.sealed import Header, sealed_bytes
from mesh_llm.engine.prompt_cache.store import PromptCacheStore, Usage, clear_directory, directory_usage

SECRET = b"s" * 32
ONE = b"1" * 32
SIZE = 10_000


def marks(*names: str) -> tuple[Mark, ...]:
    return tuple(Mark(name.encode(), 4000 * (place + 1)) for place, name in enumerate(names))


def make(directory: Path, limit: int = 10**9) -> PromptCacheStore:
    store = PromptCacheStore(directory, SECRET, limit, free=0)
    store.open()
    return store


def save(store: PromptCacheStore, *names: str, size: int = SIZE, identity: bytes = ONE) -> bool:
    header = Header(identity=identity, marks=marks(*names), tokens=2000, size=size)
    return store.write(header, BytesIO(names[-1][0].encode() * size)) is not None


def found(store: PromptCacheStore, *names: str) -> bytes | None:
    answer = store.find(ONE, marks(*names), 0)
    state = BytesIO()
    if answer is None or not store.restore(answer[0], state):
        return None
    return state.getvalue()[:1]


def test_another_run_finds_what_was_saved(tmp_path: Path) -> None:
    assert save(make(tmp_path), "a", "b")
    store = make(tmp_path)
    assert found(store, "a", "b", "c") == b"b"
    assert found(store, "x", "y") is None
    assert store.find(b"2" * 32, marks("a", "b"), 0) is None
    assert store.usage.count == 1
    assert store.usage.bytes == directory_usage(tmp_path).bytes


def test_a_longer_prompt_replaces_what_it_continues(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert save(store, "a", "b")
    assert save(store, "a", "b", "c")
    assert save(store, "a", "x")
    assert store.usage.count == 2
    assert found(store, "a", "b", "c") == b"c"


def test_a_beginning_of_a_saved_prompt_is_covered(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert save(store, "a", "b", "c")
    assert store.covers(ONE, marks("a", "b"))
    assert store.covers(ONE, marks("a", "b", "c"))
    assert not store.covers(ONE, marks("a", "b", "c", "d"))
    assert not store.covers(ONE, marks("a", "x"))
    assert not store.covers(b"2" * 32, marks("a"))
    assert not store.covers(ONE, ())


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = make(tmp_path, limit=3 * sealed_bytes(SIZE))
    for place, name in enumerate("abc"):
        assert save(store, name)
        entry = next(one for one in store._entries if one.header.marks[0].key == name.encode())
        entry.used = place
    assert found(store, "a") == b"a"
    assert save(store, "d")
    assert found(store, "b") is None
    assert [found(store, name) for name in "acd"] == [b"a", b"c", b"d"]
    assert store.usage.bytes <= 3 * sealed_bytes(SIZE)


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    store = make(tmp_path, limit=2 * sealed_bytes(SIZE))
    assert save(store, "a")
    assert not store.room_for(10 * SIZE)
    assert not save(store, "b", size=10 * SIZE)
    assert found(store, "a") == b"a"


def test_a_smaller_limit_shrinks_the_directory(tmp_path: Path) -> None:
    store = make(tmp_path)
    for name in "abcd":
        assert save(store, name)
    assert make(tmp_path, limit=2 * sealed_bytes(SIZE)).usage.count == 2
    assert directory_usage(tmp_path).count == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "empty"])
def test_a_bad_file_is_deleted(tmp_path: Path, damage: str) -> None:
    assert save(make(tmp_path), "a")
    (file,) = tmp_path.glob("*.cache")
    data = file.read_bytes()
    bad = {
        "cut": data[:-1],
        "flip": data[:-500] + bytes([data[-500] ^ 1]) + data[-499:],
        "foreign": b"something else",
        "empty": b"",
    }
    file.write_bytes(bad[damage])
    store = make(tmp_path)
    assert found(store, "a") is None
    assert not file.exists()
    assert store.usage == Usage()


def test_a_file_that_vanishes_is_forgotten(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert save(store, "a")
    clear_directory(tmp_path)
    assert found(store, "a") is None
    assert store.usage.count == 0


def test_a_full_disk_costs_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    assert save(store, "a")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, "sealed", full)
        assert not save(store, "b")
    assert [path.suffix for path in tmp_path.iterdir()] == [".cache"]
    assert save(store, "b")
    assert (
        PromptCacheStore(tmp_path, SECRET, 10**9, free=1 << 62).write(
            Header(identity=ONE, marks=marks("c"), tokens=2000, size=4), BytesIO(b"cccc")
        )
        is None
    )
    assert store.usage.count == 2


def test_no_half_of_a_file_stays(tmp_path: Path) -> None:
    store = make(tmp_path)
    state = BytesIO(bytes(SIZE))
    state.close()
    with pytest.raises(ValueError, match="closed"):
        store.write(Header(identity=ONE, marks=marks("a"), tokens=2000, size=SIZE), state)
    assert list(tmp_path.iterdir()) == []


def test_clearing_deletes_all(tmp_path: Path) -> None:
    store = make(tmp_path / "prompts")
    assert store.clear() == Usage()
    assert save(store, "a")
    assert save(store, "b")
    assert store.clear().count == 2
    assert store.usage == Usage()
    assert list((tmp_path / "prompts").iterdir()) == []
    assert oct((tmp_path / "prompts").stat().st_mode)[-3:] == "700"
    assert directory_usage(tmp_path / "nowhere") == Usage()
