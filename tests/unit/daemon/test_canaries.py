"""Checks of hosts by canaries: what is asked of whom, what follows, and what the home keeps."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace
from tests.support.core_values import facts, member, node_id, serving

from mesh_llm.api.canaries import CanaryClient, GaveWayError
from mesh_llm.api.canary_shapes import CHAT, Question, RequestShape, RequestShapes
from mesh_llm.api.types import Usage
from mesh_llm.core.node import Node
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.trust.canaries import AnswerToken, CanaryAnswer
from mesh_llm.core.trust.canary_plan import CANARY_TOKENS, CANARY_WORK, WRITING_WORK, HostKey, Standing, TrustState
from mesh_llm.core.trust.corrections import Correction, Kind, Life
from mesh_llm.core.trust.readback import Reading
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.effects import Notice
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, CorrectionsForgotten, HostsDistrusted
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.daemon.canaries import Canaries
from mesh_llm.daemon.trust_records import TrustRecords
from mesh_llm.daemon.trusted_copies import coarser_names
from mesh_llm.runtime.supervision import TaskScope

MODEL, COARSE = ModelName("tiny-Q8_0"), ModelName("tiny-Q4_K_M")
ME, LIAR, HONEST, FRIEND = (node_id(number) for number in (1, 2, 3, 4))
MINE = OwnerId("7" * 64)
PROBABILITIES = RequestShape(path=CHAT, fields=(("model", None), ("messages", None)))
STREAMED = RequestShape(path=CHAT, fields=(("model", None), ("messages", None), ("stream", b"true")))
WORK = Usage(prompt=0, generated=10**6)


FRIENDS = Target(node=FRIEND, local=False, slots=4)


def answer(shift: float, best: str = "a") -> CanaryAnswer:
    """As an honest host gives it at 0.0; with another best token, as another model gives it."""
    other = "b" if best == "a" else "a"
    token = AnswerToken(best, -0.1 - shift, ((best, -0.1 - shift), (other, -2.4 - shift)))
    return CanaryAnswer((token,) * CANARY_TOKENS)


def apart(by: float) -> CanaryAnswer:
    """As a coarser file gives it: its second token is by so much further away from the first one."""
    return CanaryAnswer((AnswerToken("a", -0.1, (("a", -0.1), ("b", -2.4 - by))),) * CANARY_TOKENS)


@dataclass
class FakeNode:
    """What canaries read of the core."""

    snapshot: RoutingSnapshot
    members: Any
    names: dict[NodeId, str] = field(default_factory=dict[NodeId, str])
    launches: tuple[Any, ...] = ()
    serving: tuple[Any, ...] = ()
    config: Any = field(default_factory=lambda: SimpleNamespace(epoch=1e9))


@dataclass
class FakeClient:
    """Asks nobody: hosts answer as told."""

    liars: set[NodeId] = field(default_factory=lambda: {LIAR})
    readable: bool = True
    length: int = CANARY_TOKENS
    """Tokens of an answer that is read back."""
    template_text: str | None = "plain"
    shapes: RequestShapes = field(default_factory=RequestShapes)
    asked: list[tuple[str, NodeId]] = field(default_factory=list[tuple[str, NodeId]])
    silent: bool = False
    in_the_way: bool = False
    """A client's request comes while a host is asked."""
    coarse: float = 0.0
    """By so much a host that serves a coarser file differs; a coarser copy is there as well."""
    sent: asyncio.Event = field(default_factory=asyncio.Event)

    others: dict[NodeId, int] = field(default_factory=dict[NodeId, int])
    """Requests in flight."""

    def in_flight(self, model: ModelName) -> dict[NodeId, int]:
        return self.others

    async def template(self, target: Target, model: ModelName) -> str | None:
        return self.template_text

    async def write(self, target: Target, model: ModelName, about: str, give_way: Any) -> str:
        self.asked.append(("write", target.node))
        return f"What is rain number {len(self.asked)}?"

    async def reference(self, target: Target, asked: Question, give_way: Any) -> CanaryAnswer:
        self.asked.append(("reference" if asked.model == MODEL else "coarser", target.node))
        return apart(0.0 if asked.model == MODEL else self.coarse)

    async def ask(self, target: Target, shape: RequestShape, asked: Question, give_way: Any) -> CanaryAnswer | None:
        self.asked.append(("probabilities", target.node))
        self.sent.set()
        if self.in_the_way:
            raise GaveWayError
        if self.silent:
            return None
        if self.coarse:
            return apart(self.coarse if target.node in self.liars else self.coarse / 4)
        return answer(1.0, "b") if target.node in self.liars else answer(0.001)

    async def ask_ordinarily(self, target: Target, shape: RequestShape, asked: Question, give_way: Any) -> list[str]:
        self.asked.append(("ordinary", target.node))
        return ["lie" if target.node in self.liars else "word"] * CANARY_TOKENS

    async def read_back(self, target: Target, asked: Question, pieces: list[str], give_way: Any) -> Reading:
        self.asked.append(("read back", target.node))
        fits = pieces[0] == "word" and self.readable
        return Reading(self.length) if fits else Reading(2, misfit=True)


@dataclass
class World:
    canaries: Canaries
    records: TrustRecords
    client: FakeClient
    node: FakeNode
    posted: list[AnyEvent]
    notices: list[Notice]

    async def check(self, host: NodeId, times: int = 60) -> None:
        """A client works with a host until it was checked so many times."""
        for _ in range(times):
            await self.canaries._check(HostKey(host, MODEL))
            known = [event.hosts for event in self.posted if isinstance(event, HostsDistrusted)]
            self.node.snapshot = replace(self.node.snapshot, distrusted=frozenset(known[-1] if known else ()))

    def spent(self, host: NodeId) -> float:
        """What checks of a host have cost other nodes."""
        return -self.canaries._schedule._credit.get(HostKey(host, MODEL), 0.0)

    def standing(self, host: NodeId) -> str:
        return next((one.standing for one in self.records.trust().hosts if one.node_id == host), "unknown")


def world(tmp_path: Path, shape: RequestShape = PROBABILITIES) -> World:
    targets = tuple(Target(node=node, local=False, slots=4) for node in (LIAR, HONEST, FRIEND))
    snapshot = RoutingSnapshot(
        version=1,
        node=ME,
        models={MODEL: ModelRoute(name=MODEL, status=ModelStatus.WARM, targets=targets)},
        owners={FRIEND: Ownership(owner=MINE, issued=0, expires=2**40, signature=b"s" * 64)},
    )
    members = tuple(member(number, serving(MODEL), on_disk=(facts(MODEL),)) for number in (2, 3, 4))
    node = FakeNode(snapshot, members, {LIAR: "liar", HONEST: "honest", FRIEND: "friend"})
    client = FakeClient()
    client.shapes._shapes.append(shape)
    posted: list[AnyEvent] = []
    notices: list[Notice] = []
    trusted, core = lambda: frozenset({MINE}), cast("Node", node)
    records = TrustRecords(tmp_path / "trust.json", core, trusted, posted.append, notices.append, asks=True)
    canaries = Canaries(1.0, trusted, core, cast("CanaryClient", client), records)
    return World(canaries, records, client, node, posted, notices)


async def test_a_liar_is_found_and_an_honest_host_is_not_accused(tmp_path: Path) -> None:
    made = world(tmp_path)
    await made.check(LIAR)
    await made.check(HONEST)
    assert made.standing(LIAR) == Standing.DISTRUSTED
    assert made.standing(HONEST) == Standing.HONEST
    assert made.posted == [HostsDistrusted(hosts=((MODEL, LIAR),))]
    (notice,) = made.notices
    assert notice.code == "host_distrusted"
    assert "liar gave other answers for tiny-Q8_0" in notice.text
    assert f"mesh-llm trust forget {LIAR[:10]}" in notice.text
    assert [one.text for one in made.records.problems()] == [notice.text]
    # It learned the reference from the trusted host only.
    assert {node for what, node in made.client.asked if what in ("write", "reference")} == {FRIEND}


@pytest.mark.parametrize(("cache", "found"), [("f16", Standing.DISTRUSTED), ("q8_0", Standing.HONEST)])
async def test_where_a_coarser_copy_is_there_a_host_that_serves_it_is_found_however_near_it_is(
    tmp_path: Path, cache: str, found: Standing
) -> None:
    made = world(tmp_path)
    models = made.node.snapshot.models
    made.node.snapshot = replace(
        made.node.snapshot, models={**models, COARSE: replace(models[MODEL], name=COARSE, targets=(FRIENDS,))}
    )
    files = (facts(MODEL),)
    made.node.members = (
        *(member(number, serving(MODEL, cache_type="f16"), on_disk=files) for number in (2, 3)),
        # The copies can be compared where their caches are of one type.
        member(4, serving(MODEL, cache_type="f16"), serving(COARSE, cache_type=cache), on_disk=files),
    )
    made.client.coarse = 0.004
    await made.check(LIAR, times=20)
    await made.check(HONEST, times=20)
    assert made.standing(LIAR) == found
    assert made.standing(HONEST) == Standing.HONEST
    assert (("coarser", FRIEND) in made.client.asked) is (found is Standing.DISTRUSTED)


def test_coarser_files_are_known_by_their_names() -> None:
    names = [ModelName(f"tiny-{kind}") for kind in ("Q2_K", "Q8_0", "f16", "Q4_K_M")]
    assert coarser_names(MODEL, names) == ["tiny-Q4_K_M", "tiny-Q2_K"]
    assert coarser_names(ModelName("Tiny-fp16"), names) == ["tiny-Q8_0", "tiny-Q4_K_M", "tiny-Q2_K"]


@pytest.mark.parametrize("name", ["tiny", "tiny-Q4_K_M", "", "tiny-Q4_K_M-Q8_0-tuned"])
def test_a_model_of_another_name_is_no_coarser_copy(name: str) -> None:
    assert coarser_names(ModelName(name), [ModelName("tiny-Q8_0"), ModelName("tiny-fp16"), ModelName("tiny")]) == []


async def test_a_host_that_is_honest_where_probabilities_are_asked_for_is_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(tmp_path, STREAMED)
    monkeypatch.setattr(made.canaries, "_chance", lambda: 0.99)
    await made.check(LIAR, times=20)
    assert made.standing(LIAR) == Standing.DISTRUSTED
    await made.check(HONEST, times=20)
    assert made.standing(HONEST) == Standing.HONEST
    assert ("probabilities", LIAR) not in made.client.asked
    assert ("ordinary", LIAR) in made.client.asked


async def test_where_the_copys_own_answers_cannot_be_read_back_nobody_is_judged_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(tmp_path, STREAMED)
    made.client.readable = False
    monkeypatch.setattr(made.canaries, "_chance", lambda: 0.99)
    await made.check(HONEST, times=20)
    assert ("ordinary", HONEST) not in made.client.asked
    assert made.standing(HONEST) == Standing.HONEST


async def test_a_copy_whose_first_answers_are_short_gives_more_before_it_counts_as_one_that_cannot_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(tmp_path, STREAMED)
    made.client.length = 5
    monkeypatch.setattr(made.canaries, "_chance", lambda: 0.99)
    await made.check(LIAR, times=20)
    assert ("ordinary", LIAR) in made.client.asked
    assert made.standing(LIAR) == Standing.DISTRUSTED


@pytest.mark.parametrize("template", ["{{ strftime_now('%d') }}", None])
async def test_a_model_whose_prompt_depends_on_the_day_is_not_checked(tmp_path: Path, template: str | None) -> None:
    made = world(tmp_path)
    made.client.template_text = template
    await made.check(LIAR, times=5)
    assert made.client.asked == []
    assert made.records.trust().hosts == ()


async def test_no_host_gets_a_prompt_twice(tmp_path: Path) -> None:
    made = world(tmp_path)
    await made.check(HONEST, times=5)
    kept = list(made.records.prompts)
    assert len({one.text for one in kept}) == len(kept)
    # Without any copy to ask, the recorded answers are for another host.
    route = made.node.snapshot.models[MODEL]
    left = replace(route, targets=tuple(one for one in route.targets if one.node != FRIEND))
    made.node.snapshot = replace(made.node.snapshot, models={MODEL: left})
    made.client.asked.clear()
    await made.check(HONEST, times=5)
    assert made.client.asked == []
    await made.check(LIAR, times=10)
    assert made.client.asked == [("probabilities", LIAR)] * 5


async def test_what_is_found_outlives_a_restart_and_is_forgotten_on_request(tmp_path: Path) -> None:
    made = world(tmp_path)
    await made.check(LIAR)
    again = world(tmp_path)
    again.records.begin()
    assert again.posted == [HostsDistrusted(hosts=((MODEL, LIAR),))]
    assert again.standing(LIAR) == Standing.DISTRUSTED
    with pytest.raises(MeshError) as refused:
        await again.records.forget("nobody")
    assert "mesh-llm trust list" in refused.value.hint
    forgotten = await again.records.forget("liar")
    assert (forgotten.node_id, forgotten.models) == (LIAR, (MODEL,))
    assert again.posted[-2:] == [HostsDistrusted(hosts=()), CorrectionsForgotten(node=LIAR)]
    assert again.standing(LIAR) == "unknown"
    third = world(tmp_path)
    third.records.begin()
    assert third.posted == []


async def test_corrections_are_listed_and_end_with_what_canaries_said(tmp_path: Path) -> None:
    made = world(tmp_path)
    wrong = Correction(
        node=LIAR, model=MODEL, kind=Kind.CONTEXT, announced=32768, seen=900, at=5.0, until=3605.0,
        life=Life(Incarnation(1), 1),
    )  # fmt: skip
    unchecked = replace(wrong, node=FRIEND, kind=Kind.SPEED, announced=50.0, seen=5.0)
    made.node.snapshot = replace(made.node.snapshot, corrections=(wrong, unchecked))
    await made.check(LIAR)
    assert [(one.node_id, one.kind, one.until) for one in made.records.trust().corrections] == [
        (LIAR, "context", 1e9 + 3605.0),
        (FRIEND, "speed", 1e9 + 3605.0),
    ]
    with pytest.raises(MeshError) as refused:
        await made.records.forget("liar", "another")
    assert refused.value.code == "model_unknown"
    assert made.standing(LIAR) == Standing.DISTRUSTED
    forgotten = await made.records.forget("liar", MODEL)
    assert forgotten.models == (MODEL,)
    assert [one.text for one in forgotten.corrections] == [f"liar, {MODEL}: announced a context of 32,768, refused 900"]
    assert made.posted[-1] == CorrectionsForgotten(node=LIAR, model=MODEL)
    assert made.standing(LIAR) == "unknown"
    # A host of which canaries say nothing.
    forgotten = await made.records.forget("friend")
    assert (forgotten.models, [one.kind for one in forgotten.corrections]) == ((), ["speed"])
    assert made.posted[-1] == CorrectionsForgotten(node=FRIEND)


@pytest.mark.parametrize("damage", [b"", b"no json", b'{"hosts": [{"node": 3}]}', b"\xff\xfe", b'{"hosts": null}'])
async def test_a_damaged_file_is_reported_and_begun_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "trust.json").write_bytes(damage)
    made = world(tmp_path)
    made.records.begin()
    assert [one.code for one in made.notices] == ["trust_lost"]
    await made.check(LIAR)
    saved = msgspec.json.decode((tmp_path / "trust.json").read_bytes(), type=TrustState)
    assert saved.hosts[0].standing is Standing.DISTRUSTED


async def test_a_host_that_gives_no_probabilities_is_counted(tmp_path: Path) -> None:
    made = world(tmp_path)
    await made.check(HONEST, times=1)
    made.client.silent = True
    await made.check(HONEST, times=4)
    (found,) = made.records.trust().hosts
    assert (found.unanswered, found.canaries, found.standing) == (4, 1, Standing.UNDECIDED)


async def test_a_canary_that_gives_way_to_a_client_says_nothing_about_the_host_and_costs_what_was_asked(
    tmp_path: Path,
) -> None:
    made = world(tmp_path)
    await made.check(HONEST, times=1)
    before = made.spent(HONEST)
    made.client.in_the_way = True
    await made.check(HONEST, times=4)
    (found,) = made.records.trust().hosts
    assert (found.unanswered, found.canaries) == (0, 1)
    assert made.spent(HONEST) - before == 4 * (WRITING_WORK + 2 * CANARY_WORK)
    # The host has read them: it is not asked the same again.
    assert all(one.asked == (HONEST,) for one in made.records.prompts)


async def test_a_host_that_always_says_that_it_is_busy_is_found_too(tmp_path: Path) -> None:
    made = world(tmp_path)
    models = made.node.snapshot.models
    busy = tuple(replace(one, load=4.0) if one.node == LIAR else one for one in models[MODEL].targets)
    made.node.snapshot = replace(made.node.snapshot, models={MODEL: replace(models[MODEL], targets=busy)})
    await made.check(LIAR, times=8)
    assert ("probabilities", LIAR) not in made.client.asked
    await made.check(LIAR, times=120)
    assert made.standing(LIAR) == Standing.DISTRUSTED
    # It is spared again after each canary that it answered.
    assert made.client.asked.count(("probabilities", LIAR)) <= 128 // 8


async def test_a_host_whose_place_is_always_needed_is_asked_to_the_end_at_last(tmp_path: Path) -> None:
    made = world(tmp_path)
    ask = made.client.ask

    async def asks(target: Target, shape: RequestShape, asked: Question, give_way: Any) -> CanaryAnswer | None:
        made.client.others = {LIAR: 6}
        needed, made.client.others = give_way(), {}
        if needed:
            raise GaveWayError
        return await ask(target, shape, asked, give_way)

    made.client.ask = asks
    await made.check(LIAR, times=8)
    assert made.records.trust().hosts == ()
    await made.check(LIAR, times=80)
    assert made.standing(LIAR) == Standing.DISTRUSTED


async def test_a_host_that_never_gave_probabilities_is_shown(tmp_path: Path) -> None:
    made = world(tmp_path)
    made.client.silent = True
    await made.check(LIAR, times=12)
    (found,) = world(tmp_path).records.trust().hosts
    assert (found.node_id, found.unanswered, found.canaries) == (LIAR, 12, 0)


async def test_reading_a_copys_own_answers_back_is_part_of_what_canaries_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(tmp_path, STREAMED)
    made.client.length = 5
    monkeypatch.setattr(made.canaries, "_chance", lambda: 0.99)
    await made.check(HONEST, times=3)
    asked = [(what, node) for what, node in made.client.asked if what != "write"]
    # Each is written in two texts, and answered and read back once.
    assert made.client.asked.count(("write", FRIEND)) == 2 * len(asked) // 2
    assert made.spent(HONEST) == len(asked) // 2 * (WRITING_WORK + 2 * CANARY_WORK)


async def test_what_a_canary_found_is_saved_before_anything_else_is_asked(tmp_path: Path) -> None:
    made = world(tmp_path)
    copy = Target(node=ME, local=True, slots=4)
    route = made.node.snapshot.models[MODEL]
    made.node.snapshot = replace(made.node.snapshot, models={MODEL: replace(route, targets=(copy, *route.targets))})
    made.node.launches = (SimpleNamespace(model=MODEL, order=SimpleNamespace(facts=facts(MODEL))),)
    saved: list[TrustState] = []
    write = made.client.write

    async def writes(target: Target, model: ModelName, about: str, give_way: Any) -> str:
        if ("probabilities", LIAR) in made.client.asked:
            saved.append(msgspec.json.decode((tmp_path / "trust.json").read_bytes(), type=TrustState))
        return await write(target, model, about, give_way)

    made.client.write = writes
    await made.check(LIAR, times=1)
    assert saved
    assert [(one.node, one.canaries) for one in saved[0].hosts] == [(LIAR, 1)]
    # What was written and answered since then is kept as well.
    last = msgspec.json.decode((tmp_path / "trust.json").read_bytes(), type=TrustState)
    assert [one.asked for one in last.prompts] == [(), (LIAR,)]


async def test_a_host_that_announces_another_file_begins_anew(tmp_path: Path) -> None:
    made = world(tmp_path)
    await made.check(HONEST, times=1)
    other = (replace(facts(MODEL), fingerprint="another"),)
    made.node.members = tuple(member(number, serving(MODEL), on_disk=other) for number in (2, 3, 4))
    await made.check(HONEST, times=1)
    (found,) = made.records.trust().hosts
    assert found.canaries == 1


async def test_clients_work_makes_hosts_due_and_is_what_canaries_are_a_part_of(tmp_path: Path) -> None:
    made = world(tmp_path)
    async with TaskScope("test") as scope, asyncio.timeout(20):
        scope.spawn(made.canaries.run(), "canaries")
        made.canaries.worked(MODEL, LIAR, Usage(prompt=10, generated=10))
        assert made.canaries._schedule.deadline() is None
        made.canaries.worked(MODEL, LIAR, WORK)
        await made.client.sent.wait()
    assert ("probabilities", LIAR) in made.client.asked


def split(world: World, *workers: NodeId, host: NodeId = ME) -> None:
    """A host computes the model with these workers; this node has the file."""
    target = Target(node=host, local=host == ME, slots=4, workers=workers)
    friend = Target(node=FRIEND, local=False, slots=4)
    route = ModelRoute(name=MODEL, status=ModelStatus.WARM, targets=(target, friend))
    world.node.snapshot = replace(world.node.snapshot, models={MODEL: route})
    if host == ME:
        order = SimpleNamespace(facts=facts(MODEL))
        world.node.launches = (SimpleNamespace(model=MODEL, order=order),)
        world.client.liars = {ME}


async def test_workers_of_a_host_that_lies_are_named_and_not_avoided(tmp_path: Path) -> None:
    here = world(tmp_path)
    split(here, HONEST, host=LIAR)
    await here.check(LIAR)
    (record,) = [one for one in here.records.trust().hosts if one.standing == Standing.DISTRUSTED]
    assert (record.node_id, record.workers) == (LIAR, (HONEST,))
    assert (
        "It computes that model with honest, and no answer shows which of these nodes computes wrongly" in record.text
    )
    assert here.posted == [HostsDistrusted(hosts=((MODEL, LIAR),))]
    # Other workers do not make it begin anew.
    few = world(tmp_path / "few")
    (tmp_path / "few").mkdir()
    for number in range(20):
        split(few, node_id(10 + number), host=LIAR)
        await few.check(LIAR, 1)
    assert few.standing(LIAR) == Standing.DISTRUSTED


@pytest.mark.parametrize("workers", [(LIAR,), (LIAR, HONEST)])
async def test_a_node_whose_own_split_is_wrong_avoids_the_workers_that_it_does_not_trust(
    tmp_path: Path, workers: tuple[NodeId, ...]
) -> None:
    here = world(tmp_path)
    split(here, *workers, FRIEND)
    await here.check(ME)
    # The friend is the owner's own, so it is not suspected. This node goes on serving.
    assert here.posted[-1] == HostsDistrusted(hosts=tuple(sorted((MODEL, one) for one in workers)))
    assert {one.node_id for one in here.records.trust().hosts} == set(workers)
    assert [one.about for one in here.notices] == list(workers)
    assert all("the split model gave other answers than its file" in one.text for one in here.notices)
    several = "no answer shows which of them it is"
    assert [several in one.text for one in here.notices] == [len(workers) > 1] * len(workers)
    # Without the liar it passes.
    split(here, HONEST)
    here.client.liars = set()
    if HONEST in workers:
        await here.records.forget("honest")
    await here.check(ME)
    assert here.standing(ME) == Standing.HONEST


async def test_a_split_of_this_node_with_trusted_workers_alone_is_not_checked(tmp_path: Path) -> None:
    here = world(tmp_path)
    split(here, FRIEND)
    await here.check(ME, 3)
    assert here.client.asked == []
