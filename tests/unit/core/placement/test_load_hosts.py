from collections.abc import Collection

import msgspec
from tests.support.core_values import GB, facts, member, node_id, serving

from mesh_llm.core.placement.load_hosts import Place, Rates, no_demand, place_of, rank_places
from mesh_llm.core.placement.offload import Pools
from mesh_llm.core.types.announcement import LoadOffer, may_load
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, Role

MODEL = facts("red", 4.0)


def place(number: int, *on_disk: str, free: float = 8.0, room: float = 0.0, speed: int = 0, **offer: bool) -> Place:
    room = max(free, room)
    return Place(
        node=node_id(number),
        offer=LoadOffer(free_bytes=int(free * GB), room_bytes=int(room * GB), **offer),
        idle_bytes=int(room * GB),
        on_disk=frozenset(map(ModelName, on_disk)),
        speed=speed,
    )


def ranked(*places: Place, shared: bool = True, model: ModelFacts = MODEL, demand: Rates = no_demand) -> list[NodeId]:
    def fits(wanted: ModelFacts, pools: Pools) -> bool:
        return pools.device >= wanted.size_bytes

    return list(rank_places(model, places, shared=shared, fits=fits, demand=demand))


def test_the_disk_here_comes_before_a_neighbour_and_before_the_source() -> None:
    from_source = place(1, hub=True)
    fetches = place(2, fetches=True)
    has = place(3, "red", free=0.0, room=8.0)
    sourced = msgspec.structs.replace(MODEL, source="hf:o/r:f")
    assert ranked(from_source, fetches, has, model=sourced) == [node_id(3), node_id(2), node_id(1)]
    assert ranked(from_source, fetches, shared=False) == []


def test_free_memory_comes_before_idle_and_idle_before_busy() -> None:
    idle = place(1, "red", free=0.0, room=8.0)
    busy = place(2, "red", free=0.0, room=8.0)._replace(idle_bytes=0)
    free = place(3, "red")
    assert ranked(busy, idle, free) == [node_id(3), node_id(1), node_id(2)]


def test_whoever_must_wait_for_a_turn_comes_after_whoever_must_fetch() -> None:
    busy = place(1, "red", free=0.0, room=8.0)._replace(idle_bytes=0)
    assert ranked(busy, place(2, fetches=True)) == [node_id(2), node_id(1)]


def test_fast_machines_come_first_and_equal_ones_in_one_order_for_all() -> None:
    slow, fast = place(1, "red", speed=10**9), place(2, "red", speed=9 * 10**9)
    assert ranked(slow, fast) == [node_id(2), node_id(1)]
    equal = [place(number, "red", speed=10**9 + number) for number in range(8)]
    assert ranked(*equal) == ranked(*reversed(equal))


def test_what_is_asked_for_least_makes_room() -> None:
    """Else a popular model goes, and is loaded again at once."""
    rates = {"popular": 20.0, "usual": 4.0, "equal": 4.1, "rare": 0.1}

    def full(number: int, **residents: float) -> Place:
        sizes = {ModelName(name): int(size * GB) for name, size in residents.items()}
        return place(number, "red", free=0.0, room=8.0, speed=10**9 * number)._replace(residents=sizes)

    def demand(models: Collection[ModelName]) -> dict[ModelName, float]:
        return {model: rates[model] for model in models}

    def order(*places: Place) -> list[NodeId]:
        return ranked(*places, demand=demand)

    popular, usual, rare = full(3, popular=4.0), full(2, usual=4.0), full(1, rare=4.0)
    assert order(popular, usual, rare) == [rare.node, usual.node, popular.node]
    # One of two is enough; else both count.
    assert order(usual, full(1, popular=4.0, rare=4.0)) == [node_id(1), node_id(2)]
    assert order(usual, full(1, popular=3.0, rare=3.0)) == [node_id(2), node_id(1)]
    # Nearly the same demand is the same: the faster machine comes first.
    assert order(usual, full(9, equal=4.0)) == [node_id(9), node_id(2)]


def test_what_fits_nowhere_is_asked_nowhere() -> None:
    assert ranked(place(1, "red", free=1.0), place(2, "blue")) == []


def test_only_nodes_that_offer_it_are_places() -> None:
    assert place_of(member(1)) is None
    assert place_of(member(1, loads=LoadOffer(), suspect=True)) is None
    assert place_of(member(1, loads=LoadOffer(), role=Role.CLIENT)) is None
    used, idle = serving("a", size_bytes=GB, in_flight=1), serving("b", size_bytes=2 * GB)
    found = place_of(member(1, used, idle, loads=LoadOffer(free_bytes=GB, room_bytes=8 * GB)))
    assert found is not None
    assert found.idle_bytes == 3 * GB


def test_for_whom_a_node_loads() -> None:
    allowed = {
        scope: [who for who in ("own", "member", "client", "stranger") if may_load(scope, who)]
        for scope in ("off", "own", "members", "clients", "strangers")
    }
    assert allowed == {
        "off": [],
        "own": ["own"],
        "members": ["own", "member"],
        "clients": ["own", "member", "client"],
        "strangers": ["own", "member", "client", "stranger"],
    }
