import re
from random import Random

import msgspec
from tests.support.core_values import GB, config, facts, member, node_id, of_kind, serving
from tests.support.fake_peers import FakePeers

from mesh_llm.core.node import Node
from mesh_llm.core.placement.local_models import LoadRefused
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.effects import AnyEffect, Finished, Notice, SetRoutes, StartEngine, StopEngine
from mesh_llm.core.types.events import (
    AddressesChanged,
    AnyEvent,
    DropRequested,
    EngineExited,
    EngineReady,
    LoadRequested,
    ModelsChanged,
    ModelUnavailable,
    OwnershipChanged,
    PeerConnected,
    RoutesLearned,
    Started,
    StopRequested,
    TargetFailed,
    Tick,
    TrafficSampled,
)
from mesh_llm.core.types.ids import ModelName, OwnerId, Term
from mesh_llm.core.types.model import Capacity, LaunchPlan, ModelKind, ModelStatus, Role

M = ModelName("m")


def started(*names: str, memory: int = 8 * GB) -> Started:
    return Started(capacity=Capacity(memory_bytes=memory), on_disk=tuple(facts(name) for name in names))


def ready(model: str = "m", term: int = 1) -> EngineReady:
    return EngineReady(model=ModelName(model), term=Term(term), address="127.0.0.1:9", context=2048, slots=4)


def exited(model: str = "m", term: int = 1) -> EngineExited:
    return EngineExited(model=ModelName(model), term=Term(term), code=-9, reason="killed")


class Trial:
    """A node with stand-in peers and a clock."""

    def __init__(self, *wanted: str, joins: bool = False) -> None:
        self.peers = FakePeers()
        self.node = Node(config(*wanted, joins=joins), Random(1), self.peers)
        self.now = 0.0

    def does(self, *events: AnyEvent) -> list[AnyEffect]:
        effects: list[AnyEffect] = []
        for event in events:
            effects += self.node.handle(event, self.now)
        return effects

    def passes(self, seconds: float) -> list[AnyEffect]:
        """Let time pass, with a Tick at each deadline."""
        effects: list[AnyEffect] = []
        until = self.now + seconds
        while (deadline := self.node.deadline()) is not None and deadline <= until:
            before = self.now
            self.now = max(self.now, deadline)
            effects += self.node.handle(Tick(), self.now)
            after = self.node.deadline()
            assert after is None or after > self.now or self.now > before, "a deadline that a Tick does not move"
        self.now = until
        return effects

    @property
    def route(self) -> ModelRoute:
        return self.node.snapshot.models[M]


def test_a_node_serves_the_first_of_its_models() -> None:
    trial = Trial("m", "second")
    effects = trial.does(started("m", "second"))
    assert [effect.plan.model for effect in of_kind(effects, StartEngine)] == ["m"]
    (routes,) = of_kind(effects, SetRoutes)
    assert routes.snapshot.default == "m"
    assert {name: route.status for name, route in routes.snapshot.models.items()} == {
        "m": ModelStatus.LOADING,
        "second": ModelStatus.COLD,
    }
    trial.does(ready())
    (target,) = trial.route.targets
    assert (target.local, target.address, target.status) == (True, "127.0.0.1:9", ModelStatus.WARM)
    assert trial.node.role is Role.SERVE


def test_versions_rise_only_with_changes() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready())
    version = trial.node.snapshot.version
    assert of_kind(trial.does(Tick(), AddressesChanged(addresses=("1.2.3.4:5",)), TrafficSampled()), SetRoutes) == []
    assert trial.node.snapshot.version == version
    trial.does(TrafficSampled(in_flight={"m": 4}))
    assert trial.node.snapshot.version == version + 1
    assert trial.route.targets[0].load == 1.0


def test_a_model_that_is_not_there_or_too_big_is_refused_with_the_reason() -> None:
    trial = Trial("absent")
    (notice,) = of_kind(trial.does(started("m", memory=GB // 2)), Notice)
    assert notice.code == "model_not_found"
    (notice,) = of_kind(trial.does(LoadRequested(model=M)), Notice)
    assert notice.code == "does_not_fit"
    assert "need" in trial.route.reason
    assert trial.route.status is ModelStatus.FAILED
    assert trial.node.role is Role.STANDBY
    assert isinstance(trial.node.check_load(M), LoadRefused)


def test_models_share_the_memory() -> None:
    trial = Trial("a")
    trial.does(started("a", "b", "c", memory=int(4.2 * GB)), ready("a"))
    assert isinstance(trial.node.check_load(ModelName("b")), LaunchPlan)
    trial.does(LoadRequested(model=ModelName("b")))
    used = sum(launch.order.plan.memory_bytes for launch in trial.node.launches)
    assert used <= 4.2 * GB
    assert trial.node.free_bytes == int(4.2 * GB) - used


def test_drop_then_load_again() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready())
    (stop,) = of_kind(trial.does(DropRequested(model=M, drain_seconds=7.0)), StopEngine)
    assert (stop.term, stop.drain_seconds) == (1, 7.0)
    assert trial.route.targets == ()
    assert trial.route.status is ModelStatus.STOPPING
    trial.does(exited())
    assert trial.route.status is ModelStatus.COLD
    trial.passes(1.0)
    assert trial.peers.published[-1].wanted == ()
    (start,) = of_kind(trial.does(LoadRequested(model=M)), StartEngine)
    assert start.term == 2


def test_whose_node_it_is_is_announced_as_soon_as_it_changes() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready())
    assert trial.peers.published[-1].ownership is None
    mine = Ownership(owner=OwnerId("1" * 64), issued=0, expires=2**40, signature=b"s" * 64)
    for ownership, known in ((mine, {trial.node.config.node: mine}), (None, {})):
        trial.does(OwnershipChanged(ownership=ownership))
        trial.passes(1.0)
        assert trial.peers.published[-1].ownership == ownership
        # Passive nodes get it with the routes.
        assert trial.node.snapshot.owners == known


def test_a_dead_engine_leaves_the_routes_at_once_and_comes_back() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready())
    trial.now = 10.0
    trial.does(exited())
    assert trial.route.status is ModelStatus.LOADING
    assert all(target.status is not ModelStatus.WARM for target in trial.route.targets)
    (start,) = of_kind(trial.passes(1.0), StartEngine)
    assert start.term == 2
    trial.does(ready(term=2))
    assert trial.route.status is ModelStatus.WARM


def test_a_crash_loop_ends_and_is_told() -> None:
    trial = Trial("m")
    effects = trial.does(started("m"))
    for term in range(1, 10):
        trial.does(ready(term=term))
        effects = trial.does(exited(term=term))
        if not of_kind(trial.passes(10.0), StartEngine):
            break
    else:
        raise AssertionError("it was restarted for ever")
    assert term == 4
    (notice,) = [one for one in of_kind(effects, Notice) if one.code == "model_failed"]
    assert "killed" in notice.text
    assert re.fullmatch(
        r"it ended 4 times within 120 seconds; tried again at [0-9:]{8} UTC: killed", trial.route.reason
    )


def failed(trial: Trial, term: int = 1) -> int:
    """Let a model end until it has failed; its last term."""
    while trial.route.status is not ModelStatus.FAILED:
        trial.does(ready(term=term))
        trial.does(exited(term=term))
        if of_kind(trial.passes(10.0), StartEngine):
            term += 1
    return term


def test_a_model_that_failed_comes_back_by_itself_after_a_pause_and_a_longer_one() -> None:
    trial = Trial("m")
    trial.does(started("m"))
    term = failed(trial)
    assert of_kind(trial.passes(40.0), StartEngine) == []
    effects = trial.passes(20.0)
    assert [effect.term for effect in of_kind(effects, StartEngine)] == [term + 1]
    assert "model_retried" in [notice.code for notice in of_kind(effects, Notice)]
    assert trial.route.status is ModelStatus.LOADING
    term = failed(trial, term + 1)
    assert of_kind(trial.passes(70.0), StartEngine) == []
    assert of_kind(trial.passes(50.0), StartEngine)
    trial.does(ready(term=term + 1))
    assert trial.route.status is ModelStatus.WARM


def test_a_model_that_failed_and_was_dropped_or_does_not_fit_any_more_is_not_started() -> None:
    trial = Trial("m")
    trial.does(started("m"))
    failed(trial)
    trial.does(ModelsChanged(on_disk=()))
    assert of_kind(trial.passes(70.0), StartEngine) == []
    assert "not on this machine's disk" in trial.route.reason
    trial.does(DropRequested(model=M))
    assert of_kind(trial.passes(4000.0), StartEngine) == []


def test_a_failed_local_target_is_routed_around_until_its_engine_is_anew() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready())
    trial.now = 10.0
    trial.does(TargetFailed(node=node_id(1), model=M, reason="refused", term=1))
    assert trial.route.targets == ()
    trial.does(exited())
    trial.passes(0.6)
    trial.does(ready(term=2))
    assert [target.term for target in trial.route.targets] == [2]
    trial.does(TargetFailed(node=node_id(1), model=M, reason="word of the old one", term=1))
    assert [target.term for target in trial.route.targets] == [2]


def test_a_failed_remote_target_leaves_at_once_and_comes_back() -> None:
    trial = Trial()
    trial.does(started())
    trial.peers.set(member(2, serving("m")), member(3, serving("m")))
    trial.does(Tick())
    assert [target.node for target in trial.route.targets] == [node_id(2), node_id(3)]
    event = TargetFailed(node=node_id(2), model=M, reason="reset")
    (routes,) = of_kind(trial.does(event), SetRoutes)
    assert [target.node for target in routes.snapshot.models[M].targets] == [node_id(3)]
    assert event in trial.peers.seen
    trial.passes(3.0)
    assert len(trial.route.targets) == 2


def test_a_doubted_host_is_used_for_a_moment_where_nobody_else_serves() -> None:
    trial = Trial()
    trial.does(started())
    trial.peers.set(member(2, serving("m"), suspect=True))
    trial.does(Tick())
    assert trial.route.status is ModelStatus.WARM
    trial.passes(0.9)
    assert len(trial.route.targets) == 1
    trial.passes(0.2)
    assert (trial.route.status, trial.route.targets) == (ModelStatus.LOADING, ())
    trial.peers.set(member(2, serving("m")))
    trial.passes(0.2)
    assert trial.route.status is ModelStatus.WARM


def test_other_nodes_words_change_routes_at_a_bounded_rate() -> None:
    trial = Trial()
    trial.does(started())
    count = 0
    for step in range(100):
        trial.now = step * 0.01
        trial.peers.set(member(2, serving("m", context=step)))
        count += len(of_kind(trial.does(Tick()), SetRoutes))
    assert count == 10
    trial.passes(0.1)
    assert trial.route.context == 99


def test_what_it_says_of_itself() -> None:
    trial = Trial("m")
    projector = facts("eyes", kind=ModelKind.PROJECTOR)
    trial.does(
        Started(capacity=Capacity(memory_bytes=8 * GB), on_disk=(facts("m"), projector), addresses=("1.1.1.1:1",))
    )
    word = trial.peers.published[-1]
    assert (word.node, word.role, word.wanted, word.addresses) == (node_id(1), Role.SERVE, ("m",), ("1.1.1.1:1",))
    assert [one.name for one in word.on_disk] == ["m"]
    assert [(one.model, one.status) for one in word.serving] == [("m", ModelStatus.LOADING)]
    trial.passes(1.0)
    trial.does(ready(), ModelsChanged(on_disk=(facts("m"), facts("n"))), TrafficSampled(wanted={"m": 30}))
    assert trial.peers.published[-1].serving[0].status is ModelStatus.WARM
    trial.passes(10.0)
    assert [one.name for one in trial.peers.published[-1].on_disk] == ["m", "n"]
    assert trial.peers.published[-1].demand == {"m": 30.0}
    sequences = [one.sequence for one in trial.peers.published]
    assert sequences == sorted(set(sequences))


def test_the_speed_of_a_model_is_known_here_and_told_to_others_by_one_digit() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready(), TrafficSampled(tokens_per_second={"m": 172.4}))
    assert trial.node.speeds == {"m": 172.4}
    assert [one.tokens_per_second for one in trial.node.serving] == [200.0]


def test_stopping_drains_then_leaves_then_finishes() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready())
    effects = trial.does(StopRequested(drain_seconds=5.0))
    (stop,) = of_kind(effects, StopEngine)
    assert stop.drain_seconds == 5.0
    assert not trial.node.snapshot.accepting
    assert not of_kind(effects, Finished)
    assert trial.peers.published[-1].serving[0].status is ModelStatus.STOPPING
    assert trial.does(LoadRequested(model=M)) == []
    assert not trial.peers.left
    effects = trial.does(exited())
    assert isinstance(effects[-1], Finished)
    assert trial.peers.left
    assert trial.node.deadline() is None
    assert trial.does(Tick(), started("m")) == []


def test_an_engine_that_does_not_end_holds_nobody_up() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready(), StopRequested(drain_seconds=1.0))
    assert not of_kind(trial.passes(5.9), Finished)
    assert of_kind(trial.passes(0.2), Finished)


def test_stopping_a_node_without_engines_is_immediate() -> None:
    trial = Trial()
    trial.does(started())
    assert isinstance(trial.does(StopRequested())[-1], Finished)


def test_stopping_waits_for_the_answers_that_pass_through() -> None:
    trial = Trial()
    trial.does(started(), TrafficSampled(open=2))
    assert not of_kind(trial.does(StopRequested(drain_seconds=5.0)), Finished)
    assert not of_kind(trial.does(TrafficSampled(open=1)), Finished)
    assert isinstance(trial.does(TrafficSampled(open=0))[-1], Finished)


def test_stopping_does_not_wait_for_them_longer_than_it_was_told() -> None:
    trial = Trial()
    trial.does(started(), TrafficSampled(open=2), StopRequested(drain_seconds=5.0))
    assert not of_kind(trial.passes(4.9), Finished)
    assert of_kind(trial.passes(0.2), Finished)


def test_a_joiner_is_assigned_and_says_why() -> None:
    trial = Trial(joins=True)
    trial.does(started("m", "n"))
    assert trial.node.role is Role.STANDBY
    trial.peers.set(member(2, serving("m"), on_disk=(facts("m"),), wanted=(M, ModelName("n"))))
    assert of_kind(trial.does(Tick()), StartEngine) == []
    effects = trial.passes(5.0)
    assert [start.plan.model for start in of_kind(effects, StartEngine)] == ["n"]
    texts = [notice.text for notice in of_kind(effects, Notice)]
    assert texts == ["Serving n, because nobody serves it, and it is on disk here."]
    assert trial.node.role is Role.SERVE


def test_a_joiner_with_nothing_stands_by_and_says_why_once() -> None:
    trial = Trial(joins=True)
    trial.does(started())
    trial.peers.set(member(2, serving("m"), on_disk=(facts("m"),)))
    notices = of_kind(trial.does(Tick()) + trial.passes(60.0), Notice)
    assert [notice.code for notice in notices] == ["standing_by"]
    assert trial.node.waiting_reason


def test_a_dropped_model_is_not_taken_up_again() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready())
    trial.peers.set(member(2, wanted=(M,)))
    trial.does(Tick(), DropRequested(model=M), exited())
    assert of_kind(trial.passes(100.0), StartEngine) == []


def test_a_standby_node_fills_the_gap_of_a_dead_host_and_gives_it_up_when_idle() -> None:
    trial = Trial(joins=False)
    trial.does(started("m"))
    host = member(2, serving("m"), on_disk=(facts("m"),))
    trial.peers.set(host)
    assert of_kind(trial.does(Tick()) + trial.passes(100.0), StartEngine) == []
    trial.peers.set(member(3))
    assert of_kind(trial.does(Tick()) + trial.passes(2.0), StartEngine)
    trial.does(ready())
    trial.peers.set(member(3), host)
    trial.does(Tick())
    assert of_kind(trial.passes(500.0), StopEngine) == []
    trial.does(TrafficSampled(served={"m": 1}))
    assert of_kind(trial.passes(590.0), StopEngine) == []
    effects = trial.passes(40.0)
    assert of_kind(effects, StopEngine)
    assert "model_given_up" in {notice.code for notice in of_kind(effects, Notice)}
    trial.does(exited())
    assert trial.node.role is Role.STANDBY
    assert of_kind(trial.passes(1000.0), StartEngine) == []


def test_a_users_own_model_is_never_given_up() -> None:
    trial = Trial("m")
    trial.does(started("m"), ready())
    trial.peers.set(member(2, serving("m")))
    assert of_kind(trial.does(Tick()) + trial.passes(5000.0), StopEngine) == []


def test_a_passive_node_routes_by_what_it_fetched() -> None:
    node = Node(config(role=Role.CLIENT), Random(1))
    node.handle(Started(capacity=Capacity()), 0.0)
    target = Target(node=node_id(5), local=False, term=3)
    table = RoutingSnapshot(
        version=9,
        node=node_id(1),
        default=M,
        models={M: ModelRoute(name=M, status=ModelStatus.WARM, targets=(target,))},
    )
    node.handle(PeerConnected(node=node_id(5), rtt_ms=12.0), 0.0)
    assert not node.synced
    (routes,) = of_kind(node.handle(RoutesLearned(source=node_id(5), snapshot=table), 1.0), SetRoutes)
    assert node.synced
    assert routes.snapshot.default == "m"
    assert routes.snapshot.models[M].targets == (msgspec.structs.replace(target, rtt_ms=12.0),)
    node.handle(TargetFailed(node=node_id(5), model=M, reason="reset", term=3), 2.0)
    assert node.snapshot.models[M].targets == ()
    assert node.snapshot.models[M].status is ModelStatus.LOADING
    node.handle(Tick(), 4.0)
    assert len(node.snapshot.models[M].targets) == 1
    assert node.role is Role.CLIENT


def test_who_is_alive_does_not_depend_on_who_is_routed_to() -> None:
    trial = Trial()
    trial.does(started())
    trial.peers.set(member(2, serving("m")), member(3, serving("m", ModelStatus.STOPPING)), member(4))
    trial.passes(0.2)
    trial.does(TargetFailed(node=node_id(2), model=M, reason="one request failed", term=1))
    assert trial.route.targets == ()
    assert trial.node.snapshot.alive == {node_id(2), node_id(3)}
    # A doubt alone is not a death; one that lasts is as good as one.
    trial.peers.set(member(2, serving("m"), suspect=True), member(3, serving("m", ModelStatus.STOPPING)))
    trial.passes(0.5)
    assert node_id(2) in trial.node.snapshot.alive
    trial.passes(1.0)
    assert trial.node.snapshot.alive == {node_id(3)}
    trial.peers.set()
    trial.passes(0.5)
    assert trial.node.snapshot.alive == frozenset()


def test_round_trips_of_peers_that_came_and_went_are_forgotten():
    node = Node(config(), Random(1))
    for number in range(1, 6000):
        node.handle(PeerConnected(node=node_id(number + 1), rtt_ms=1.0, relayed=False), number / 1000)
    trips = node._cache.round_trips
    assert len(trips) <= 4096
    assert node_id(6000) in trips


def test_when_the_first_of_several_models_keeps_failing_the_next_is_served() -> None:
    trial = Trial("m", "n")
    trial.does(started("m", "n"))
    effects: list[AnyEffect] = []
    for term in (1, 2):
        broken = EngineExited(model=M, term=Term(term), code=1, reason="tensor data is damaged", never_ready=True)
        effects += trial.does(broken)
        effects += trial.passes(1.0)
    assert [effect.plan.model for effect in of_kind(effects, StartEngine)] == ["m", "n"]
    trial.does(ready("n"))
    states = {one.model: (one.status, one.reason) for one in trial.node.serving}
    assert states[M][0] is ModelStatus.FAILED
    assert "tensor data is damaged" in states[M][1]
    assert states[ModelName("n")] == (ModelStatus.WARM, "")
    # The first is tried again beside it.
    effects = trial.passes(120.0)
    assert [effect.plan.model for effect in of_kind(effects, StartEngine)] == ["m"]


def test_a_model_that_cannot_be_had_has_its_reason_until_it_can() -> None:
    trial = Trial("m", "typo")
    trial.does(started("m"), ready())
    typo = ModelName("typo")
    unavailable = ModelUnavailable(model=typo, reason="No model called typo. Check the name.")
    (notice,) = of_kind(trial.does(unavailable), Notice)
    assert notice.text == "typo cannot be served here: No model called typo. Check the name."
    assert of_kind(trial.does(unavailable), Notice) == []
    trial.passes(10.0)
    states = {one.model: (one.status, one.reason) for one in trial.peers.published[-1].serving}
    assert states[typo] == (ModelStatus.FAILED, "No model called typo. Check the name.")
    assert states[M][0] is ModelStatus.WARM
    trial.does(ModelUnavailable(model=typo))
    assert [one.model for one in trial.node.serving] == ["m"]
    # What the user dropped is no failure.
    trial.does(DropRequested(model=typo, drain_seconds=0.0), unavailable)
    assert [one.model for one in trial.node.serving] == ["m"]
