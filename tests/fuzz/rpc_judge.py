"""A second definition of what may reach an rpc-server, from the protocol alone, without the checks of the firewall."""

import struct

from tests.fuzz.rpc_index_judge import Memory, graph_tensors, unsound_index
from tests.fuzz.rpc_made import BUFFERS

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.protocol import Command
from mesh_llm.wire.ggml_rpc.tensors import Tensor, unpack

_NEVER = frozenset({
    Command.HELLO, Command.COMM_INIT, Command.COMM_ALLREDUCE, Command.COMM_FREE, Command.SET_TENSOR_HASH,
    Command.ALLOC_BUFFER, Command.BUFFER_GET_BASE,
})  # fmt: skip
# enum ggml_op of protocol 8: CUSTOM and the MAP_CUSTOM family hold addresses of code.
_CODE = frozenset(range(92, 96))


class FindingError(AssertionError):
    """A forbidden request got through."""


class Judge:
    """One connection: no forbidden command, no byte outside the buffers, no row that was not set or does not exist."""

    def __init__(self) -> None:
        self._buffers = {pointer: (base, base + size) for pointer, base, size in BUFFERS}
        self._graphs: dict[tuple[int, int], bytes] = {}
        self._memory = Memory()

    def judge(self, command: int, payload: memoryview, streamed: int) -> None:
        """Check an accepted request; `streamed`: bytes of data that follow it."""
        if command in _NEVER or command > Command.COMM_FREE:
            raise FindingError(f"command {command} passed")
        match command:
            case Command.SET_TENSOR:
                (offset,) = struct.unpack_from("<Q", payload, 297)
                self.written(unpack(payload), offset, streamed or bytes(payload[305:]))
            case Command.GET_TENSOR:
                self.region(unpack(payload), *struct.unpack_from("<QQ", payload, 296))
            case Command.MEMSET_TENSOR:
                self.written(unpack(payload), *struct.unpack_from("<QQ", payload, 296))
            case Command.GET_TENSOR_2D:
                offset, size, copies, stride = struct.unpack_from("<QQQQ", payload, 296)
                self.region(unpack(payload), offset, max(0, copies - 1) * stride + size)
            case Command.SET_TENSOR_2D:
                offset, size, copies, stride = struct.unpack_from("<QQQQ", payload, 296)
                self.written(unpack(payload), offset, max(0, copies - 1) * stride + size)
            case Command.COPY_TENSOR:
                self.tensor(unpack(payload))
                target = unpack(payload, 296)
                self.written(target, 0, self._extent(target))
            case Command.INIT_TENSOR:
                self.tensor(unpack(payload))
            case Command.FREE_BUFFER:
                begin, end = self._buffers.pop(struct.unpack("<Q", payload)[0], (0, -1))
                if end < begin:
                    raise FindingError("a buffer is freed that is not there")
                self._memory.wrote(begin, end - begin, None)
                # Those that were computed may point into it.
                self._graphs.clear()
            case Command.BUFFER_CLEAR:
                begin, end = self._buffers.get(struct.unpack_from("<Q", payload)[0], (0, -1))
                if end < begin:
                    raise FindingError("a buffer is cleared that is not there")
                self._memory.wrote(begin, end - begin, None)
            case Command.GRAPH_COMPUTE:
                self._graph(payload)
            case Command.GRAPH_RECOMPUTE:
                graph = self._graphs.get(struct.unpack("<IQ", payload))
                if graph is None:
                    raise FindingError("a graph is computed again that was not, or whose buffers are gone")
                self._indices(memoryview(graph))
            case Command.GET_ALIGNMENT | Command.GET_MAX_SIZE | Command.GET_DEVICE_MEMORY | Command.GET_ALLOC_SIZE:
                self.device(payload)
            case _:
                pass

    @staticmethod
    def device(payload: memoryview) -> None:
        """The number that a request begins with; there is one device."""
        if struct.unpack_from("<I", payload)[0]:
            raise FindingError("a device that is not there")

    def written(self, tensor: Tensor, offset: int, what: bytes | int) -> None:
        """A part of a tensor is set: to these bytes, or to a number of unknown bytes."""
        size = what if isinstance(what, int) else len(what)
        self.region(tensor, offset, size)
        self._memory.wrote(tensor.data + offset, size, None if isinstance(what, int) else what)

    def _graph(self, payload: memoryview) -> None:
        device, uid = struct.unpack_from("<IQ", payload)
        self.device(payload)
        if uid:
            self._graphs[device, uid] = bytes(payload)
        for tensor in graph_tensors(payload)[0].values():
            if tensor.op in _CODE:
                raise FindingError(f"operator {tensor.op} passed")
            if tensor.buffer or tensor.data:
                self.tensor(tensor)
        self._indices(payload)

    def _indices(self, graph: memoryview) -> None:
        wrong = unsound_index(graph, self._memory)
        if wrong is not None:
            raise FindingError(f"a graph follows {wrong}")

    def tensor(self, tensor: Tensor) -> None:
        """A tensor that the rpc-server will touch."""
        self.region(tensor, 0, self._extent(tensor))

    def region(self, tensor: Tensor, offset: int, size: int) -> None:
        """A part of a tensor that will be read or written."""
        begin, end = self._buffers.get(tensor.buffer, (0, -1))
        whole = self._extent(tensor)
        if not begin <= tensor.data <= tensor.data + whole <= end:
            raise FindingError(f"a tensor outside of all buffers passed: {tensor}")
        if offset + size > whole:
            raise FindingError(f"{size} bytes at {offset} of {whole} passed")

    @staticmethod
    def _extent(tensor: Tensor) -> int:
        """ggml_nbytes."""
        kind = GGML_TYPES[tensor.type]
        if 0 in tensor.shape:
            return 0
        first = kind.bytes if kind.block == 1 else tensor.shape[0] * tensor.strides[0] // kind.block
        from_dimension = 0 if kind.block == 1 else 1
        return first + sum((tensor.shape[i] - 1) * tensor.strides[i] for i in range(from_dimension, 4))
