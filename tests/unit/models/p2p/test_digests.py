import hashlib
import os
import random
import threading
from pathlib import Path

import msgspec
import pytest

from mesh_llm.models.p2p.digests import CHUNK_BYTES, ChunkDigests, ChunkDigestStore, digest_file
from mesh_llm.runtime.transfer.progress import FetchCancelledError

CONTENT = random.Random(3).randbytes(2 * CHUNK_BYTES + 1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "m.gguf"
    file.write_bytes(CONTENT)
    return file


def test_whole_and_chunks(path: Path) -> None:
    seen: list[int] = []
    digests = digest_file(path, seen.append)
    assert digests.sha256 == hashlib.sha256(CONTENT).digest()
    assert (digests.size, digests.count, digests.problem()) == (len(CONTENT), 3, None)
    assert seen == [CHUNK_BYTES, 2 * CHUNK_BYTES, len(CONTENT)]
    for index in range(3):
        begin, end = digests.span(index)
        assert digests.matches(index, CONTENT[begin:end])
        assert not digests.matches(index, CONTENT[begin : end - 1])
        assert not digests.matches(index, bytes([CONTENT[begin] ^ 1]) + CONTENT[begin + 1 : end])


def test_the_name_stands_for_everything(path: Path) -> None:
    digests = digest_file(path)
    others = [
        msgspec.structs.replace(digests, size=digests.size - 1),
        msgspec.structs.replace(digests, sha256=bytes(32)),
        msgspec.structs.replace(digests, chunks=digests.chunks[:-1] + b"x"),
    ]
    assert len({digests.name, *(other.name for other in others)}) == 4
    assert digest_file(path).name == digests.name


@pytest.mark.parametrize(
    "changes",
    [{"size": -1}, {"size": 1 << 50}, {"sha256": b""}, {"chunk_bytes": 1}, {"chunk_bytes": 0}, {"chunks": b"x"}],
)
def test_lists_that_cannot_be_are_told(path: Path, changes: dict[str, int | bytes]) -> None:
    assert msgspec.structs.replace(digest_file(path), **changes).problem()


def test_cancelling(path: Path) -> None:
    cancel = threading.Event()
    with pytest.raises(FetchCancelledError):
        digest_file(path, lambda _: cancel.set(), cancel)


def test_kept_while_the_file_is_the_same(path: Path, tmp_path: Path) -> None:
    store = ChunkDigestStore(tmp_path / "digests")
    assert store.get(path) is None
    made = store.make(path)
    assert isinstance(made, ChunkDigests)
    assert store.get(path) == made
    seen: list[int] = []
    assert store.make(path, seen.append) == made
    assert not seen
    os.utime(path, (1, 1))
    assert store.get(path) is None
    assert store.make(path, seen.append) == made
    assert seen
    next((tmp_path / "digests").iterdir()).write_bytes(b"x")
    assert store.get(path) is None
    store.make(path)
    assert store.get(path) == made
