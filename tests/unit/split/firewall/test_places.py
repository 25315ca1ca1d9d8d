"""Devices such as Vulkan's give all their buffers the same addresses; each buffer has a history of its own."""

import struct

import pytest

from mesh_llm.split.firewall.memory import Buffer, Buffers, IndexUse, IndexValues, RefusedError
from mesh_llm.wire.ggml_rpc.tensors import F32, I32, plain

BASE = 0x1000
SHAPE = (4, 1, 1, 1)


def two() -> Buffers:
    buffers = Buffers(1 << 20)
    for pointer in (1, 2):
        buffers.add(Buffer(pointer=pointer, base=BASE, size=4096))
    return buffers


def test_the_same_address_in_two_buffers_is_two_places() -> None:
    buffers = two()
    first, second = (buffers.place(plain(I32, SHAPE, pointer, BASE)) for pointer in (1, 2))
    indices = IndexValues()
    indices.wrote(*first, I32, struct.pack("<4i", 0, 1, 2, 3))
    indices.wrote(*second, F32, None)
    indices.check([IndexUse(*first, I32, 4)])
    with pytest.raises(RefusedError, match="that the host did not set"):
        indices.check([IndexUse(*second, I32, 4)])
    # A view and an alias in one buffer share one history.
    assert buffers.place(plain(F32, SHAPE, 1, BASE)) == first
    assert buffers.check_region(plain(I32, SHAPE, 1, BASE), 4, 8) == (first[0] + 4, first[0] + 12)


def test_a_buffer_that_takes_the_place_of_another_has_no_history() -> None:
    buffers = two()
    before = buffers.place(plain(I32, SHAPE, 1, BASE))
    buffers.remove(1)
    buffers.add(Buffer(pointer=1, base=BASE, size=4096))
    assert buffers.place(plain(I32, SHAPE, 1, BASE)) != before
    assert buffers.total == 8192
