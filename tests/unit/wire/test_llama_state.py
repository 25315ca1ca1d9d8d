"""A slot's state: what is written is read, whatever the cells' order; and the rows of its first tokens."""

import random
import struct
from itertools import chain as joined

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.types.model import CACHE_TYPES, GGML_TYPES
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.llama_state import (
    BLOCK_TOKENS,
    State,
    StateLayout,
    chain,
    check_numbers,
    common_tokens,
    plain_layout,
    read_state,
    rows,
    structure,
)

LAYOUT = plain_layout((2, 1), 16, 8, "f16", streams=2, context=64)


def written(layout: StateLayout, tokens: list[int], data: bytes) -> bytes:
    """A whole file; `data`: the rows, in order."""
    at = 0
    out = bytearray()
    for part in structure(layout, tokens):
        if isinstance(part, bytes):
            out += part
        else:
            out += data[at : at + part]
            at += part
    assert at == len(data)
    return bytes(out)


def numbered_rows(layout: StateLayout, order: list[int]) -> bytes:
    """Rows that say whose they are: block and position, cell by cell."""
    return b"".join(
        bytes([block, position] * (size // 2)) for block, size in enumerate(layout.rows) for position in order
    )


def shuffled(layout: StateLayout, tokens: list[int], order: list[int]) -> bytes:
    """As an engine writes it whose cells are in this order."""
    data = written(layout, tokens, numbered_rows(layout, order))
    cells = struct.pack(f"<{3 * len(order)}i", *joined.from_iterable((position, 1, 0) for position in order))
    begin = 4 * (3 + len(tokens) + 4 + 2)
    return data[:begin] + cells + data[begin + len(cells) :]


def whole(data: bytes, layout: StateLayout = LAYOUT) -> State:
    state = read_state(memoryview(data), layout)
    assert isinstance(state, State), state
    return state


def test_the_layout_of_a_quantised_cache_is_rotated() -> None:
    layout = plain_layout((2, 2, 2), 128, 64, "q8_0", streams=4, context=1024)
    assert layout.layers == ((272, 136),) * 3
    assert (layout.key_rotation, layout.value_rotation) == (128, 64)
    assert layout.token_bytes == 3 * 408
    assert plain_layout((1,), 80, 80, "q8_0", streams=1, context=1).key_rotation == 0


@given(st.permutations(range(9)), st.integers(1, 9))
def test_rows_come_in_the_order_of_positions_whatever_that_of_the_cells(order: list[int], taken: int) -> None:
    tokens = [7 * position for position in range(9)]
    data = shuffled(LAYOUT, tokens, order)
    state = whole(data)
    assert state.tokens == tuple(tokens)
    part = b"".join(rows(memoryview(data), state, taken))
    assert part == numbered_rows(LAYOUT, list(range(taken)))
    again = written(LAYOUT, tokens[:taken], part)
    assert whole(again).tokens == tuple(tokens[:taken])


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_each_truncation_and_each_addition_is_refused(streams: int) -> None:
    layout = msgspec.structs.replace(LAYOUT, streams=streams)
    data = shuffled(layout, [5, 6, 7], [2, 0, 1])
    whole(data, layout)
    for end in range(len(data)):
        assert isinstance(read_state(memoryview(data)[:end], layout), Malformed)
    assert isinstance(read_state(memoryview(data + b"\0"), layout), Malformed)


def test_each_flipped_byte_of_the_structure_is_refused() -> None:
    """Only rows may differ, and tokens but for their sign."""
    tokens = [5, 6, 7]
    rows_filled = b"\1" * (LAYOUT.token_bytes * 3)
    data = written(LAYOUT, tokens, rows_filled)
    free = set[int]()
    signs = {4 * (6 + number) + 3 for number in range(len(tokens))}
    at = 0
    for part in structure(LAYOUT, tokens):
        if isinstance(part, int):
            free |= set(range(at, at + part))
        at += part if isinstance(part, int) else len(part)
    free |= {place - less for place in signs for less in range(4)}
    for place in range(len(data)):
        for bit in (0x01, 0x80):
            changed = bytearray(data)
            changed[place] ^= bit
            outcome = read_state(memoryview(bytes(changed)), LAYOUT)
            passes = place in free and not (place in signs and bit == 0x80)
            assert isinstance(outcome, State) == passes, (place, bit, outcome)


@given(st.binary(max_size=600), st.data())
def test_bytes_of_others_never_raise(noise: bytes, drawn: st.DataObject) -> None:
    assert isinstance(read_state(memoryview(noise), LAYOUT), Malformed)
    data = bytearray(shuffled(LAYOUT, [5, 6, 7], [2, 0, 1]))
    at = drawn.draw(st.integers(0, len(data)))
    data[at : at + len(noise)] = noise
    outcome = read_state(memoryview(bytes(data)), LAYOUT)
    if isinstance(outcome, State):
        assert all(token >= 0 for token in outcome.tokens)
        assert len(b"".join(rows(memoryview(bytes(data)), outcome, len(outcome.tokens)))) == 3 * LAYOUT.token_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"streams": 3},
        {"type": 0},
        {"layers": LAYOUT.layers[:1]},
        {"layers": (LAYOUT.layers[0], (32, 32))},
        {"key_rotation": 64},
        {"value_rotation": 64},
        {"context": 2},
    ],
)
def test_a_state_of_another_model_or_context_is_refused(change: dict[str, object]) -> None:
    data = written(LAYOUT, [5, 6, 7], bytes(LAYOUT.token_bytes * 3))
    assert isinstance(read_state(memoryview(data), msgspec.structs.replace(LAYOUT, **change)), Malformed)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_numbers_that_are_not_finite_are_refused(cache_type: str) -> None:
    layout = plain_layout((2, 2), 64, 64, cache_type, streams=1, context=8)
    size = layout.token_bytes * 3
    good = bytes(random.Random(1).choices(range(0x40), k=size))
    data = written(layout, [1, 2, 3], good)
    assert check_numbers(memoryview(data), whole(data, layout), layout) is None
    block = GGML_TYPES[layout.type].bytes
    not_finite = {"f32": b"\0\0\x80\x7f", "bf16": b"\x80\x7f"}.get(cache_type, b"\0\xfc")
    for at in (0, size // 2 // block * block, size - block):
        bad = good[:at] + not_finite + good[at + len(not_finite) :]
        data = written(layout, [1, 2, 3], bad)
        assert isinstance(check_numbers(memoryview(data), whole(data, layout), layout), Malformed)


@pytest.mark.parametrize("cache_type", ["f32", "bf16"])
def test_finite_numbers_whose_products_are_not_are_refused(cache_type: str) -> None:
    """A key of 1e38 times a query of 100 is infinite, and with a mask's minus infinity no number: for all slots."""
    layout = plain_layout((1,), 64, 64, cache_type, streams=1, context=8)
    for number, good in ((6e4, True), (-1e9, True), (1e20, False), (-8e37, False)):
        row = struct.pack("<f", number)[-GGML_TYPES[layout.type].bytes :]
        data = written(layout, [1], bytes(layout.token_bytes - len(row)) + row)
        assert (check_numbers(memoryview(data), whole(data, layout), layout) is None) == good, number


def test_a_chain_shows_which_tokens_its_maker_knows() -> None:
    tokens = list(range(3 * BLOCK_TOKENS + 50))
    links = list(chain(tokens, b"key"))
    assert len(links) == 3
    assert common_tokens(tokens, links, b"key") == 3 * BLOCK_TOKENS
    assert common_tokens(tokens, links, b"other") == 0
    assert common_tokens(tokens[:300], links, b"key") == BLOCK_TOKENS
    changed = tokens.copy()
    changed[BLOCK_TOKENS + 3] = 9
    assert common_tokens(changed, links, b"key") == BLOCK_TOKENS
    # A later link alone shows nothing: the blocks before it are in it.
    assert common_tokens(tokens, [links[1]], b"key") == 0
