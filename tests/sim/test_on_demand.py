"""Models on demand in a simulated mesh, in the short form of `make bench ARGS="on_demand.simulated"`."""

import argparse
from typing import Any

import msgspec
import pytest
from bench.on_demand.simulated import Asking, Board, BoardPeers, Machine, Simulation, report

from mesh_llm.core.config import NodeConfig, OnDemandPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.types.events import AnyEvent, RpcChanged, SplitScope, Started, Tick
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import Capacity, LaunchOptions, ModelFacts


def simulated(**options: Any) -> dict[str, Any]:
    values = {"nodes": 24, "models": 12, "hosts": 0, "copies": 4, "minutes": 3.0, "rate": 4.0, "delay": 2.0, "seed": 1}
    simulation = Simulation(argparse.Namespace(**(values | options)))
    simulation.run()
    return report(simulation, 0.0)


def test_where_there_is_room_each_model_is_loaded_once_and_stays() -> None:
    found = simulated()
    assert found["failed"] == 0
    assert found["still_waiting"] == 0
    assert found["loads"] <= 12
    assert found["loads_of_what_was_loaded_elsewhere"] == 0
    # Only the load is waited for.
    assert found["wait_longest_s"] < 12.0


@pytest.mark.slow
def test_where_there_is_too_little_room_models_take_turns_and_no_request_is_lost() -> None:
    found = simulated(hosts=5)
    assert found["failed"] == 0
    # A turn is four loads long, and the load itself comes before it. What is idle goes sooner.
    rooms, turn = 5, 5 * 8.0
    assert 12 <= found["loads"] <= rooms * (3.0 * 60.0 / turn * 2 + 1.0)
    assert found["longest_still_waiting_s"] < 12 * turn


@pytest.mark.slow
def test_where_there_is_too_little_room_nothing_goes_to_and_fro() -> None:
    found = simulated(nodes=20, models=30, hosts=16, rate=4.5, minutes=4.0)
    assert found["failed"] == 0
    assert found["loaded_again_within_a_minute"] <= 1
    # At 8 s each, a node would load for a fifth of the time at most.
    assert found["loads"] / 16 / 4.0 < 1.5


GB = 10**9
BIG = ModelFacts(
    name=ModelName("big"), size_bytes=4 * GB, layers=16, context_train=4096, embedding_length=1024, vocabulary=32_000,
    kv_bytes_per_token=16_384, fingerprint="print-big",
)  # fmt: skip
NO_OPTIONS = LaunchOptions()
CAN_SHARE = RpcChanged(rpc_version="8.0.0")
BUILDING = RpcChanged(rpc_version="", obstacle="building")


class LateWays(Board):
    """A board on which the ways to other nodes are measured only at `measured`."""

    measured = 0.0

    def advance(self, now: float) -> None:
        super().advance(now)
        for node, member in self.members.items():
            if member.rtt_ms != (way := 1.0 if now >= self.measured else 0.0):
                self.members[node] = msgspec.structs.replace(member, rtt_ms=way)
                self.revision += 1


class Joined(Simulation):
    """Two machines that hold a model together: the first has its file, and the second has just joined and asks."""

    def __init__(self) -> None:
        options = {"nodes": 0, "models": 0, "hosts": 0, "copies": 0, "delay": 0.3, "seed": 1, "rate": 0.0}
        super().__init__(argparse.Namespace(**options, minutes=0.0))
        self.board = LateWays(0.3)

    def start(
        self,
        number: int,
        *events: AnyEvent,
        disk: tuple[ModelFacts, ...] = (),
        joins: bool = True,
        options: LaunchOptions = NO_OPTIONS,
        ttl: float | None = None,
    ) -> Machine:
        node = NodeId(f"{number:064x}")
        config = NodeConfig(
            node=node, mesh=MeshId("5" * 64), name=f"node{number}", incarnation=Incarnation(1), joins=joins,
            on_demand=OnDemandPolicy(scope="members", ttl=ttl), shares=True, can_fetch=True, options=options,
        )  # fmt: skip
        one = self.machines[node] = Machine(Node(config, self.random, BoardPeers(node, self.board)), node)
        version = next(event.rpc_version for event in events if isinstance(event, RpcChanged))
        capacity = Capacity(memory_bytes=3 * GB, memory_total_bytes=3 * GB, rpc_version=version)
        for event in (*events, Started(capacity=capacity, on_disk=disk)):
            self.do(one, event)
        return one

    def look_on(self, one: Machine) -> None:
        """Let a node see what has become known, ten times a second."""
        self.do(one, Tick())
        self.later(0.1, lambda: self.look_on(one))


@pytest.mark.parametrize("late", ["nothing", "the scope", "the plugin", "the way", "the host's plugin"])
def test_a_request_at_a_machine_that_has_just_joined_waits_until_the_model_is_split(late: str) -> None:
    mesh = Joined()
    mesh.board.measured = 8.0 if late == "the way" else 0.0
    has = mesh.start(
        1, BUILDING if late == "the host's plugin" else CAN_SHARE, SplitScope(granted=True), disk=(BIG,), joins=False
    )
    mesh.later(0.0, lambda: mesh.look_on(has))
    mesh.until(20.0 if late != "the way" else 1.0)
    begun = mesh.now
    scope = () if late == "the scope" else (SplitScope(granted=True),)
    asks = mesh.start(2, BUILDING if late == "the plugin" else CAN_SHARE, *scope)
    mesh.later(0.0, lambda: mesh.look_on(asks))
    mesh.until(begun + 0.5)
    mesh.send(asks, Asking(BIG.name, mesh.now))
    mesh.until(begun + 5.0)
    if late == "the scope":
        mesh.do(asks, SplitScope(granted=True))
    elif late == "the plugin":
        mesh.do(asks, CAN_SHARE)
    elif late == "the host's plugin":
        mesh.do(has, CAN_SHARE)
    mesh.until(begun + 40.0)
    assert not mesh.problems
    assert mesh.waits
    launch = next(one for one in has.node.launches if one.model == BIG.name)
    assert launch.order.plan.split is not None


def two_that_share(*disk: ModelFacts, ttl: float | None = None) -> tuple[Joined, Machine, Machine]:
    """A mesh, its node with the files, and the one that helps."""
    mesh = Joined()
    has = mesh.start(1, CAN_SHARE, SplitScope(granted=True), disk=disk, joins=False, ttl=ttl)
    helps = mesh.start(2, CAN_SHARE, SplitScope(granted=True))
    for one in (has, helps):
        mesh.later(0.0, lambda one=one: mesh.look_on(one))
    return mesh, has, helps


def test_a_split_that_a_request_began_is_unloaded_when_nobody_asks_and_begun_again_by_the_next_request() -> None:
    mesh, has, helps = two_that_share(BIG, ttl=20.0)
    for begun in (10.0, 80.0):
        mesh.until(begun)
        mesh.send(has, Asking(BIG.name, mesh.now))
        mesh.until(begun + 20.0)
        assert [launch.order.plan.split is not None for launch in has.node.launches] == [True]
        assert helps.node.split.lending is not None
        mesh.until(begun + 65.0)
        assert has.node.launches == ()
        assert helps.node.split.lending is None
    assert (mesh.failed, len(mesh.waits)) == (0, 2)


def test_an_idle_split_that_a_request_began_makes_room_for_another_model() -> None:
    small = msgspec.structs.replace(BIG, name=ModelName("small"), size_bytes=2 * GB, fingerprint="print-small")
    mesh, has, helps = two_that_share(BIG, small)
    mesh.until(10.0)
    mesh.send(has, Asking(BIG.name, mesh.now))
    mesh.until(40.0)
    assert helps.node.split.lending is not None
    mesh.send(has, Asking(small.name, mesh.now))
    mesh.until(80.0)
    assert [launch.model for launch in has.node.launches] == [small.name]
    assert helps.node.split.lending is None
    assert (mesh.failed, len(mesh.waits)) == (0, 2)


def test_a_request_that_is_repeated_after_a_refusal_is_answered_as_soon_as_a_third_machine_has_come() -> None:
    mesh = Joined()
    bigger = msgspec.structs.replace(BIG, size_bytes=53 * GB // 10)
    # Only the host knows what context its user wants: it refuses, and the other one remembers that.
    options = LaunchOptions(context=4096, slots=8)
    has = mesh.start(1, CAN_SHARE, SplitScope(granted=True), disk=(bigger,), joins=False, options=options)
    asks = mesh.start(2, CAN_SHARE, SplitScope(granted=True))
    for one in (has, asks):
        mesh.later(0.0, lambda one=one: mesh.look_on(one))
    mesh.until(10.0)
    mesh.send(asks, Asking(BIG.name, mesh.now))
    mesh.until(15.0)
    assert mesh.failed == 1
    assert "node1 does not load it: big does not fit" in next(iter(mesh.problems))
    mesh.start(3, CAN_SHARE, SplitScope(granted=True))
    third = mesh.machines[NodeId(f"{3:064x}")]
    mesh.later(0.0, lambda: mesh.look_on(third))
    mesh.until(16.5)
    mesh.send(asks, Asking(BIG.name, mesh.now))
    mesh.until(30.0)
    assert (mesh.failed, len(mesh.waits)) == (1, 1)
