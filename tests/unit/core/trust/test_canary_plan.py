"""Whom to ask for a canary and when, which reference counts, and what is remembered."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.support.core_values import facts, member, node_id, serving

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.trust import canary_plan
from mesh_llm.core.trust.canaries import AnswerToken, CanaryAnswer, Suspicion
from mesh_llm.core.trust.canary_plan import (
    CANARY_WORK,
    Check,
    HostKey,
    HostRecord,
    Prompt,
    Schedule,
    Seen,
    Source,
    Standing,
    bounded,
    choose,
    coarser_copy,
    compared,
    distrusted,
    unasked,
    work,
)
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.ids import ModelName, OwnerId
from mesh_llm.core.types.model import ModelKind, ModelStatus

MODEL = ModelName("tiny")
PRINT = "print-tiny"
CHAT = "/v1/chat/completions"
ME, HOST, FRIEND, OTHER = (node_id(number) for number in (1, 2, 3, 4))
MINE = OwnerId("7" * 64)
KEY = HostKey(HOST, MODEL)
ANSWER = CanaryAnswer((AnswerToken("a", -0.1, (("a", -0.1), ("b", -2.5))),))
OWNED = Ownership(owner=MINE, issued=0, expires=2**40, signature=b"s" * 64)


def target(number: int, **fields: Any) -> Target:
    return Target(node=node_id(number), local=number == 1, slots=2, **fields)


def seen(*targets: Target, prints: dict[int, str] | None = None, **fields: Any) -> Seen:
    named = prints or {}
    on_disk = {number: (replace(facts("tiny"), fingerprint=named.get(number, PRINT)),) for number in (2, 3, 4)}
    snapshot = RoutingSnapshot(
        version=1,
        node=ME,
        models={MODEL: ModelRoute(name=MODEL, status=ModelStatus.WARM, targets=targets)},
        owners={FRIEND: OWNED},
    )
    values: dict[str, Any] = {
        "snapshot": snapshot,
        "members": tuple(member(number, serving("tiny"), on_disk=on_disk[number]) for number in (2, 3, 4)),
        "own": {MODEL: PRINT},
        "own_caches": {MODEL: "f16"},
        "in_flight": {},
        "circle": frozenset({MINE}),
        "now": 1000.0,
    }
    return Seen(**(values | fields))


def chosen(*targets: Target, prompts: tuple[Prompt, ...] = (), **fields: Any) -> Check | None:
    return choose(KEY, CHAT, seen(*targets, **fields), prompts, fields.get("doubted", ()))


def prompt(number: int, *asked: int, at: float = 0.0, fingerprint: str = PRINT) -> Prompt:
    return Prompt(
        fingerprint=fingerprint,
        path=CHAT,
        system="s",
        text=f"{number}",
        answer=ANSWER,
        asked=tuple(map(node_id, asked)),
        at=at,
    )


# When.


def test_a_host_is_due_when_clients_gave_it_enough_work_and_not_before() -> None:
    schedule = Schedule(0.01)
    schedule.earned(KEY, 99 * CANARY_WORK, 0.0, 0.5)
    assert schedule.deadline() is None
    schedule.earned(KEY, 2 * CANARY_WORK, 0.0, 0.5)
    at = schedule.deadline()
    assert at is not None
    assert not schedule.due(at - 0.1)
    assert schedule.due(at) == (KEY,)
    schedule.spent(KEY, CANARY_WORK, at, 0.5)
    assert schedule.deadline() is None


def test_a_host_that_could_not_be_asked_is_due_again_later() -> None:
    schedule = Schedule(0.01)
    schedule.earned(KEY, 100 * CANARY_WORK, 0.0, 0.0)
    schedule.spent(KEY, 0.0, 10.0, 0.5)
    at = schedule.deadline()
    assert at is not None
    assert at > 10.0


@given(
    st.lists(st.tuples(st.floats(0, 5000), st.floats(0, 300), st.floats(0, 0.999)), min_size=1, max_size=200),
    st.sampled_from([0.001, 0.01, 0.1]),
)
def test_canaries_never_exceed_their_share_of_the_work(steps: list[tuple[float, float, float]], share: float) -> None:
    schedule, now, given_work, spent = Schedule(share), 0.0, 0.0, 0.0
    for done, passed, chance in steps:
        now += passed
        schedule.earned(KEY, done, now, chance)
        given_work += done
        while schedule.due(now):
            schedule.spent(KEY, CANARY_WORK, now, chance)
            spent += CANARY_WORK
        assert spent <= share * given_work + 1e-6


def test_what_is_remembered_of_hosts_is_bounded() -> None:
    schedule = Schedule(1.0)
    for number in range(2000):
        schedule.earned(HostKey(node_id(number), MODEL), 1e6, 0.0, 0.5)
    assert len(schedule.due(1e9)) <= canary_plan._MOST_HOSTS


def test_a_prompt_that_is_read_again_from_a_cache_is_no_work() -> None:
    assert work(1000, 1000, 50) == 50
    assert work(1000, 0, 50) == 150


# Whom, against what.


def test_the_own_copy_of_the_same_file_is_the_reference() -> None:
    check = chosen(target(1), target(2), target(3))
    assert check is not None
    assert (check.source, check.host.node) == (Source.OWN, HOST)
    assert check.reference is not None
    assert check.reference.local


@pytest.mark.parametrize(
    "fields",
    [
        {"own": {MODEL: "another"}},
        {"own": {}},
        {"in_flight": {ME: 1}},
    ],
)
def test_without_it_a_trusted_host_is(fields: dict[str, Any]) -> None:
    check = chosen(target(1), target(2), target(3), target(4), **fields)
    assert check is not None
    assert check.reference is not None
    assert (check.source, check.reference.node) == (Source.TRUSTED, FRIEND)


def test_a_trusted_host_that_splits_the_model_with_strangers_is_no_reference() -> None:
    assert chosen(target(2), target(3, workers=(OTHER,))) is None
    check = chosen(target(2), target(3, workers=(ME,)))
    assert check is not None


def test_a_trusted_host_that_is_in_doubt_itself_is_no_reference() -> None:
    assert choose(KEY, CHAT, seen(target(2), target(3)), (), {(MODEL, FRIEND)}) is None


def test_else_an_answer_is_that_was_recorded_and_the_host_was_not_asked_for() -> None:
    prompts = (prompt(1, 2), prompt(2, 4, at=5.0), prompt(3, at=9.0), prompt(4, fingerprint="another"))
    check = chosen(target(2), prompts=prompts)
    assert check is not None
    assert (check.source, check.prompt) == (Source.RECORDED, prompts[1])
    assert chosen(target(2), prompts=prompts[:1]) is None
    assert unasked(prompts, PRINT, CHAT) == [prompts[2]]


def with_caches(host: str, friend: str) -> tuple[Any, ...]:
    """The members, with these types of KV caches."""
    files = (replace(facts("tiny"), fingerprint=PRINT),)
    return tuple(
        member(number, serving("tiny", cache_type=cache), on_disk=files) for number, cache in ((2, host), (3, friend))
    )


@pytest.mark.parametrize(
    ("host", "friend", "recorded", "source"),
    [
        ("f16", "f16", "f16", Source.OWN),
        ("q8_0", "q8_0", "q8_0", Source.TRUSTED),
        ("q4_0", "q8_0", "q4_0", Source.RECORDED),
        # None has the host's, or it says nothing: as if there were no types.
        ("q4_0", "q8_0", "f16", Source.OWN),
        ("", "q8_0", "q4_0", Source.OWN),
    ],
)
def test_a_reference_with_a_cache_of_the_announced_type_goes_first(
    host: str, friend: str, recorded: str, source: Source
) -> None:
    prompts = (replace(prompt(1), cache_type=recorded),)
    check = chosen(target(1), target(2), target(3), prompts=prompts, members=with_caches(host, friend))
    assert check is not None
    assert check.source is source


COARSE = ModelName("tiny-q4")


def also_serves(*targets: Target, cache: str = "f16", **fields: Any) -> Seen:
    """A coarser file of the model is served, too."""
    now = seen(target(1), target(2))
    route = ModelRoute(name=COARSE, status=ModelStatus.WARM, targets=targets)
    models = {**now.snapshot.models, COARSE: route}
    return replace(
        now,
        snapshot=replace(now.snapshot, models=models, **fields),
        members=tuple(member(number, serving(COARSE, cache_type=cache)) for number in (3, 4)),
        own_caches={COARSE: cache},
    )


def test_the_coarser_copy_is_an_idle_trusted_one_with_the_same_cache() -> None:
    for number in (1, 3):
        assert coarser_copy(COARSE, "f16", also_serves(target(number))) == target(number)


@pytest.mark.parametrize(
    "now",
    [
        also_serves(target(4)),
        also_serves(target(3, workers=(OTHER,))),
        also_serves(target(3, load=1.0)),
        also_serves(target(1, load=0.5)),
        also_serves(target(1), cache="q8_0"),
        also_serves(target(1), cache=""),
        also_serves(target(3), distrusted=frozenset({(COARSE, FRIEND)})),
        seen(target(1), target(2)),
    ],
)
def test_without_such_a_one_there_is_none(now: Seen) -> None:
    assert coarser_copy(COARSE, "f16", now) is None
    assert coarser_copy(COARSE, "", now) is None


@pytest.mark.parametrize(
    "host",
    [
        target(2, load=1.0),
        target(2, status=ModelStatus.LOADING),
    ],
)
def test_a_host_without_a_free_place_is_not_asked(host: Target) -> None:
    assert chosen(target(1), host) is None


def test_a_host_is_not_asked_where_this_node_fills_it() -> None:
    assert chosen(target(1), target(2), in_flight={HOST: 2}) is None
    assert chosen(target(1), target(2), in_flight={HOST: 1}) is not None


def test_a_host_that_says_nothing_of_its_file_or_has_another_is_not_checked() -> None:
    assert chosen(target(1), target(2), prints={2: "another"}) is None
    assert chosen(target(1), target(2), members=(member(2, serving("tiny")),)) is None


def test_hosts_that_are_trusted_or_distrusted_already_are_not_checked() -> None:
    assert choose(HostKey(FRIEND, MODEL), CHAT, seen(target(1), target(3)), (), ()) is None
    assert choose(KEY, CHAT, seen(target(1), target(2)), (), {(MODEL, HOST)}) is None


def test_only_models_that_answer_texts_are_checked() -> None:
    now = seen(target(1), target(2))
    models = {MODEL: replace(now.snapshot.models[MODEL], kind=ModelKind.EMBEDDING)}
    assert choose(KEY, CHAT, replace(now, snapshot=replace(now.snapshot, models=models)), (), ()) is None


# What is remembered.


def verdict(found: str) -> Callable[[Suspicion], str]:
    """A test that always ends so."""

    def decide(_: Suspicion) -> str:
        return found

    return decide


def unchanged(known: Suspicion, *_: CanaryAnswer) -> Suspicion:
    """A canary that says nothing."""
    return known


def record(**fields: Any) -> HostRecord:
    return HostRecord(node=HOST, model=MODEL, fingerprint=PRINT, **fields)


def test_a_test_that_ends_well_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary_plan, "verdict", verdict("honest"))
    after = compared(record(suspicion=Suspicion(evidence=1.0), canaries=4), ANSWER, ANSWER, 50.0)
    assert (after.standing, after.tests, after.canaries, after.suspicion) == (Standing.HONEST, 1, 5, Suspicion())


def test_distrust_stays_until_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary_plan, "verdict", verdict("suspect"))
    lied = compared(record(), ANSWER, ANSWER, 50.0)
    assert lied.standing is Standing.DISTRUSTED
    assert distrusted([lied, record(standing=Standing.HONEST)]) == ((MODEL, HOST),)
    assert compared(lied, ANSWER, ANSWER, 1e9) is lied
    # However long ago, and however many others came since.
    others = [replace(record(), node=node_id(number), at=1e9) for number in range(5000)]
    assert lied in bounded([*others, lied], (), 1e9).hosts


def test_a_host_that_answers_as_a_coarser_copy_is_distrusted_however_near_the_two_are() -> None:
    def place(distance: float) -> CanaryAnswer:
        top = (("a", -0.2), ("b", -2.5 - distance), ("c", -3.0 + distance))
        return CanaryAnswer((AnswerToken("a", -0.2, top),) * 8)

    step = 0.004
    liar, true, alone = record(), record(), record()
    for _ in range(20):
        liar = compared(liar, place(0.0), place(step), 50.0, coarser=place(step))
        true = compared(true, place(0.0), place(step / 4), 50.0, coarser=place(step))
        alone = compared(alone, place(0.0), place(step), 50.0)
    assert liar.standing is Standing.DISTRUSTED
    assert liar.canaries < 20
    assert (true.standing, alone.standing) == (Standing.HONEST, Standing.HONEST)
    assert true.tests > alone.tests


def test_evidence_fades_by_half_in_a_week(monkeypatch: pytest.MonkeyPatch) -> None:
    week = 7 * 86400.0
    monkeypatch.setattr(canary_plan, "judged", unchanged)
    before = record(suspicion=Suspicion(evidence=8.0), at=100.0)
    assert compared(before, ANSWER, ANSWER, 100.0 + week).suspicion.evidence == pytest.approx(4.0)
    assert compared(before, ANSWER, ANSWER, 100.0).suspicion.evidence == pytest.approx(8.0)


def test_what_is_kept_is_bounded_and_keeps_prompts_that_nobody_was_asked() -> None:
    hosts = [replace(record(at=1000.0), node=node_id(number)) for number in range(5000)]
    prompts = [prompt(number, 2, at=float(number)) for number in range(100)]
    unused = prompt(1000, at=-1.0)
    kept = bounded([*hosts, record(at=-1e9)], [*prompts, unused], 2000.0)
    assert len(kept.hosts) == canary_plan._MOST_RECORDS
    assert all(one.at == 1000.0 for one in kept.hosts)
    assert unused in kept.prompts
    assert len(kept.prompts) == canary_plan._PROMPTS_EACH
