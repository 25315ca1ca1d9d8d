from tests.support.core_values import GB, facts, member, node_id, serving

from mesh_llm.core.config import Timings
from mesh_llm.core.placement.assignment import rendezvous
from mesh_llm.core.placement.standby import Losses, Situation, Standby
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, ModelStatus, Role

M = ModelName("m")
TIMINGS = Timings()


def situation(
    *members: Member,
    disk: tuple[str, ...] = ("m",),
    wanted: tuple[str, ...] = ("m",),
    demand: dict[str, float] | None = None,
    excluded: tuple[str, ...] = (),
    memory: int = 8 * GB,
    me: int = 1,
) -> Situation:
    here = {ModelName(name): facts(name) for name in disk}
    known = {one.name: one for peer in members for one in peer.announcement.on_disk}
    return Situation(
        me=node_id(me),
        members=members,
        on_disk=here,
        known=known | here,
        wanted=[ModelName(name) for name in wanted],
        demand=demand or {},
        excluded=[ModelName(name) for name in excluded],
        fits=lambda model, size: model.size_bytes <= size,
        memory_bytes=memory,
    )


def run(standby: Standby, what: Situation, now: float, until: float) -> tuple[str, float] | None:
    """Look whenever the deadline says, as the node does; what was taken, and when."""
    while now <= until:
        taken = standby.look(what, now)
        if taken is not None:
            return taken.facts.name, now
        deadline = standby.deadline()
        if deadline is None:
            return None
        assert deadline > now
        now = deadline
    return None


def test_alone_there_is_nothing_to_do() -> None:
    standby = Standby(TIMINGS, joins=True)
    assert standby.look(situation(), 0.0) is None
    assert standby.deadline() is None


def test_a_joiner_listens_and_then_takes_what_nobody_serves() -> None:
    standby = Standby(TIMINGS, joins=True)
    busy = member(2, serving("other"), on_disk=(facts("other"),))
    assert run(standby, situation(busy, disk=("other", "m"), wanted=("other", "m")), 0.0, 60.0) == ("m", TIMINGS.settle)


def test_a_joiner_helps_where_everything_is_served() -> None:
    standby = Standby(TIMINGS, joins=True)
    assert run(standby, situation(member(2, serving("m"))), 0.0, 60.0) == ("m", TIMINGS.settle)


def test_a_joiner_that_can_take_nothing_says_why_and_looks_again() -> None:
    standby = Standby(TIMINGS, joins=True)
    nothing = situation(member(2, serving("m"), on_disk=(facts("m"),)), disk=())
    assert standby.look(nothing, 0.0) is None
    assert standby.look(nothing, 2.0) is None
    assert "none of the mesh's models is on disk here" in standby.waiting_because
    assert standby.deadline() == 2.0 + TIMINGS.retry_assignment


def test_a_standby_node_helps_nobody_unasked() -> None:
    assert run(Standby(TIMINGS, joins=False), situation(member(2, serving("m"))), 0.0, 1000.0) is None


def test_a_gap_is_filled_by_one_after_the_other() -> None:
    times: dict[int, float] = {}
    for me in (1, 2, 3):
        others = [member(number, on_disk=(facts("m"),), role=Role.STANDBY) for number in (1, 2, 3) if number != me]
        taken = run(Standby(TIMINGS, joins=False), situation(*others, me=me), 0.0, 60.0)
        assert taken is not None
        times[me] = taken[1]
    order = [int(node, 16) for node in rendezvous(M, [node_id(number) for number in (1, 2, 3)])]
    step = TIMINGS.promotion_step
    assert [times[number] for number in order] == [1.0, 1.0 + step, 1.0 + 2 * step]


def test_those_that_cannot_take_it_are_not_waited_for() -> None:
    order = rendezvous(M, [node_id(number) for number in range(1, 6)])
    last = int(order[-1], 16)
    incapable = {
        0: {"on_disk": ()},
        1: {"on_disk": (facts("m"),), "capacity": Capacity(memory_bytes=GB // 2)},
        2: {"on_disk": (facts("m"),), "suspect": True},
        3: {"on_disk": (facts("m"),), "role": Role.SERVE},
    }
    others = [member(int(node, 16), **incapable[rank]) for rank, node in enumerate(order[:-1])]  # pyright: ignore[reportArgumentType]
    assert run(Standby(TIMINGS, joins=False), situation(*others, me=last), 0.0, 60.0) == ("m", 1.0)


def test_somebody_else_taking_it_ends_the_call() -> None:
    standby = Standby(TIMINGS, joins=False)
    assert standby.look(situation(member(2)), 0.0) is None
    assert run(standby, situation(member(2, serving("m", ModelStatus.LOADING))), 0.5, 60.0) is None
    assert standby.look(situation(member(2)), 10.0) is None
    assert standby.deadline() == 11.0


def test_demand_beyond_what_hosts_bear_calls_for_one_more() -> None:
    host = member(2, serving("m"))
    standby = Standby(TIMINGS, joins=False)
    assert run(standby, situation(host, demand={"m": 59.0}), 0.0, 60.0) is None
    assert run(standby, situation(host, demand={"m": 61.0}), 0.0, 60.0) == ("m", 1.0)


def test_excluded_and_oversized_models_are_never_taken() -> None:
    for joins in (True, False):
        assert run(Standby(TIMINGS, joins=joins), situation(member(2), excluded=("m",)), 0.0, 20.0) is None
        assert run(Standby(TIMINGS, joins=joins), situation(member(2), memory=GB // 2), 0.0, 20.0) is None


def test_losses_tell_death_and_failure_from_a_drop() -> None:
    losses = Losses()
    host, bystander = member(2, serving("m")), member(3)
    losses.observe([host, bystander], 0.0)
    losses.observe([member(2), bystander], 1.0)
    assert losses.lost == {}
    losses.observe([host, bystander], 2.0)
    losses.observe([bystander], 3.0)
    assert losses.lost == {M: 3.0}
    losses.observe([host, bystander], 4.0)
    assert losses.lost == {}
    losses.observe([member(2, serving("m", ModelStatus.FAILED)), bystander], 5.0)
    assert losses.lost == {M: 5.0}
    losses.observe([bystander], 5.0 + 3601.0)
    assert losses.lost == {}


def test_a_model_that_nobody_wanted_but_somebody_served_is_taken_up_when_lost() -> None:
    standby = Standby(TIMINGS, joins=False)
    standby.losses.observe([member(2, serving("m")), member(3)], 0.0)
    standby.losses.observe([member(3)], 5.0)
    assert run(standby, situation(member(3), wanted=()), 5.0, 60.0) == ("m", 6.0)
