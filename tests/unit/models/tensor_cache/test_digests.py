"""Digests of tensors: computed right, kept, and no longer believed when a file changes."""

import os
from pathlib import Path

import pytest
from blake3 import blake3
from tests.support.gguf_writer import Tensor, header, llama_metadata

from mesh_llm.models.gguf.header import GgufError
from mesh_llm.models.tensor_cache.digests import DigestIndex, DigestStore, compute

TENSORS = [Tensor("a", (32, 4), "f16"), Tensor("b", (32,), "f32"), Tensor("c", (64, 2), "q8_0")]


def write(path: Path, fill: int = 1, tensors: list[Tensor] = TENSORS) -> Path:
    head, size = header(llama_metadata(), tensors)
    body = bytes((n * fill) % 251 for n in range(size - len(head)))
    path.write_bytes(head + body)
    return path


def test_every_tensor_has_its_own_bytes_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    digests = compute(path, threads=2)
    data = path.read_bytes()
    assert [tensor.name for tensor in digests.tensors] == ["a", "b", "c"]
    for tensor in digests.tensors:
        assert tensor.digest == blake3(data[tensor.offset : tensor.offset + tensor.size]).digest()
    index = DigestIndex()
    index.add_main(path, digests)
    b = index.tensor("b")
    assert b is not None
    assert b.read(0, 999) == data[digests.tensors[1].offset :][:128]
    assert b.read(100, 999) == data[digests.tensors[1].offset + 100 :][:28]
    assert index.holding(b.digest) == b
    assert len(list(index.digests())) == 3


def test_parts_of_one_model(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00002.gguf")
    write(tmp_path / "m-00002-of-00002.gguf", 3, [Tensor("d", (32, 4), "f16")])
    digests = compute(first)
    assert [(tensor.name, tensor.file) for tensor in digests.tensors] == [("a", 0), ("b", 0), ("c", 0), ("d", 1)]
    index = DigestIndex()
    index.add_main(first, digests)
    d = index.tensor("d")
    assert d is not None
    assert blake3(d.read(0, d.size)).digest() == d.digest


def test_kept_and_dropped_when_a_file_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    store = DigestStore(tmp_path / "cache")
    assert store.load(path) is None
    digests = store.get(path)
    assert store.load(path) == digests
    status = path.stat()
    # Same size, same bytes, another time of change.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert store.load(path) is None
    assert not digests.is_current
    again = store.get(path)
    # Same name, size and time, another file.
    other = write(tmp_path / "other", 7)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    other.replace(path)
    assert store.load(path) is None
    assert store.get(path).tensors[0].digest != again.tensors[0].digest


def test_damaged_or_foreign_caches_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    store = DigestStore(tmp_path / "cache")
    store.get(path)
    (kept,) = (tmp_path / "cache").iterdir()
    for damage in (b"", b"\x80", kept.read_bytes()[:-3], b"\xc1" * 50):
        kept.write_bytes(damage)
        assert store.load(path) is None


def test_learned_hashes_are_kept_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    store = DigestStore(tmp_path / "cache")
    index = DigestIndex(store)
    index.add_main(path, store.get(path))
    assert index.known_hash("a") is None
    index.learn_hash("a", (1 << 64) - 1)
    index.save()
    again = DigestIndex(store)
    loaded = store.load(path)
    assert loaded is not None
    again.add_main(path, loaded)
    assert again.known_hash("a") == (1 << 64) - 1
    os.utime(path, ns=(1, 1))
    assert again.known_hash("a") is None


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF nonsense")
    with pytest.raises(GgufError):
        compute(path)
