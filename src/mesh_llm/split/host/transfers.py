"""Learns which tensors the engine copies from worker to worker, and lets the workers send them to each other.

The engine's scheduler copies a tensor X with a GET_TENSOR and right after it a SET_TENSOR of the same bytes, named
`...#X#n`. The copies of a graph follow from the graph, so a copy that was seen once is the same each time that this
graph is computed. Then the host answers the GET at once with a handle instead of the content. When the handle comes
back in the learned SET, the host sends PUSH to the one worker and WAIT to the other.

A handle has the tensor's size and begins with 32 bytes that nobody can guess. While one is out, no answer of a worker
reaches the engine, so no token can be made from a handle. If one turns up in another place, or does not come back, the
session ends (`HandleLeakedError`).
"""

import asyncio
import secrets
import struct
from collections import OrderedDict
from dataclasses import dataclass

from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES
from mesh_llm.wire.ggml_rpc.tensors import name_of, place_of
from mesh_llm.wire.ggml_rpc.tunnel import KEY_BYTES, MAX_PUSH, TAG_BYTES, push_tag

_MAGIC_BYTES = 8
_HEAD_BYTES = _MAGIC_BYTES + 8 + TAG_BYTES
_MAX_GRAPHS = 4096
_LONGEST_NAME = 63
_REGION = struct.Struct("<QQ")
_OFFSET = struct.Struct("<Q")

Place = tuple[int, ...]


class HandleLeakedError(Exception):
    """A handle went where the tensor's content should be; the engine's state is worthless."""


@dataclass(frozen=True, slots=True)
class CopySource:
    """One GET_TENSOR within the computation of one graph; `turn` counts repetitions of the same one."""

    connection: int
    graph: bytes
    place: Place
    offset: int
    size: int
    turn: int


@dataclass(frozen=True, slots=True)
class CopyTarget:
    """The SET_TENSOR that a copy ends in."""

    connection: int
    place: Place
    offset: int


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
        self.turns: dict[tuple[Place, int, int], int] = {}
        self.by_uid: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self.learned: OrderedDict[bytes, dict[CopySource, CopyTarget]] = OrderedDict()


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
        self._last: tuple[CopySource, bytes, bytes] | None = None
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
        self._last = None
        for other in self._connections.values():
            other.learned.clear()

    def freed(self, connection: int) -> None:
        """Memory was freed: its addresses may mean something else from now on."""
        self._connections[connection].learned.clear()
        for other in self._connections.values():
            for targets in other.learned.values():
                for source in [source for source, target in targets.items() if target.connection == connection]:
                    del targets[source]

    # The engine's requests

    def computes(self, connection: int, identity: tuple[int, int], signature: bytes | None) -> None:
        """A graph is computed. `signature` None: the last one with this identity, again."""
        here = self._connections[connection]
        if signature is not None:
            here.by_uid[identity] = signature
            if len(here.by_uid) > _MAX_GRAPHS:
                here.by_uid.popitem(last=False)
        here.graph = here.by_uid.get(identity, b"")
        here.turns.clear()

    def get(self, connection: int, payload: memoryview) -> tuple[CopySource, Transfer | None]:
        """A GET_TENSOR. With a transfer, if it can be one: answer with its handle then."""
        here = self._connections[connection]
        place = place_of(payload)
        offset, size = _REGION.unpack_from(payload, TENSOR_BYTES)
        turn = here.turns.get((place, offset, size), 0)
        here.turns[place, offset, size] = turn + 1
        source = CopySource(connection, here.graph, place, offset, size, turn)
        self._last = None
        target = here.learned.get(here.graph, {}).get(source)
        if target is None or not self._may_push(here.worker, target):
            return source, None
        here.learned.move_to_end(here.graph)
        return source, self._begin(target, size)

    def answered(self, source: CopySource, payload: bytes, content: bytes) -> None:
        """A GET_TENSOR was answered with a tensor's content."""
        if source.graph and _HEAD_BYTES <= source.size <= MAX_PUSH and source.connection in self._connections:
            self._last = (source, name_of(payload), content)

    def set(self, connection: int, payload: memoryview) -> Transfer | None:
        """A whole SET_TENSOR; the transfer that it completes, if it does.

        Raises:
            HandleLeakedError: it carries a handle that does not belong there.
        """
        data = payload[SET_TENSOR_HEAD:]
        target = CopyTarget(connection, place_of(payload), _OFFSET.unpack_from(payload, TENSOR_BYTES + 1)[0])
        if self._order:
            transfer = self._out.get(bytes(data[:_HEAD_BYTES]))
            if transfer is not None:
                if transfer.target != target or bytes(data) != transfer.handle:
                    raise HandleLeakedError("a tensor's handle came back in another place")
                del self._out[transfer.handle[:_HEAD_BYTES]]
                self._settled.set()
                return transfer
            self.check_no_handle(data)
        if self._last is not None and len(data) == self._last[0].size:
            self._learn(*self._last, target, name_of(payload), data)
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

    def _learn(
        self, get: CopySource, get_name: bytes, content: bytes, target: CopyTarget, name: bytes, data: memoryview
    ) -> None:
        source = self._connections.get(get.connection)
        if source is None or get.connection == target.connection or bytes(data) != content:
            return
        if not _is_copy_of(name, get_name):
            return
        self._last = None
        self.relayed += 1
        source.learned.setdefault(get.graph, {})[get] = target
        if len(source.learned) > _MAX_GRAPHS:
            source.learned.popitem(last=False)


def _is_copy_of(name: bytes, source: bytes) -> bool:
    """Whether the scheduler's name for a copy, `BACKEND#NAME#n` cut at 63 bytes, is one of `source`."""
    _, mark, rest = name.partition(b"#")
    if not mark or not source:
        return False
    if len(name) >= _LONGEST_NAME:
        return (source + b"#").startswith(rest) or rest.startswith(source + b"#")
    return rest.startswith(source + b"#") and rest[len(source) + 1 :].isdigit()
