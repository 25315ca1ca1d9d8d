"""What runs on a simulated machine: membership alone, or a whole node; and the passive nodes that follow them.

Engines load in a moment and never fail. A passive node follows the routing table of one active node by long poll, and
moves on when that node is lost. Active nodes keep nothing about passive ones but the open polls.
"""

from dataclasses import dataclass
from hashlib import blake2b
from random import Random

import msgspec

from mesh_llm.core.config import MembershipConfig, NodeConfig
from mesh_llm.core.membership.membership import Membership
from mesh_llm.core.node import Node
from mesh_llm.core.routing.ranking import RoutingSnapshot
from mesh_llm.core.types.announcement import Announcement, Serving
from mesh_llm.core.types.effects import AnyEffect, SetRoutes
from mesh_llm.core.types.events import AnyEvent, Started, StopRequested, TrafficSampled
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import Capacity, ModelFacts, ModelStatus
from mesh_llm.simulation.scenario import Scenario
from mesh_llm.simulation.world import Machine, World

MESH = MeshId("5" * 64)
_FIRST_LIFE = 1_700_000_000


def node_id(seed: int, index: int) -> NodeId:
    """Ids spread over the ring like public keys."""
    return NodeId(blake2b(f"{seed}:{index}".encode(), digest_size=32).hexdigest())


def incarnation(local: float) -> Incarnation:
    """The incarnation that a machine's clock gives."""
    return Incarnation(_FIRST_LIFE + int(local))


class MembershipAdapter:
    """Membership with a made-up announcement."""

    def __init__(self, node: NodeId, index: int, life: Incarnation, pace: MembershipConfig, seed: int) -> None:
        self.membership = Membership(node, MESH, life, pace, Random(seed))  # noqa: S311 - not for secrets
        model = ModelName(f"model-{index % 4}")
        self._word = Announcement(
            mesh=MESH,
            node=node,
            incarnation=life,
            sequence=0,
            name=f"node-{index}",
            serving=(Serving(model=model, status=ModelStatus.WARM, context=4096, slots=4),),
            addresses=(f"10.0.{index // 256 % 256}.{index % 256}:7000",),
        )

    def start(self, now: float) -> list[AnyEffect]:
        """Announce."""
        return self.membership.publish(self._word, now)

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Pass the call on."""
        return self.membership.handle(event, now)

    def change_load(self, in_flight: int, now: float) -> list[AnyEffect]:
        """Announce other requests in flight."""
        serving = msgspec.structs.replace(self._word.serving[0], in_flight=in_flight)
        self._word = msgspec.structs.replace(self._word, serving=(serving,))
        return self.membership.publish(self._word, now)

    def stop(self, now: float) -> list[AnyEffect]:
        """Leave."""
        return self.membership.leave(now)

    def deadline(self) -> float | None:
        """Pass the call on."""
        return self.membership.deadline()


_GB = 10**9


def model_name(index: int) -> ModelName:
    """The name of one of the simulated models."""
    return ModelName(f"model-{index}")


def _facts(index: int) -> ModelFacts:
    return ModelFacts(
        name=model_name(index),
        size_bytes=4 * _GB,
        layers=32,
        context_train=8192,
        embedding_length=4096,
        vocabulary=32_000,
        kv_bytes_per_token=65_536,
        fingerprint=f"{index:032x}",
    )


class NodeAdapter:
    """`core.node.Node`. The first nodes seed one model each, in turn; standby ones come with nothing to serve."""

    def __init__(self, node: NodeId, index: int, life: Incarnation, scenario: Scenario, seed: int) -> None:
        rng = Random(seed)  # noqa: S311 - not for secrets
        standby = index >= scenario.nodes - scenario.standby
        config = NodeConfig(
            node=node,
            mesh=MESH,
            name=f"node-{index}",
            version="simulated",
            incarnation=life,
            wanted=() if standby else (model_name(index % scenario.models),),
            joins=False,
            pace=scenario.pace,
        )
        self.membership = Membership(node, MESH, life, scenario.pace, rng)
        self._node = Node(config, rng, self.membership)
        self._started = Started(
            capacity=Capacity(memory_bytes=16 * _GB, memory_total_bytes=16 * _GB, devices=("CPU",), engine="simulated"),
            on_disk=tuple(_facts(number) for number in range(scenario.models)),
            addresses=(f"10.0.{index // 256 % 256}.{index % 256}:7000",),
        )
        self.snapshot: RoutingSnapshot | None = None

    @property
    def serves(self) -> frozenset[ModelName]:
        """The models that run here, or are about to."""
        running = {ModelStatus.LOADING, ModelStatus.WARM}
        return frozenset(one.model for one in self._node.serving if one.status in running)

    def start(self, now: float) -> list[AnyEffect]:
        """Start the node."""
        return self.handle(self._started, now)

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Pass the event on, and keep the routes."""
        effects = self._node.handle(event, now)
        for effect in effects:
            if isinstance(effect, SetRoutes):
                self.snapshot = effect.snapshot
        return effects

    def change_load(self, in_flight: int, now: float) -> list[AnyEffect]:
        """Change the requests in flight at its engines."""
        return self.handle(TrafficSampled(in_flight=dict.fromkeys(self.serves, in_flight)), now)

    def stop(self, now: float) -> list[AnyEffect]:
        """Stop without waiting for requests."""
        return self.handle(StopRequested(drain_seconds=0.0), now)

    def deadline(self) -> float | None:
        """Pass the call on."""
        return self._node.deadline()

    def routes_to(self, model: ModelName) -> frozenset[NodeId]:
        """Where it would send a request for a model."""
        route = self.snapshot.models.get(model) if self.snapshot is not None else None
        if route is None:
            return frozenset()
        return frozenset(target.node for target in route.targets if target.status is ModelStatus.WARM)


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
    """One passive node: the active one that it follows, its table, and the number of its last poll."""

    __slots__ = ("poll", "source", "table")

    def __init__(self, source: Machine) -> None:
        self.source = source
        self.table = _EMPTY
        self.poll = 0


class Clients:
    """All passive nodes, and the polls that active nodes answer for them."""

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
        """Whether any client would still send requests to one of these nodes."""
        return any(not gone.isdisjoint(client.table.there) for client in self.all)

    def changed(self, machine: Machine) -> None:
        """An active node's view changed: answer its open polls a moment later."""
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
        """Send a request to a node in the table. If it is dead, follow another active node."""
        if client.table.nodes:
            target = self._world.by_id[self._world.random.choice(client.table.nodes)]
            if not target.runs:
                self._move(client, client.poll)
        self._use_later(client)

    def _table(self, machine: Machine) -> _Table:
        adapter = machine.adapter
        if adapter is None:
            return _EMPTY
        revision = adapter.membership.revision
        known = self._tables.get(machine, _EMPTY)
        epoch = (machine.index, machine.life)
        if known.version[:2] == epoch and known.revision == revision:
            return known
        nodes = tuple(member.announcement.node for member in adapter.membership.members() if not member.suspect)
        version = known.version
        if version[:2] != epoch or nodes != known.nodes:
            version = (*epoch, known.version[2] + 1)
        table = _Table(version, revision, nodes, known.there if nodes == known.nodes else frozenset(nodes))
        self._tables[machine] = table
        return table
