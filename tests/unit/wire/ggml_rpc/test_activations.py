"""Activations in fewer bytes: how far off they are, what is kept as it is, and what is refused."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_llm.wire.ggml_rpc.activations import (
    ALL_FORMATS,
    BLOCK,
    EXACT,
    Format,
    WireFormats,
    is_activation,
    knows,
    pack,
    packed_size,
    read_format,
    unpack,
)
from mesh_llm.wire.ggml_rpc.packing import SET_BOUNDS, PackedSet
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES, FrameError
from mesh_llm.wire.ggml_rpc.tensors import F16, F32, plain
from mesh_llm.wire.ggml_rpc.tunnel import (
    PACKED_GET,
    PUSH,
    PUSH_HEADER,
    PackedGet,
    Push,
    push_header,
    read_push_header,
    tunnel_bounds,
)

LOSSY = [Format.F16, Format.Q8]
SMALLEST_NORMAL_HALF = 2.0**-14
LARGEST_HALF = 65504.0

blocks = st.lists(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=BLOCK, max_size=BLOCK),
    min_size=1,
    max_size=6,
)
"""Any numbers of 32 bits, and what is none."""

usual = st.lists(
    st.lists(st.floats(-LARGEST_HALF, LARGEST_HALF, width=32), min_size=BLOCK, max_size=BLOCK), min_size=1, max_size=6
)


def data_of(rows: list[list[float]]) -> bytes:
    return np.array(rows, dtype="<f4").tobytes()


def floats(data: bytes | bytearray | memoryview) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    return np.frombuffer(data, dtype="<f4").astype(np.float64).reshape(-1, BLOCK)


def travelled(wanted: Format, data: bytes) -> tuple[Format, bytes]:
    kind, packed = pack(wanted, data)
    assert len(packed) == packed_size(kind, len(data))
    return kind, bytes(unpack(kind, packed, len(data)))


@given(usual)
def test_half_precision_is_as_near_as_it_can_be(rows: list[list[float]]) -> None:
    data = data_of(rows)
    kind, back = travelled(Format.F16, data)
    assert kind is Format.F16
    exact, got = floats(data), floats(back)
    # Half of the last place; below the normal numbers, half of the smallest one.
    assert (np.abs(got - exact) <= np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25 * 1.001)).all()


@given(blocks)
def test_blocks_are_off_by_half_a_scale_at_most(rows: list[list[float]]) -> None:
    data = data_of(rows)
    kind, back = travelled(Format.Q8, data)
    exact, got = floats(data), floats(back)
    if not np.isfinite(exact).all():
        assert (kind, back) == (Format.F32, data)
        return
    assert kind is Format.Q8
    # The scale is the largest of a block divided by 127, rounded to eight bits; the smallest blocks are zeros.
    scale = np.abs(exact).max(axis=1, keepdims=True) / 127 * (1 + 2.0**-8)
    assert (np.abs(got - exact) <= np.maximum(scale * 0.5001, 1.5e-36)).all()


@given(blocks, st.sampled_from(LOSSY))
def test_what_was_rounded_once_is_not_rounded_again(rows: list[list[float]], wanted: Format) -> None:
    kind, once = travelled(wanted, data_of(rows))
    again, twice = travelled(wanted, once)
    assert (again, twice) == (kind, once)


@given(blocks, st.sampled_from(LOSSY))
def test_nothing_becomes_what_is_no_number(rows: list[list[float]], wanted: Format) -> None:
    data = data_of(rows)
    kind, back = travelled(wanted, data)
    assert np.isfinite(floats(back)).all() == np.isfinite(floats(data)).all()
    assert kind is wanted or back == data


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 65505.0, -1e30, 3.4e38])
def test_what_half_precision_cannot_keep_travels_as_it_is(odd: float) -> None:
    data = data_of([[0.5] * BLOCK, [0.5] * (BLOCK - 1) + [odd]])
    assert travelled(Format.F16, data) == (Format.F32, data)


def test_the_largest_numbers_fit_blocks() -> None:
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    data = data_of([[largest, -largest, *([1.0] * (BLOCK - 2))]])
    kind, back = travelled(Format.Q8, data)
    assert kind is Format.Q8
    assert floats(back)[0, 0] == pytest.approx(largest, rel=0.005)


@pytest.mark.parametrize("size", [0, 1, 2, 126, 130])
@pytest.mark.parametrize("wanted", LOSSY)
def test_what_is_not_whole_travels_as_it_is(wanted: Format, size: int) -> None:
    data = bytes(size)
    assert pack(wanted, data) == (Format.F32, data)
    with pytest.raises(FrameError):
        packed_size(wanted, size or 1)


def test_sizes() -> None:
    assert [packed_size(kind, 4096) for kind in Format] == [4096, 2048, 1088]


@settings(max_examples=300)
@given(st.sampled_from(list(Format)), st.binary(max_size=300), st.integers(0, 1200))
def test_any_bytes_are_finite_numbers_of_the_right_size_or_refused(kind: Format, data: bytes, size: int) -> None:
    try:
        back = bytes(unpack(kind, data, size))
    except FrameError:
        return
    assert len(back) == size
    assert kind is Format.F32 or np.isfinite(np.frombuffer(back, dtype="<f4")).all()
    # What is accepted is what `pack` makes of it, up to the sign of nought.
    if kind is Format.F16:
        assert bytes(pack(kind, back)[1]) == data


@pytest.mark.parametrize("scale", [0x7C02, 0x7F80, 0x8000, 0xFFFF, 0x0001, 0x007F])
def test_scales_that_no_sender_makes_are_refused(scale: int) -> None:
    with pytest.raises(FrameError, match="scale"):
        unpack(Format.Q8, struct.pack("<H", scale) + bytes(BLOCK), 4 * BLOCK)
    with pytest.raises(FrameError, match="step"):
        unpack(Format.Q8, struct.pack("<H", 0x3F80) + b"\x80" + bytes(BLOCK - 1), 4 * BLOCK)


def test_halves_that_are_no_numbers_are_refused() -> None:
    for half in (0x7C00, 0xFC00, 0x7E01):
        with pytest.raises(FrameError, match="finite"):
            unpack(Format.F16, struct.pack("<HH", 0, half), 8)


def tensor(name: bytes, rows: int = 1, kind: int = F32) -> bytes:
    return plain(kind, (64, rows, 1, 1), 7, 0x1000, name).pack()


ACTIVATIONS = [b"l_out-7", b"ffn_inp-0", b"RPC0[unix:/run/t.sock]#l_out-11#0", b"CPU#ffn_moe_out-3#12"]
OTHERS = [
    b"result_output", b"result_norm", b"inp_embd", b"attn_inp_kq_mask", b"CPU#attn_inp_kq_mask#0", b"inp_pos",
    b"RPC0#result_output#0", b"leaf_7", b"cache_k_l3", b"cache_v_l11 (view)", b"node_12", b"", b"l_out-", b"-3",
    b"RPC0#l_out-3#", b"RPC0#l_out-3", b"#l_out-3#x", b"l_out-3 (reshaped)", b"CPU#result_norm#0",
]  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_their_names(name: bytes) -> None:
    wire = WireFormats(prompts=Format.Q8, tokens=Format.F16)
    assert is_activation(name)
    assert wire.of(tensor(name, rows=31)) is Format.F16
    assert wire.of(tensor(name, rows=32)) is Format.Q8
    assert wire.of(tensor(name, rows=32, kind=F16)) is Format.F32
    assert EXACT.of(tensor(name, rows=32)) is Format.F32


@pytest.mark.parametrize("name", OTHERS)
def test_logits_masks_positions_and_caches_are_none(name: bytes) -> None:
    assert not is_activation(name)
    assert WireFormats(Format.Q8, Format.Q8).of(tensor(name, rows=512)) is Format.F32


def test_a_node_that_named_nothing_gets_what_there_always_was() -> None:
    assert [knows(0, kind) for kind in Format] == [True, False, False]
    assert all(knows(ALL_FORMATS, kind) for kind in Format)
    assert not knows(1 << Format.F16, Format.Q8)


@pytest.mark.parametrize("wanted", list(Format))
def test_requests_and_pushes_name_their_format(wanted: Format) -> None:
    get = memoryview(bytes(TENSOR_BYTES + 16))
    push = Push(get, 7, b"t" * 16, 3, wanted)
    payload = push.pack()
    assert Push.unpack(memoryview(payload)) == push
    bounds = tunnel_bounds(PUSH)
    assert bounds is not None
    assert bounds.least <= len(payload) <= bounds.most
    # As it always was, byte for byte, where nothing is rounded.
    assert (len(payload) == bounds.least) is (wanted is Format.F32)
    packed = PackedGet(get, wanted).pack()
    assert PackedGet.unpack(memoryview(packed)) == PackedGet(get, wanted)
    assert tunnel_bounds(PACKED_GET) == (len(packed), len(packed))
    head = push_header(9, b"t" * 16, 1 << 20, wanted)
    assert read_push_header(head) == (9, b"t" * 16, 1 << 20, wanted)
    assert wanted is not Format.F32 or head == PUSH_HEADER.pack(9, b"t" * 16, 1 << 20)


@pytest.mark.parametrize("number", [3, 4, 255])
def test_formats_that_there_are_not_are_refused(number: int) -> None:
    with pytest.raises(FrameError):
        read_format(number)
    get = bytes(TENSOR_BYTES + 16)
    with pytest.raises(FrameError):
        PackedGet.unpack(memoryview(get + bytes((number,))))
    with pytest.raises(FrameError):
        read_push_header(PUSH_HEADER.pack(1, bytes(16), 64 | number << 56))


@pytest.mark.parametrize("wanted", LOSSY)
def test_a_packed_set_keeps_its_format(wanted: Format) -> None:
    data = data_of([[1.5] * BLOCK] * 4)
    kind, packed = pack(wanted, data)
    one = PackedSet(3, bytes(SET_TENSOR_HEAD), len(data), packed, compressed=False, kind=kind)
    payload = one.pack()
    assert SET_BOUNDS.least <= len(payload) <= SET_BOUNDS.most
    read = PackedSet.unpack(memoryview(payload))
    assert (read.kind, read.size, bytes(read.data)) == (wanted, len(data), bytes(packed))
    for wrong in (payload[:-1], payload + b"\0", bytes((payload[0] | 2,)) + payload[1:], b"\x0d" + payload[1:]):
        with pytest.raises(FrameError):
            PackedSet.unpack(memoryview(wrong))
