"""Requests in fewer bytes: what was packed comes back, and what was not is refused, whatever it says of itself."""

import itertools
import random
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.rpc_record import recorded

from mesh_llm.wire.ggml_rpc.packing import (
    GRAPH_BOUNDS,
    MAX_HEADS,
    MAX_SET,
    MAX_SET_DATA,
    PACKED,
    PACKED_SET,
    SET_BOUNDS,
    KeptHeads,
    PackedSet,
    SentHeads,
    compress_data,
    compress_graph,
    decompress_graph,
    is_worth_compressing,
    unpack_data,
)
from mesh_llm.wire.ggml_rpc.protocol import MAX_GRAPH, SET_TENSOR_HEAD, Command, FrameError
from mesh_llm.wire.ggml_rpc.tunnel import tunnel_bounds

GRAPHS = [what for command, what in recorded() if command == Command.GRAPH_COMPUTE and isinstance(what, bytes)]


def test_a_graph_compresses_well() -> None:
    for graph in GRAPHS:
        packed = compress_graph(graph)
        assert decompress_graph(packed) == graph
        assert len(packed) < len(graph) / 4
        assert tunnel_bounds(PACKED) == GRAPH_BOUNDS
        assert GRAPH_BOUNDS.least <= len(packed) <= GRAPH_BOUNDS.most


@given(st.binary(max_size=2000))
def test_any_bytes_round_trip_through_compression(data: bytes) -> None:
    assert decompress_graph(compress_graph(data)) == data


@given(st.binary(min_size=16, max_size=400))
def test_invalid_compressed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", 64) + data)


@pytest.mark.parametrize("told", [0, 9, 11, MAX_GRAPH + 1, 1 << 63])
def test_a_wrong_length_is_refused(told: int) -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", told) + zlib.compress(bytes(10)))


def test_a_decompression_bomb_is_refused() -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", 1000) + zlib.compress(bytes(100 << 20)))
    with pytest.raises(FrameError):
        decompress_graph(compress_graph(bytes(100)) + b"and more")


def mask(rows: int, columns: int, first: int, empty: bytes = b"\x00\xfc") -> bytes:
    """A causal mask as llama.cpp makes it: each row sees one position more than the row before."""
    seen = bytes(len(empty))
    return b"".join(seen * (first + row) + empty * (columns - first - row) for row in range(rows))


@pytest.mark.parametrize("empty", [b"\x00\xfc", b"\x00\x00\x80\xff"])
def test_masks_are_worth_it_and_activations_are_not(empty: bytes) -> None:
    chance = random.Random(1)
    for rows, columns in ((512, 1024), (100, 768), (1, 256)):
        full = mask(rows, columns, columns - rows, empty)
        assert is_worth_compressing(full)
        assert len(compress_data(full)) < len(full) / (20 if rows > 1 else 4)
    # Some channels of these are the same in all rows, as in some models.
    for width in (256, 768, 1024, 4096):
        for same in (1, 64, width // 4):
            for rows in (1, 64, 128):
                full = (bytes(4 * same) + chance.randbytes(4 * (width - same))) * rows
                assert not is_worth_compressing(full), (width, same, rows)
    assert not is_worth_compressing(bytes(63))
    assert is_worth_compressing(bytes(64))


def test_a_long_prompts_masks_are_small() -> None:
    # A prompt of 16,000 tokens in batches of 512: every eighth of them.
    parts = [mask(512, 512 * (batch + 1), 512 * batch) for batch in range(0, 32, 8)]
    assert sum(map(len, (compress_data(part) for part in parts))) < sum(map(len, parts)) / 150


BYTES = st.one_of(st.binary(max_size=3000), st.binary(min_size=1, max_size=8).map(lambda word: word * 1000))


@given(BYTES)
def test_any_data_comes_back(data: bytes) -> None:
    assert b"".join(unpack_data(compress_data(data), len(data))) == data


@given(st.integers(0, 255), st.one_of(st.just(b""), st.binary(min_size=305, max_size=305)), BYTES, st.booleans())
def test_a_packed_tensor_is_read_as_it_was_written(number: int, head: bytes, data: bytes, compressed: bool) -> None:
    travels = compress_data(data) if compressed else data
    packed = PackedSet(number, head, len(data), travels, compressed)
    payload = packed.pack()
    assert SET_BOUNDS.least <= len(payload) <= SET_BOUNDS.most
    assert tunnel_bounds(PACKED_SET) == SET_BOUNDS
    assert PackedSet.unpack(memoryview(payload)) == packed


@given(st.binary(min_size=6, max_size=800))
def test_any_bytes_are_a_packed_tensor_or_refused(payload: bytes) -> None:
    try:
        packed = PackedSet.unpack(memoryview(payload))
    except FrameError:
        return
    assert packed.size <= MAX_SET
    assert packed.pack() == payload
    if packed.compressed:
        taken = 0
        try:
            for part in unpack_data(packed.data, packed.size):
                taken += len(part)
        except FrameError:
            assert taken <= packed.size
        else:
            assert taken == packed.size
    else:
        assert len(packed.data) == packed.size


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("<BBI", 4, 0, 0),
        struct.pack("<BBI", 128, 0, 0),
        struct.pack("<BBI", 1, 0, 0) + bytes(SET_TENSOR_HEAD - 1),
        struct.pack("<BBI", 0, 0, 5) + bytes(4),
        struct.pack("<BBI", 0, 0, 4) + bytes(5),
        struct.pack("<BBI", 2, 0, MAX_SET + 1) + compress_data(bytes(100)),
        struct.pack("<BBI", 2, 0, (1 << 32) - 1) + compress_data(bytes(100)),
    ],
)
def test_a_packed_tensor_that_contradicts_itself_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        PackedSet.unpack(memoryview(payload))


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (compress_data(bytes(1000)), 999),
        (compress_data(bytes(1000)), 1001),
        (compress_data(bytes(1000)), 0),
        (compress_data(bytes(1000))[:-1], 1000),
        (compress_data(bytes(1000)) + b"x", 1000),
        (compress_data(b"") + compress_data(b""), 0),
        (b"", 0),
        (b"", 10),
        (b"no zlib", 10),
        # A stream of empty blocks that never ends.
        (zlib.compress(b"")[:2] + b"\0\0\0\xff\xff" * 5000, 10),
        # Another check sum.
        (compress_data(bytes(1000))[:-4] + bytes(4), 1000),
        # A dictionary that nobody gave.
        (b"\x78\xbb" + bytes(20), 10),
    ],
)
def test_data_that_is_not_what_it_says_is_refused(data: bytes, size: int) -> None:
    with pytest.raises(FrameError, match="packed data"):
        b"".join(unpack_data(data, size))


def test_a_bomb_takes_no_memory() -> None:
    bomb = zlib.compress(bytes(60 << 20))
    assert len(bomb) < MAX_SET_DATA
    parts = unpack_data(bomb, 3 << 20)
    assert [len(next(parts)) for _ in range(3)] == [1 << 20] * 3
    with pytest.raises(FrameError):
        next(parts)
    # As large as it says: in parts all the same.
    assert max(map(len, itertools.islice(unpack_data(bomb, 60 << 20), 4))) <= 1 << 20


@given(st.lists(st.integers(0, 2 * MAX_HEADS), max_size=2000), st.randoms())
def test_both_ends_agree_on_heads(chosen: list[int], chance: random.Random) -> None:
    sent, kept = SentHeads(), KeptHeads()
    for which in (*range(chance.randrange(2 * MAX_HEADS)), *chosen):
        head = which.to_bytes(2, "little") + bytes(SET_TENSOR_HEAD - 2)
        number, known = sent.number(head)
        packed = PackedSet(number, b"" if known else head, 0, b"", compressed=False)
        assert kept.head(PackedSet.unpack(memoryview(packed.pack()))) == head


def test_heads_of_a_token_stay_while_others_come_and_go() -> None:
    sent = SentHeads()
    head = bytes(SET_TENSOR_HEAD)
    sent.number(head)
    for which in range(1000):
        sent.number(which.to_bytes(2, "little") + b"x" * (SET_TENSOR_HEAD - 2))
        assert sent.number(head) == (0, True)


def test_a_head_that_never_came_is_refused() -> None:
    kept = KeptHeads()
    kept.head(PackedSet(3, bytes(SET_TENSOR_HEAD), 0, b"", compressed=False))
    assert kept.head(PackedSet(3, b"", 0, b"", compressed=False)) == bytes(SET_TENSOR_HEAD)
    with pytest.raises(FrameError, match="did not come before"):
        kept.head(PackedSet(4, b"", 0, b"", compressed=False))
