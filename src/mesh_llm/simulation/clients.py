"""Passive nodes: each follows the routing table of one active node by long poll, and moves on when that one is lost.

Actives keep nothing about them but the polls that are open: here a list that dies with the process.
"""

from dataclasses import dataclass

from mesh_llm.core.ids import NodeId
from mesh_llm.simulation.machine import Machine
from mesh_llm.simulation.world import World

_LONG_POLL = 30.0
_GATHER = 0.5
_MOST_WAITING = 256
_COME_BACK = 10.0
_RETRY = 0.5
_ASK_EVERY = 15.0


@dataclass(frozen=True)
class _Table:
    version: tuple[int, int, int]
    revision: int
    nodes: tuple[NodeId, ...]
    there: frozenset[NodeId]


_EMPTY = _Table((-1, -1, -1), -1, (), frozenset())


class Client:
    """One passive node."""

    __slots__ = ("poll", "source", "table")

    def __init__(self, source: Machine) -> None:
        self.source = source
        self.table = _EMPTY
        self.poll = 0


class Clients:
    """All of them, and what the actives do for them."""

    def __init__(self, world: World, count: int) -> None:
        self._world = world
        self._waiting: dict[Machine, list[tuple[Client, int]]] = {}
        self._tables: dict[Machine, _Table] = {}
        self._gathering: set[Machine] = set()
        self.answered = 0
        self.most_waiting = 0
        machines = world.machines
        self.all = [Client(machines[index % len(machines)]) for index in range(count)]
        for client in self.all:
            self._later(world.random.random() * 5.0, client)
            self._use_later(client)

    def holds_any(self, gone: frozenset[NodeId]) -> bool:
        """Whether any client would still send requests there."""
        return any(not gone.isdisjoint(client.table.there) for client in self.all)

    def changed(self, machine: Machine) -> None:
        """An active node's view changed: those who wait there are told a moment later."""
        if machine in self._waiting and machine not in self._gathering:
            self._gathering.add(machine)
            self._world.call(self._world.time + _GATHER, lambda: self._tell(machine))

    def _later(self, wait: float, client: Client) -> None:
        self._world.call(self._world.time + wait, lambda: self._ask(client))

    def _ask(self, client: Client) -> None:
        world = self._world
        client.poll += 1
        poll, source = client.poll, client.source
        if not source.runs:
            # A standing connection to a dead process is only seen to be dead after a while; a new one fails at once.
            world.call(world.time + _RETRY, lambda: self._move(client, poll))
            return
        table = self._table(source)
        if client.table.version != table.version:
            self._answer(client, table)
            return
        waiting = self._waiting.setdefault(source, [])
        if len(waiting) >= _MOST_WAITING:
            self._later(_COME_BACK, client)
            return
        waiting.append((client, poll))
        self.most_waiting = max(self.most_waiting, len(waiting))
        world.call(world.time + _LONG_POLL, lambda: self._expire(client, poll))

    def _answer(self, client: Client, table: _Table) -> None:
        self.answered += 1
        client.table = table
        self._later(self._world.scenario.delay_ms / 500.0, client)

    def _tell(self, machine: Machine) -> None:
        self._gathering.discard(machine)
        waiting = self._waiting.pop(machine, [])
        if not machine.runs:
            return
        table = self._table(machine)
        for client, poll in waiting:
            if client.poll == poll:
                if client.table.version == table.version:
                    self._waiting.setdefault(machine, []).append((client, poll))
                else:
                    self._answer(client, table)

    def _expire(self, client: Client, poll: int) -> None:
        if client.poll != poll:
            return
        waiting = self._waiting.get(client.source)
        if waiting is not None and (client, poll) in waiting:
            waiting.remove((client, poll))
        if client.source.runs:
            self.answered += 1
            self._ask(client)
        else:
            self._move(client, poll)

    def _move(self, client: Client, poll: int) -> None:
        if client.poll == poll:
            client.source = self._world.random.choice(self._world.machines)
            self._ask(client)

    def _use_later(self, client: Client) -> None:
        wait = _ASK_EVERY * (0.5 + self._world.random.random())
        self._world.call(self._world.time + wait, lambda: self._use(client))

    def _use(self, client: Client) -> None:
        """Ask somebody in the table for an answer; a dead one is seen at once, and another table fetched."""
        if client.table.nodes:
            target = self._world.by_id[self._world.random.choice(client.table.nodes)]
            if not target.runs:
                self._move(client, client.poll)
        self._use_later(client)

    def _table(self, machine: Machine) -> _Table:
        mind = machine.mind
        if mind is None:
            return _EMPTY
        revision = mind.membership.revision
        known = self._tables.get(machine, _EMPTY)
        epoch = (machine.index, machine.life)
        if known.version[:2] == epoch and known.revision == revision:
            return known
        nodes = tuple(member.announcement.node for member in mind.membership.members() if not member.suspect)
        version = known.version
        if version[:2] != epoch or nodes != known.nodes:
            version = (*epoch, known.version[2] + 1)
        table = _Table(version, revision, nodes, known.there if nodes == known.nodes else frozenset(nodes))
        self._tables[machine] = table
        return table
