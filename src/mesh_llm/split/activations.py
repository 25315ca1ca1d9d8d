"""Converts the activations of a split model beside the event loop, where that takes long enough to be noticed."""

import asyncio
import sys

from mesh_llm.wire.ggml_rpc.activations import Bytes, Data, Format, pack, unpack

_IN_THREAD = 256 * 1024
"""Data of this size and more is converted in another thread: 256 KiB take about half a millisecond."""


async def pack_activations(wanted: Format, data: Data) -> tuple[Format, Data]:
    """As `wire.ggml_rpc.activations.pack`."""
    if wanted is Format.F32 or _is_quick(len(data)):
        return pack(wanted, data)
    return await asyncio.to_thread(pack, wanted, data)


async def unpack_activations(kind: Format, data: Bytes, size: int) -> Bytes:
    """As `wire.ggml_rpc.activations.unpack`. Raises FrameError."""
    if kind is Format.F32 or _is_quick(size):
        return unpack(kind, data, size)
    return await asyncio.to_thread(unpack, kind, data, size)


def _is_quick(size: int) -> bool:
    # The first conversion loads numpy, which takes a tenth of a second.
    return size < _IN_THREAD and "numpy" in sys.modules
