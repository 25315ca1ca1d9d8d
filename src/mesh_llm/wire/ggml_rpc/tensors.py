"""Operators, tensors and graphs of ggml's RPC, as in protocols 7.0.0 and 8.0.0 (101 operators).

A tensor (`rpc_tensor`) is 296 packed bytes (llama.cpp, ggml/src/ggml-rpc/ggml-rpc.cpp).

A graph is the payload of GRAPH_COMPUTE (llama.cpp, serialize_graph): u32 device, from protocol 8 on u64 uid, u32 node
count, u64 node ids, u32 tensor count, the tensors. The client writes a tensor's operands before the tensor, so that
each id is known before it is used.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.protocol import TENSOR_BYTES, V8, FrameError, Version

F32, F16, I32, I64, BF16 = 0, 1, 26, 27, 30
FLOATS = frozenset({F32, F16, BF16})
INDICES = frozenset({I32, I64})

# enum ggml_op, in order.
_TEXT = """
none dup add add_id add1 acc sub mul div sqr sqrt log sin cos sum sum_rows cumsum mean argmax count_equal
repeat repeat_back concat silu_back norm rms_norm rms_norm_back group_norm l2_norm mul_mat mul_mat_id out_prod
scale set cpy cont reshape view permute transpose get_rows get_rows_back set_rows diag diag_mask_inf
diag_mask_zero soft_max soft_max_back rope rope_back clamp conv_transpose_1d im2col im2col_back im2col_3d
col2im_1d conv_2d conv_3d conv_2d_dw conv_transpose_2d pool_1d pool_2d pool_2d_back upscale pad pad_reflect_1d
roll arange timestep_embedding argsort top_k leaky_relu tri fill flash_attn_ext flash_attn_back ssm_conv
ssm_scan win_part win_unpart get_rel_pos add_rel_pos rwkv_wkv6 gated_linear_attn rwkv_wkv7 solve_tri
gated_delta_net lightning_indexer dsv4_hc_comb dsv4_hc_pre dsv4_hc_post unary map_custom1 map_custom2
map_custom3 custom cross_entropy_loss cross_entropy_loss_back opt_step_adamw opt_step_sgd glu
"""
_NAMES = _TEXT.split()
OPERATORS = {name: number for number, name in enumerate(_NAMES)}
"""Operator numbers by name."""

COMPUTE_FLAG = 16
"""A tensor's flag: compute it (GGML_TENSOR_FLAG_COMPUTE)."""

IDLE = frozenset(OPERATORS[name] for name in ("none", "reshape", "view", "permute", "transpose"))
"""Operators that compute nothing: their tensors only name memory."""


def operator_name(number: int) -> str:
    """An operator's name, for messages; its number if it has none."""
    return _NAMES[number] if number < len(_NAMES) else str(number)


_LAYOUT = struct.Struct("<QIQ4I4II16ii10QQQQ64si")
assert _LAYOUT.size == 296  # noqa: S101 - the protocol's own constant

_NAME = slice(228, 292)
NAME_BYTES = 64
"""Bytes of a name, with its terminating zero."""

_WHERE = struct.Struct("<QIQ4I4I")
_DATA = struct.Struct("<Q")
_DATA_AT = 220


class Tensor(NamedTuple):
    """A tensor as ggml's RPC describes it.

    Attributes:
        id: the client's pointer, which identifies the tensor within a graph.
        type: element type, see core.types.model.GGML_TYPES.
        buffer: the server's buffer that contains it; 0 for none.
        shape: elements per dimension, innermost first.
        strides: bytes from one element, row, matrix to the next.
        op: operator that computes it; 0 for none.
        params: the operator's parameters.
        flags: such as COMPUTE_FLAG.
        sources: ids of its operands, 0 for none.
        view_source: id of the tensor that it is a view of; 0 for none.
        view_offset: bytes into that tensor.
        data: the server's address of its first byte.
        name: up to its first zero byte.
        uses: how many tensors of its graph use it.
    """

    id: int
    type: int
    buffer: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    op: int
    params: tuple[int, ...]
    flags: int
    sources: tuple[int, ...]
    view_source: int
    view_offset: int
    data: int
    name: bytes
    uses: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        a, b, c, d = self.shape
        return a * b * c * d

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last, as in ggml_nbytes; 0 without elements.

        Only for a known type.
        """
        if not self.elements:
            return 0
        kind = GGML_TYPES[self.type]
        (n0, n1, n2, n3), (s0, s1, s2, s3) = self.shape, self.strides
        first = kind.bytes + (n0 - 1) * s0 if kind.block == 1 else n0 * s0 // kind.block
        return first + (n1 - 1) * s1 + (n2 - 1) * s2 + (n3 - 1) * s3

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements are in order and without gaps. Only for a known type."""
        return (
            self.elements == 0
            or self.strides[: self._rank()] == contiguous_strides(self.type, self.shape)[: self._rank()]
        )

    def _rank(self) -> int:
        return max((i + 1 for i in range(4) if self.shape[i] != 1), default=1)

    def pack(self) -> bytes:
        """The 296 bytes."""
        return _LAYOUT.pack(
            self.id, self.type, self.buffer, *self.shape, *self.strides, self.op, *self.params, self.flags,
            *self.sources, self.view_source, self.view_offset, self.data, self.name, self.uses,
        )  # fmt: skip


def unpack(data: bytes | memoryview, offset: int = 0) -> Tensor:
    """Read 296 bytes at `offset`. Any bytes are a tensor: its values must be checked."""
    f = _LAYOUT.unpack_from(data, offset)
    return Tensor(
        f[0], f[1], f[2], f[3:7], f[7:11], f[11], f[12:28], f[28], f[29:39], f[39], f[40], f[41],
        f[42].split(b"\0", 1)[0], f[43],
    )  # fmt: skip


def name_of(data: bytes | memoryview, offset: int = 0) -> bytes:
    """Only the name of the tensor at `offset`."""
    return bytes(data[offset + _NAME.start : offset + _NAME.stop]).split(b"\0", 1)[0]


def place_of(data: bytes | memoryview, offset: int = 0) -> tuple[int, ...]:
    """The memory and layout of the tensor at `offset`: type, buffer, shape, strides and address."""
    return (*_WHERE.unpack_from(data, offset)[1:], _DATA.unpack_from(data, offset + _DATA_AT)[0])


def contiguous_strides(type_number: int, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The strides of a tensor without gaps. Only for a known type."""
    kind = GGML_TYPES[type_number]
    row = kind.bytes * (shape[0] // kind.block)
    return kind.bytes, row, row * shape[1], row * shape[1] * shape[2]


def plain(type_number: int, shape: tuple[int, int, int, int], buffer: int, data: int, name: bytes = b"") -> Tensor:
    """A tensor without operator: a contiguous region of a buffer."""
    strides = contiguous_strides(type_number, shape)
    return Tensor(0, type_number, buffer, shape, strides, 0, (0,) * 16, 0, (0,) * 10, 0, 0, data, name, 0)


MAX_TENSORS = 65_536


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph. The server keeps it under `uid`, if that is not 0; before protocol 8 it keeps the last graph only."""

    device: int
    uid: int
    nodes: tuple[int, ...]
    tensors: tuple[Tensor, ...]


def graph_identity(payload: bytes | memoryview, version: Version) -> tuple[int, int]:
    """Device and uid of a graph, without reading the rest. Raises struct.error if bytes are missing."""
    if version.major >= V8.major:
        return struct.unpack_from("<IQ", payload)
    return struct.unpack_from("<I", payload)[0], 0


def _graph_layout(payload: bytes | memoryview, version: Version) -> tuple[tuple[int, ...], int, int]:
    """The ids of the nodes, where the tensors begin, and their number. Raises FrameError."""
    prefix = 12 if version.major >= V8.major else 4
    if len(payload) < prefix + 8:
        raise FrameError(f"a graph of {len(payload)} bytes")
    (count,) = struct.unpack_from("<I", payload, prefix)
    nodes_at = prefix + 4
    tensors_at = nodes_at + 8 * count + 4
    if not 0 < count <= MAX_TENSORS or len(payload) < tensors_at:
        raise FrameError(f"a graph of {count} nodes in {len(payload)} bytes")
    nodes = struct.unpack_from(f"<{count}Q", payload, nodes_at)
    (tensor_count,) = struct.unpack_from("<I", payload, tensors_at - 4)
    if tensor_count > MAX_TENSORS or len(payload) != tensors_at + tensor_count * TENSOR_BYTES:
        raise FrameError(f"a graph of {count} nodes and {tensor_count} tensors in {len(payload)} bytes")
    return nodes, tensors_at, tensor_count


_STRUCTURE = struct.Struct("<QIQ32xI64xi10QQ16x64si")
_STRUCTURE_KEY = struct.Struct("<IQIi11Ii")
assert _STRUCTURE.size == TENSOR_BYTES  # noqa: S101 - the protocol's own constant


class GraphStructure(NamedTuple):
    """What of a graph does not depend on how many tokens it computes, nor on how many came before.

    Attributes:
        digest: of the operators, names, types, flags and buffers of all tensors, of what each is computed from, and of
            the nodes' order. Shapes, strides, parameters, offsets and addresses are left out.
        names: those that only one tensor of the graph has.
    """

    digest: bytes
    names: frozenset[bytes]


def graph_structure(payload: bytes | memoryview, version: Version) -> GraphStructure:
    """The structure of a serialized graph. Raises FrameError."""
    nodes, tensors_at, _ = _graph_layout(payload, version)
    hasher = blake3(payload[:4])
    places = {0: 0}
    names: dict[bytes, int] = {}
    for place, fields in enumerate(_STRUCTURE.iter_unpack(payload[tensors_at:]), 1):
        number, kind, buffer, op, flags, *sources, name, uses = fields
        places[number] = place
        try:
            links = [places[source] for source in sources]
        except KeyError:
            raise FrameError("a graph with a tensor before its operands") from None
        short = name.split(b"\0", 1)[0]
        names[short] = names.get(short, 0) + 1
        hasher.update(_STRUCTURE_KEY.pack(kind, buffer, op, flags, *links, uses))
        hasher.update(name)
    try:
        order = [places[node] for node in nodes]
    except KeyError:
        raise FrameError("a graph with a node that is no tensor of it") from None
    hasher.update(struct.pack(f"<{len(order)}I", *order))
    return GraphStructure(hasher.digest(), frozenset(name for name, count in names.items() if name and count == 1))


def parse_graph(payload: bytes | memoryview, version: Version) -> Graph:
    """Read a graph; its length must be exactly what its counts say. Raises FrameError."""
    device, uid = graph_identity(payload, version)
    nodes, tensors_at, tensor_count = _graph_layout(payload, version)
    tensors = tuple(unpack(payload, tensors_at + index * TENSOR_BYTES) for index in range(tensor_count))
    return Graph(device, uid, nodes, tensors)


def pack_graph(graph: Graph, version: Version) -> bytes:
    """The inverse of `parse_graph`."""
    head = struct.pack("<IQ", graph.device, graph.uid) if version.major >= V8.major else struct.pack("<I", graph.device)
    nodes = struct.pack(f"<I{len(graph.nodes)}Q", len(graph.nodes), *graph.nodes)
    return head + nodes + struct.pack("<I", len(graph.tensors)) + b"".join(t.pack() for t in graph.tensors)
