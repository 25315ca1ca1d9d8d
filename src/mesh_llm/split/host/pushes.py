"""Which tensor goes from one worker to another, learned from what the engine does; and the transfers under way.

The engine's scheduler copies a tensor X from worker to worker by a GET_TENSOR and, in the same breath, a SET_TENSOR of
the same bytes under the name `...#X#n`. Where that was seen once for a graph, it is the same whenever the very same
graph is computed again: the order of copies follows from the graph. Then the GET is answered at once with a handle
instead of the tensor, and when the handle comes back in the SET that was learned, both workers are told to do it among
themselves.

A handle is 32 bytes that nobody can guess, once for each transfer, in place of a whole tensor. While one is out, no
answer of a worker reaches the engine, so no token can be made of it; if it turns up anywhere but where it belongs, or
not at all, the session ends (`EscapedError`).
"""

import asyncio
import secrets
import struct
from collections import OrderedDict
from dataclasses import dataclass

from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES
from mesh_llm.wire.ggml_rpc.tensors import name_of, place_of
from mesh_llm.wire.ggml_rpc.tunnel import KEY_BYTES, MAX_PUSH, TAG_BYTES, push_tag

_MAGIC = 8
_LEAST = _MAGIC + 8 + TAG_BYTES
_MOST_GRAPHS = 4096
_LONGEST_NAME = 63
_REGION = struct.Struct("<QQ")
_OFFSET = struct.Struct("<Q")

Place = tuple[int, ...]


class EscapedError(Exception):
    """A handle went where the tensor's content should be; the engine's state is worthless."""


@dataclass(frozen=True, slots=True)
class Get:
    """A GET_TENSOR within the computation of one graph, told from all others."""

    connection: int
    graph: bytes
    place: Place
    offset: int
    size: int
    turn: int


@dataclass(frozen=True, slots=True)
class Target:
    """The SET_TENSOR that a GET's content goes to."""

    connection: int
    place: Place
    offset: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor on its way to a worker. `handle` stands for it meanwhile."""

    worker: int
    target: Target
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
        self.learned: OrderedDict[bytes, dict[Get, Target]] = OrderedDict()


class Pushes:
    """All of one engine's. Workers and connections are named by numbers."""

    def __init__(self) -> None:
        self._magic = secrets.token_bytes(_MAGIC)
        self._keys: dict[int, bytes] = {}
        self._counters: dict[int, int] = {}
        self._reachable: set[tuple[int, int]] = set()
        self._connections: dict[int, _Connection] = {}
        self._out: dict[bytes, Transfer] = {}
        self._order = 0
        self._last: tuple[Get, bytes, bytes] | None = None
        self._settled = asyncio.Event()
        self._settled.set()
        self.relayed = 0
        """Tensors of one worker that went to another through the host."""

    # Who is there

    def key(self, worker: int) -> bytes:
        """The secret that proves transfers to a worker."""
        return self._keys.setdefault(worker, secrets.token_bytes(KEY_BYTES))

    def reachable(self, source: int, target: int, *, yes: bool) -> None:
        """Whether one worker reaches another; until it is known, it does not."""
        (self._reachable.add if yes else self._reachable.discard)((source, target))

    def connected(self, connection: int, worker: int) -> None:
        """The engine connected to a worker."""
        self._connections[connection] = _Connection(worker)

    def disconnected(self, connection: int) -> None:
        """A connection ended: what led from or to it is no longer so."""
        self._connections.pop(connection, None)
        self._last = None
        for other in self._connections.values():
            other.learned.clear()

    def freed(self, connection: int) -> None:
        """Memory was given back: addresses mean something else from here on."""
        self._connections[connection].learned.clear()
        for other in self._connections.values():
            for targets in other.learned.values():
                for get in [get for get, target in targets.items() if target.connection == connection]:
                    del targets[get]

    # What the engine does

    def computes(self, connection: int, identity: tuple[int, int], signature: bytes | None) -> None:
        """A graph is computed: the one with this signature, or (None) the one that had this identity before."""
        here = self._connections[connection]
        if signature is not None:
            here.by_uid[identity] = signature
            if len(here.by_uid) > _MOST_GRAPHS:
                here.by_uid.popitem(last=False)
        here.graph = here.by_uid.get(identity, b"")
        here.turns.clear()

    def get(self, connection: int, payload: memoryview) -> tuple[Get, Transfer | None]:
        """A GET_TENSOR; with a transfer if it can be made one. Its handle is then the answer."""
        here = self._connections[connection]
        place = place_of(payload)
        offset, size = _REGION.unpack_from(payload, TENSOR_BYTES)
        turn = here.turns.get((place, offset, size), 0)
        here.turns[place, offset, size] = turn + 1
        get = Get(connection, here.graph, place, offset, size, turn)
        self._last = None
        target = here.learned.get(here.graph, {}).get(get)
        if target is None or not self._may_push(here.worker, target):
            return get, None
        here.learned.move_to_end(here.graph)
        return get, self._begin(target, size)

    def answered(self, get: Get, payload: bytes, content: bytes) -> None:
        """A GET_TENSOR was answered with a tensor's content."""
        if get.graph and _LEAST <= get.size <= MAX_PUSH and get.connection in self._connections:
            self._last = (get, name_of(payload), content)

    def set(self, connection: int, payload: memoryview) -> Transfer | None:
        """A SET_TENSOR, whole; the transfer that it completes, if it is one.

        Raises:
            EscapedError: it carries a handle that does not belong there.
        """
        data = payload[SET_TENSOR_HEAD:]
        target = Target(connection, place_of(payload), _OFFSET.unpack_from(payload, TENSOR_BYTES + 1)[0])
        if self._order:
            transfer = self._out.get(bytes(data[:_LEAST]))
            if transfer is not None:
                if transfer.target != target or bytes(data) != transfer.handle:
                    raise EscapedError("a tensor's handle came back in another place")
                self._end(transfer)
                return transfer
            self.check_free(data)
        if self._last is not None and len(data) == self._last[0].size:
            self._learn(target, name_of(payload), data)
        return None

    def check_free(self, data: bytes | memoryview) -> None:
        """Data that goes to a worker carries no handle, neither one that is out nor an old one. Raises EscapedError."""
        if self._order and bytes(data).find(self._magic) >= 0:
            raise EscapedError("a tensor's handle is part of something else")

    @property
    def order(self) -> int:
        """Rises with every transfer: for `settled`."""
        return self._order

    async def settled(self, order: int, timeout: float) -> None:
        """Wait until no handle given out up to `order` is still out. Raises EscapedError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while any(transfer.order <= order for transfer in self._out.values()):
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            raise EscapedError("a tensor's handle was not used where it was learned") from None

    def _may_push(self, source: int, target: Target) -> bool:
        other = self._connections.get(target.connection)
        return other is not None and (source, other.worker) in self._reachable

    def _begin(self, target: Target, size: int) -> Transfer:
        worker = self._connections[target.connection].worker
        counter = self._counters.get(worker, 0) + 1
        self._counters[worker] = counter
        self._order += 1
        tag = push_tag(self.key(worker), counter, size)
        head = self._magic + _OFFSET.pack(counter) + tag
        # Not a number, in every float type: if it is computed with, that shows.
        transfer = Transfer(worker, target, counter, tag, head + b"\xff" * (size - len(head)), self._order)
        self._out[head] = transfer
        return transfer

    def _end(self, transfer: Transfer) -> None:
        del self._out[transfer.handle[:_LEAST]]
        self._settled.set()

    def _learn(self, target: Target, name: bytes, data: memoryview) -> None:
        if self._last is None:
            return
        get, source_name, content = self._last
        source = self._connections.get(get.connection)
        if source is None or get.connection == target.connection or bytes(data) != content:
            return
        if not _is_copy_of(name, source_name):
            return
        self._last = None
        self.relayed += 1
        source.learned.setdefault(get.graph, {})[get] = target
        if len(source.learned) > _MOST_GRAPHS:
            source.learned.popitem(last=False)


def _is_copy_of(name: bytes, source: bytes) -> bool:
    """Whether the scheduler's name for a copy, `BACKEND#NAME#n` cut at 63 bytes, is one of `source`."""
    _, mark, rest = name.partition(b"#")
    if not mark or not source:
        return False
    if len(name) >= _LONGEST_NAME:
        return (source + b"#").startswith(rest) or rest.startswith(source + b"#")
    return rest.startswith(source + b"#") and rest[len(source) + 1 :].isdigit()
