"""The firewall before one connection to an rpc-server: whoever can reach an rpc-server can run code there.

It knows what the connection allocated, and lets a request pass only where nothing in it can reach other memory.
Published attacks on rpc-servers and their relatives are in tests/unit/split/firewall/test_attacks.py.
"""

import struct
import time
from collections.abc import Callable

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.split.firewall.graphs import CheckedGraph, check_graph
from mesh_llm.split.firewall.memory import Buffer, Buffers, IndexValues, Interval, RefusedError, is_index
from mesh_llm.wire.ggml_rpc.activations import Format
from mesh_llm.wire.ggml_rpc.protocol import (
    CHECKED_VERSIONS,
    MAX_SOURCES,
    SET_TENSOR_2D_HEAD,
    SET_TENSOR_HEAD,
    TENSOR_BYTES,
    V8,
    Command,
    SizeBounds,
    Version,
    request_bounds,
)
from mesh_llm.wire.ggml_rpc.rules import ALLOWED, RULES
from mesh_llm.wire.ggml_rpc.rules.rule import overlap
from mesh_llm.wire.ggml_rpc.tensors import F32, Tensor, operator_name, parse_graph, plain, unpack
from mesh_llm.wire.ggml_rpc.tunnel import MAX_PUSH, Reference, tunnel_bounds

_U64 = struct.Struct("<Q")
_REGION = struct.Struct("<QQ")
_REGION_2D = struct.Struct("<QQQQ")
MAX_GRAPHS = 1024
"""As many as the rpc-server keeps (GRAPH_CACHE_MAX); both sides then drop all of them."""
MAX_GRAPH_TENSORS = 4 << 20
"""Tensors of all graphs that the rpc-server keeps; about 1.5 GB of its memory."""
GRAPH_SECONDS = 20.0
"""Most time to check one graph. The largest that fits into a frame takes a few seconds."""

_FORBIDDEN = frozenset({
    # The host answers these itself. A communicator would make the worker open connections at the host's wish.
    Command.HELLO, Command.COMM_INIT, Command.COMM_ALLREDUCE, Command.COMM_FREE,
    # Reads files by their hash, also those that other sessions made. The host answers it itself.
    Command.SET_TENSOR_HASH,
    # The tunnel's ALLOC stands for both, and its answer holds the address.
    Command.ALLOC_BUFFER, Command.BUFFER_GET_BASE,
})  # fmt: skip


class Firewall:
    """Checks the requests of one connection. Every check raises RefusedError."""

    def __init__(
        self,
        version: Version,
        devices: int,
        limit: int,
        graph_seconds: float = GRAPH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        *,
        reference_kernels: bool = False,
    ) -> None:
        """One for each connection.

        Args:
            version: of the RPC protocol.
            devices: how many the rpc-server has.
            limit: bytes that may be allocated.
            graph_seconds: most time to check one graph.
            clock: monotonic, seconds.
            reference_kernels: the rpc-server computes on the processor with the kernels that the rules were read from.
                Some of those check their indices themselves, so the firewall need not know where they come from.

        Raises:
            ValueError: the operators of this version are not known.
        """
        if version not in CHECKED_VERSIONS:
            raise ValueError(f"RPC protocol {version} cannot be checked")
        self.version = version
        self._devices = devices
        self._graph_seconds = graph_seconds
        self._clock = clock
        self._reference_kernels = reference_kernels
        self.buffers = Buffers(limit)
        self._indices = IndexValues()
        self._graphs: dict[int, dict[int, tuple[CheckedGraph | None, int]]] = {}
        self._graph_tensors = 0
        self._checks: dict[int, Callable[[memoryview], object]] = {
            Command.SET_TENSOR: self._set,
            Command.GET_TENSOR: self.check_get,
            Command.SET_TENSOR_2D: self._set_2d,
            Command.GET_TENSOR_2D: self._get_2d,
            Command.MEMSET_TENSOR: self._memset,
            Command.COPY_TENSOR: self._copy,
            Command.INIT_TENSOR: self.check_initialize,
            Command.GET_ALLOC_SIZE: self._allocation_size,
            Command.GRAPH_COMPUTE: self._compute,
            Command.GRAPH_RECOMPUTE: self._recompute,
            Command.FREE_BUFFER: self._free,
            Command.BUFFER_CLEAR: self._clear,
            Command.GET_ALIGNMENT: self._ask_device,
            Command.GET_MAX_SIZE: self._ask_device,
            Command.GET_DEVICE_MEMORY: self._ask_device,
            Command.DEVICE_COUNT: lambda _: None,
        }

    def bounds(self, command: int) -> SizeBounds | None:
        """Sizes that a request's payload may have; None refuses the command."""
        if command in _FORBIDDEN:
            return None
        return tunnel_bounds(command) or request_bounds(command, self.version)

    def allocated(self, buffer: Buffer, *, read_only: bool = False) -> None:
        """The rpc-server allocated a buffer. `read_only`: for another engine, whose weights are in it."""
        self.buffers.add(buffer, read_only=read_only)

    def check(self, command: int, payload: memoryview) -> None:
        """A whole request of ggml's own, with its data if it has some."""
        check = self._checks.get(command)
        if check is None:
            raise RefusedError(f"command {command} is not allowed")
        check(payload)

    # Data in and out

    def check_set(self, head: memoryview, data: memoryview | None, size: int, *, same: bool = False) -> None:
        """SET_TENSOR by its first bytes; `data` if all of it is there already.

        `same`: it is not passed on, but compared with what is there.
        """
        tensor = unpack(head)
        if not same:
            self.buffers.check_writable(tensor.buffer)
        (offset,) = _U64.unpack_from(head, TENSOR_BYTES + 1)
        if head[TENSOR_BYTES] > 1:
            raise RefusedError("a SET_TENSOR with an unknown flag")
        start, end = self.buffers.check_region(tensor, offset, size)
        self._indices.wrote(start, end, tensor.type, data)

    def check_set_2d(self, head: memoryview, data_size: int) -> None:
        """SET_TENSOR_2D by its first bytes."""
        offset, size, copies, stride = _REGION_2D.unpack_from(head, TENSOR_BYTES)
        if size * copies != data_size:
            raise RefusedError(f"{copies} pieces of {size} bytes in {data_size}")
        tensor = unpack(head)
        region = self._strided(tensor, offset, size, copies, stride)
        self.buffers.wrote(tensor.buffer)
        self._indices.forget(*region)

    def check_get(self, payload: memoryview) -> int:
        """GET_TENSOR; returns the number of bytes that are read."""
        offset, size = _REGION.unpack_from(payload, TENSOR_BYTES)
        self.buffers.check_region(unpack(payload), offset, size)
        return size

    def _set(self, payload: memoryview) -> None:
        self.check_set(payload[:SET_TENSOR_HEAD], payload[SET_TENSOR_HEAD:], len(payload) - SET_TENSOR_HEAD)

    def _set_2d(self, payload: memoryview) -> None:
        self.check_set_2d(payload, len(payload) - SET_TENSOR_2D_HEAD)

    def _get_2d(self, payload: memoryview) -> None:
        self._strided(unpack(payload), *_REGION_2D.unpack_from(payload, TENSOR_BYTES))

    def _strided(self, tensor: Tensor, offset: int, size: int, copies: int, stride: int) -> Interval:
        if not size or not copies or (copies > 1 and stride < size):
            raise RefusedError(f"{copies} pieces of {size} bytes, {stride} bytes apart")
        return self.buffers.check_region(tensor, offset, (copies - 1) * stride + size)

    def _memset(self, payload: memoryview) -> None:
        tensor = unpack(payload)
        region = self.buffers.check_region(tensor, *_REGION.unpack_from(payload, TENSOR_BYTES))
        self.buffers.wrote(tensor.buffer)
        self._indices.forget(*region)

    def _copy(self, payload: memoryview) -> None:
        source, target = unpack(payload), unpack(payload, TENSOR_BYTES)
        self.buffers.check_allocated(source)
        self.buffers.check_allocated(target)
        if source.extent > target.extent or source.type != target.type:
            raise RefusedError(f"a copy of {source.extent} bytes into {target.extent}")
        if source.data != target.data and overlap(source, target):
            raise RefusedError("a copy of a tensor over a part of itself")
        self.buffers.wrote(target.buffer)
        self._indices.forget(*self.buffers.place(target))

    # The tunnel's own requests

    def check_allocation(self, payload: memoryview) -> int:
        """ALLOC; returns the bytes asked for."""
        device, size = struct.unpack("<IQ", payload)
        self._check_device(device)
        return size

    def check_push(self, get: memoryview) -> int:
        """The GET_TENSOR in a PUSH; returns its number of bytes."""
        size = self.check_get(get)
        if size > MAX_PUSH:
            raise RefusedError(f"{size} bytes to be pushed")
        return size

    def check_rounded(self, tensor: memoryview, kind: Format) -> None:
        """A tensor's data may come or go in this format: only 32-bit floats may be rounded."""
        if kind is not Format.F32 and (number := unpack(tensor).type) != F32:
            raise RefusedError(f"a tensor of type {number} as {kind.name}")

    def check_wait(self, tensor: memoryview, offset: int, size: int) -> bool:
        """The SET_TENSOR in a WAIT. True: pass its data to `received` before anything else is checked."""
        if size > MAX_PUSH:
            raise RefusedError(f"{size} bytes to be waited for")
        parsed = unpack(tensor)
        start, end = self.buffers.check_region(parsed, offset, size)
        self.buffers.wrote(parsed.buffer)
        self._indices.wrote(start, end, parsed.type, None)
        return is_index(parsed.type)

    def received(self, tensor: memoryview, offset: int, data: bytes) -> None:
        """The data of a WAIT is about to be set."""
        parsed = unpack(tensor)
        start = self.buffers.place(parsed)[0] + offset
        self._indices.wrote(start, start + len(data), parsed.type, data)

    def check_reference(self, reference: Reference, size: int, *, same: bool = False) -> Tensor:
        """A tensor to be filled with content of `size` bytes; returns it as SET_TENSOR describes it.

        `same`: it is not filled, but compared with what is there.
        """
        kind = GGML_TYPES.get(reference.type)
        if kind is None or reference.shape[0] % kind.block:
            raise RefusedError(f"a reference for a tensor of type {reference.type} and shape {reference.shape}")
        tensor = plain(reference.type, reference.shape, reference.buffer, reference.data)
        if tensor.extent != size:
            raise RefusedError(f"a reference to {size} bytes for a tensor of {tensor.extent}")
        if not same:
            self.buffers.check_writable(tensor.buffer)
        self._indices.forget(*self.buffers.check_region(tensor, 0, size))
        return tensor

    # Buffers and devices

    def check_initialize(self, payload: memoryview, *, same: bool = False) -> None:
        """INIT_TENSOR, which may write behind the rows of a tensor. `same`: it is not passed on."""
        tensor = unpack(payload)
        self.buffers.check_allocated(tensor)
        if not same:
            self.buffers.check_writable(tensor.buffer)

    def _clear(self, payload: memoryview) -> None:
        buffer = self.buffers.get(_U64.unpack_from(payload)[0])
        self.buffers.wrote(buffer.pointer)
        self._indices.forget(*buffer.places)

    def _free(self, payload: memoryview) -> None:
        (pointer,) = _U64.unpack(payload)
        buffer = self.buffers.get(pointer)
        self._indices.forget(*buffer.places)
        self.buffers.remove(pointer)
        # Kept graphs may point into the freed memory: none of them may be computed again. They still take up memory.
        for graphs in self._graphs.values():
            for uid, (_, size) in graphs.items():
                graphs[uid] = None, size

    def _ask_device(self, payload: memoryview) -> None:
        self._check_device(struct.unpack("<I", payload)[0])

    def _check_device(self, device: int) -> None:
        if device >= self._devices:
            # The rpc-server indexes its list of devices with this number.
            raise RefusedError(f"device {device} of {self._devices}")

    def _allocation_size(self, payload: memoryview) -> None:
        self._check_device(struct.unpack_from("<I", payload)[0])
        tensor, *sources = (unpack(payload, 4 + index * TENSOR_BYTES) for index in range(1 + MAX_SOURCES))
        self.buffers.check(tensor)
        for source in sources:
            if source.id:
                self.buffers.check(source)
        # Some devices need more memory for some operators, and read the operands to find out.
        rule = RULES.get(tensor.op)
        if tensor.op not in ALLOWED or (rule is not None and not rule.complete([bool(each.id) for each in sources])):
            raise RefusedError(f"the size of operator {operator_name(tensor.op)} without its operands")

    # Graphs

    def _compute(self, payload: memoryview) -> None:
        graph = parse_graph(payload, self.version)
        self._check_device(graph.device)
        deadline = self._clock() + self._graph_seconds

        def check_time() -> None:
            if self._clock() > deadline:
                raise RefusedError(f"a graph that takes more than {self._graph_seconds:.0f} s to check")

        checked = check_graph(graph, self.buffers, check_time, reference_kernels=self._reference_kernels)
        self._run(checked)
        self._keep(graph.device, graph.uid, checked)

    def _recompute(self, payload: memoryview) -> None:
        uid = 0
        if self.version.major >= V8.major:
            device, uid = struct.unpack("<IQ", payload)
        else:
            (device,) = struct.unpack("<I", payload)
        checked, _ = self._graphs.get(device, {}).get(uid, (None, 0))
        if checked is None:
            raise RefusedError(f"graph {uid} of device {device} was not computed before")
        self._run(checked)

    def _run(self, checked: CheckedGraph) -> None:
        self._indices.check(checked.uses)
        self._indices.computed(checked.writes)

    def _keep(self, device: int, uid: int, checked: CheckedGraph) -> None:
        """Count the graphs as the rpc-server keeps them, since each takes up memory there."""
        graphs = self._graphs.setdefault(device, {})
        if self.version.major >= V8.major:
            if not uid:
                return
            if len(graphs) >= MAX_GRAPHS:
                self._graph_tensors -= sum(size for _, size in graphs.values())
                graphs.clear()
        before = graphs.get(uid, (None, 0))[1]
        size = max(checked.size, before)
        graphs[uid] = checked, size
        self._graph_tensors += size - before
        if self._graph_tensors > MAX_GRAPH_TENSORS:
            raise RefusedError("more graphs than can be kept")
