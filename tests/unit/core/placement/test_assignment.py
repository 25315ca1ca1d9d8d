import msgspec
from tests.support.core_values import GB, facts, member, node_id, serving

from mesh_llm.core.config import Timings
from mesh_llm.core.placement.assignment import (
    Assigned,
    Assigner,
    Candidate,
    OrphanedModels,
    PlacementInputs,
    Unassigned,
    first_assignment,
    overloaded,
    rendezvous,
    wanted_order,
)
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, ModelFacts, ModelStatus, Role


def candidate(name: str, hosts: int, *, on_disk: bool = True, wanted: int | None = 0, size: float = 1.0) -> Candidate:
    known = msgspec.structs.replace(facts(name, size), source=f"hf:o/r:{name}.gguf")
    return Candidate(facts=known, hosts=hosts, on_disk=on_disk, wanted=wanted)


def fits(model: ModelFacts) -> bool:
    return model.size_bytes <= 10 * 10**9


def choose(*candidates: Candidate, can_fetch: bool = True) -> str:
    outcome = first_assignment(candidates, fits, can_fetch=can_fetch)
    return outcome.facts.name if isinstance(outcome, Assigned) else f"none: {outcome.why}"


def test_unserved_on_disk_first() -> None:
    assert (
        choose(candidate("fetch", 0, on_disk=False), candidate("disk", 0, wanted=5), candidate("served", 1)) == "disk"
    )


def test_then_unserved_that_fits() -> None:
    assert choose(candidate("fetch", 0, on_disk=False, wanted=3), candidate("served", 1)) == "fetch"


def test_then_least_served_on_disk_then_least_served() -> None:
    assert choose(candidate("a", 3), candidate("b", 2), candidate("c", 1, on_disk=False)) == "b"
    assert choose(candidate("a", 3, on_disk=False), candidate("c", 1, on_disk=False)) == "c"


def test_wanted_order_breaks_ties_then_the_name() -> None:
    assert choose(candidate("b", 0, wanted=0), candidate("a", 0, wanted=1)) == "b"
    assert choose(candidate("b", 1, wanted=None), candidate("a", 1, wanted=None)) == "a"


def test_never_one_that_does_not_fit() -> None:
    assert choose(candidate("big", 0, size=11), candidate("small", 7)) == "small"
    assert choose(candidate("big", 0, size=11)).startswith("none: none of the mesh's models fits")


def test_what_is_not_on_disk_needs_fetching() -> None:
    assert choose(candidate("fetch", 0, on_disk=False), candidate("disk", 2), can_fetch=False) == "disk"
    assert choose(candidate("fetch", 0, on_disk=False), can_fetch=False).startswith(
        "none: none of the mesh's models is on"
    )


def test_nothing_wanted() -> None:
    assert first_assignment([], fits, can_fetch=True) == Unassigned(why="the mesh wants no model yet")


def test_it_says_why() -> None:
    outcome = first_assignment([candidate("a", 2)], fits, can_fetch=False)
    assert isinstance(outcome, Assigned)
    assert outcome.why == "it is the least served (2 nodes) of those on disk here"


def test_wanted_lists_merge_alike_in_any_order() -> None:
    first, second = (ModelName("b"), ModelName("a")), (ModelName("c"), ModelName("b"))
    assert wanted_order([first, second]) == wanted_order([second, first]) == ("b", "c", "a")


def test_rendezvous_is_the_same_everywhere_and_spreads() -> None:
    nodes = [node_id(number) for number in range(20)]
    model = ModelName("m")
    assert rendezvous(model, nodes) == rendezvous(model, list(reversed(nodes)))
    firsts = {rendezvous(ModelName(f"m{number}"), nodes)[0] for number in range(200)}
    assert len(firsts) == 20
    order = rendezvous(model, nodes)
    assert rendezvous(model, [node for node in nodes if node != order[0]]) == order[1:]


def test_overloaded_counts_per_host() -> None:
    hosts = {ModelName("a"): 1, ModelName("b"): 4, ModelName("c"): 0}
    assert overloaded({"a": 100.0, "b": 100.0, "c": 500.0}, hosts, 60.0) == {"a": 100.0}


def test_what_nobody_says_where_to_find_is_not_fetched() -> None:
    lost = Candidate(facts=facts("a"), hosts=0, on_disk=False, wanted=0)
    assert choose(lost) == "none: none of the mesh's models is on disk here (a)"
    assert choose(lost, candidate("b", 2, on_disk=False)) == "b"


M = ModelName("m")
TIMINGS = Timings()


def inputs(
    *members: Member,
    disk: tuple[str, ...] = ("m",),
    wanted: tuple[str, ...] = ("m",),
    demand: dict[str, float] | None = None,
    excluded: tuple[str, ...] = (),
    memory: int = 8 * GB,
    me: int = 1,
) -> PlacementInputs:
    here = {ModelName(name): facts(name) for name in disk}
    known = {one.name: one for peer in members for one in peer.announcement.on_disk}
    return PlacementInputs(
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


def run(assigner: Assigner, what: PlacementInputs, now: float, until: float) -> tuple[str, float] | None:
    """Look whenever the deadline says, as the node does; what was taken, and when."""
    while now <= until:
        taken = assigner.evaluate(what, now)
        if taken is not None:
            return taken.facts.name, now
        deadline = assigner.deadline()
        if deadline is None:
            return None
        assert deadline > now
        now = deadline
    return None


def test_alone_there_is_nothing_to_do() -> None:
    assigner = Assigner(TIMINGS, joins=True)
    assert assigner.evaluate(inputs(wanted=()), 0.0) is None
    assert assigner.deadline() is None
    assert assigner.waiting_reason == ""


def test_a_joiner_listens_and_then_takes_what_nobody_serves() -> None:
    assigner = Assigner(TIMINGS, joins=True)
    busy = member(2, serving("other"), on_disk=(facts("other"),))
    assert run(assigner, inputs(busy, disk=("other", "m"), wanted=("other", "m")), 0.0, 60.0) == ("m", TIMINGS.settle)


def test_a_joiner_helps_where_everything_is_served() -> None:
    assigner = Assigner(TIMINGS, joins=True)
    assert run(assigner, inputs(member(2, serving("m"))), 0.0, 60.0) == ("m", TIMINGS.settle)


def test_a_joiner_that_can_take_nothing_says_why_and_looks_again() -> None:
    assigner = Assigner(TIMINGS, joins=True)
    nothing = inputs(member(2, serving("m"), on_disk=(facts("m"),)), disk=())
    assert assigner.evaluate(nothing, 0.0) is None
    assert assigner.evaluate(nothing, 2.0) is None
    assert "none of the mesh's models is on disk here" in assigner.waiting_reason
    assert assigner.deadline() == 2.0 + TIMINGS.retry_assignment


def test_a_standby_node_helps_nobody_unasked() -> None:
    assert run(Assigner(TIMINGS, joins=False), inputs(member(2, serving("m"))), 0.0, 1000.0) is None


def test_a_gap_is_filled_by_one_after_the_other() -> None:
    times: dict[int, float] = {}
    for me in (1, 2, 3):
        others = [member(number, on_disk=(facts("m"),), role=Role.STANDBY) for number in (1, 2, 3) if number != me]
        taken = run(Assigner(TIMINGS, joins=False), inputs(*others, me=me), 0.0, 60.0)
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
    assert run(Assigner(TIMINGS, joins=False), inputs(*others, me=last), 0.0, 60.0) == ("m", 1.0)


def test_somebody_else_taking_it_ends_the_call() -> None:
    assigner = Assigner(TIMINGS, joins=False)
    assert assigner.evaluate(inputs(member(2)), 0.0) is None
    assert run(assigner, inputs(member(2, serving("m", ModelStatus.LOADING))), 0.5, 60.0) is None
    assert assigner.evaluate(inputs(member(2)), 10.0) is None
    assert assigner.deadline() == 11.0


def test_demand_beyond_what_hosts_bear_calls_for_one_more() -> None:
    host = member(2, serving("m"))
    assigner = Assigner(TIMINGS, joins=False)
    assert run(assigner, inputs(host, demand={"m": 59.0}), 0.0, 60.0) is None
    assert run(assigner, inputs(host, demand={"m": 61.0}), 0.0, 60.0) == ("m", 1.0)


def test_excluded_and_oversized_models_are_never_taken() -> None:
    for joins in (True, False):
        assert run(Assigner(TIMINGS, joins=joins), inputs(member(2), excluded=("m",)), 0.0, 20.0) is None
        assert run(Assigner(TIMINGS, joins=joins), inputs(member(2), memory=GB // 2), 0.0, 20.0) is None


def test_a_model_is_orphaned_by_death_and_failure_and_not_by_a_drop() -> None:
    orphaned = OrphanedModels()
    host, bystander = member(2, serving("m")), member(3)
    orphaned.observe([host, bystander], 0.0)
    orphaned.observe([member(2), bystander], 1.0)
    assert orphaned.since == {}
    orphaned.observe([host, bystander], 2.0)
    orphaned.observe([bystander], 3.0)
    assert orphaned.since == {M: 3.0}
    orphaned.observe([host, bystander], 4.0)
    assert orphaned.since == {}
    orphaned.observe([member(2, serving("m", ModelStatus.FAILED)), bystander], 5.0)
    assert orphaned.since == {M: 5.0}
    orphaned.observe([bystander], 5.0 + 3601.0)
    assert orphaned.since == {}


def test_a_model_that_nobody_wanted_but_somebody_served_is_taken_up_when_lost() -> None:
    assigner = Assigner(TIMINGS, joins=False)
    assigner.orphaned.observe([member(2, serving("m")), member(3)], 0.0)
    assigner.orphaned.observe([member(3)], 5.0)
    assert run(assigner, inputs(member(3), wanted=()), 5.0, 60.0) == ("m", 6.0)


def left_alone(*models: str) -> Assigner:
    assigner = Assigner(TIMINGS, joins=False)
    host = member(2, *(serving(name) for name in models))
    assigner.orphaned.observe([host], 0.0)
    assigner.evaluate(inputs(host), 0.0)
    assigner.orphaned.observe([], 5.0)
    return assigner


def test_who_is_left_alone_takes_what_it_has_at_once() -> None:
    assigner = left_alone("m", "n")
    taken = assigner.evaluate(inputs(wanted=()), 5.0)
    assert taken is not None
    assert (taken.facts.name, taken.why) == ("m", "its last host is gone")
    # The rest too, as far as it has it.
    assert assigner.evaluate(inputs(wanted=()), 5.0) is None
    assert assigner.waiting_reason == "no other node of the mesh is left; not on disk here: n"
    taken = assigner.evaluate(inputs(disk=("n",), wanted=()), 6.0)
    assert taken is not None
    assert taken.facts.name == "n"


def test_who_is_left_alone_prefers_what_was_asked_for() -> None:
    taken = left_alone("m", "n").evaluate(inputs(disk=("m", "n"), wanted=(), demand={"n": 3.0}), 5.0)
    assert taken is not None
    assert taken.facts.name == "n"


def test_who_is_left_alone_says_why_it_serves_nothing() -> None:
    assigner = left_alone("m", "n")
    assert assigner.evaluate(inputs(memory=GB // 2, wanted=()), 5.0) is None
    assert assigner.waiting_reason == (
        "no other node of the mesh is left; not on disk here: n; too big for this machine: m"
    )
    # When another is there, the reason is another.
    assigner.evaluate(inputs(member(2, serving("m")), memory=GB // 2), 6.0)
    assert assigner.waiting_reason == ""


def test_models_that_a_peer_says_it_lost_are_forgotten() -> None:
    orphaned = OrphanedModels()
    for number in range(3000):
        name = f"m{number}"
        orphaned.observe((member(1, serving(name)),), 0.0)
        orphaned.observe((member(1, serving(name, ModelStatus.FAILED)),), 0.0)
    assert len(orphaned.since) < 600
    assert ModelName("m2999") in orphaned.since
