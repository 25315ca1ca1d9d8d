"""Valid requests that no recording has: the tunnel's own for pushed tensors, and ggml's that the model did not need.

They are made from what was recorded, so their tensors lie in the recorded buffers. The firewall lets them pass
unchanged, so every refusal is due to the damage.
"""

import random
import struct
from collections.abc import Callable

from tests.support.rpc_record import recorded

from mesh_llm.wire.ggml_rpc.activations import Format, pack
from mesh_llm.wire.ggml_rpc.packing import PACKED, PACKED_SET, PackedSet, SentHeads, compress_data, compress_graph
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES, Command
from mesh_llm.wire.ggml_rpc.tensors import F32, Tensor, plain, unpack
from mesh_llm.wire.ggml_rpc.tunnel import (
    PACKED_GET,
    PUSH,
    REFERENCE,
    TAG_BYTES,
    WAIT,
    PackedGet,
    Push,
    Reference,
    Wait,
)

Made = tuple[int, bytes]

STEPS = recorded()
BUFFERS = tuple(what for _, what in STEPS if not isinstance(what, bytes))
REQUESTS: tuple[Made, ...] = tuple((command, what) for command, what in STEPS if isinstance(what, bytes))
_LONG = 20
_DATA = 4096
"""Bytes of tensor data in a request that is made here."""


def _offered() -> dict[int, int]:
    """Bytes of each tensor that the worker offered, by its number."""
    found: dict[int, int] = {}
    for command, what in REQUESTS:
        if command == REFERENCE:
            reference = Reference.unpack(memoryview(what))
            found[reference.number] = plain(reference.type, reference.shape, 0, 0).extent
    return found


def _tensors() -> tuple[Tensor, ...]:
    """Tensors that the host set or read, each once."""
    return tuple(
        dict.fromkeys(unpack(what) for command, what in REQUESTS if command in {Command.SET_TENSOR, Command.GET_TENSOR})
    )


def _computations() -> tuple[tuple[Made, ...], ...]:
    """What the host sets, and the graph that uses it; if recorded, also those of the next token."""
    found: list[tuple[Made, ...]] = []
    at = 0
    for position, (command, _) in enumerate(REQUESTS):
        if command in {Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE}:
            own = REQUESTS[at : position + 1]
            found.append(found[-1] + own if command == Command.GRAPH_RECOMPUTE and len(found[-1]) < _LONG else own)
        elif command == Command.SET_TENSOR:
            continue
        at = position + 1
    return tuple(steps for steps in found if steps[0][0] == Command.SET_TENSOR)


OFFERED = _offered()
TENSORS = _tensors()
COMPUTATIONS = _computations()


class Maker:
    """Makes random requests. `inbox` contains what its WAITs wait for, by counter."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._counter = 0
        self._heads = SentHeads()
        self.inbox: dict[int, bytes] = {}
        self._ways: tuple[Callable[[Tensor], Made], ...] = (
            self._push, self._wait, self._memset, self._copy, self._set_2d, self._get_2d, self._free, self._initialize,
            self._device,
        )  # fmt: skip

    def begin(self) -> None:
        """A new connection: nothing is waited for."""
        self._counter = 0
        self._heads = SentHeads()
        self.inbox.clear()

    def any(self) -> Made:
        """One request."""
        return self._chance.choice(self._ways)(self._chance.choice(TENSORS))

    def tunnelled(self, command: int, payload: bytes) -> Made:
        """The same request in another form of the tunnel: by push, by wait, or packed."""
        if command == Command.GET_TENSOR:
            return self._pushed(payload)
        if command == Command.SET_TENSOR and self._chance.random() < 0.5:
            return self._packed(payload)
        if command == Command.SET_TENSOR:
            (offset,) = struct.unpack_from("<Q", payload, TENSOR_BYTES + 1)
            return self._waited(payload[:TENSOR_BYTES], offset, payload[SET_TENSOR_HEAD:])
        if command == Command.GRAPH_COMPUTE:
            return PACKED, compress_graph(payload)
        return command, payload

    def _region(self, tensor: Tensor) -> tuple[int, int]:
        """Offset and size of a part, from nothing to all of it."""
        offset = self._chance.choice((0, self._chance.randrange(tensor.extent + 1)))
        return offset, self._chance.choice((tensor.extent - offset, self._chance.randrange(tensor.extent - offset + 1)))

    def _pushed(self, get: bytes) -> Made:
        self._counter += 1
        tag = self._chance.randbytes(TAG_BYTES)
        wanted = self._format(get)
        if self._chance.random() < 0.3:
            return PACKED_GET, PackedGet(memoryview(get), wanted).pack()
        return PUSH, Push(memoryview(get), self._counter, tag, self._chance.randrange(4), wanted).pack()

    def _format(self, tensor: bytes) -> Format:
        """One that a tensor may travel in."""
        return self._chance.choice(list(Format)) if unpack(tensor).type == F32 else Format.F32

    def _packed(self, payload: bytes) -> Made:
        head, data = payload[:SET_TENSOR_HEAD], payload[SET_TENSOR_HEAD:]
        number, known = self._heads.number(head)
        compressed = self._chance.random() < 0.5
        kind, travels = (Format.F32, compress_data(data)) if compressed else pack(self._format(head), data)
        return PACKED_SET, PackedSet(number, b"" if known else head, len(data), travels, compressed, kind).pack()

    def _waited(self, tensor: bytes, offset: int, data: bytes) -> Made:
        self._counter += 1
        self.inbox[self._counter] = data
        return WAIT, Wait(memoryview(tensor), offset, len(data), self._counter).pack()

    def _push(self, tensor: Tensor) -> Made:
        return self._pushed(tensor.pack() + struct.pack("<QQ", *self._region(tensor)))

    def _wait(self, tensor: Tensor) -> Made:
        offset, size = self._region(tensor)
        return self._waited(tensor.pack(), offset, self._chance.randbytes(min(size, _DATA)))

    def _memset(self, tensor: Tensor) -> Made:
        return Command.MEMSET_TENSOR, tensor.pack() + struct.pack("<QQB", *self._region(tensor), 0)

    def _copy(self, tensor: Tensor) -> Made:
        target = self._chance.choice([other for other in TENSORS if other.type == tensor.type])
        return Command.COPY_TENSOR, tensor.pack() + target.pack()

    def _strided(self, tensor: Tensor) -> tuple[int, int, int, int]:
        """Offset, size, copies and stride that stay inside."""
        copies = self._chance.randint(1, 4)
        stride = max(1, min(tensor.extent, _DATA) // copies)
        return 0, self._chance.randint(1, stride), copies, stride

    def _set_2d(self, tensor: Tensor) -> Made:
        region = self._strided(tensor)
        data = self._chance.randbytes(region[1] * region[2])
        return Command.SET_TENSOR_2D, tensor.pack() + struct.pack("<QQQQ", *region) + data

    def _get_2d(self, tensor: Tensor) -> Made:
        return Command.GET_TENSOR_2D, tensor.pack() + struct.pack("<QQQQ", *self._strided(tensor))

    def _free(self, tensor: Tensor) -> Made:
        return Command.FREE_BUFFER, struct.pack("<Q", tensor.buffer)

    def _initialize(self, tensor: Tensor) -> Made:
        return Command.INIT_TENSOR, tensor.pack()

    def _device(self, _tensor: Tensor) -> Made:
        kinds = (Command.GET_ALIGNMENT, Command.GET_MAX_SIZE, Command.GET_DEVICE_MEMORY)
        return self._chance.choice(kinds), struct.pack("<I", 0)
