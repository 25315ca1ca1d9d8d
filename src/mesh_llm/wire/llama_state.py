"""The state of one slot, as llama.cpp writes it into a file, and as a part of it travels to another node. Sans-IO.

llama.cpp trusts such a file: one that was cut or forged can end the engine. So nothing but rows of the KV cache ever
travels between nodes. The sender reads its own engine's file strictly (`read_state`) and sends the rows of the first
tokens (`rows`). The receiver writes all of the structure itself, from its own model's shape and its own tokens
(`structure`), and reads the result strictly again before its engine sees it.

Only caches of one kind are understood: plain attention over the whole context, values not transposed, text only.
Everything else is malformed: sliding windows, recurrent states and their checkpoints, pictures, positions in two
dimensions.

Source: `state_seq_save_file` in llama-context.cpp, `state_write_meta` and `state_write_data` in llama-kv-cache.cpp,
`server_tokens::serialize` in server-common.cpp, of the pinned release. All numbers are little-endian.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from mesh_llm.core.types.model import GGML_TYPES, cache_row_bytes
from mesh_llm.wire.codec import Malformed

_MAGIC = 0x67677371
_VERSION = 4
_TOKENS_MARK = -1
_TOKENS_VERSION = 1
_PACKED_BESIDE_TOKENS = 4
"""Numbers beside the tokens in the packed list: mark, version, count, and the count of pictures."""
_MAX_STREAMS = 256
_TYPE_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}

BLOCK_TOKENS = 256
"""Tokens between two links of a `chain`."""
LINK_BYTES = 16


class StateLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of an engine's KV cache, by its model and options.

    Attributes:
        type: ggml's number of the element type.
        layers: bytes of one token's keys, and of its values, in each layer.
        key_rotation, value_rotation: sizes of the matrices by which keys and values are rotated; 0: they are not.
        streams: separate caches in the context: one for each slot.
        context: the most tokens in a slot.
    """

    type: int
    layers: tuple[tuple[int, int], ...]
    key_rotation: int
    value_rotation: int
    streams: int
    context: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's rows."""
        return sum(key + value for key, value in self.layers)

    @property
    def rows(self) -> Iterator[int]:
        """Bytes of one token's row in each block of rows, in the order of the file: keys, then values."""
        yield from (key for key, _ in self.layers)
        yield from (value for _, value in self.layers)


class State(NamedTuple):
    """A slot's state that was read strictly.

    Attributes:
        tokens: in the order of their positions, from 0.
        runs: first and last cell (exclusive) of cells that follow each other in the file and in position, in the order
            of their positions.
        blocks: where each block of rows begins, and bytes of a row.
    """

    tokens: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    blocks: tuple[tuple[int, int], ...]


def plain_layout(
    heads: Sequence[int], key: int, value: int, cache_type: str, *, streams: int, context: int
) -> StateLayout:
    """The layout of a model's cache.

    Args:
        heads: key and value heads of each layer.
        key: elements of a head's key.
        value: elements of a head's value.
        cache_type: element type, as in `f16`.
        streams: slots.
        context: tokens of a slot.
    """
    quantised = GGML_TYPES[_TYPE_NUMBERS[cache_type]].block > 1
    return StateLayout(
        type=_TYPE_NUMBERS[cache_type],
        layers=tuple(
            (cache_row_bytes(cache_type, count * key), cache_row_bytes(cache_type, count * value)) for count in heads
        ),
        key_rotation=_key_rotation(key) if quantised and key % 64 == 0 else 0,
        value_rotation=64 if quantised and value % 64 == 0 else 0,
        streams=streams,
        context=context,
    )


def _key_rotation(head: int) -> int:
    size = 64
    while head % (2 * size) == 0:
        size *= 2
    return size


class _Reader:
    """Numbers of a file, one after the other. An end too early raises struct.error."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def numbers(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found


class _OddError(Exception):
    """Something is not as it must be; the text says what, as a clause."""


def read_state(data: memoryview, layout: StateLayout) -> State | Malformed:
    """Read a whole file of one slot. Anything unexpected, in whatever place, is malformed."""
    try:
        return _read(_Reader(data), layout)
    except struct.error:
        return Malformed("it ends too early")
    except _OddError as error:
        return Malformed(str(error))


def streams_of(data: memoryview, layout: StateLayout) -> StateLayout:
    """The layout with as many streams as a file names, which an engine of the same model with other slots wrote.

    A file that cannot be read so far leaves the layout as it is: reading it says what is wrong.
    """
    reader = _Reader(data)
    try:
        reader.numbers("<II")
        (packed,) = reader.numbers("<I")
        reader.at += 4 * packed
        (streams,) = reader.numbers("<I")
    except struct.error:
        return layout
    return msgspec.structs.replace(layout, streams=streams) if 0 < streams <= _MAX_STREAMS else layout


def _read(reader: _Reader, layout: StateLayout) -> State:
    _expect("magic and version", reader.numbers("<II"), (_MAGIC, _VERSION))
    tokens = _read_tokens(reader, layout)
    (streams,) = reader.numbers("<I")
    _expect("count of streams", streams, layout.streams)
    state: State | None = None
    for stream in range(streams):
        (cells,) = reader.numbers("<I")
        if not cells:
            continue
        if state is not None:
            raise _OddError("two of its streams have cells")
        _expect("count of cells", cells, len(tokens))
        state = State(tokens, _read_cells(reader, cells, stream, layout), _read_rows(reader, cells, layout))
    if state is None:
        raise _OddError("it has no cells")
    if reader.at != len(reader.data):
        raise _OddError(f"{len(reader.data) - reader.at} bytes follow its end")
    return state


def _read_tokens(reader: _Reader, layout: StateLayout) -> tuple[int, ...]:
    (packed,) = reader.numbers("<I")
    mark, version, count = reader.numbers("<iII")
    _expect("form of the tokens", (mark, version), (_TOKENS_MARK, _TOKENS_VERSION))
    if not 0 < count <= layout.context:
        raise _OddError(f"it has {count} tokens, not 1 to {layout.context}")
    _expect("length of the tokens", packed, count + _PACKED_BESIDE_TOKENS)
    tokens = reader.numbers(f"<{count}i")
    if min(tokens) < 0:
        raise _OddError("a token is below 0")
    _expect("count of pictures", reader.numbers("<I"), (0,))
    return tokens


def _read_cells(reader: _Reader, count: int, stream: int, layout: StateLayout) -> tuple[tuple[int, int], ...]:
    cells = reader.numbers(f"<{3 * count}i")
    positions, sequences = cells[0::3], cells[2::3]
    if cells[1::3].count(1) != count:
        raise _OddError("a cell is not of one sequence")
    if sequences.count(sequences[0]) != count or not 0 <= sequences[0] < _MAX_STREAMS:
        raise _OddError("its cells are of several sequences")
    if layout.streams > 1:
        _expect("sequence of the cells", sequences[0], stream)
    order = sorted(range(count), key=positions.__getitem__)
    if any(positions[cell] != position for position, cell in enumerate(order)):
        raise _OddError("its positions are not 0 to the last, each once")
    runs: list[tuple[int, int]] = []
    begin = 0
    for index in range(1, count + 1):
        if index == count or order[index] != order[index - 1] + 1:
            runs.append((order[begin], order[index - 1] + 1))
            begin = index
    return tuple(runs)


def _read_rows(reader: _Reader, cells: int, layout: StateLayout) -> tuple[tuple[int, int], ...]:
    about = (0, len(layout.layers), layout.key_rotation, layout.value_rotation)
    _expect("values' order, layers and rotations", reader.numbers("<IIII"), about)
    blocks: list[tuple[int, int]] = []
    for size in layout.rows:
        _expect("type and size of a row", reader.numbers("<iQ"), (layout.type, size))
        blocks.append((reader.at, size))
        if len(reader.data) - reader.at < cells * size:
            raise _OddError("it ends too early")
        reader.at += cells * size
    return tuple(blocks)


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise _OddError(f"its {what} is {found}, not {expected}")


def rows(data: memoryview, state: State, tokens: int) -> Iterator[memoryview]:
    """The rows of the first tokens of a state, block by block, as `structure` asks for them."""
    for begin, size in state.blocks:
        left = tokens
        for first, last in state.runs:
            taken = min(left, last - first)
            if taken:
                yield data[begin + first * size : begin + (first + taken) * size]
            left -= taken


def structure(layout: StateLayout, tokens: Sequence[int]) -> Iterator[bytes | int]:
    """A file for these tokens, in the first of its streams: its own bytes, and the bytes of rows that belong between.

    `tokens`: 1 to the layout's context.
    """
    count = len(tokens)
    packed = (_TOKENS_MARK, _TOKENS_VERSION, count, *tokens, 0)
    head = struct.pack(f"<III{len(packed)}iII", _MAGIC, _VERSION, len(packed), *packed, layout.streams, count)
    cells = struct.pack(f"<{3 * count}i", *(number for position in range(count) for number in (position, 1, 0)))
    about = struct.pack("<IIII", 0, len(layout.layers), layout.key_rotation, layout.value_rotation)
    before = head + cells + about
    for size in layout.rows:
        yield before + struct.pack("<iQ", layout.type, size)
        yield count * size
        before = b""
    if layout.streams > 1:
        yield bytes(4 * (layout.streams - 1))


def chain(tokens: Sequence[int], key: bytes) -> Iterator[bytes]:
    """For each whole block of tokens a link: the keyed hash of all tokens up to its end.

    Only one who knows the tokens and the key can make it; it says nothing about tokens that one does not know.
    """
    link = b""
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        block = struct.pack(f"<{BLOCK_TOKENS}i", *tokens[end - BLOCK_TOKENS : end])
        link = blake2b(link + block, digest_size=LINK_BYTES, key=key).digest()
        yield link


def common_tokens(tokens: Sequence[int], links: Iterable[bytes], key: bytes) -> int:
    """How many of these tokens a chain's maker has shown to know: whole blocks from the beginning."""
    count = 0
    for own, other in zip(chain(tokens, key), links, strict=False):
        if own != other:
            break
        count += BLOCK_TOKENS
    return count


_CHECKED_BYTES = 1 << 18
_HIGHEST_BYTES = {
    "f32": (4, (3,), 0x60),
    "f16": (2, (1,), 0x7C),
    "bf16": (2, (1,), 0x60),
    "q8_0": (34, (1,), 0x7C),
    "q4_0": (18, (1,), 0x7C),
    "q4_1": (20, (1, 3), 0x7C),
    "iq4_nl": (18, (1,), 0x7C),
    "q5_0": (22, (1,), 0x7C),
    "q5_1": (24, (1, 3), 0x7C),
}
"""Of each type of a cache: bytes of a block, where the highest bytes of its floating-point numbers are, and the bits of
such a byte that are all set in infinities and in what is no number, and in nothing of a usual size. For f32 and bf16
also in all from 2^65 on: the product of a key and a query would be infinite, as bad (the others end at 65504)."""


def check_numbers(data: memoryview, state: State, layout: StateLayout) -> Malformed | None:
    """Whether all numbers in a state's rows are finite, and stay so in a product.

    One number that is not makes every answer that attends to it worthless, without any error (seen with the pinned
    engine). It may outlive its prompt: attention can read the rows of free cells, for which reason llama.cpp clears
    those of a failed restore. Takes about two seconds for each gigabyte.
    """
    block, places, bits = _HIGHEST_BYTES[GGML_TYPES[layout.type].name]
    bad = bytes(byte for byte in range(256) if byte & bits == bits)
    step = _CHECKED_BYTES // block * block
    for begin, size in state.blocks:
        end = begin + size * len(state.tokens)
        for at in range(begin, end, step):
            piece = bytes(data[at : min(at + step, end)])
            for place in places:
                highest = piece[place::block]
                if len(highest.translate(None, bad)) != len(highest):
                    return Malformed("a number in its rows is not finite, or far too large")
    return None
