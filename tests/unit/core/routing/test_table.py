import msgspec
from tests.support.core_values import config, facts, member, node_id, serving

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot
from mesh_llm.core.routing.table import Endpoint, RoutingTable, build_routes, same_routes
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus

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
