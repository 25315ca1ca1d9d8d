"""A node under events in any order: engines that lie, peers that come and go, users that change their minds."""

from dataclasses import dataclass, field
from random import Random

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.core_values import GB, config, facts, member, node_id, serving
from tests.support.examples import examples

from mesh_llm.core import node as node_module
from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.routing.table import same_routes
from mesh_llm.core.types.announcement import SignedAnnouncement
from mesh_llm.core.types.effects import AnyEffect, Finished, SetRoutes, StartEngine, StopEngine
from mesh_llm.core.types.events import (
    AnyEvent,
    DropRequested,
    EngineExited,
    EngineReady,
    LoadAnswered,
    LoadRequested,
    MessageReceived,
    ModelAwaited,
    ModelsChanged,
    OwnerSensed,
    PeerConnected,
    PeerLost,
    RejoinFailed,
    SendFailed,
    Started,
    StopRequested,
    TargetFailed,
    Tick,
    TrafficSampled,
)
from mesh_llm.core.types.gossip import Exchange
from mesh_llm.core.types.ids import Incarnation, ModelName, Term
from mesh_llm.core.types.model import Capacity, LaunchOptions, ModelStatus

SIZES = {"a": 1.0, "b": 2.0, "c": 3.0, "huge": 50.0}
MEMORY = 6 * GB
MODELS = st.sampled_from([ModelName(name) for name in (*SIZES, "nowhere")])
PEERS = st.integers(min_value=2, max_value=5)
STATES = st.sampled_from(list(ModelStatus))
LIBRARY = tuple(facts(name, size) for name, size in SIZES.items())
ENCODE = msgspec.json.Encoder(order="deterministic").encode


@dataclass
class World:
    """The outside world's record of the node's effects."""

    terms: dict[str, int] = field(default_factory=dict[str, int])
    alive: dict[str, StartEngine] = field(default_factory=dict[str, StartEngine])
    version: int = 0
    finished: bool = False

    def learn(self, effects: list[AnyEffect], now: float) -> None:
        for effect in effects:
            assert not self.finished, "something was asked for after the end"
            match effect:
                case StartEngine(plan=plan, term=term):
                    assert term > self.terms.get(plan.model, 0), "a term did not rise"
                    assert plan.model not in self.alive, "a second engine for a model"
                    self.terms[plan.model] = term
                    self.alive[plan.model] = effect
                    assert sum(one.plan.memory_bytes for one in self.alive.values()) <= MEMORY, "too much memory"
                case StopEngine(model=model, term=term):
                    assert self.terms[model] == term
                    assert model in self.alive, "an engine that is not there was stopped"
                case SetRoutes(snapshot=snapshot):
                    assert snapshot.version > self.version
                    self.version = snapshot.version
                case Finished():
                    self.finished = True
                case _:
                    pass


class NodeMachine(RuleBasedStateMachine):
    """Every rule is something that can happen at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.world = World()
        self.journal: list[tuple[float, AnyEvent, bytes]] = []
        self.sequence = 0

    @initialize(seed=st.integers(0, 3), wanted=st.lists(MODELS, max_size=2), joins=st.booleans(), loads=st.booleans())
    def begin(self, seed: int, wanted: list[ModelName], joins: bool, loads: bool = False) -> None:
        self.seed = seed
        on_demand = OnDemandPolicy(scope="members", ttl=5.0) if loads else OnDemandPolicy()
        self.config = config(*wanted, joins=joins, on_demand=on_demand)
        self.node = Node(self.config, Random(seed))
        self.happens(Started(capacity=Capacity(memory_bytes=MEMORY), on_disk=LIBRARY))

    def happens(self, event: AnyEvent) -> None:
        before = self.node.snapshot
        effects = self.node.handle(event, self.now)
        self.journal.append((self.now, event, ENCODE(effects)))
        self.world.learn(effects, self.now)
        for routes in (effect for effect in effects if isinstance(effect, SetRoutes)):
            assert not same_routes(routes.snapshot, before), "routes were given out that route alike"

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 1.0, 7.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        for _ in range(2000):
            deadline = self.node.deadline()
            if deadline is None or deadline > until:
                break
            self.now = max(self.now, deadline)
            self.happens(Tick())
        else:
            raise AssertionError("ticks do not move the deadline")
        self.now = until

    @rule()
    def tick_too_early(self) -> None:
        self.happens(Tick())

    @rule(model=MODELS, slots=st.sampled_from([None, 1, 2]))
    def load(self, model: ModelName, slots: int | None) -> None:
        self.happens(LoadRequested(model=model, options=None if slots is None else LaunchOptions(slots=slots)))

    @rule(model=MODELS)
    def drop(self, model: ModelName) -> None:
        self.happens(DropRequested(model=model))

    @rule(model=MODELS, back=st.integers(0, 2))
    def ready(self, model: ModelName, back: int) -> None:
        term = Term(self.world.terms.get(model, 0) - back)
        self.happens(EngineReady(model=model, term=term, address="127.0.0.1:1", context=2048, slots=4))

    @rule(model=MODELS, never_ready=st.booleans())
    def engine_dies(self, model: ModelName, never_ready: bool) -> None:
        started = self.world.alive.pop(model, None)
        if started is not None:
            self.happens(EngineExited(model=model, term=started.term, code=1, reason="x", never_ready=never_ready))

    @rule(model=MODELS, back=st.integers(1, 3))
    def old_word_of_an_exit(self, model: ModelName, back: int) -> None:
        self.happens(EngineExited(model=model, term=Term(self.world.terms.get(model, 0) - back), code=0))

    @rule(names=st.sets(st.sampled_from(list(SIZES))))
    def library_changes(self, names: set[str]) -> None:
        self.happens(ModelsChanged(on_disk=tuple(one for one in LIBRARY if one.name in names)))

    @rule(number=PEERS, model=MODELS, state=STATES, incarnation=st.integers(1, 2), left=st.booleans())
    def peer_speaks(self, number: int, model: ModelName, state: ModelStatus, incarnation: int, left: bool) -> None:
        self.sequence += 1
        word = member(
            number,
            serving(model, state),
            incarnation=Incarnation(incarnation),
            sequence=self.sequence,
            on_disk=LIBRARY[:2],
            wanted=(model,),
            demand={"a": 200.0},
            left=left,
        ).announcement
        entries = (SignedAnnouncement(announcement=word, payload=b"p", signature=b"s"),)
        self.happens(MessageReceived(peer=node_id(number), message=Exchange(entries=entries)))

    @rule(number=PEERS, what=st.sampled_from([PeerConnected, PeerLost]))
    def connection(self, number: int, what: type[PeerConnected] | type[PeerLost]) -> None:
        self.happens(what(node=node_id(number)))

    @rule(number=PEERS)
    def send_fails(self, number: int) -> None:
        self.happens(SendFailed(peer=node_id(number)))
        self.happens(RejoinFailed())

    @rule(number=st.integers(1, 5), model=MODELS, term=st.integers(0, 3))
    def target_fails(self, number: int, model: ModelName, term: int) -> None:
        self.happens(TargetFailed(node=node_id(number), model=model, reason="reset", term=term))
        route = self.node.snapshot.models.get(model)
        # A node that has ended makes no more decisions.
        assert (
            self.node.finished
            or route is None
            or all(target.node != node_id(number) or (term and target.term != term) for target in route.targets)
        )

    @rule(model=MODELS, count=st.integers(0, 50))
    def traffic(self, model: ModelName, count: int) -> None:
        self.happens(TrafficSampled(in_flight={model: count}, wanted={model: count}, tokens_per_second={model: 30.0}))

    @rule(model=MODELS, number=st.integers(1, 4), count=st.integers(0, 2), here=st.booleans())
    def requests_wait(self, model: ModelName, number: int, count: int, here: bool) -> None:
        standing = "own" if number == 1 else "member"
        self.happens(ModelAwaited(model=model, asker=node_id(number), count=count, here=here, standing=standing))

    @rule(model=MODELS, number=PEERS, problem=st.sampled_from(["", "It does not fit."]))
    def peer_answers(self, model: ModelName, number: int, problem: str) -> None:
        self.happens(LoadAnswered(node=node_id(number), model=model, problem=problem))

    @rule(busy=st.sampled_from([0.0, 0.9]))
    def owner_works(self, busy: float) -> None:
        self.happens(OwnerSensed(busy=busy))

    @precondition(lambda self: len(self.journal) > 15)
    @rule(drain=st.sampled_from([0.0, 10.0]))
    def stop(self, drain: float) -> None:
        self.happens(StopRequested(drain_seconds=drain))

    @invariant()
    def routes_are_true(self) -> None:
        if not self.journal:
            return
        snapshot = self.node.snapshot
        warm = {launch.model: launch for launch in self.node.launches if launch.status is ModelStatus.WARM}
        for name, route in snapshot.models.items():
            for target in route.targets:
                assert target.status in {ModelStatus.WARM, ModelStatus.LOADING}
                if target.local and target.status is ModelStatus.WARM:
                    assert target.address == warm[name].address
                    assert target.term == self.world.terms[name]
                    assert name in self.world.alive
            if any(target.status is ModelStatus.WARM for target in route.targets):
                assert route.status is ModelStatus.WARM
        assert self.node.free_bytes >= 0
        for model in self.world.alive:
            assert any(launch.model == model and launch.running for launch in self.node.launches) or self.world.finished

    def teardown(self) -> None:
        if not self.journal:
            return
        self._replay("a replay differs")
        # Most gossip and ticks let nothing be evaluated. What that leaves out must never have been needed.
        often, node_module._OFTEN_NO_NEWS = node_module._OFTEN_NO_NEWS, ()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self._replay("an evaluation that was needed did not come")
        finally:
            node_module._OFTEN_NO_NEWS = often

    def _replay(self, problem: str) -> None:
        again = Node(self.config, Random(self.seed))
        for now, event, effects in self.journal:
            assert ENCODE(again.handle(event, now)) == effects, problem


NodeMachine.TestCase.settings = examples(60, stateful_step_count=40)
TestNode = NodeMachine.TestCase


def test_a_node_that_stops_while_it_gives_a_suspect_time_has_no_deadline_that_stays() -> None:
    state = NodeMachine()
    state.begin(seed=0, wanted=[], joins=False)
    state.load(model="a", slots=None)
    state.target_fails(model="a", number=1, term=0)
    state.peer_speaks(incarnation=1, left=False, model="a", number=2, state=ModelStatus.COLD)
    state.tick_too_early()
    state.stop(drain=0.0)
    state.time_passes(seconds=7.0)
