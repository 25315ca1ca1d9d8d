"""What a host knows of one worker: properties that do not change during a session, and the traffic so far.

Many of the engine's questions ask for the former. The host answers them, which saves a round trip each.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from mesh_llm.split.framing import ProtocolError
from mesh_llm.split.weights import Weights
from mesh_llm.wire.ggml_rpc.protocol import MAX_SOURCES, TENSOR_BYTES, Command, Version, hello_reply
from mesh_llm.wire.ggml_rpc.tunnel import DeviceFacts

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MAX_SIZES = 65_536
_MAX_ALIGNMENT = 1 << 20
MAX_BYTES = 1 << 46
"""Of one tensor or buffer of a worker: no machine has more, and sums of many still fit into 64 bits."""

# Of an rpc_tensor: the type; then shape, strides, operator and its parameters. Names and addresses are left out.
_TYPE = slice(8, 12)
_SHAPE = slice(20, 120)

AllocationSizes = dict[bytes, int]
"""Bytes that a worker's device needs for a tensor, by its shape. Valid as long as the worker's engine is the same."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Properties of one worker, for one session.

    Attributes:
        version: the RPC protocol that both engines speak.
        devices: in the rpc-server's order. Free memory is that at the beginning: the split is decided already, and the
            engine does not choose by it.
        weights: the model's tensors on the host's disk.
        offered: the number of each digest that the worker has on disk.
        sizes: answers of the worker to GET_ALLOC_SIZE.
        unpacks: the worker takes graphs compressed.
        unpacks_sets: the worker takes what is set packed.
    """

    version: Version
    devices: tuple[DeviceFacts, ...]
    weights: Weights | None = None
    offered: dict[bytes, int] = field(default_factory=dict[bytes, int])
    sizes: AllocationSizes = field(default_factory=AllocationSizes)
    unpacks: bool = False
    unpacks_sets: bool = False

    def answer(self, command: int, payload: memoryview) -> bytes | None:
        """The answer to a request, if it is known."""
        match command:
            case Command.HELLO:
                return hello_reply(self.version)
            case Command.DEVICE_COUNT:
                return _U32.pack(len(self.devices))
            case Command.GET_ALIGNMENT | Command.GET_MAX_SIZE | Command.GET_DEVICE_MEMORY:
                number: int = _U32.unpack(payload)[0]
                return _device_answer(command, self.devices[number]) if number < len(self.devices) else None
            case Command.GET_ALLOC_SIZE:
                size = self.sizes.get(_shape_key(payload))
                return None if size is None else _U64.pack(size)
            case _:
                return None

    def learn_size(self, payload: memoryview) -> Callable[[bytes], None]:
        """A function for the answer to a GET_ALLOC_SIZE. It raises ProtocolError if no tensor can be so large."""
        key = _shape_key(payload)

        def learn(answer: bytes) -> None:
            size: int = _U64.unpack(answer)[0]
            if size > MAX_BYTES:
                raise ProtocolError(f"the worker needs {size} bytes for a tensor")
            if len(self.sizes) < _MAX_SIZES:
                self.sizes[key] = size

        return learn


def is_plausible(device: DeviceFacts) -> bool:
    """Whether there can be such a device. The engine divides by its alignment, and adds sizes without a check."""
    alignment = device.alignment
    return 0 < alignment <= _MAX_ALIGNMENT and not alignment & (alignment - 1) and device.max_size > 0


def _device_answer(command: int, device: DeviceFacts) -> bytes:
    if command == Command.GET_ALIGNMENT:
        return _U64.pack(device.alignment)
    if command == Command.GET_MAX_SIZE:
        return _U64.pack(device.max_size)
    return struct.pack("<QQ", device.free, device.total)


def _shape_key(payload: memoryview) -> bytes:
    """What the answer to a GET_ALLOC_SIZE depends on: the device, and each tensor's type, shape and operator."""
    parts = [payload[:4]]
    for index in range(1 + MAX_SOURCES):
        tensor = payload[4 + index * TENSOR_BYTES : 4 + (index + 1) * TENSOR_BYTES]
        parts += (tensor[_TYPE], tensor[_SHAPE])
    return b"".join(parts)


@dataclass(slots=True)
class WorkerStats:
    """The traffic with one worker. Bytes and counts since the session began.

    Attributes:
        connections: of the engine to this worker's endpoint.
        streams: tunnel streams that were opened for them.
        requests: of the engine.
        answered_here: requests that the host answered.
        round_trips: requests for which the engine waited for the worker.
        writes: batches written to the worker.
        bytes_sent: to the worker on tunnel streams.
        bytes_received: from the worker on tunnel streams.
        weight_bytes_referenced: weights that were referenced instead of sent.
        weight_bytes_sent: tensor data from the host's model that had to be sent.
        weight_bytes_filled: referenced weights that the worker has read from its own disk so far.
        graphs: whole graphs sent.
        packed: data that travelled compressed, unpacked bytes.
        rounded: activations that travelled in fewer bytes to this worker or back, unpacked bytes.
        unrounded: activations that the wanted format could not keep, bytes.
        pushed: tensors that went to another worker directly.
        relayed: tensors of another worker that went through the host.
        rescued: pushed tensors that did not arrive, and then went through the host.
        padding: bytes of padding behind answers (`split.worker.transfers.WindowPadding`).
        refused: buffers that it did not allocate since the last graph. An engine may do with smaller ones.
    """

    connections: int = 0
    streams: int = 0
    requests: int = 0
    answered_here: int = 0
    round_trips: int = 0
    writes: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    weight_bytes_referenced: int = 0
    weight_bytes_sent: int = 0
    weight_bytes_filled: int = 0
    graphs: int = 0
    packed: int = 0
    rounded: int = 0
    unrounded: int = 0
    pushed: int = 0
    relayed: int = 0
    rescued: int = 0
    padding: int = 0
    refused: int = 0

    def wrote(self, size: int) -> None:
        """Count one write of `size` bytes."""
        self.writes += 1
        self.bytes_sent += size

    def minus(self, earlier: "WorkerStats") -> "WorkerStats":
        """The difference to an earlier copy."""
        return WorkerStats(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def plus(self, other: "WorkerStats") -> "WorkerStats":
        """The sum."""
        return WorkerStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def copy(self) -> "WorkerStats":
        """The present numbers."""
        return self.minus(WorkerStats())


@dataclass(frozen=True, slots=True)
class PairState:
    """Whether one worker reaches another, by name."""

    source: str
    target: str
    reachable: bool
    reason: str = ""


@dataclass(slots=True)
class SplitStats:
    """All of a group, by worker's name; `pairs` that were tried."""

    workers: dict[str, WorkerStats] = field(default_factory=dict[str, WorkerStats])
    pairs: list[PairState] = field(default_factory=list[PairState])

    @property
    def total(self) -> WorkerStats:
        """The sum over workers."""
        total = WorkerStats()
        for stats in self.workers.values():
            total = total.plus(stats)
        return total


def merged(engines: Sequence[SplitStats]) -> SplitStats:
    """The traffic of several engines of one host with the same workers."""
    if len(engines) == 1:
        return engines[0]
    workers: dict[str, WorkerStats] = {}
    for engine in engines:
        for name, stats in engine.workers.items():
            workers[name] = workers.get(name, WorkerStats()).plus(stats)
    return SplitStats(workers, [pair for engine in engines for pair in engine.pairs])
