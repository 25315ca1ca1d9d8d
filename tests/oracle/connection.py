"""One connection of a hostile host: graphs and what comes between them, as far as the firewall lets it pass."""

import random
import struct
from bisect import insort
from collections import Counter
from dataclasses import dataclass, field

from tests.oracle.operators import any_maker
from tests.oracle.runner import Runner
from tests.oracle.sketch import MOST_BYTES, Sketch, TooLargeError
from tests.oracle.templates import Templates
from tests.oracle.twists import twist

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.wire.ggml_rpc.protocol import V8, Command, FrameError
from mesh_llm.wire.ggml_rpc.tensors import I32, I64, IDLE, Graph, Tensor, operator_name, pack_graph, plain

Step = tuple[int, bytes | tuple[int, int, int]]
"""A request, or -1 and (pointer, first address, bytes) of a buffer that came to be; as in tests.support.rpc_record."""

ALLOCATED = -1
LIMIT = 1 << 30
EPISODES = 64
SIZES = (
    *(64,) * 10, *(256,) * 12, *(1024,) * 12, *(4096,) * 12, *(16384,) * 10, *(65536,) * 6, *(262144,) * 3,
)  # fmt: skip
"""Bytes of a connection's buffers. Some get odd ones more."""

_POOL = 1 << 20


@dataclass
class Tally:
    """What was tried.

    Attributes:
        proposed, accepted: graphs that the operator was part of, by its name; accepted ones were computed.
        types: pairs of an operator and the type of its first operand (or its own), of accepted graphs.
        reasons: why graphs were refused.
        twisted: accepted graphs with a change that no constructor makes.
        recomputed: accepted GRAPH_RECOMPUTE, not counted as graphs.
        closed: connections that the rpc-server ended itself.
    """

    graphs: int = 0
    nodes: int = 0
    twisted: int = 0
    refused: int = 0
    recomputed: int = 0
    requests: int = 0
    connections: int = 0
    closed: int = 0
    too_large: int = 0
    proposed: Counter[str] = field(default_factory=Counter[str])
    accepted: Counter[str] = field(default_factory=Counter[str])
    types: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    reasons: Counter[str] = field(default_factory=Counter[str])


class Content:
    """Numbers to fill tensors with, cut from what was drawn once."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        floats = [chance.gauss(0, 1) for _ in range(16384)]
        self._floats = struct.pack("<16384f", *floats) * 17
        self._halves = struct.pack("<16384e", *floats) * 33
        self._random = chance.randbytes(_POOL)
        special = (0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38, -3e38)
        self._special = struct.pack("<16384f", *(chance.choice(special) for _ in range(16384))) * 17
        self._zeros = bytes(_POOL)

    def of(self, kind: int, size: int) -> bytes:
        """Bytes for a tensor of a type."""
        chance = self._chance
        draw = chance.random()
        if kind in {I32, I64} or draw < 0.15:
            pool = self._random
        elif draw < 0.25:
            pool = self._special
        elif draw < 0.3:
            pool = self._zeros
        else:
            pool = self._halves if GGML_TYPES[kind].bytes == 2 or GGML_TYPES[kind].block > 1 else self._floats
        # A pool ends where whole numbers end.
        start = chance.randrange(0, 4096) * 8
        return pool[start : start + size]

    def indices(self, kind: int, size: int, bound: int) -> bytes:
        """Mostly below `bound`."""
        chance = self._chance
        width, letter = (8, "q") if kind == I64 else (4, "i")
        count = size // width
        high = min(bound, 1 << 31)
        values = [chance.randrange(high) for _ in range(count)]
        if values and chance.random() < 0.08:
            values[chance.randrange(count)] = chance.choice((-1, bound & 0x7FFFFFFF, (1 << 31) - 1, -(1 << 31)))
        elif chance.random() < 0.2:
            values = [high - 1] * count
        return struct.pack(f"<{count}{letter}", *values) + bytes(size - count * width)


class Connection:
    """Makes one, over a runner. `steps` is all that was accepted, in order."""

    def __init__(
        self,
        chance: random.Random,
        content: Content,
        runner: Runner,
        tally: Tally,
        templates: Templates,
    ) -> None:
        self._chance = chance
        self._content = content
        self._runner = runner
        self._tally = tally
        self._templates = templates
        self._firewall = Firewall(V8, 1, LIMIT)
        self._buffers: list[Buffer] = []
        self._kept: list[tuple[int, list[Tensor]]] = []
        self._indices: list[tuple[Tensor, int]] = []
        self.steps: list[Step] = []
        self.threads = chance.choice((1, 1, 2, 3))

    def run(self) -> None:
        """All of it. Raises RunnerDiedError; then `steps` are the way there."""
        self._tally.connections += 1
        self._runner.begin(self.threads)
        self._allocate([size + self._chance.choice((0, 0, 0, 2, 4, 18, 34)) for size in SIZES])
        for _ in range(EPISODES):
            self._episode()
        self._read_something()
        if self._runner.end().closed:
            self._tally.closed += 1

    def _allocate(self, sizes: list[int]) -> None:
        for buffer in self._runner.allocate(sizes):
            self._firewall.allocated(buffer)
            insort(self._buffers, buffer, key=_size)
            self.steps.append((ALLOCATED, (buffer.pointer, buffer.base, buffer.size)))

    def _ask(self, command: int, payload: bytes) -> bool:
        """Whether the firewall lets a request pass; then the runner has it."""
        try:
            self._firewall.check(command, memoryview(payload))
        except (RefusedError, FrameError) as refused:
            if command == Command.GRAPH_COMPUTE:
                self._tally.refused += 1
                self._tally.reasons[_reason(refused)] += 1
            return False
        self._tally.requests += 1
        self.steps.append((command, payload))
        self._runner.ask(command, payload)
        return True

    def _episode(self) -> None:
        chance = self._chance
        draw = chance.random()
        if draw < 0.8 or not self._kept:
            self._graph()
        elif draw < 0.93:
            self._again()
        else:
            self._between()

    def _graph(self) -> None:
        chance = self._chance
        sketch = Sketch(chance)
        try:
            for _ in range(chance.choice((1, 1, 1, 1, 2, 2, 3, 5))):
                if chance.random() < 0.6 or self._templates.add(sketch) is None:
                    any_maker(chance)(sketch)
            twisted = chance.random() < 0.25
            if twisted:
                twist(sketch)
            tensors = sketch.place(self._buffers)
        except TooLargeError:
            self._tally.too_large += 1
            return
        self._fill(sketch)
        uid = chance.choice((0, 0, 1, 2, 3))
        nodes = tuple(draft.id for draft in sketch.nodes)
        # A value that does not fit its field is nothing that a host can send.
        try:
            payload = pack_graph(Graph(0, uid, nodes, tuple(tensors)), V8)
        except struct.error:
            return
        names = {operator_name(draft.op) for draft in sketch.nodes}
        self._tally.proposed.update(names)
        if not self._ask(Command.GRAPH_COMPUTE, payload):
            return
        self._tally.graphs += 1
        self._tally.twisted += twisted
        self._tally.nodes += len(nodes)
        self._tally.accepted.update(names)
        for draft in sketch.nodes:
            if draft.op not in IDLE:
                first = draft.sources[0] if draft.sources and draft.sources[0] is not None else draft
                kind = GGML_TYPES.get(first.type)
                self._tally.types[operator_name(draft.op), kind.name if kind else "?"] += 1
        if uid:
            self._kept.append((uid, tensors))
            del self._kept[:-8]

    def _fill(self, sketch: Sketch) -> None:
        chance = self._chance
        for draft in sketch.leaves():
            tensor = draft.tensor()
            size = tensor.extent
            if not 0 < size <= MOST_BYTES:
                continue
            if draft.bound is not None:
                data = self._content.indices(draft.type, size, draft.bound)
                self._indices.append((tensor, draft.bound))
                del self._indices[:-8]
                if chance.random() < 0.02:
                    continue
            elif chance.random() < 0.5:
                continue
            else:
                data = self._content.of(draft.type, size)
            self._set(tensor, data)

    def _set(self, tensor: Tensor, data: bytes) -> None:
        chance = self._chance
        bare = tensor._replace(op=0, sources=(0,) * 10, view_source=0)
        size = len(data)
        if chance.random() < 0.03 and size >= 16:
            half = size // 2
            part = bare.pack() + struct.pack("<QQQQ", 0, half, 2, half) + data[: 2 * half]
            self._ask(Command.SET_TENSOR_2D, part)
            return
        cut = 0 if chance.random() < 0.95 else chance.randrange(size)
        self._ask(Command.SET_TENSOR, bare.pack() + b"\0" + struct.pack("<Q", cut) + data[cut:])

    def _again(self) -> None:
        """A graph that was computed before, perhaps over other indices."""
        chance = self._chance
        uid, tensors = chance.choice(self._kept)
        if self._indices and chance.random() < 0.4:
            tensor, bound = chance.choice(self._indices)
            self._set(tensor, self._content.indices(tensor.type, tensor.extent, bound))
        elif chance.random() < 0.3:
            tensor = chance.choice(tensors)
            if 0 < tensor.extent <= MOST_BYTES:
                self._set(tensor, self._content.of(tensor.type, tensor.extent))
        if self._ask(Command.GRAPH_RECOMPUTE, struct.pack("<IQ", 0, uid)):
            self._tally.recomputed += 1

    def _between(self) -> None:
        """What is not a graph: memory written in other ways, freed, and taken anew."""
        chance = self._chance
        tensors = chance.choice(self._kept)[1]
        tensor = chance.choice(tensors)._replace(op=0, sources=(0,) * 10, view_source=0)
        other = chance.choice(tensors)._replace(op=0, sources=(0,) * 10, view_source=0)
        size = tensor.extent
        if self._indices and chance.random() < 0.3:
            tensor = self._indices[-1][0]
            size = tensor.extent
        match chance.randrange(7):
            case 0:
                self._ask(
                    Command.MEMSET_TENSOR, tensor.pack() + struct.pack("<QQB", 0, size, chance.choice((0, 1, 255)))
                )
            case 1:
                self._ask(Command.COPY_TENSOR, other.pack() + tensor.pack())
            case 2:
                self._ask(Command.BUFFER_CLEAR, struct.pack("<QB", tensor.buffer, chance.choice((0, 1, 255))))
            case 3:
                self._ask(Command.INIT_TENSOR, tensor.pack())
            case 4:
                self._ask(Command.GET_TENSOR, tensor.pack() + struct.pack("<QQ", 0, size))
            case 5:
                everything = [tensor, *tensors[:10]]
                empty = plain(0, (0, 0, 0, 0), 0, 0)
                everything += [empty] * (11 - len(everything))
                self._ask(Command.GET_ALLOC_SIZE, struct.pack("<I", 0) + b"".join(t.pack() for t in everything))
            case _:
                gone = next((b for b in self._buffers if b.pointer == tensor.buffer), None)
                if gone is not None and self._ask(Command.FREE_BUFFER, struct.pack("<Q", gone.pointer)):
                    self._buffers.remove(gone)
                    if chance.random() < 0.7:
                        self._allocate([gone.size])

    def _read_something(self) -> None:
        """A read at the end: the server has computed all that came before it."""
        buffer = self._buffers[0]
        tensor = plain(24, (buffer.size, 1, 1, 1), buffer.pointer, buffer.base)
        self._ask(Command.GET_TENSOR, tensor.pack() + struct.pack("<QQ", 0, 8))


def _size(buffer: Buffer) -> int:
    return buffer.size


def _reason(refused: Exception) -> str:
    """Without the names of tensors."""
    text = str(refused)
    return text if not text.startswith("tensor b'") else text.partition("': ")[2] or text.partition("' ")[2]
