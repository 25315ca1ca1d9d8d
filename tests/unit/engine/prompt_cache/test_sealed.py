"""Saved prompt caches as files: what was written comes back, and nothing else does."""

from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.engine.prompt_cache.sealed import (
    MAGIC,
    PIECE_BYTES,
    DamagedError,
    Header,
    read_header,
    root_key,
    sealed,
    sealed_bytes,
    unseal,
)

KEY = root_key(b"k" * 32)


def header(size: int) -> Header:
    return Header(identity=b"i" * 32, marks=(Mark(b"m" * 16, 100),), tokens=50, size=size, model="tiny")


def written(state: bytes, key: bytes = KEY) -> bytes:
    file = BytesIO()
    count = sealed(file, header(len(state)), BytesIO(state), key)
    assert count == len(file.getvalue())
    return file.getvalue()


def opened(data: bytes, key: bytes = KEY) -> bytes:
    state = BytesIO()
    assert unseal(BytesIO(data), state, key) == read_header(BytesIO(data), key)
    return state.getvalue()


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_comes_back_as_it_was(size: int) -> None:
    state = bytes(range(256)) * (size // 256 + 1)
    data = written(state[:size])
    assert opened(data) == state[:size]
    assert len(data) <= sealed_bytes(size)


def test_nothing_of_it_can_be_read() -> None:
    data = written(b"secret prompt " * 100)
    assert b"secret" not in data
    assert b"tiny" not in data
    assert written(b"same") != written(b"same")


def test_only_with_the_nodes_key() -> None:
    data = written(b"state")
    with pytest.raises(DamagedError, match="another node"):
        read_header(BytesIO(data), root_key(b"x" * 32))
    assert root_key(b"k" * 32) != b"k" * 32


@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_changed_bit_is_found(at: int, bit: int) -> None:
    data = bytearray(SHORT)
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(DamagedError):
        unseal(BytesIO(bytes(data)), BytesIO(), KEY)


@given(size=st.integers(min_value=0))
def test_a_cut_file_is_found(size: int) -> None:
    with pytest.raises(DamagedError):
        unseal(BytesIO(SHORT[: size % len(SHORT)]), BytesIO(), KEY)


@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    for foreign in (data, MAGIC + data):
        with pytest.raises(DamagedError):
            read_header(BytesIO(foreign), KEY)


def test_pieces_cannot_be_exchanged_left_out_or_added() -> None:
    state = b"a" * PIECE_BYTES + b"b" * PIECE_BYTES + b"c" * PIECE_BYTES
    data = written(state)
    length = PIECE_BYTES + 16
    begin = len(data) - 3 * length
    first, second, third = (data[begin + number * length :][:length] for number in range(3))
    head = data[:begin]
    for pieces in (second + first + third, first + third, first + second, first + second + third + third):
        with pytest.raises(DamagedError):
            unseal(BytesIO(head + pieces), BytesIO(), KEY)


def test_a_state_that_is_shorter_than_said_is_not_written() -> None:
    with pytest.raises(OSError, match="ended before"):
        sealed(BytesIO(), header(100), BytesIO(b"x" * 99), KEY)


SHORT = written(b"a state of a slot" * 50)
