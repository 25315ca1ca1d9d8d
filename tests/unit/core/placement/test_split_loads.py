"""Models that fit no node alone and that requests ask for: when they are split, what is waited for, what is refused."""

from typing import Any

import pytest
from tests.support.core_values import GB, facts, member, of_kind, serving
from tests.support.on_demand import OTHER, THIRD, Machine

from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.types.announcement import LoadOffer, Member, Ownership, SplitOffer
from mesh_llm.core.types.effects import AskForLoad, StopEngine
from mesh_llm.core.types.events import (
    DropRequested,
    LoadAnswered,
    ModelsChanged,
    RoutesLearned,
    RpcChanged,
    SplitScope,
)
from mesh_llm.core.types.ids import ModelName, OwnerId
from mesh_llm.core.types.model import Capacity, LaunchOptions, ModelStatus, Role

RED = facts("red", 4.0)
STILL = 4.0
"""Seconds after which nothing that is known of the others is new."""
SOON = "it is about to be split over several nodes"


def helper(number: int, gigabytes: float = 3.0, *servings: Any, on_disk: tuple[str, ...] = (), **fields: Any) -> Member:
    """A node that offers memory to split models."""
    size = int(gigabytes * GB)
    values: dict[str, Any] = {
        "loads": LoadOffer(free_bytes=size, room_bytes=size),
        "offer": SplitOffer(memory_bytes=size, fetches=True),
        "capacity": Capacity(memory_bytes=size, rpc_version="8.0.0"),
        "on_disk": tuple(facts(name, 4.0) for name in on_disk),
        "shares": True,
    }
    return member(number, *servings, **(values | fields))


def host(memory: float = 3.0, *, disk: tuple[str, ...] = ("red",), **config: Any) -> Machine:
    """A node with the file that can share models."""
    machine = Machine(memory=memory, disk=disk, **({"shares": True, "can_fetch": True} | config))
    machine.do(RpcChanged(rpc_version="8.0.0"))
    machine.do(SplitScope(granted=True, scope="split"))
    return machine


def wants_group(machine: Machine) -> bool:
    split = machine.peers.published[-1].split
    return split is not None and split.model == "red" and split.seeds


def asked(machine: Machine) -> list[str]:
    return [one.node for one in of_kind(machine.effects, AskForLoad)]


def test_what_fits_no_node_alone_is_split_where_the_memory_is_enough_together() -> None:
    machine = host()
    machine.peers.set(helper(2))
    machine.wait(STILL)
    machine.asks("red")
    assert machine.state("red").text == SOON
    assert wants_group(machine)


def test_what_can_never_fit_is_refused_at_once_with_sizes_and_what_to_type() -> None:
    machine = host()
    machine.peers.set(helper(2, 0.5))
    machine.wait(STILL)
    machine.asks("red")
    problem = machine.state("red").problem
    assert problem.startswith("red does not fit: need 4.")
    assert "Split over several nodes, it needs 4." in problem
    assert "3.0, node2 0.5 = 3.5 GB" in problem
    assert "Add a machine, or take a smaller model" in problem
    assert not wants_group(machine)


def test_cache_and_buffers_count_as_in_the_election() -> None:
    """The weights alone would fit together: 2.05 and 2.05 of 4 GB."""
    machine = host(2.05)
    machine.peers.set(helper(2, 2.05))
    machine.wait(STILL)
    machine.asks("red")
    assert "it needs 4." in machine.state("red").problem
    assert not wants_group(machine)


@pytest.mark.parametrize("context", [4096, None])
def test_the_context_that_the_user_fixed_counts(context: int | None) -> None:
    """An eight times larger cache than that of the least context would not fit."""
    heavy = facts("red", 4.0)
    machine = host(2.4, options=LaunchOptions(context=context, slots=8 if context else None))
    machine.peers.set(helper(2, 2.4))
    machine.wait(STILL)
    assert machine.node.launches == ()
    machine.asks(heavy.name)
    assert (machine.state("red").text == SOON) == (context is None)


BUILDING = SplitOffer(obstacle="building", memory_bytes=3 * GB, fetches=True)


def new(**fields: Any) -> Member:
    return helper(2, offer=None, **fields)


def stops(gigabytes: int) -> Member:
    unloaded = serving("other", ModelStatus.STOPPING, size_bytes=gigabytes * GB)
    return helper(2, 3.0, unloaded, offer=SplitOffer(memory_bytes=GB, fetches=True))


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (new(), "node2 has not said yet what it offers"),
        (helper(2, offer=BUILDING), "node2 is still building its RPC plugin"),
        (new(capacity=Capacity(memory_bytes=3 * GB)), "node2 has not said yet what it offers"),
        (helper(2, rtt_ms=0.0), "node2 is not reached yet"),
        (helper(2, suspect=True), "node2 does not answer"),
        (stops(2), "node2 is unloading a model"),
    ],
    ids=["no offer", "building", "no offer and no plugin", "no way", "silent", "stopping"],
)
def test_what_is_not_known_yet_is_waited_for(before: Member, says: str) -> None:
    machine = host()
    machine.peers.set(before)
    machine.wait(STILL)
    machine.asks("red", asker=OTHER, here=True, standing="member")
    machine.wait(20.0)
    state = machine.state("red")
    assert (state.problem, state.problem_here) == ("", "")
    assert state.text == f"it waits to be split over several nodes: {says}"
    assert not wants_group(machine)
    machine.peers.set(helper(2))
    machine.wait(1.0)
    assert machine.state("red").text == SOON
    assert wants_group(machine)


@pytest.mark.parametrize(
    "after",
    [
        (helper(2, offer=SplitOffer(obstacle="plugin", detail="no compiler", memory_bytes=3 * GB)),),
        (helper(2, offer=SplitOffer(obstacle="scope", detail="serve", memory_bytes=3 * GB)),),
        (helper(2, 0.5),),
        (),
    ],
    ids=["no plugin", "no scope", "too small", "gone"],
)
def test_once_the_facts_say_no_it_is_refused(after: tuple[Member, ...]) -> None:
    machine = host()
    machine.peers.set(new())
    machine.wait(STILL)
    machine.asks("red", asker=OTHER, here=True, standing="member")
    machine.wait(10.0)
    assert not machine.state("red").problem_here
    machine.peers.set(*after)
    machine.wait(STILL)
    assert "red does not fit" in machine.state("red").problem_here


@pytest.mark.parametrize("before", [new(), helper(2, rtt_ms=0.0)], ids=["older version", "no way"])
def test_what_stays_unknown_is_refused_in_the_end(before: Member) -> None:
    machine = host()
    machine.peers.set(before)
    machine.asks("red", asker=OTHER, here=True, standing="member")
    machine.wait(25.0)
    assert not machine.state("red").problem_here
    machine.wait(10.0)
    assert "red does not fit" in machine.state("red").problem_here
    # The next one is not kept waiting for what was waited for in vain.
    machine.asks("red", 0, asker=OTHER)
    machine.wait(60.0)
    machine.asks("red", asker=OTHER, here=True, standing="member")
    assert "red does not fit" in machine.state("red").problem_here


def test_a_build_is_waited_for_as_long_as_it_takes() -> None:
    machine = host()
    machine.peers.set(helper(2, offer=BUILDING))
    machine.asks("red")
    machine.wait(300.0)
    assert "is still building its RPC plugin" in machine.state("red").text
    machine.peers.set(helper(2))
    machine.wait(1.0)
    assert machine.state("red").text == SOON


def test_a_host_waits_for_its_own_plugin_and_its_own_admission() -> None:
    for event, before in (
        (RpcChanged(rpc_version="8.0.0"), RpcChanged(rpc_version="", obstacle="building")),
        (SplitScope(granted=True, scope="split"), RpcChanged(rpc_version="8.0.0")),
    ):
        machine = Machine(memory=3.0, disk=("red",), shares=True, joins=True)
        machine.do(before)
        if isinstance(event, RpcChanged):
            machine.do(SplitScope(granted=True, scope="split"))
        machine.peers.set(helper(2))
        machine.wait(STILL)
        machine.asks("red")
        assert "it waits to be split over several nodes: this node is" in machine.state("red").text
        machine.wait(10.0)
        machine.do(event)
        machine.wait(1.0)
        assert machine.state("red").text == SOON


def test_a_node_that_asks_and_is_not_known_yet_has_just_joined() -> None:
    machine = host()
    machine.wait(STILL)
    machine.asks("red", asker=OTHER, here=True, standing="member")
    assert not machine.state("red").problem_here
    machine.wait(1.0)
    machine.peers.set(helper(2))
    machine.wait(1.0)
    assert machine.state("red").text == SOON


def test_a_passive_node_that_asks_is_never_known_and_is_refused_at_once() -> None:
    machine = host(on_demand=OnDemandPolicy(scope="clients"))
    machine.wait(STILL)
    machine.asks("red", asker=OTHER, standing="client")
    assert "Add a machine, or take a smaller model" in machine.state("red").problem


def test_without_a_plugin_and_without_a_build_nothing_is_waited_for() -> None:
    machine = Machine(memory=3.0, disk=("red",), shares=True)
    machine.do(RpcChanged(rpc_version="", obstacle="plugin", detail="no compiler"))
    machine.peers.set(new())
    machine.wait(1.0)
    machine.asks("red", asker=OTHER, here=True, standing="member")
    assert "This node offers 3.0 GB but has no RPC plugin (no compiler)" in machine.state("red").problem_here


# A node without the file asks one that has it.


def test_a_node_with_the_file_is_asked_to_split_what_fits_no_node_alone() -> None:
    machine = host(disk=())
    barred = helper(3, on_disk=("red",), offer=SplitOffer(obstacle="scope", memory_bytes=3 * GB))
    machine.peers.set(barred)
    machine.wait(STILL)
    machine.asks("red")
    assert not asked(machine)
    assert "it fits no node alone" in machine.state("red").problem
    machine.asks("red", 0)
    machine.peers.set(barred, helper(2, on_disk=("red",)))
    machine.wait(1.0)
    machine.asks("red")
    assert asked(machine) == [OTHER]
    assert machine.state("red").text == "node2 was asked to split it over several nodes"


@pytest.mark.parametrize(
    "before",
    [new(on_disk=("red",)), helper(2, on_disk=("red",), offer=BUILDING)],
    ids=["no offer", "building"],
)
def test_a_node_with_the_file_is_asked_though_not_all_of_it_is_known(before: Member) -> None:
    machine = host(disk=())
    machine.peers.set(before)
    machine.wait(1.0)
    machine.asks("red")
    assert asked(machine) == [OTHER]
    assert "node2 was asked to split it over several nodes, and waits: node2 " in machine.state("red").text


def test_what_is_too_big_for_all_together_is_refused_by_the_node_that_is_asked() -> None:
    machine = host(0.5, disk=())
    machine.peers.set(helper(2, on_disk=("red",)))
    machine.wait(STILL)
    machine.asks("red")
    assert not asked(machine)
    problem = machine.state("red").problem
    assert problem.startswith("it fits no node alone. Split over several nodes, it needs 4.")
    assert "Add a machine, or take a smaller model" in problem


# What was refused.


@pytest.mark.parametrize("change", ["nothing", "its own offer", "a third node", "its life"])
def test_a_refusal_is_forgotten_as_soon_as_a_fact_has_changed(change: str) -> None:
    machine = host(disk=())
    there = helper(2, on_disk=("red",))
    machine.peers.set(there)
    machine.wait(STILL)
    machine.asks("red")
    machine.do(LoadAnswered(node=OTHER, model=ModelName("red"), problem="it is full", retry_after=30.0))
    assert machine.state("red").problem == "node2 does not load it: it is full"
    machine.asks("red", 0)
    machine.wait(1.0)
    others = {
        "nothing": (there,),
        "its own offer": (helper(2, 2.9, on_disk=("red",)),),
        "a third node": (there, helper(3)),
        "its life": (helper(2, on_disk=("red",), incarnation=2),),
    }
    machine.peers.set(*others[change])
    machine.wait(1.0)
    machine.asks("red")
    assert asked(machine) == [OTHER] * (1 if change == "nothing" else 2)


def test_a_refusal_of_a_model_that_fits_one_node_is_kept_whatever_others_do() -> None:
    """Where hundreds of nodes load and unload all the time, none is asked again for that."""
    machine = Machine(disk=())
    there = helper(2, 16.0, on_disk=("red",))
    machine.peers.set(there)
    machine.wait(1.0)
    machine.asks("red")
    machine.do(LoadAnswered(node=OTHER, model=ModelName("red"), problem="it is full"))
    machine.asks("red", 0)
    machine.wait(1.0)
    machine.peers.set(there, helper(3))
    machine.wait(1.0)
    machine.asks("red")
    assert asked(machine) == [OTHER]


def test_a_refusal_counts_for_a_moment_though_all_changes_all_the_time() -> None:
    machine = host(disk=())
    machine.peers.set(helper(2, on_disk=("red",)))
    machine.wait(STILL)
    for number in range(40):
        machine.asks("red")
        machine.do(LoadAnswered(node=OTHER, model=ModelName("red"), problem="it is full"))
        machine.asks("red", 0)
        machine.peers.set(helper(2, 2.9 - number * 0.001, on_disk=("red",)))
        machine.wait(0.1)
    assert len(asked(machine)) <= 9


def test_a_passive_node_asks_again_because_it_sees_nothing_that_changes() -> None:
    machine = Machine(disk=(), role=Role.CLIENT)
    machine.do(RoutesLearned(source=OTHER, snapshot=machine.routes))
    machine.asks("red")
    machine.do(LoadAnswered(node=OTHER, model=ModelName("red"), problem="it is full", retry_after=30.0))
    assert machine.state("red").problem == "it is full"
    machine.asks("red", 0)
    machine.wait(1.0)
    machine.asks("red")
    assert asked(machine) == [OTHER, OTHER]


# Room, and what becomes of the group.


def test_what_is_idle_here_is_unloaded_for_what_is_split() -> None:
    machine = host(3.0, disk=("red",))
    small = facts("small", 1.0)
    machine.do(ModelsChanged(on_disk=(RED, small)))
    machine.loads("small")
    machine.wait(30.0)
    machine.peers.set(helper(2, 2.4))
    machine.wait(STILL)
    machine.asks("red")
    assert machine.state("red").text == "small is unloaded to make room"
    assert [one.model for one in of_kind(machine.effects, StopEngine)] == ["small"]
    machine.wait(1.0)
    assert machine.state("red").text == SOON
    assert wants_group(machine)


def test_what_is_pinned_stays_and_the_refusal_says_so() -> None:
    policy = OnDemandPolicy(scope="members", pinned=("small",))
    machine = host(3.0, disk=("red",), on_demand=policy)
    machine.do(ModelsChanged(on_disk=(RED, facts("small", 1.0))))
    machine.loads("small")
    machine.wait(30.0)
    machine.peers.set(helper(2, 2.4))
    machine.wait(STILL)
    machine.asks("red")
    assert "small is pinned and stays. Split over several nodes, it needs" in machine.state("red").problem


def test_nobody_waits_any_more_and_no_group_is_wanted() -> None:
    machine = host()
    machine.peers.set(helper(2))
    machine.wait(STILL)
    machine.asks("red")
    assert wants_group(machine)
    machine.asks("red", 0)
    machine.wait(1.0)
    assert machine.peers.published[-1].split is None
    assert machine.peers.published[-1].wanted == ()


def test_the_other_node_leaves_before_the_split_began() -> None:
    machine = host()
    machine.peers.set(helper(2))
    machine.wait(STILL)
    machine.asks("red", asker=THIRD, here=True, standing="member")
    assert wants_group(machine)
    machine.peers.set()
    machine.wait(STILL)
    assert "red does not fit" in machine.state("red").problem_here
    assert machine.peers.published[-1].split is None


def test_a_node_that_never_enters_the_group_is_not_counted_on_for_ever() -> None:
    machine = host()
    machine.peers.set(helper(2))
    machine.wait(STILL)
    machine.asks("red")
    machine.wait(25.0)
    assert machine.state("red").text == SOON
    machine.wait(10.0)
    assert "red does not fit" in machine.state("red").problem


def test_a_second_model_to_split_is_refused_with_what_to_type() -> None:
    machine = host(disk=("red", "blue"))
    machine.peers.set(helper(2))
    machine.wait(STILL)
    machine.asks("red")
    machine.asks("blue", asker=OTHER, here=True, standing="member")
    assert "while this node takes part in red: mesh-llm drop red" in machine.state("blue").problem_here
    # Once that is gone, the other one can be split.
    machine.do(DropRequested(model=ModelName("red")))
    machine.asks("red", 0)
    machine.asks("blue", 0, asker=OTHER)
    machine.wait(1.0)
    machine.asks("blue", asker=OTHER, here=True, standing="member")
    assert machine.state("blue").text == SOON


def test_where_models_are_not_loaded_on_demand_nothing_is_split() -> None:
    machine = host(on_demand=OnDemandPolicy(scope="off"))
    machine.peers.set(helper(2))
    machine.wait(STILL)
    machine.asks("red")
    assert "--on-demand off" in machine.state("red").problem
    assert not wants_group(machine)


MINE = OwnerId("1" * 64)


def owned(owner: str = MINE, expires: int = 2**40) -> Ownership:
    return Ownership(owner=OwnerId(owner), issued=0, expires=expires, signature=b"s" * 64)


@pytest.mark.parametrize(
    "outsider",
    [
        helper(3),
        helper(3, ownership=owned("2" * 64)),
        helper(3, ownership=owned(expires=1)),
        helper(3, offer=BUILDING),
        helper(3, offer=None),
        helper(3, suspect=True),
    ],
    ids=["of nobody", "of another", "ended", "building", "unknown", "silent"],
)
def test_no_split_is_begun_for_a_prompt_that_a_worker_may_not_see(outsider: Member) -> None:
    """The election is everybody's: who could be elected must be in the circle."""
    machine = host(epoch=1000.0)
    machine.peers.set(helper(2, ownership=owned()), outsider)
    machine.wait(STILL)
    machine.asks("red", here=True, circle=(MINE,))
    assert "outside the request's circle" in machine.state("red").problem_here
    assert machine.state("red").problem_here.endswith("node3")
    machine.wait(20.0)
    assert not wants_group(machine)


@pytest.mark.parametrize(
    "harmless",
    [None, helper(3, offer=SplitOffer(obstacle="scope", detail="client")), helper(3, role=Role.CLIENT)],
    ids=["nobody", "without the scope", "client"],
)
def test_a_split_is_begun_where_all_who_could_take_part_are_in_the_circle(harmless: Member | None) -> None:
    machine = host()
    machine.peers.set(helper(2, ownership=owned()), *([harmless] if harmless is not None else []))
    machine.wait(STILL)
    machine.asks("red", here=True, circle=(MINE,))
    assert machine.state("red").text == SOON
    assert wants_group(machine)


def test_a_passive_node_asks_nobody_to_load_for_a_prompt_that_may_not_go_everywhere() -> None:
    machine = host(disk=(), role=Role.CLIENT)
    machine.do(RoutesLearned(source=OTHER, snapshot=machine.routes))
    machine.asks("red", here=True, circle=(MINE,))
    assert "client" in machine.state("red").problem_here
    assert not asked(machine)
