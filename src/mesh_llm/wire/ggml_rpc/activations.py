"""Activations of a split model in fewer bytes, with loss: as half precision (F16), or as blocks of eight bits (Q8).

Data is elements of 32 bits (IEEE 754, little-endian). As it travels, little-endian too:

    F32  as it is
    F16  the nearest number of 16 bits for each element
    Q8   a scale for each block of 32 elements (the upper half of a 32-bit float), then a signed byte for each element

An element of Q8 is its byte times its block's scale. The scale is the largest magnitude of the block divided by 127,
rounded to the nearest upper half. So no byte is beyond 127, an error is at most half of the scale, and what was Q8 once
does not change when it is packed again. F16 has this property too.

What cannot be kept travels as F32, the whole message: elements that are no finite number, for F16 also magnitudes above
65,504, and data that is not whole blocks. So each message says what it is.

The names say which tensors are activations. llama.cpp gives what a layer computes a name that ends in the layer's
number, as in `l_out-7`; the scheduler's copy of it is `BACKEND#l_out-7#0`. Masks, positions, embeddings of tokens,
caches, logits and the state that answers are made of have no such number, so they stay as they are.

numpy converts, without Python's lock. A MB of data takes 0.5 ms to F16 and 0.6 ms back, to Q8 0.6 and 0.2 ms (one core
of a busy virtual machine); a link of 100 Mbit/s takes 80 ms for it.
"""

import re
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from mesh_llm.wire.ggml_rpc.protocol import FrameError
from mesh_llm.wire.ggml_rpc.tensors import F32 as F32_ELEMENTS
from mesh_llm.wire.ggml_rpc.tensors import name_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ELEMENT = 4
BLOCK = 32
"""Elements that share a scale."""

_BLOCK_BYTES = BLOCK * ELEMENT
_SCALE_BYTES = 2
_LARGEST_HALF = 65504.0
_STEPS = 127
_LEAST_SCALE = 0x0080
"""The smallest normal number. Blocks with less are zeros: no magnitude in them is above 1.5e-36."""

_LARGEST_SCALE = 0x7C01
"""127 times this is the largest product that is a finite number."""

_HALF_EXPONENT = 0x7C00
_HALF_SCALE = 2.0**-112
_AT_ONCE = 1 << 16
"""Elements that are converted at once: what is in between stays in the processor's cache."""

_MANY_ROWS = 32
_ACTIVATION = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*-[0-9]{1,5}")
_TYPE = slice(8, 12)
_ROWS = (24, 28, 32)

Data = bytes | memoryview
Bytes = Data | bytearray


class Format(IntEnum):
    """How activations travel. The numbers are part of the tunnel's protocol."""

    F32 = 0
    F16 = 1
    Q8 = 2


ALL_FORMATS = 1 << Format.F16 | 1 << Format.Q8
"""The formats that this version reads and writes beside F32, one bit each, as nodes name them to each other."""


class WireFormats(NamedTuple):
    """What is wanted for activations of many tokens, as prompts have, and for those of few.

    llama.cpp counts 32 rows and more as many.
    """

    prompts: Format = Format.F32
    tokens: Format = Format.F32

    def of(self, tensor: Bytes) -> Format:
        """The format for one tensor, by its 296 bytes; F32 for all that is no activation."""
        if self.prompts is self.tokens is Format.F32:
            return Format.F32
        if int.from_bytes(tensor[_TYPE], "little") != F32_ELEMENTS or not is_activation(name_of(memoryview(tensor))):
            return Format.F32
        rows = 1
        for at in _ROWS:
            rows *= int.from_bytes(tensor[at : at + 4], "little")
        return self.prompts if rows >= _MANY_ROWS else self.tokens


EXACT = WireFormats()


def is_activation(name: bytes) -> bool:
    """Whether a tensor of this name is what a layer computed, or the scheduler's copy of such a tensor."""
    if b"#" in name:
        copied, _, number = name.partition(b"#")[2].rpartition(b"#")
        return number.isdigit() and _ACTIVATION.fullmatch(copied) is not None
    return _ACTIVATION.fullmatch(name) is not None


def knows(formats: int, wanted: Format) -> bool:
    """Whether a node that named `formats` reads and writes the wanted one."""
    return wanted is Format.F32 or bool(formats >> wanted & 1)


def is_whole(kind: Format, size: int) -> bool:
    """Whether so many bytes of data are whole elements of a format, or whole blocks."""
    return size > 0 and not size % (ELEMENT if kind is Format.F16 else _BLOCK_BYTES)


def packed_size(kind: Format, size: int) -> int:
    """Bytes of `size` bytes of data as they travel. Raises FrameError where they cannot travel so."""
    if kind is Format.F32:
        return size
    if not is_whole(kind, size):
        raise FrameError(f"{size} bytes of activations, which are no whole {kind.name}")
    return size // 2 if kind is Format.F16 else size // _BLOCK_BYTES * (_SCALE_BYTES + BLOCK)


def pack(wanted: Format, data: Data) -> tuple[Format, Data]:
    """Data as it travels, and its format then: the wanted one, or F32 where that cannot keep it."""
    if wanted is Format.F32 or not is_whole(wanted, len(data)):
        return Format.F32, data
    packed = _to_halves(data) if wanted is Format.F16 else _to_blocks(data)
    return (Format.F32, data) if packed is None else (wanted, packed)


def unpack(kind: Format, data: Bytes, size: int) -> Bytes:
    """`size` bytes of data from what travelled. Raises FrameError where `pack` did not make it."""
    if len(data) != packed_size(kind, size):
        raise FrameError(f"{size} bytes of activations in {len(data)} as {kind.name}")
    match kind:
        case Format.F32:
            return data
        case Format.F16:
            return _from_halves(data)
        case Format.Q8:
            return _from_blocks(data, size // _BLOCK_BYTES)


def read_format(number: int) -> Format:
    """A format by its number. Raises FrameError."""
    try:
        return Format(number)
    except ValueError:
        raise FrameError(f"activations in format {number}") from None


def _to_halves(data: Bytes) -> bytes | None:
    import numpy as np

    values: NDArray[np.float32] = np.frombuffer(data, dtype="<f4")
    # What is not a number is neither below nor above.
    if not (values.max() <= _LARGEST_HALF and values.min() >= -_LARGEST_HALF):
        return None
    packed = np.empty(len(values), dtype="<u2")
    for at in range(0, len(values), _AT_ONCE):
        # With the exponents of halves in its lowest place, a float has a half's bits above 13 further ones: also where
        # both are subnormal. numpy's own conversion takes six times as long.
        words = (values[at : at + _AT_ONCE] * _HALF_SCALE).view("<u4")
        words += (words >> np.uint32(13) & np.uint32(1)) + np.uint32(0xFFF)
        halves = packed[at : at + _AT_ONCE]
        halves[:] = words >> np.uint32(13)
        halves |= words.view("<u2")[1::2] & np.uint16(0x8000)
    return packed.tobytes()


def _from_halves(data: Bytes) -> bytes:
    import numpy as np

    words: NDArray[np.uint16] = np.frombuffer(data, dtype="<u2")
    if ((words & _HALF_EXPONENT) == _HALF_EXPONENT).any():
        raise FrameError("activations as F16 that are no finite numbers")
    return words.view("<f2").astype("<f4").tobytes()


def _to_blocks(data: Bytes) -> bytes | None:
    import numpy as np

    blocks: NDArray[np.float32] = np.frombuffer(data, dtype="<f4").reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    if not np.isfinite(largest).all():
        return None
    words = (largest / np.float32(_STEPS)).view("<u4")
    # To the nearest upper half; of two equally near, to the even one.
    scales = ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype("<u2")
    scales[scales < _LEAST_SCALE] = 0
    divisors = _scales(scales)
    divisors[scales == 0] = np.inf
    steps = blocks / divisors[:, None]
    np.rint(steps, out=steps)
    return scales.tobytes() + steps.astype(np.int8).tobytes()


def _from_blocks(data: Bytes, count: int) -> bytes:
    import numpy as np

    scales: NDArray[np.uint16] = np.frombuffer(data, dtype="<u2", count=count)
    steps: NDArray[np.int8] = np.frombuffer(data, dtype=np.int8, offset=count * _SCALE_BYTES)
    # A negative scale has the highest bit set.
    if scales.max() > _LARGEST_SCALE or ((scales != 0) & (scales < _LEAST_SCALE)).any() or steps.min() < -_STEPS:
        raise FrameError("activations as Q8 with a scale or a step that there is not")
    values = steps.reshape(count, BLOCK).astype("<f4")
    values *= _scales(scales)[:, None]
    return values.tobytes()


def _scales(upper: "NDArray[np.uint16]") -> "NDArray[np.float32]":
    """Floats by their upper halves."""
    import numpy as np

    return (upper.astype("<u4") << np.uint32(16)).view("<f4")
