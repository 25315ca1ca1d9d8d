import msgspec
from tests.support.core_values import facts, node_id

from mesh_llm.core.placement.assignment import (
    Assigned,
    Candidate,
    Unassigned,
    assign,
    overloaded,
    rendezvous,
    wanted_order,
)
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts


def candidate(name: str, hosts: int, *, on_disk: bool = True, wanted: int | None = 0, size: float = 1.0) -> Candidate:
    known = msgspec.structs.replace(facts(name, size), source=f"hf:o/r:{name}.gguf")
    return Candidate(facts=known, hosts=hosts, on_disk=on_disk, wanted=wanted)


def fits(model: ModelFacts) -> bool:
    return model.size_bytes <= 10 * 10**9


def choose(*candidates: Candidate, can_fetch: bool = True) -> str:
    outcome = assign(candidates, fits, can_fetch=can_fetch)
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
    assert assign([], fits, can_fetch=True) == Unassigned(why="the mesh wants no model yet")


def test_it_says_why() -> None:
    outcome = assign([candidate("a", 2)], fits, can_fetch=False)
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
