"""What a node does for the owner of its machine: reasons, delays, what is given up and served again."""

from random import Random

import pytest
from tests.support.core_values import GB, config, facts, of_kind
from tests.support.fake_peers import FakePeers
from tests.support.split_mesh import SplitMesh

from mesh_llm.core.config import SplitOptions, YieldPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.placement.local_models import LocalModels
from mesh_llm.core.placement.yield_controller import YieldController
from mesh_llm.core.split.controller import SplitController
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
    assert trial.node.yield_reason == "it runs on its battery"
    assert started(trial.passes(1000)) == []
    trial.does(MAINS)
    assert started(trial.passes(29)) == []
    effects = trial.passes(2)
    assert started(effects) == [M]
    assert "yield_over" in codes(effects)
    assert trial.node.yield_reason == ""
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


class Machine:
    """What is sensed of the owner over time; evaluates exactly at the deadlines."""

    def __init__(self, **policy: object) -> None:
        chosen = YieldPolicy(**policy)  # pyright: ignore[reportArgumentType]
        models = LocalModels(config())
        self.yielding = YieldController(chosen, models, SplitController(config(), models))
        self.now = 0.0

    def senses(self, **sensed: object) -> str:
        self.yielding.sense(OwnerSensed(**sensed), self.now)  # pyright: ignore[reportArgumentType]
        self.yielding.evaluate(self.now)
        return self.yielding.reason

    def passes(self, seconds: float) -> str:
        until = self.now + seconds
        while (deadline := self.yielding.deadline()) is not None and deadline <= until:
            self.now = deadline
            assert self.yielding.evaluate(self.now), "a deadline at which nothing changes"
        self.now = until
        return self.yielding.reason


def test_nothing_is_looked_for_unasked() -> None:
    assert not YieldPolicy().watches
    machine = Machine()
    assert machine.senses(busy=1.0, on_battery=True, fullscreen=True, minute=600) == ""
    assert machine.passes(1000) == ""


@pytest.mark.parametrize(
    ("policy", "sensed"),
    [
        ({"battery": True}, {"on_battery": True}),
        ({"fullscreen": True}, {"fullscreen": True}),
        ({"schedule": ((540, 1020),)}, {"minute": 540}),
    ],
)
def test_what_lasts_counts_at_once(policy: dict[str, object], sensed: dict[str, object]) -> None:
    assert Machine(**policy).senses(**sensed)


def test_a_moment_of_load_is_no_reason() -> None:
    machine = Machine(load=0.5)
    assert machine.senses(busy=0.9) == ""
    assert machine.passes(3.0) == ""
    assert machine.senses(busy=0.2) == ""
    assert machine.passes(100.0) == ""
    machine.senses(busy=0.9)
    assert "processors" in machine.passes(4.0)


def test_load_must_fall_well_below_the_limit_and_stay_there() -> None:
    machine = Machine(load=0.5)
    machine.senses(busy=0.9)
    assert machine.passes(5.0)
    assert machine.senses(busy=0.4)
    assert machine.passes(1000.0)
    assert machine.senses(busy=0.2)
    assert machine.passes(29.0)
    assert machine.senses(busy=0.9)
    assert machine.senses(busy=0.1)
    assert machine.passes(29.0)
    assert machine.passes(1.5) == ""


def test_a_span_may_pass_midnight() -> None:
    machine = Machine(schedule=((22 * 60, 8 * 60),))
    assert machine.senses(minute=21 * 60 + 59) == ""
    assert machine.senses(minute=23 * 60) == "it is between 22:00 and 08:00"
    assert machine.senses(minute=7 * 60 + 59)
    assert machine.senses(minute=8 * 60) == ""


def test_the_reason_is_the_present_one() -> None:
    machine = Machine(battery=True, fullscreen=True)
    assert machine.senses(on_battery=True) == "it runs on its battery"
    assert machine.senses(fullscreen=True) == "a program fills its screen"
    assert machine.passes(1000.0) == "a program fills its screen"
