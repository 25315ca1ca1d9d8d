"""GRAPH_COMPUTE's payload: a graph of tensors, and the nodes of it to compute (llama.cpp, serialize_graph).

u32 device, from protocol 8 on u64 uid, u32 node count, u64 node ids, u32 tensor count, the tensors. The client puts a
tensor's operands before the tensor, so that every id is known before it is used.
"""

import struct
from dataclasses import dataclass

from mesh_llm.wire.ggml_rpc.frames import FrameError
from mesh_llm.wire.ggml_rpc.protocol import TENSOR_BYTES, V8, Version
from mesh_llm.wire.ggml_rpc.tensor import Tensor, unpack

MAX_TENSORS = 65_536


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph as it travels; `uid` 0 is not kept by the server (always before protocol 8, where only the last is)."""

    device: int
    uid: int
    nodes: tuple[int, ...]
    tensors: tuple[Tensor, ...]


def graph_identity(payload: bytes | memoryview, version: Version) -> tuple[int, int]:
    """Device and uid of a graph, without reading the rest. Raises struct.error on too few bytes."""
    if version.major >= V8.major:
        return struct.unpack_from("<IQ", payload)
    return struct.unpack_from("<I", payload)[0], 0


def parse_graph(payload: bytes | memoryview, version: Version) -> Graph:
    """Read a graph; its length must be exactly what its counts say. Raises FrameError."""
    prefix = 12 if version.major >= V8.major else 4
    if len(payload) < prefix + 8:
        raise FrameError(f"a graph of {len(payload)} bytes")
    device, uid = graph_identity(payload, version)
    (count,) = struct.unpack_from("<I", payload, prefix)
    nodes_at = prefix + 4
    tensors_at = nodes_at + 8 * count + 4
    if not 0 < count <= MAX_TENSORS or len(payload) < tensors_at:
        raise FrameError(f"a graph of {count} nodes in {len(payload)} bytes")
    nodes = struct.unpack_from(f"<{count}Q", payload, nodes_at)
    (tensor_count,) = struct.unpack_from("<I", payload, tensors_at - 4)
    if tensor_count > MAX_TENSORS or len(payload) != tensors_at + tensor_count * TENSOR_BYTES:
        raise FrameError(f"a graph of {count} nodes and {tensor_count} tensors in {len(payload)} bytes")
    tensors = tuple(unpack(payload, tensors_at + index * TENSOR_BYTES) for index in range(tensor_count))
    return Graph(device, uid, nodes, tensors)


def pack_graph(graph: Graph, version: Version) -> bytes:
    """The inverse of `parse_graph`."""
    head = struct.pack("<IQ", graph.device, graph.uid) if version.major >= V8.major else struct.pack("<I", graph.device)
    nodes = struct.pack(f"<I{len(graph.nodes)}Q", len(graph.nodes), *graph.nodes)
    return head + nodes + struct.pack("<I", len(graph.tensors)) + b"".join(t.pack() for t in graph.tensors)
