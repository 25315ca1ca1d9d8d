"""What a host packs: nothing is lost, nothing that would grow, and nothing twice."""

import random

import numpy as np
import pytest

from mesh_llm.split.host import packing
from mesh_llm.split.host.packing import CompressedData, SetPacker
from mesh_llm.wire.ggml_rpc.activations import Format, unpack
from mesh_llm.wire.ggml_rpc.packing import SMALL_DATA, KeptHeads, PackedSet, unpack_data
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD
from mesh_llm.wire.ggml_rpc.tensors import plain

MASK = b"".join(bytes(2 * row) + b"\x00\xfc" * (512 - row) for row in range(300))


def payload(data: bytes, address: int = 0x1000) -> memoryview:
    return memoryview(plain(0, (1 << 20, 1, 1, 1), 7, address).pack() + bytes(9) + data)


def unpacked(packed: PackedSet, kept: KeptHeads) -> bytes:
    """The SET_TENSOR that a worker makes of it."""
    read = PackedSet.unpack(memoryview(packed.pack()))
    return kept.head(read) + b"".join(unpack_data(read.data, read.size) if read.compressed else [read.data])


async def test_what_a_worker_unpacks_is_what_was_set() -> None:
    chance = random.Random(3)
    packer, kept = SetPacker(CompressedData()), KeptHeads()
    for _ in range(300):
        data = chance.choice((b"", b"\x05\0\0\0", MASK, chance.randbytes(chance.randrange(3000)), bytes(100)))
        one = payload(data, 0x1000 + 64 * chance.randrange(400))
        packed = await packer.pack(one)
        assert packed is not None
        assert unpacked(packed, kept) == bytes(one)


async def test_large_activations_travel_as_they_are_and_small_ones_without_their_head() -> None:
    packer = SetPacker(CompressedData())
    dense = random.Random(4).randbytes(SMALL_DATA + 1)
    assert await packer.pack(payload(dense)) is None
    token = dense[:3072]
    for known in (False, True):
        packed = await packer.pack(payload(token))
        assert packed is not None
        assert not packed.compressed
        assert len(packed.pack()) == 6 + len(token) + (0 if known else SET_TENSOR_HEAD)


@pytest.mark.parametrize("wanted", [Format.F16, Format.Q8])
async def test_activations_travel_in_pieces_that_a_worker_sets_one_after_the_other(wanted: Format) -> None:
    values = np.linspace(-3.0, 3.0, 700_000 // 32 * 32, dtype="<f4")
    # One piece has a number that half precision does not have: only that one travels as it is.
    values[300_000] = 1e6
    data = values.tobytes()
    packer, kept = SetPacker(CompressedData()), KeptHeads()
    address, offset = 0x1000, 64
    one = memoryview(plain(0, (1 << 20, 1, 1, 1), 7, address).pack() + b"\0" + offset.to_bytes(8, "little") + data)
    kinds: list[Format] = []
    whole = bytearray(len(data))
    async for piece in packer.pack_activations(one, wanted):
        read = PackedSet.unpack(memoryview(piece.pack()))
        head = kept.head(read)
        assert head[:-8] == bytes(one[: SET_TENSOR_HEAD - 8])
        at = int.from_bytes(head[-8:], "little") - offset
        whole[at : at + read.size] = unpack(read.kind, read.data, read.size)
        kinds.append(read.kind)
    assert kinds == [wanted, wanted if wanted is Format.Q8 else Format.F32, wanted]
    back = np.frombuffer(whole, dtype="<f4")
    far = np.abs(back - values) > 0.02
    # In eight bits, a block is as coarse as its largest number.
    assert far.sum() <= (32 if wanted is Format.Q8 else 0)


async def test_an_input_of_several_workers_is_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compress = packing.compress_data

    def counted(data: memoryview) -> bytes:
        calls.append(len(data))
        return compress(data)

    monkeypatch.setattr(packing, "compress_data", counted)
    for threshold in (len(MASK) + 1, 1):
        monkeypatch.setattr(packing, "_IN_THREAD", threshold)
        calls.clear()
        shared = CompressedData()
        workers = [SetPacker(shared) for _ in range(3)]
        packed = [await worker.pack(payload(MASK, 0x1000 * number)) for number, worker in enumerate(workers, 1)]
        assert calls == [len(MASK)]
        assert len({one.data for one in packed if one is not None}) == 1
        # What has been forgotten is compressed again, and the memory is bounded.
        for number in range(20):
            await workers[0].pack(payload(number.to_bytes(4, "little") + MASK))
        calls.clear()
        await workers[0].pack(payload(MASK))
        assert calls == [len(MASK)]


async def test_data_that_does_not_get_smaller_is_not_packed() -> None:
    # Few words in the sample, many elsewhere.
    chance = random.Random(5)
    words = [bytes(4) if number % 1025 == 0 else chance.randbytes(4) for number in range(65_536)]
    assert await SetPacker(CompressedData()).pack(payload(b"".join(words))) is None
