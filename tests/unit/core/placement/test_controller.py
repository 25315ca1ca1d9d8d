from random import Random
from typing import Any

import msgspec
from tests.support.core_values import GB, MESH, facts, member, node_id, serving
from tests.support.fake_peers import FakePeers

from mesh_llm.core.config import NodeConfig, OnDemandPolicy
from mesh_llm.core.member_cache import Peers
from mesh_llm.core.node import Node
from mesh_llm.core.placement.assignment import Assigned
from mesh_llm.core.placement.controller import ModelFetch, describe_source, file_sources, offered_models
from mesh_llm.core.types.announcement import LoadScope, Member
from mesh_llm.core.types.effects import AnyEffect, FetchModel, Notice, StartEngine, StopEngine
from mesh_llm.core.types.events import (
    AnyEvent,
    DropRequested,
    EngineExited,
    EngineReady,
    FetchEnded,
    LoadRequested,
    ModelsChanged,
    StandingsKnown,
    Started,
    Tick,
)
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId
from mesh_llm.core.types.model import Capacity, ModelFacts, ModelStatus, Role

THEIRS = msgspec.structs.replace(facts("m"), source="hf:o/r:m.gguf@1")
OTHER = facts("other")


class Others:
    """Other nodes that are simply there; stands in for the membership."""

    revision = 1

    def __init__(self, *members: Member) -> None:
        self._members = members

    def members(self) -> tuple[Member, ...]:
        return self._members

    def deadline(self) -> None:
        return None

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        return []

    def publish(self, word: object, now: float) -> list[AnyEffect]:
        return []

    def leave(self, now: float) -> list[AnyEffect]:
        return []


class Survivor:
    """A node on standby beside one host, which serves two models; what happens when that is lost."""

    def __init__(
        self,
        *on_disk: str,
        memory: int = 8 * GB,
        can_fetch: bool = False,
        on_demand: LoadScope = "members",
        **host: object,
    ) -> None:
        self.peers = FakePeers()
        self.host = {"on_disk": (THEIRS, OTHER), "name": "desk", **host}
        policy = OnDemandPolicy(scope=on_demand)
        config = NodeConfig(node=node_id(1), mesh=MESH, can_fetch=can_fetch, joins=can_fetch, on_demand=policy)
        self.node = Node(config, Random(1), self.peers)
        self.now = 0.0
        self.started: list[str] = []
        self.fetched: list[str] = []
        self.notices: list[str] = []
        self.do(Started(capacity=Capacity(memory_bytes=memory), on_disk=tuple(facts(name) for name in on_disk)))
        self.sees(self.member())

    def member(self, incarnation: int = 1, *, suspect: bool = False) -> Member:
        fields: dict[str, Any] = {**self.host, "incarnation": Incarnation(incarnation)}
        return member(2, serving("m"), serving("other"), suspect=suspect, **fields)

    def sees(self, *members: Member, seconds: float = 3.0) -> None:
        self.peers.set(*members)
        until = self.now + seconds
        while self.now < until:
            self.now += 0.1
            self.do(Tick())

    def do(self, event: AnyEvent) -> None:
        for effect in self.node.handle(event, self.now):
            match effect:
                case StartEngine(plan=plan, term=term):
                    self.started.append(plan.model)
                    ready = EngineReady(model=plan.model, term=term, address="127.0.0.1:1", context=1, slots=1)
                    self.do(ready)
                case StopEngine(model=model, term=term):
                    self.started.remove(model)
                    self.do(EngineExited(model=model, term=term, code=0))
                case FetchModel(model=model):
                    self.fetched.append(model)
                case Notice(code=code):
                    self.notices.append(code)
                case _:
                    pass


def test_a_standby_serves_what_it_has_when_its_last_peer_dies() -> None:
    survivor = Survivor("m", "other", "third")
    assert survivor.started == []
    survivor.sees()
    assert survivor.started == ["m", "other"]
    assert survivor.node.role is Role.SERVE
    # The host is back: what its user asked for runs there. Nothing is stopped or started in haste.
    survivor.sees(survivor.member(incarnation=2), seconds=60.0)
    assert survivor.started == ["m", "other"]
    # Idle for long, both are given up.
    survivor.sees(survivor.member(incarnation=2), seconds=620.0)
    assert survivor.started == []
    survivor.sees()
    assert sorted(survivor.started) == ["m", "other"]


def test_a_peer_that_is_suspect_for_too_long_is_as_good_as_dead() -> None:
    survivor = Survivor("m", "other")
    survivor.sees(survivor.member(), seconds=0.2)
    suspect = survivor.member(suspect=True)
    survivor.sees(suspect, seconds=0.8)
    assert survivor.started == []
    survivor.sees(survivor.member(), seconds=0.5)
    survivor.sees(suspect, seconds=0.8)
    assert survivor.started == []
    survivor.sees(suspect, seconds=1.0)
    assert survivor.started == ["m", "other"]


def test_with_others_left_the_dead_are_replaced_by_one_and_as_before() -> None:
    survivor = Survivor("m", "other")
    third = member(3, serving("x"), on_disk=(facts("m"),))
    survivor.sees(survivor.member(), third)
    survivor.sees(third, seconds=0.8)
    assert survivor.started == []
    survivor.sees(third, seconds=1.0)
    assert survivor.started == ["m"]


def test_what_the_user_dropped_and_what_does_not_fit_is_not_taken() -> None:
    survivor = Survivor("m", "other")
    survivor.do(DropRequested(model=ModelName("m")))
    survivor.sees()
    assert survivor.started == ["other"]
    survivor = Survivor("m", memory=GB // 2)
    survivor.sees()
    assert survivor.started == []
    assert survivor.node.waiting_reason == (
        "no other node of the mesh is left; not on disk here: other; too big for this machine: m"
    )
    assert survivor.notices.count("standing_by") == 1


def test_who_serves_its_users_model_takes_no_other_when_it_is_left_alone() -> None:
    survivor = Survivor("m", "mine")
    survivor.do(LoadRequested(model=ModelName("mine")))
    survivor.sees()
    assert survivor.started == ["mine"]


def test_a_fetch_that_the_death_of_the_host_broke_off_is_in_nobodys_way_and_tried_again() -> None:
    theirs = msgspec.structs.replace(THEIRS, source="", fingerprint="ab" * 16)
    survivor = Survivor(can_fetch=True, on_disk=(theirs, OTHER), shares=True)
    assert survivor.fetched == ["m"]
    survivor.do(ModelsChanged(on_disk=(OTHER,)))
    survivor.sees()
    assert survivor.started == ["other"]
    survivor.do(FetchEnded(model=ModelName("m"), problem="desk does not answer."))
    survivor.do(DropRequested(model=ModelName("other")))
    survivor.sees(survivor.member())
    assert survivor.fetched == ["m"]
    survivor.sees()
    survivor.sees(survivor.member(incarnation=2), seconds=10.0)
    assert survivor.fetched == ["m", "m"]


class Joiner:
    def __init__(
        self,
        *,
        can_fetch: bool = True,
        on_disk: tuple[str, ...] = (),
        shares: bool = False,
        theirs: ModelFacts = THEIRS,
    ) -> None:
        host = member(2, serving("m"), serving("other"), on_disk=(theirs, OTHER), shares=shares, name="desk")
        config = NodeConfig(node=node_id(1), mesh=MESH, joins=True, can_fetch=can_fetch)
        peers: Peers = Others(host)  # pyright: ignore[reportAssignmentType]
        self.node = Node(config, Random(1), peers)
        self.now = 0.0
        here = tuple(facts(name) for name in on_disk)
        self.do(Started(capacity=Capacity(memory_bytes=8 * GB), on_disk=here))

    def do(self, event: AnyEvent) -> list[AnyEffect]:
        return self.node.handle(event, self.now)

    def wait(self, until: float = 60.0) -> list[AnyEffect]:
        effects: list[AnyEffect] = []
        while (deadline := self.node.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            effects += self.do(Tick())
            if any(isinstance(effect, FetchModel | StartEngine) for effect in effects):
                break
        return effects


def codes(effects: list[AnyEffect]) -> list[str]:
    return [effect.code for effect in effects if isinstance(effect, Notice)]


def test_a_joiner_says_so_fetches_and_serves() -> None:
    joiner = Joiner()
    effects = joiner.wait()
    assert [effect for effect in effects if isinstance(effect, FetchModel)] == [
        FetchModel(model=THEIRS.name, source=THEIRS.source, fingerprint=THEIRS.fingerprint)
    ]
    assert "model_fetching" in codes(effects)
    assert [(one.model, one.status) for one in joiner.node.serving] == [("m", ModelStatus.LOADING)]
    assert joiner.node.role is Role.STANDBY
    assert not any(isinstance(effect, FetchModel | StartEngine) for effect in joiner.wait(joiner.now + 30))
    joiner.do(ModelsChanged(on_disk=(THEIRS,)))
    effects = joiner.do(FetchEnded(model=THEIRS.name))
    assert [effect.plan.model for effect in effects if isinstance(effect, StartEngine)] == ["m"]


def test_what_could_not_be_had_is_not_tried_again() -> None:
    joiner = Joiner(on_disk=("mine",))
    joiner.wait()
    effects = joiner.do(FetchEnded(model=THEIRS.name, problem="The disk is full."))
    assert "model_fetch_failed" in codes(effects)
    assert joiner.node.serving == ()
    assert not any(isinstance(effect, FetchModel) for effect in joiner.wait(joiner.now + 60))


def test_what_came_may_be_another_model() -> None:
    joiner = Joiner()
    joiner.wait()
    assert "model_fetch_failed" in codes(joiner.do(FetchEnded(model=THEIRS.name)))


def test_word_of_a_fetch_that_nobody_asked_for_changes_nothing() -> None:
    joiner = Joiner()
    assert not codes(joiner.do(FetchEnded(model=THEIRS.name)))


def test_nothing_is_fetched_where_that_is_not_wanted() -> None:
    assert not any(isinstance(effect, FetchModel) for effect in Joiner(can_fetch=False).wait())


def test_what_nobody_knows_the_source_of_is_taken_from_who_has_it() -> None:
    theirs = msgspec.structs.replace(THEIRS, source="", fingerprint="ab" * 16)
    joiner = Joiner(shares=True, theirs=theirs)
    effects = joiner.wait()
    assert [effect for effect in effects if isinstance(effect, FetchModel)] == [
        FetchModel(model=theirs.name, source="", fingerprint=theirs.fingerprint)
    ]
    said = next(effect.text for effect in effects if isinstance(effect, Notice) and effect.code == "model_fetching")
    assert said.startswith("Fetching m (1.0 GB) from desk to serve it, because ")
    assert [one.reason for one in joiner.node.serving] == ["it is being fetched from desk"]


def test_what_nobody_gives_and_nobody_knows_the_source_of_is_left_alone() -> None:
    theirs = msgspec.structs.replace(THEIRS, source="", fingerprint="ab" * 16)
    assert not any(isinstance(effect, FetchModel) for effect in Joiner(theirs=theirs).wait())


MINE = msgspec.structs.replace(facts("m"), fingerprint="ab" * 16)
ANOTHER_FILE = msgspec.structs.replace(facts("m"), fingerprint="cd" * 16)


def test_only_who_has_the_very_file_and_gives_it():
    near = member(2, on_disk=(MINE,), shares=True, rtt_ms=1.0)
    far = member(3, on_disk=(MINE,), shares=True, rtt_ms=40.0)
    doubted = member(4, on_disk=(MINE,), shares=True, suspect=True)
    mean = member(5, on_disk=(MINE,))
    different = member(6, on_disk=(ANOTHER_FILE,), shares=True)
    members = (doubted, far, mean, different, near)
    assert file_sources(members, ModelName("m"), MINE.fingerprint) == [near, far, doubted]
    assert file_sources(members, ModelName("m"), "") == []
    assert file_sources(members, ModelName("other"), MINE.fingerprint) == []
    assert offered_models((mean,)) == set()
    assert offered_models((mean, near)) == {"m"}


def test_the_source_of_a_model_for_people():
    source = msgspec.structs.replace(MINE, source="hf:o/r:m.gguf")
    names = [member(number, name=f"n{number}") for number in range(2, 6)]
    assert describe_source([], source) == "hf:o/r:m.gguf"
    assert describe_source(names[:1], source) == "n2"
    assert describe_source(names[:2], source) == "n2 and n3"
    assert describe_source(names, source) == "n2, n3 and 2 more"


def test_models_that_could_not_be_fetched_are_forgotten() -> None:
    fetch = ModelFetch()
    for number in range(3000):
        one = facts(f"m{number}")
        fetch.begin(Assigned(facts=one, why="nobody serves it", unserved=True))
        fetch.ended(FetchEnded(model=one.name, problem="no"), ())
    assert len(fetch.failed) < 600
    assert ModelName("m2999") in fetch.failed


def test_what_strangers_want_serve_and_leave_makes_a_node_take_nothing_unless_it_is_allowed() -> None:
    stranger = member(2, serving("theirs"), wanted=("m",), on_disk=(facts("m"), facts("theirs")), demand={"x": 99.0})
    host = member(3, serving("x"), on_disk=(facts("x"),))
    expected: dict[LoadScope, list[str]] = {"members": [], "clients": [], "strangers": ["m"]}
    for scope, taken in expected.items():
        survivor = Survivor("m", "theirs", "x", on_demand=scope)
        survivor.do(StandingsKnown(members=frozenset({node_id(3)})))
        survivor.sees(stranger, host, seconds=60.0)
        assert survivor.started == taken
    survivor = Survivor("m", "theirs", "x", on_demand="members")
    survivor.do(StandingsKnown(members=frozenset({node_id(3)})))
    survivor.sees(stranger, host)
    # What only the stranger served is not taken over from it; what a member wants is taken, and a stranger can be it no
    # more: it got an invite.
    survivor.sees(host, seconds=60.0)
    assert survivor.started == []
    survivor.do(StandingsKnown(members=frozenset({node_id(2), node_id(3)})))
    survivor.sees(stranger, host, seconds=60.0)
    assert survivor.started == ["m"]


def test_nothing_is_fetched_from_a_host_that_is_distrusted_for_it() -> None:
    theirs = msgspec.structs.replace(THEIRS, source="")
    host, other = (member(number, on_disk=(theirs, OTHER), shares=True) for number in (2, 3))
    lies = {(ModelName("m"), node_id(2))}
    assert file_sources([host, other], ModelName("m"), theirs.fingerprint, lies) == [other]
    assert file_sources([host], ModelName("other"), OTHER.fingerprint, lies) == [host]
    assert offered_models([host], lies) == {"other"}
    fetch = ModelFetch()
    fetch.distrusted = frozenset(lies)
    begun = fetch.begin(Assigned(facts=theirs, why="it is wanted", unserved=True), [host, other])
    assert isinstance(begun[0], Notice)
    assert "from node3 " in begun[0].text
    assert fetch.ended(FetchEnded(model=ModelName("m"), problem="x"), {}) is not None
    # That it offers the file anew is no reason to try again.
    again = member(2, on_disk=(theirs,), shares=True, incarnation=Incarnation(9))
    assert fetch.unobtainable([again, other]) == {"m"}


def test_a_node_that_joins_takes_no_model_that_only_a_stranger_serves() -> None:
    for members in (frozenset[NodeId](), frozenset({node_id(2)})):
        joiner = Joiner(on_disk=("m",))
        joiner.do(StandingsKnown(members=members))
        started = [one.plan.model for one in joiner.wait() if isinstance(one, StartEngine)]
        assert started == (["m"] if members else [])
