"""Keeping what a host sends: only whole weights of layers that the host told of, and never instead of computing."""

import struct

from blake3 import blake3

from mesh_llm.split.worker.weights import CacheEntry, WeightRecorder
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES
from mesh_llm.wire.ggml_rpc.tunnel import SKETCH_BYTES

WEIGHT = bytes(range(256)) * 64


def head(name: bytes = b"blk.3.ffn_up.weight", offset: int = 0) -> memoryview:
    """The fixed beginning of a SET_TENSOR."""
    tensor = bytearray(TENSOR_BYTES)
    tensor[228 : 228 + len(name)] = name
    data = bytes(tensor) + b"\0" + struct.pack("<Q", offset)
    assert len(data) == SET_TENSOR_HEAD
    return memoryview(data)


class Coming:
    def __init__(self, store: "Store") -> None:
        self.store = store
        self.data = b""

    def write(self, data: bytes | memoryview) -> None:
        if self.store.full:
            raise OSError(28, "no space")
        self.data += bytes(data)

    def keep(self, digest: bytes) -> None:
        self.store.kept[digest] = self.data

    def drop(self) -> None:
        self.store.dropped += 1


class Store:
    def __init__(self, *, full: bool = False) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.dropped = 0
        self.full = full

    def begin(self, size: int) -> CacheEntry | None:
        return Coming(self) if size else None

    def forget(self, digest: bytes) -> None:
        del self.kept[digest]


def keeping(store: Store, *contents: bytes) -> WeightRecorder:
    return WeightRecorder(store, {blake3(content).digest()[:SKETCH_BYTES] for content in contents})


async def send(keeps: WeightRecorder, beginning: memoryview, content: bytes, piece: int = 5000) -> None:
    keeps.begin(beginning, len(content))
    for at in range(0, len(content), piece):
        await keeps.feed(memoryview(content)[at : at + piece], last=at + piece >= len(content))


async def test_a_weight_of_a_layer_is_kept_whole() -> None:
    store = Store()
    large = WEIGHT * 400
    keeps = keeping(store, WEIGHT, large)
    await send(keeps, head(), WEIGHT)
    await send(keeps, head(), large, piece=1 << 20)
    assert store.kept == {blake3(content).digest(): content for content in (WEIGHT, large)}
    keeps.forget(blake3(WEIGHT).digest())
    assert list(store.kept.values()) == [large]


async def test_what_the_host_did_not_tell_of_and_what_is_no_weight_is_not() -> None:
    store = Store()
    keeps = keeping(store, WEIGHT)
    await send(keeps, head(), WEIGHT[:-1])
    assert store.dropped == 1
    await send(keeps, head(name=b"l_out-3"), WEIGHT)
    await send(keeps, head(offset=64), WEIGHT)
    assert (store.kept, store.dropped) == ({}, 1)


async def test_what_does_not_come_to_its_end_is_dropped_and_a_full_disk_hinders_nothing() -> None:
    store = Store()
    keeps = keeping(store, WEIGHT)
    keeps.begin(head(), len(WEIGHT))
    await keeps.feed(memoryview(WEIGHT[:100]), last=False)
    keeps.abandon()
    assert store.dropped == 1
    await send(keeps, head(), WEIGHT)
    assert list(store.kept.values()) == [WEIGHT]
    full = Store(full=True)
    keeps = keeping(full, WEIGHT)
    for _ in range(2):
        await send(keeps, head(), WEIGHT)
    assert (full.kept, full.dropped) == ({}, 2)
