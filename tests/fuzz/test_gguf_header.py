"""Hostile GGUF headers: the result is a header or a GgufError, in bounded memory."""

import io
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.gguf_writer import Raw, Tensor, Value, header, llama_metadata, llama_tensors

from mesh_llm.models.gguf.header import GgufError, Limits, parse_header

LIMITS = Limits(header_bytes=1 << 16, kept_bytes=1 << 14, kept_string_bytes=256, kept_elements=16, array_elements=4096)
GOOD, GOOD_SIZE = header(
    llama_metadata(tokens=[f"t{i}" for i in range(64)], extra={"x.f": [0.5, 1.5], "x.b": True}), llama_tensors()
)
EDGES = [0, 1, 2, 31, 32, 33, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]

numbers = st.one_of(st.sampled_from(EDGES), st.integers(0, (1 << 64) - 1))


@st.composite
def raw_arrays(draw: st.DrawFn) -> Raw:
    return Raw(9, struct.pack("<IQ", draw(st.integers(0, 13)), draw(numbers)) + draw(st.binary(max_size=60)))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(numbers, max_size=5)))
    return Tensor(draw(st.text(max_size=8)), shape, draw(st.integers(0, 44)), draw(numbers))


values = st.one_of(
    st.integers(-(1 << 31), (1 << 64) - 1),
    st.booleans(),
    st.floats(width=32),
    st.text(max_size=20),
    st.lists(st.integers(0, 255), max_size=20),
    st.lists(st.text(max_size=5), max_size=20),
    st.builds(Raw, st.integers(0, 14), st.binary(max_size=40)),
    raw_arrays(),
)


def judge(data: bytes, size: int) -> None:
    file = io.BytesIO(data)
    try:
        parsed = parse_header(file, size, LIMITS)
    except GgufError:
        assert file.tell() <= LIMITS.header_bytes
        return
    assert parsed.data_offset - parsed.alignment < len(data)
    end = 0
    for tensor in parsed.tensors:
        assert tensor.offset >= end
        assert tensor.offset % parsed.alignment == 0
        end = tensor.offset + tensor.size
        assert parsed.data_offset + end <= size


@given(st.binary(max_size=400), st.integers(0, 1 << 40))
@settings(max_examples=150, deadline=None)
def test_any_bytes(data: bytes, size: int) -> None:
    judge(data, size)
    judge(b"GGUF" + struct.pack("<I", 3) + data, size)


@given(
    st.lists(st.tuples(st.text(max_size=6), values), max_size=6),
    st.lists(tensors(), max_size=4),
    st.integers(0, 1 << 20),
)
@settings(max_examples=200, deadline=None)
def test_headers_of_hostile_fields(metadata: list[tuple[str, Value]], infos: list[Tensor], slack: int) -> None:
    data, _ = header(metadata, infos)
    judge(data, len(data) + slack)


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, len(GOOD)),
)
@settings(max_examples=300, deadline=None)
def test_a_good_header_with_bytes_changed_and_cut(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(GOOD)
    for at, byte in changes:
        data[at] = byte
    judge(bytes(data), GOOD_SIZE)
    judge(bytes(data[:cut]), cut)


@given(st.integers(0, (len(GOOD) - 8) // 4), numbers)
@settings(max_examples=300, deadline=None)
def test_a_good_header_with_one_number_replaced(word: int, number: int) -> None:
    data = bytearray(GOOD)
    data[word * 4 : word * 4 + 8] = struct.pack("<Q", number)
    judge(bytes(data), GOOD_SIZE)
