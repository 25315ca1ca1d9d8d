"""Row numbers are data that kernels use unchecked. This is a second definition of the numbers that a graph may use.

It shares no check with the firewall: it remembers what was written where, and reads the numbers when they are used.
"""

import struct
from dataclasses import dataclass, field

from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, I32, I64, IDLE, OPERATORS, Tensor, unpack

_GET_ROWS, _SET_ROWS = OPERATORS["get_rows"], OPERATORS["set_rows"]
_FORMATS = {I32: ("i", 4), I64: ("q", 8)}


@dataclass
class Memory:
    """The writes to the rpc-server's memory, newest last; None if the bytes are not known."""

    _writes: list[tuple[int, int, bytes | None]] = field(default_factory=list[tuple[int, int, bytes | None]])

    def wrote(self, start: int, size: int, data: bytes | None) -> None:
        """The writes to these bytes."""
        if size:
            self._writes.append((start, start + size, data))

    def read(self, start: int, end: int) -> bytes | None:
        """The content, if a single write set all of it."""
        for first, last, data in reversed(self._writes):
            if first < end and start < last:
                return data[start - first : end - first] if data is not None and first <= start <= end <= last else None
        return None


def graph_tensors(payload: memoryview) -> tuple[dict[int, Tensor], list[Tensor]]:
    """All tensors of a graph by their ids, and those that it computes, in order."""
    (count,) = struct.unpack_from("<I", payload, 12)
    nodes = struct.unpack_from(f"<{count}Q", payload, 16)
    start = 20 + 8 * count
    (total,) = struct.unpack_from("<I", payload, start - 4)
    tensors = [unpack(payload, start + 296 * index) for index in range(total)]
    by_id = {tensor.id: tensor for tensor in tensors}
    return by_id, [by_id[node] for node in nodes]


def unsound_index(payload: memoryview, memory: Memory) -> str | None:
    """Faults in the row numbers that a graph uses. Afterwards `memory` contains what the graph writes."""
    by_id, nodes = graph_tensors(payload)
    for tensor in nodes:
        if tensor.op in IDLE or not tensor.flags & COMPUTE_FLAG or not tensor.elements:
            continue
        if tensor.op in {_GET_ROWS, _SET_ROWS}:
            bound = by_id[tensor.sources[0]].shape[1] if tensor.op == _GET_ROWS else tensor.shape[1]
            wrong = _wrong(by_id[tensor.sources[1]], bound, by_id, memory)
            if wrong is not None:
                return wrong
        memory.wrote(tensor.data, tensor.extent, None)
    return None


def _wrong(ids: Tensor, bound: int, by_id: dict[int, Tensor], memory: Memory) -> str | None:
    origin = ids
    while origin.op in IDLE and origin.sources[0]:
        origin = by_id[origin.sources[0]]
    if origin.op or not ids.elements:
        # The graph sorts something itself; not judged here.
        return None
    data = memory.read(ids.data, ids.data + ids.extent)
    if data is None:
        return f"row numbers at {ids.data:#x} that nobody set"
    letter, size = _FORMATS[ids.type]
    values = struct.unpack(f"<{len(data) // size}{letter}", data)
    outside = [value for value in values if not 0 <= value < bound]
    return f"row {outside[0]} of {bound}" if outside else None
