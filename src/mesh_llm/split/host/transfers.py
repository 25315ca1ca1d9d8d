"""Learns which tensors the engine copies from worker to worker, and lets the workers send them to each other.

The engine's scheduler copies a tensor X with a GET_TENSOR and right after it a SET_TENSOR of the same bytes, named
`...#X#n`. The copies of a graph follow from the graph, so a copy that was seen once is the same each time that this
graph is computed. Then the host answers the GET at once with a handle instead of the content. When the handle comes
back in the learned SET, the host sends PUSH to the one worker and WAIT to the other.

Each batch of a prompt has a graph of its own, since more tokens came before it; but which device needs a tensor follows
from the operators, and from where the weights are (llama.cpp, ggml_backend_sched_split_graph), not from lengths. So a
copy that one graph made is expected of all others of its structure (`wire.ggml_rpc.tensors.GraphStructure`): the same
tensor, by a name that is unique in the graph, to the same connection. So only the first batch of the first prompt waits
for its copies. WAIT names the place that the engine's SET names, so the tensor cannot arrive in another one.

A handle has the tensor's size and begins with 32 bytes that nobody can guess. While one is out, no answer of a worker
reaches the engine, so no token can be made from a handle. If one turns up in another place, or does not come back, the
session ends (`HandleLeakedError`).
"""

import asyncio
import math
import secrets
import struct
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES
from mesh_llm.wire.ggml_rpc.tensors import GraphStructure, Tensor, name_of, place_of, unpack
from mesh_llm.wire.ggml_rpc.tunnel import KEY_BYTES, MAX_PUSH, TAG_BYTES, push_tag

_MAGIC_BYTES = 8
_HEAD_BYTES = _MAGIC_BYTES + 8 + TAG_BYTES
_MAX_GRAPHS = 4096
_MAX_STRUCTURES = 256

_MANY_ROWS = 32
_MAX_ANSWERS = 2
"""Tensors that the engine may be about to copy: it can ask for one while the SET of the one before is on its way."""

_LONGEST_NAME = 63
_NO_STRUCTURE = GraphStructure(b"", frozenset())
_REGION = struct.Struct("<QQ")
_OFFSET = struct.Struct("<Q")

Place = tuple[int, ...]


class HandleLeakedError(Exception):
    """A handle went where the tensor's content should be; the engine's state is worthless."""


@dataclass(frozen=True, slots=True)
class CopyPattern:
    """What all graphs of one structure have in common of a copy.

    Attributes:
        name: of the tensor that is copied.
        turn: as in CopySource.
        type: of its elements.
        many: it has 32 rows or more. llama.cpp places some operators by that (llama-context.cpp, graph_get_cb).
    """

    name: bytes
    turn: int
    type: int
    many: bool


@dataclass(frozen=True, slots=True)
class CopySource:
    """One GET_TENSOR within the computation of one graph.

    Attributes:
        connection: it comes on.
        graph: digest of the graph that was computed there last.
        place: of the tensor.
        offset, size: bytes of it.
        turn: counts repetitions of the same one.
        structure: digest of the graph's structure.
        pattern: the same in all graphs of this structure; None if it has nothing that they have, such as a name.
    """

    connection: int
    graph: bytes
    place: Place
    offset: int
    size: int
    turn: int
    structure: bytes
    pattern: CopyPattern | None


@dataclass(frozen=True, slots=True)
class CopyTarget:
    """The SET_TENSOR that a copy ends in.

    Attributes:
        connection: of the worker that it goes to.
        place: of the tensor; None: of whichever tensor the scheduler made as the copy of `name`.
        offset: in the tensor.
        name: of the tensor that is copied.
    """

    connection: int
    place: Place | None
    offset: int
    name: bytes


@dataclass(frozen=True, slots=True)
class _Answer:
    """A tensor's content that the engine got, and may copy."""

    source: CopySource
    name: bytes
    content: bytes


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor on its way to a worker. The engine holds `handle` meanwhile."""

    worker: int
    target: CopyTarget
    counter: int
    tag: bytes
    handle: bytes
    order: int


class _Connection:
    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.graph = b""
        self.structure = _NO_STRUCTURE
        self.turns: dict[tuple[Place, int, int], int] = {}
        self.by_uid: OrderedDict[tuple[int, int], tuple[bytes, GraphStructure]] = OrderedDict()
        self.structures: OrderedDict[bytes, GraphStructure] = OrderedDict()
        self.learned: OrderedDict[bytes, dict[CopySource, CopyTarget]] = OrderedDict()
        self.expects: OrderedDict[bytes, dict[CopyPattern, CopyTarget]] = OrderedDict()

    def forget(self, connection: int | None = None) -> None:
        """Forget all copies, or those to one connection."""
        for targets in self.learned.values():
            for source in [each for each, target in targets.items() if connection in {None, target.connection}]:
                del targets[source]
        for expects in self.expects.values():
            for pattern in [each for each, target in expects.items() if connection in {None, target.connection}]:
                del expects[pattern]

    def learn(self, source: CopySource, target: CopyTarget) -> None:
        """A copy was made."""
        self.learned.setdefault(source.graph, {})[source] = target
        _keep_newest(self.learned, _MAX_GRAPHS)
        if source.pattern is None:
            return
        self.expects.setdefault(source.structure, {})[source.pattern] = replace(target, place=None)
        _keep_newest(self.expects, _MAX_STRUCTURES)

    def expected(self, source: CopySource) -> CopyTarget | None:
        """Where another graph of this structure copied the tensor to, if one did."""
        if source.pattern is None or not _HEAD_BYTES <= source.size <= MAX_PUSH:
            return None
        return self.expects.get(source.structure, {}).get(source.pattern)

    def computes(self, identity: tuple[int, int], graph: tuple[bytes, GraphStructure] | None) -> None:
        if graph is not None:
            signature, structure = graph
            # Graphs of one structure share its names, which are most of its memory.
            structure = self.structures.setdefault(structure.digest, structure)
            self.by_uid[identity] = signature, structure
            _keep_newest(self.by_uid, _MAX_GRAPHS)
            _keep_newest(self.structures, _MAX_STRUCTURES)
        self.graph, self.structure = self.by_uid.get(identity, (b"", _NO_STRUCTURE))
        self.turns.clear()


class DirectTransfers:
    """All transfers of one engine. Workers and connections are named by numbers."""

    def __init__(self) -> None:
        self._magic = secrets.token_bytes(_MAGIC_BYTES)
        self._keys: dict[int, bytes] = {}
        self._counters: dict[int, int] = {}
        self._reachable: set[tuple[int, int]] = set()
        self._connections: dict[int, _Connection] = {}
        self._out: dict[bytes, Transfer] = {}
        self._order = 0
        self._answers: list[_Answer] = []
        self._settled = asyncio.Event()
        self._settled.set()
        self.relayed = 0
        """Tensors of one worker that went to another through the host."""

    # Workers and connections

    def key(self, worker: int) -> bytes:
        """The secret that proves transfers to a worker."""
        return self._keys.setdefault(worker, secrets.token_bytes(KEY_BYTES))

    def reachable(self, source: int, target: int, *, yes: bool) -> None:
        """Set whether one worker reaches another; at first it does not."""
        (self._reachable.add if yes else self._reachable.discard)((source, target))

    def connected(self, connection: int, worker: int) -> None:
        """The engine connected to a worker."""
        self._connections[connection] = _Connection(worker)

    def disconnected(self, connection: int) -> None:
        """A connection ended: copies from and to it are forgotten."""
        self._connections.pop(connection, None)
        self._answers.clear()
        for other in self._connections.values():
            other.forget()

    def freed(self, connection: int) -> None:
        """Memory was freed: its addresses may mean something else from now on."""
        self._connections[connection].forget()
        for other in self._connections.values():
            other.forget(connection)

    # The engine's requests

    def computes(self, connection: int, identity: tuple[int, int], graph: tuple[bytes, GraphStructure] | None) -> None:
        """A graph is computed: its digest and structure. None: the last one with this identity, again."""
        self._connections[connection].computes(identity, graph)

    def get(self, connection: int, payload: memoryview) -> tuple[CopySource, Transfer | None]:
        """A GET_TENSOR. With a transfer, if it can be one: answer with its handle then."""
        here = self._connections[connection]
        place = place_of(payload)
        offset, size = _REGION.unpack_from(payload, TENSOR_BYTES)
        turn = here.turns.get((place, offset, size), 0)
        here.turns[place, offset, size] = turn + 1
        pattern = None if offset else _pattern(here.structure, unpack(payload), size, turn)
        source = CopySource(connection, here.graph, place, offset, size, turn, here.structure.digest, pattern)
        target = here.learned.get(here.graph, {}).get(source) or here.expected(source)
        if target is None or not self._may_push(here.worker, target):
            return source, None
        if here.graph in here.learned:
            here.learned.move_to_end(here.graph)
        return source, self._begin(target, size)

    def answered(self, source: CopySource, payload: bytes, content: bytes) -> None:
        """A GET_TENSOR was answered with a tensor's content."""
        if source.graph and _HEAD_BYTES <= source.size <= MAX_PUSH and source.connection in self._connections:
            earlier = [one for one in self._answers if one.source != source]
            self._answers = [*earlier, _Answer(source, name_of(payload), content)][-_MAX_ANSWERS:]

    def set(self, connection: int, payload: memoryview) -> Transfer | None:
        """A whole SET_TENSOR; the transfer that it completes, if it does.

        Raises:
            HandleLeakedError: it carries a handle that does not belong there.
        """
        data = payload[SET_TENSOR_HEAD:]
        name = name_of(payload)
        target = CopyTarget(connection, place_of(payload), _OFFSET.unpack_from(payload, TENSOR_BYTES + 1)[0], b"")
        if self._order:
            transfer = self._out.get(bytes(data[:_HEAD_BYTES]))
            if transfer is not None:
                if not _is_expected(transfer.target, target, name) or bytes(data) != transfer.handle:
                    raise HandleLeakedError("a tensor's handle came back in another place")
                del self._out[transfer.handle[:_HEAD_BYTES]]
                self._settled.set()
                return transfer
            self.check_no_handle(data)
        copied = [one for one in self._answers if self._is_copied(one, connection, name, data)]
        # Of two that it may be, the other one could be for the host itself.
        if len(copied) == 1:
            self._answers.remove(copied[0])
            self._learn(copied[0], replace(target, name=copied[0].name))
        return None

    def check_no_handle(self, data: bytes | memoryview) -> None:
        """Data for a worker holds no handle, neither a present nor an old one. Raises HandleLeakedError."""
        if self._order and bytes(data).find(self._magic) >= 0:
            raise HandleLeakedError("a tensor's handle is part of something else")

    @property
    def order(self) -> int:
        """Rises with every transfer: for `settled`."""
        return self._order

    async def settled(self, order: int, timeout: float) -> None:
        """Wait until all handles up to `order` came back. Raises HandleLeakedError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while any(transfer.order <= order for transfer in self._out.values()):
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            raise HandleLeakedError("a tensor's handle was not used where it was learned") from None

    def _may_push(self, source: int, target: CopyTarget) -> bool:
        other = self._connections.get(target.connection)
        return other is not None and (source, other.worker) in self._reachable

    def _begin(self, target: CopyTarget, size: int) -> Transfer:
        worker = self._connections[target.connection].worker
        counter = self._counters.get(worker, 0) + 1
        self._counters[worker] = counter
        self._order += 1
        tag = push_tag(self.key(worker), counter, size)
        head = self._magic + _OFFSET.pack(counter) + tag
        # Not a number, in every float type: if the engine computes with it, the result shows that.
        transfer = Transfer(worker, target, counter, tag, head + b"\xff" * (size - len(head)), self._order)
        self._out[head] = transfer
        return transfer

    def _is_copied(self, answer: _Answer, connection: int, name: bytes, data: memoryview) -> bool:
        source = answer.source
        return (
            len(data) == source.size
            and source.connection in self._connections
            and source.connection != connection
            and _is_copy_of(name, answer.name)
            and bytes(data) == answer.content
        )

    def _learn(self, answer: _Answer, target: CopyTarget) -> None:
        self.relayed += 1
        self._connections[answer.source.connection].learn(answer.source, target)


def _pattern(structure: GraphStructure, tensor: Tensor, size: int, turn: int) -> CopyPattern | None:
    if tensor.name not in structure.names or tensor.type not in GGML_TYPES or tensor.extent != size:
        return None
    return CopyPattern(tensor.name, turn, tensor.type, math.prod(tensor.shape[1:]) >= _MANY_ROWS)


def _is_expected(expected: CopyTarget, target: CopyTarget, name: bytes) -> bool:
    """Whether a SET of a tensor called `name` is the one that a transfer was begun for."""
    if (expected.connection, expected.offset) != (target.connection, target.offset):
        return False
    return _is_copy_of(name, expected.name) if expected.place is None else expected.place == target.place


def _keep_newest(entries: OrderedDict[Any, Any], most: int) -> None:
    if len(entries) > most:
        entries.popitem(last=False)


def _is_copy_of(name: bytes, source: bytes) -> bool:
    """Whether the scheduler's name for a copy, `BACKEND#NAME#n` cut at 63 bytes, is one of `source`."""
    _, mark, rest = name.partition(b"#")
    if not mark or not source:
        return False
    if len(name) >= _LONGEST_NAME:
        return (source + b"#").startswith(rest) or rest.startswith(source + b"#")
    return rest.startswith(source + b"#") and rest[len(source) + 1 :].isdigit()
