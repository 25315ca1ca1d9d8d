"""What a node does for its machine's owner: gives up, remembers, takes up again."""

from random import Random

from tests.support.core_values import GB, config, facts, of_kind
from tests.support.fake_peers import FakePeers
from tests.support.split_mesh import SplitMesh

from mesh_llm.core.config import SplitOptions, YieldPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.types.effects import AnyEffect, Finished, Notice, StartEngine, StopEngine
from mesh_llm.core.types.events import (
    AnyEvent,
    DropRequested,
    EngineExited,
    EngineReady,
    LoadRequested,
    OwnerSensed,
    Started,
    StopRequested,
    Tick,
)
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import Capacity, ModelStatus

M, N = ModelName("m"), ModelName("n")
BATTERY, MAINS = OwnerSensed(on_battery=True), OwnerSensed()


class Trial:
    """A node that serves `m` and yields on battery."""

    def __init__(self) -> None:
        self.peers = FakePeers()
        self.node = Node(config("m", yields=YieldPolicy(battery=True)), Random(1), self.peers)
        self.now = 0.0

    def does(self, *events: AnyEvent) -> list[AnyEffect]:
        return [effect for event in events for effect in self.node.handle(event, self.now)]

    def begins(self) -> list[AnyEffect]:
        on_disk = (facts("m"), facts("n"))
        return self.does(Started(capacity=Capacity(memory_bytes=8 * GB), on_disk=on_disk))

    def serves(self, model: ModelName = M, term: int = 1) -> None:
        self.does(EngineReady(model=model, term=Term(term), address="127.0.0.1:9", context=2048, slots=4))

    def ends(self, model: ModelName = M, term: int = 1) -> list[AnyEffect]:
        return self.does(EngineExited(model=model, term=Term(term), code=0))

    def passes(self, seconds: float) -> list[AnyEffect]:
        until, effects = self.now + seconds, list[AnyEffect]()
        while (deadline := self.node.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            effects += self.does(Tick())
            after = self.node.deadline()
            assert after is None or after > self.now, "a deadline that a Tick does not move"
        self.now = until
        return effects


def started(effects: list[AnyEffect]) -> list[str]:
    return [effect.plan.model for effect in of_kind(effects, StartEngine)]


def codes(effects: list[AnyEffect]) -> list[str]:
    return [notice.code for notice in of_kind(effects, Notice)]


def test_models_are_drained_and_out_of_the_routes_and_come_back() -> None:
    trial = Trial()
    trial.begins()
    trial.serves()
    effects = trial.does(BATTERY)
    assert [(stop.model, stop.drain_seconds) for stop in of_kind(effects, StopEngine)] == [(M, 5.0)]
    assert "yielding" in codes(effects)
    assert trial.node.snapshot.models[M].targets == ()
    trial.passes(0.3)
    word = trial.peers.published[-1]
    assert [one.status for one in word.serving] == [ModelStatus.STOPPING]
    trial.ends()
    assert trial.peers.published[-1].capacity.memory_bytes == 0
    assert trial.node.yields_because == "it runs on its battery"
    assert started(trial.passes(1000)) == []
    trial.does(MAINS)
    assert started(trial.passes(29)) == []
    effects = trial.passes(2)
    assert started(effects) == [M]
    assert "yield_over" in codes(effects)
    assert trial.node.yields_because == ""
    trial.passes(1)
    assert trial.peers.published[-1].capacity.memory_bytes == 8 * GB


def test_a_node_that_starts_on_battery_waits() -> None:
    trial = Trial()
    trial.does(BATTERY)
    effects = trial.begins()
    assert started(effects) == []
    assert "model_later" in codes(effects)
    trial.does(MAINS)
    assert started(trial.passes(31)) == [M]


def test_what_the_user_asks_for_meanwhile_is_served_later_and_what_it_drops_is_not() -> None:
    trial = Trial()
    trial.begins()
    trial.serves()
    trial.does(BATTERY)
    trial.ends()
    assert started(trial.does(LoadRequested(model=N))) == []
    trial.does(DropRequested(model=M), MAINS)
    assert started(trial.passes(31)) == [N]


def test_a_node_can_be_stopped_meanwhile() -> None:
    trial = Trial()
    trial.begins()
    trial.serves()
    trial.does(BATTERY, StopRequested())
    assert of_kind(trial.ends(), Finished)


def test_a_come_back_before_the_engine_ended_starts_it_anew() -> None:
    trial = Trial()
    trial.begins()
    trial.serves()
    trial.does(BATTERY, MAINS)
    trial.passes(31)
    assert started(trial.ends()) == [M]


def test_a_split_group_goes_on_without_the_machine_of_its_owner() -> None:
    mesh = SplitMesh()
    asked = SplitOptions(asked=True)
    first = mesh.add(1, wants="big", memory=16.0, split=asked)
    second = mesh.add(2, memory=6.0, yields=YieldPolicy(battery=True))
    mesh.passes(5.0)
    assert mesh.host() == 1
    assert second.lending is not None
    mesh.happens(second, BATTERY)
    assert second.lending is None
    mesh.passes(5.0)
    assert mesh.shares() == {1: 16}
    mesh.happens(second, MAINS)
    mesh.passes(40.0)
    assert set(mesh.shares()) == {1, 2}
    assert first.running is not None
