from collections.abc import Callable, Collection

from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.placement.room import Contention, Resident, make_room
from mesh_llm.core.types.ids import ModelName

POLICY = OnDemandPolicy(scope="members")
NOW = 1000.0


def resident(name: str, *, since: float = 0.0, used: float = 0.0, **fields: object) -> Resident:
    values: dict[str, object] = {"busy": False, "load_seconds": 2.0}
    return Resident(ModelName(name), since, used, **(values | fields))  # pyright: ignore[reportArgumentType]


def needs(sizes: dict[str, int], wanted: int) -> Callable[[Collection[ModelName]], bool]:
    return lambda chosen: sum(sizes[name] for name in chosen) >= wanted


def test_the_least_recently_used_goes_first() -> None:
    residents = [resident("new", used=900.0), resident("old", used=100.0), resident("middle", used=500.0)]
    room = make_room(residents, needs({"new": 1, "old": 1, "middle": 1}, 1), POLICY, NOW)
    assert room is not None
    assert (room.models, room.at) == (("old",), NOW)


def test_no_more_is_unloaded_than_is_needed() -> None:
    residents = [resident("small", used=1.0), resident("large", used=2.0)]
    room = make_room(residents, needs({"small": 1, "large": 4}, 4), POLICY, NOW)
    assert room is not None
    assert room.models == ("large",)


def test_there_is_no_room_where_all_together_are_too_little() -> None:
    assert make_room([resident("one")], needs({"one": 1}, 2), POLICY, NOW) is None


def test_a_model_stays_for_as_long_as_its_load_took() -> None:
    young = resident("young", since=NOW - 1.0, used=NOW - 30.0, load_seconds=8.0)
    assert young.free_at(POLICY) == NOW - 1.0 + 8.0
    assert young._replace(min_lifetime=3.0).free_at(POLICY) == NOW - 1.0 + 3.0
    assert young._replace(load_seconds=500.0).free_at(POLICY) == NOW - 1.0 + POLICY.longest


def test_what_is_used_keeps_its_turn() -> None:
    busy = resident("busy", since=NOW, used=NOW, busy=True, load_seconds=5.0)
    assert busy.free_at(POLICY) == NOW + POLICY.turn_loads * 5.0
    assert busy._replace(busy=False, needed=True).free_at(POLICY) == NOW + POLICY.turn_loads * 5.0
    assert busy._replace(load_seconds=500.0).free_at(POLICY) == NOW + POLICY.longest_turn


def test_turns_are_longer_for_a_while_where_a_model_comes_back_soon() -> None:
    contention, red = Contention(POLICY), ModelName("red")
    contention.wanted(red, 5.0, NOW)
    contention.unloaded(red, NOW)
    assert contention.turns(NOW) == 1.0
    later = Contention(POLICY)
    later.unloaded(red, NOW)
    later.wanted(red, 5.0, NOW + 2.0 * POLICY.turn_loads * 5.0)
    assert later.turns(NOW + 60.0) == 1.0
    contention.wanted(red, 5.0, NOW + 30.0)
    assert contention.turns(NOW + 31.0) == 2.0
    assert contention.turns(NOW + 30.0 + POLICY.contended) == 1.0
    busy = resident("busy", since=NOW, used=NOW, busy=True, load_seconds=5.0)
    assert busy.free_at(POLICY, 2.0) == NOW + 2.0 * POLICY.turn_loads * 5.0
    # What nobody uses makes room as before: a user who asks for two models in turn does not wait.
    idle = busy._replace(busy=False)
    assert idle.free_at(POLICY, 2.0) == idle.free_at(POLICY)


def test_what_is_idle_goes_before_what_is_used() -> None:
    residents = [resident("busy", used=0.0, busy=True, since=NOW), resident("idle", used=NOW - 5.0)]
    room = make_room(residents, needs({"busy": 1, "idle": 1}, 1), POLICY, NOW)
    assert room is not None
    assert room.models == ("idle",)


@given(
    st.lists(st.tuples(st.floats(0, NOW), st.floats(0, NOW), st.booleans(), st.integers(1, 5)), min_size=1, max_size=8),
    st.integers(1, 20),
)
def test_nothing_goes_before_its_time_and_nothing_needlessly(
    models: list[tuple[float, float, bool, int]], wanted: int
) -> None:
    residents = [resident(str(number), since=one[0], used=one[1], busy=one[2]) for number, one in enumerate(models)]
    sizes = {str(number): one[3] for number, one in enumerate(models)}
    room = make_room(residents, needs(sizes, wanted), POLICY, NOW)
    if sum(sizes.values()) < wanted:
        assert room is None
        return
    assert room is not None
    by_name = {one.model: one for one in residents}
    assert room.at == max([NOW, *(by_name[name].free_at(POLICY) for name in room.models)])
    assert sum(sizes[name] for name in room.models) >= wanted
    for name in room.models:
        assert sum(sizes[one] for one in room.models if one != name) < wanted
