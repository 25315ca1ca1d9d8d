"""What a worker said once and does not change: the engine's questions about it are answered on the host."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh_llm.split.framing import ProtocolError
from mesh_llm.split.ports import Weights
from mesh_llm.wire.ggml_rpc.protocol import MAX_SOURCES, TENSOR_BYTES, Command, Version, hello_reply
from mesh_llm.wire.ggml_rpc.tunnel import DeviceFacts

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MOST_SIZES = 65_536
_MOST_ALIGNMENT = 1 << 20
MOST_BYTES = 1 << 46
"""Of one tensor or buffer of a worker: no machine has more, and sums of many still fit into 64 bits."""

# Of an rpc_tensor: type; shape, strides, operator and its parameters. What is left out are names and addresses.
_TYPE = slice(8, 12)
_SHAPE = slice(20, 120)

AllocationSizes = dict[bytes, int]
"""Bytes that a worker's device needs for a tensor, by its shape. Good as long as the worker's engine is the same."""


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """Facts of one session.

    Attributes:
        version: the RPC protocol that both engines speak.
        devices: in the rpc-server's order. Free memory is that at the beginning: the engine is told the split, and
            does not decide by it.
        weights: what the host has on disk of the model.
        offered: number of each digest that the worker has.
        sizes: what the worker was asked before.
        unpacks: the worker takes graphs packed.
    """

    version: Version
    devices: tuple[DeviceFacts, ...]
    weights: Weights | None = None
    offered: dict[bytes, int] = field(default_factory=dict[bytes, int])
    sizes: AllocationSizes = field(default_factory=AllocationSizes)
    unpacks: bool = False

    def answer(self, command: int, payload: memoryview) -> bytes | None:
        """The answer to a request, if it is known."""
        match command:
            case Command.HELLO:
                return hello_reply(self.version)
            case Command.DEVICE_COUNT:
                return _U32.pack(len(self.devices))
            case Command.GET_ALIGNMENT | Command.GET_MAX_SIZE | Command.GET_DEVICE_MEMORY:
                number: int = _U32.unpack(payload)[0]
                return _of_device(command, self.devices[number]) if number < len(self.devices) else None
            case Command.GET_ALLOC_SIZE:
                size = self.sizes.get(_shape_key(payload))
                return None if size is None else _U64.pack(size)
            case _:
                return None

    def learn_size(self, payload: memoryview) -> Callable[[bytes], None]:
        """What takes the answer to a GET_ALLOC_SIZE. It raises ProtocolError where no tensor can be so large."""
        key = _shape_key(payload)

        def learn(answer: bytes) -> None:
            size: int = _U64.unpack(answer)[0]
            if size > MOST_BYTES:
                raise ProtocolError(f"the worker needs {size} bytes for a tensor")
            if len(self.sizes) < _MOST_SIZES:
                self.sizes[key] = size

        return learn


def is_possible(device: DeviceFacts) -> bool:
    """Whether there can be such a device. The engine divides by its alignment, and adds sizes without a check."""
    alignment = device.alignment
    return 0 < alignment <= _MOST_ALIGNMENT and not alignment & (alignment - 1) and device.max_size > 0


def _of_device(command: int, device: DeviceFacts) -> bytes:
    if command == Command.GET_ALIGNMENT:
        return _U64.pack(device.alignment)
    if command == Command.GET_MAX_SIZE:
        return _U64.pack(device.max_size)
    return struct.pack("<QQ", device.free, device.total)


def _shape_key(payload: memoryview) -> bytes:
    """What a GET_ALLOC_SIZE's answer depends on: the device, and each tensor's type, shape, operator."""
    parts = [payload[:4]]
    for index in range(1 + MAX_SOURCES):
        tensor = payload[4 + index * TENSOR_BYTES : 4 + (index + 1) * TENSOR_BYTES]
        parts += (tensor[_TYPE], tensor[_SHAPE])
    return b"".join(parts)
