import msgspec
from tests.support.core_values import GB, config, facts, member, node_id, serving

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, rank
from mesh_llm.core.routing.table import Endpoint, RoutingTable, as_announced, build_routes, same_routes
from mesh_llm.core.trust.corrections import Kind, TimedAnswer
from mesh_llm.core.types.announcement import Announcement, Member, SplitState
from mesh_llm.core.types.events import AnswersTimed, ContextRefused, PromptTaken, SplitFailed
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import (
    AttentionRates,
    Capacity,
    LayerFacts,
    ModelFacts,
    ModelStatus,
    Rates,
    Speed,
)
from mesh_llm.wire.mesh.announcement import decode_announcement, encode_announcement

M = ModelName("m")


def models(
    endpoints: list[Endpoint], *, wanted: tuple[str, ...] = (), disk: tuple[str, ...] = ()
) -> dict[ModelName, ModelRoute]:
    known = {ModelName(name): facts(name) for name in disk}
    return build_routes(endpoints, known, [ModelName(name) for name in wanted])


def route(*endpoints: Endpoint) -> ModelRoute:
    return models(list(endpoints))[M]


def mine(status: ModelStatus = ModelStatus.WARM, **fields: object) -> Endpoint:
    return Endpoint(
        node=node_id(1), owner="me", local=True, address="127.0.0.1:8", serving=serving("m", status, **fields)
    )


def theirs(
    number: int, status: ModelStatus = ModelStatus.WARM, *, blocked: bool = False, suspect: bool = False
) -> Endpoint:
    return Endpoint(
        node=node_id(number),
        owner=f"node{number}",
        serving=serving("m", status, context=100 * number),
        rtt_ms=3.0,
        suspect=suspect,
        blocked=blocked,
    )


def test_local_first_and_remote_without_address() -> None:
    found = route(theirs(2), mine(context=500))
    assert [(target.node, target.local, target.address, target.rtt_ms) for target in found.targets] == [
        (node_id(1), True, "127.0.0.1:8", 0.0),
        (node_id(2), False, "", 3.0),
    ]
    assert (found.status, found.context, found.owner, found.reason) == (ModelStatus.WARM, 200, "me", "")


def test_what_is_known_but_not_served_is_cold() -> None:
    found = models([], wanted=("w",), disk=("d",))
    assert {name: entry.status for name, entry in found.items()} == {"w": ModelStatus.COLD, "d": ModelStatus.COLD}
    assert found[ModelName("d")].size_bytes == facts("d").size_bytes


def test_the_best_state_counts_and_the_reason_is_kept() -> None:
    assert route(mine(ModelStatus.LOADING), theirs(2, ModelStatus.FAILED)).status is ModelStatus.LOADING
    failed = route(mine(ModelStatus.FAILED, reason="need 55.0 GB, have 51.5 GB"))
    assert (failed.status, failed.reason, failed.targets) == (ModelStatus.FAILED, "need 55.0 GB, have 51.5 GB", ())


def test_stopping_and_failed_hosts_are_no_targets() -> None:
    found = route(mine(ModelStatus.STOPPING), theirs(2, ModelStatus.FAILED), theirs(3))
    assert [target.node for target in found.targets] == [node_id(3)]


def test_a_doubted_host_is_used_only_alone() -> None:
    assert [target.node for target in route(theirs(2, suspect=True), theirs(3)).targets] == [node_id(3)]
    alone = route(theirs(2, suspect=True), theirs(3, ModelStatus.LOADING))
    assert [target.node for target in alone.targets] == [node_id(2), node_id(3)]
    assert alone.status is ModelStatus.WARM


def test_a_failed_target_is_left_out_at_once_and_asked_to_wait_for() -> None:
    assert [target.node for target in route(theirs(2, blocked=True), theirs(3)).targets] == [node_id(3)]
    found = route(theirs(2, blocked=True))
    assert (found.status, found.targets) == (ModelStatus.LOADING, ())
    assert found.reason


def test_load_goes_in_quarters() -> None:
    loads = [route(mine(in_flight=count)).targets[0].load for count in range(6)]
    assert loads == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]


def rebuilt(table: RoutingTable, *members: Member, now: float = 0.0) -> RoutingSnapshot | None:
    return table.rebuild(
        own=[serving("m")],
        addresses={M: "127.0.0.1:8"},
        members=members,
        round_trips={},
        on_disk={},
        wanted=(),
        accepting=True,
        now=now,
    )


def test_a_snapshot_is_given_out_only_when_it_routes_differently() -> None:
    table = RoutingTable(config(epoch=7.0))
    first = rebuilt(table)
    assert first is not None
    assert rebuilt(table, now=1.0) is None
    assert table.snapshot is first
    second = rebuilt(table, member(2, serving("m"), rtt_ms=3.0), now=2.0)
    assert second is not None
    assert second.version == first.version + 1
    assert [(target.node, target.rtt_ms) for target in second.models[M].targets] == [
        (node_id(1), 0.0),
        (node_id(2), 3.0),
    ]
    assert not same_routes(first, second)
    assert same_routes(first, msgspec.structs.replace(first, version=9))


def test_a_model_keeps_the_time_at_which_it_became_known() -> None:
    table = RoutingTable(config(epoch=7.0))
    rebuilt(table)
    found = rebuilt(table, member(2, serving("m")), now=2.0)
    assert found is not None
    assert found.models[M].created == 7


def test_embeddings_only_where_every_host_can() -> None:
    assert route(mine()).embeddings
    assert not route(mine(embeddings=False), theirs(2)).embeddings


def test_models_that_no_peer_has_any_more_are_forgotten() -> None:
    table = RoutingTable(config(epoch=1_700_000_000.0))
    kept = facts("kept")

    def seen(number: int, now: float) -> int:
        peer = member(1, on_disk=(facts(f"m{number}"), kept))
        rebuilt(table, peer, now=now)
        return table.snapshot.models[ModelName(f"m{number}")].created

    first = seen(0, 0.0)
    created = table.snapshot.models[kept.name].created
    # One of the last 256 keeps its time; among thousands, the first has lost it.
    seen(1, 1.0)
    assert seen(0, 2.0) == first
    for number in range(2, 3000):
        seen(number, float(number))
    assert seen(0, 4000.0) > first
    assert table.snapshot.models[kept.name].created == created


HOST = node_id(2)


def corrected_table() -> tuple[RoutingTable, list[Member]]:
    """A host that announces more context than it takes, and an honest one."""
    table = RoutingTable(config())
    members = [member(2, serving("m", context=32768, term=1)), member(3, serving("m", context=4096, term=1))]
    table.observe(members, 0.0)
    routed(table, members, 0.0)
    event = ContextRefused(node=HOST, model=M, term=1, tokens=900)
    assert table.refused_context(event, members, 1.0) is not None
    return table, members


def routed(table: RoutingTable, members: list[Member], now: float) -> RoutingSnapshot | None:
    return table.rebuild(
        own=[], addresses={}, members=members, round_trips={}, on_disk={}, wanted=(), accepting=True, now=now
    )


def test_a_corrected_context_is_what_this_node_routes_by_and_offers_its_clients() -> None:
    table, members = corrected_table()
    assert table.due(1.0)
    snapshot = routed(table, members, 1.0)
    assert snapshot is not None
    route = snapshot.models[M]
    assert [target.context for target in route.targets] == [900, 4096]
    assert route.context == 900
    assert [one.node for one in rank(route, {}, prompt_tokens=2000)] == [node_id(3), HOST]
    assert [(one.node, one.kind, one.announced, one.seen) for one in snapshot.corrections] == [
        (HOST, Kind.CONTEXT, 32768, 900)
    ]
    # Others are told what was announced.
    given = as_announced(snapshot)
    assert given.corrections == ()
    assert [target.context for target in given.models[M].targets] == [32768, 4096]
    assert given.models[M].context == 4096


def test_a_correction_ends_with_the_launch_and_with_time() -> None:
    table, members = corrected_table()
    again = [member(2, serving("m", context=32768, term=2)), members[1]]
    snapshot = routed(table, again, 2.0)
    assert snapshot is not None
    assert snapshot.corrections == ()
    assert snapshot.models[M].targets[0].context == 32768
    # What is said of an earlier launch does not count.
    assert table.refused_context(ContextRefused(node=HOST, model=M, term=1, tokens=9), again, 2.0) is None

    table, members = corrected_table()
    routed(table, members, 1.0)
    end = table.deadline()
    assert end is not None
    assert table.due(end)
    snapshot = routed(table, members, end)
    assert snapshot is not None
    assert snapshot.models[M].targets[0].context == 32768


def test_the_user_ends_it() -> None:
    table, members = corrected_table()
    routed(table, members, 1.0)
    table.forget_corrections(HOST, ModelName("another"))
    assert not table.stale
    table.forget_corrections(HOST, M)
    assert table.stale
    snapshot = routed(table, members, 2.0)
    assert snapshot is not None
    assert snapshot.corrections == ()
    assert snapshot.models[M].targets[0].context == 32768


def test_a_longer_prompt_that_works_ends_it() -> None:
    table, members = corrected_table()
    routed(table, members, 1.0)
    table.took_prompt(PromptTaken(node=HOST, model=M, term=1, tokens=1200), members)
    assert table.stale
    snapshot = routed(table, members, 2.0)
    assert snapshot is not None
    assert snapshot.corrections == ()


def test_a_host_is_ranked_by_the_speed_that_came() -> None:
    table = RoutingTable(config())
    members = [
        member(2, serving("m", term=1, tokens_per_second=500.0)),
        member(3, serving("m", tokens_per_second=40.0)),
    ]
    for second in range(8):
        slow = TimedAnswer(node=HOST, model=M, term=1, kind=Kind.SPEED, tokens=60, seen=4.0, said=500.0)
        table.timed(AnswersTimed(answers=(slow,)), members, {}, float(second))
    snapshot = routed(table, members, 9.0)
    assert snapshot is not None
    assert [one.node for one in rank(snapshot.models[M], {})] == [node_id(3), HOST]
    assert snapshot.models[M].targets[0].tokens_per_second == 4.0
    assert as_announced(snapshot).models[M].targets[0].tokens_per_second == 500.0


FILE = msgspec.structs.replace(facts("copy"), fingerprint="same", active_bytes=GB, head_bytes=0, weight_bits=16.0)
READS = Speed(full=Rates(f16=GB), batch=Rates(f16=1000 * GB))
"""A thousand tokens of FILE a second."""


def announcing(capacity: Capacity) -> list[Member]:
    """A host of M, with what an announcement tells of its file."""
    known = encode_announcement(
        member(2, serving("m"), on_disk=(msgspec.structs.replace(FILE, name=M),), capacity=capacity).announcement
    )
    announced = decode_announcement(known)
    assert isinstance(announced, Announcement)
    return [msgspec.structs.replace(member(2), announcement=announced)]


def prompts_seen(members: list[Member], files: dict[ModelName, ModelFacts], tokens: int = 1000) -> float:
    """What is counted on after eight prompts that were read at 150 tokens a second."""
    table = RoutingTable(config())
    slow = TimedAnswer(node=HOST, model=M, term=1, kind=Kind.PROMPTS, tokens=tokens, seen=150.0)
    for second in range(8):
        table.timed(AnswersTimed(answers=(slow,)), members, files, float(second))
    snapshot = routed(table, members, 9.0)
    assert snapshot is not None
    return snapshot.models[M].targets[0].slow_prompts


def test_a_host_that_reads_prompts_slower_than_foretold_is_known_where_the_same_file_is() -> None:
    capacity = Capacity(memory_bytes=16 * GB, speed=READS)
    here = {FILE.name: FILE}
    assert prompts_seen(announcing(capacity), here) == 150.0
    assert prompts_seen(announcing(capacity), {}) == 0.0
    other = msgspec.structs.replace(FILE, fingerprint="other")
    assert prompts_seen(announcing(capacity), {other.name: other}) == 0.0


def test_a_gpu_that_may_not_hold_the_model_is_not_judged() -> None:
    here = {FILE.name: FILE}
    assert prompts_seen(announcing(Capacity(memory_bytes=GB, speed=READS, host_bytes=16 * GB)), here) == 0.0
    assert prompts_seen(announcing(Capacity(memory_bytes=2 * GB, speed=READS, host_bytes=16 * GB)), here) == 150.0


def test_a_long_prompt_is_judged_by_what_its_length_takes() -> None:
    slow = msgspec.structs.replace(READS, attention=AttentionRates(prompt=10**9))
    file = msgspec.structs.replace(FILE, layer_facts=(LayerFacts(weights=GB, products=1000),))
    members = announcing(Capacity(memory_bytes=16 * GB, speed=slow))
    assert prompts_seen(members, {file.name: file}, tokens=600) == 150.0
    # 20,000 tokens see 200 million others: 200 s for a thousand products each, and 20 s for the rest.
    assert prompts_seen(members, {file.name: file}, tokens=20_000) == 0.0


def test_a_passive_node_corrects_the_table_that_it_fetched() -> None:
    fetched = msgspec.structs.replace(
        RoutingSnapshot(version=1, node=node_id(9)),
        models=models([theirs(200)]),
    )
    table = RoutingTable(config())
    table.learn(fetched)
    event = ContextRefused(node=node_id(200), model=M, term=fetched.models[M].targets[0].term, tokens=900)
    assert table.refused_context(event, [], 1.0) is not None
    snapshot = routed(table, [], 1.0)
    assert snapshot is not None
    assert (snapshot.models[M].context, snapshot.models[M].targets[0].context) == (900, 900)
    assert [one.seen for one in snapshot.corrections] == [900]


def lending(offered: int) -> Member:
    return member(2, split=SplitState(model=M, memory_bytes=offered))


def test_memory_that_a_worker_announces_and_does_not_give_is_shown_until_it_announces_less() -> None:
    table = RoutingTable(config())
    failed = SplitFailed(node=HOST, model=M, memory_bytes=3000)
    made = table.part_failed(failed, [lending(4000)], 1.0)
    assert made is not None
    assert (made.times, made.announced, made.seen) == (1, 4000, 3000)
    snapshot = routed(table, [lending(4000)], 1.0)
    assert snapshot is not None
    assert [one.kind for one in snapshot.corrections] == [Kind.MEMORY]
    made = table.part_failed(failed, [lending(4000)], 2.0)
    assert made is not None
    assert made.times == 2
    # It has noticed itself.
    assert table.part_failed(failed, [lending(2400)], 3.0) is None
    snapshot = routed(table, [lending(2400)], 3.0)
    assert snapshot is not None
    assert snapshot.corrections == ()


def test_distrusted_hosts_stay_targets_and_are_named() -> None:
    """They answer other nodes' clients as ever; only this node's API leaves them out."""
    table = RoutingTable(config())
    other = member(2, serving("m"))
    before = rebuilt(table, other)
    table.distrust([(M, node_id(2))])
    after = rebuilt(table, other)
    assert before is not None
    assert after is not None
    assert after.distrusted == {(M, node_id(2))}
    assert after.models == before.models
    table.distrust([])
    forgotten = rebuilt(table, other)
    assert forgotten is not None
    assert same_routes(forgotten, before)
