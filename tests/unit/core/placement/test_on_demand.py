"""Models that a node loads because requests ask for them: where, when, and what makes room."""

from typing import Any

import msgspec
import pytest
from tests.support.core_values import GB, facts, member, node_id, serving
from tests.support.on_demand import LOADS, OTHER, THIRD, Machine

from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.types.announcement import LoadOffer, Serving, SplitOffer
from mesh_llm.core.types.effects import (
    AskForLoad,
    EndAsk,
    FetchModel,
    Notice,
    StopEngine,
)
from mesh_llm.core.types.events import (
    DropRequested,
    FetchEnded,
    HostsDistrusted,
    LoadAnswered,
    LoadRequested,
    ModelsChanged,
    RoutesLearned,
    TargetFailed,
)
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, ModelStatus, Role
from mesh_llm.core.types.model_settings import ModelSettings


def test_a_request_loads_its_model_once() -> None:
    machine = Machine()
    assert machine.status("red") is ModelStatus.COLD
    machine.asks("red")
    machine.asks("red", 2)
    assert machine.state("red").ready_at is not None
    machine.wait(3.0)
    assert machine.starts == ["red"]
    assert machine.status("red") is ModelStatus.WARM
    machine.asks("red", 0)
    assert not machine.routes.awaited


def test_a_node_that_asks_for_many_models_keeps_nobody_out() -> None:
    machine = Machine(memory=10.0)
    many = [f"unknown{number}" for number in range(300)]
    for model in many:
        machine.asks(model, asker=OTHER, here=True, standing="stranger")
    assert len(machine.node.waiting) == 64
    machine.asks("red", asker=THIRD, standing="member")
    machine.asks("green")
    for model in many:
        machine.asks(model, 0, asker=OTHER)
    assert set(machine.node.waiting) == {"red", "green"}
    machine.wait(5.0)
    assert set(machine.starts) == {"red", "green"}


def test_many_nodes_that_ask_for_models_do_not_keep_this_nodes_clients_out() -> None:
    machine = Machine()
    for number in range(300):
        machine.asks(f"unknown{number}", asker=node_id(10 + number // 30), here=True)
    assert len(machine.node.waiting) == 256
    machine.asks("red")
    machine.wait(3.0)
    assert machine.starts == ["red"]


def test_the_time_of_the_last_load_is_what_waiters_are_told() -> None:
    machine = Machine(load=7.0)
    machine.loads("red", 8.0)
    machine.do(DropRequested(model=ModelName("red"), rest=True))
    machine.wait(1.0)
    machine.asks("red")
    assert machine.state("red").ready_at == machine.now + 7.0


def test_what_was_used_least_recently_makes_room() -> None:
    machine = Machine(memory=10.0)
    for model in ("red", "green"):
        machine.loads(model)
    machine.wait(10.0)
    machine.uses("red")
    machine.wait(5.0)
    machine.asks("blue")
    machine.wait(4.0)
    assert machine.stops == ["green"]
    assert machine.status("blue") is ModelStatus.WARM
    assert machine.status("red") is ModelStatus.WARM


def test_a_pinned_model_is_never_unloaded() -> None:
    by_option = OnDemandPolicy(scope="members", pinned=("Red",), ttl=5.0)
    by_settings = {"red": ModelSettings(pin=True)}
    for machine in (Machine(on_demand=by_option), Machine(models=by_settings)):
        machine.loads("red")
        machine.wait(100.0)
        machine.asks("green")
        assert "red is pinned and stays" in machine.state("green").problem
        machine.wait(100.0)
        assert machine.stops == []


def test_a_model_of_the_user_comes_back_when_it_is_asked_for() -> None:
    machine = Machine(wanted=(ModelName("red"),))
    machine.wait(5.0)
    machine.loads("green", 4.0)
    assert machine.stops == ["red"]
    assert machine.peers.published[-1].wanted == ()
    machine.wait(5.0)
    machine.loads("red", 4.0)
    assert machine.starts == ["red", "green", "red"]
    machine.wait(5.0)
    assert machine.peers.published[-1].wanted == ("red",)


def test_what_a_user_loads_makes_room_as_a_request_does_and_is_the_users() -> None:
    machine = Machine()
    machine.loads("red")
    machine.wait(20.0)
    machine.do(LoadRequested(model=ModelName("green")))
    machine.wait(4.0)
    assert (machine.stops, machine.starts) == (["red"], ["red", "green"])
    assert machine.status("green") is ModelStatus.WARM
    assert machine.peers.published[-1].wanted == ("green",)
    assert not machine.routes.awaited
    # What made room is loaded again when it is asked for.
    machine.wait(20.0)
    machine.loads("red", 4.0)
    assert machine.starts == ["red", "green", "red"]


def test_what_a_user_loads_waits_for_its_turn_and_is_forgotten_when_dropped() -> None:
    machine = Machine()
    machine.loads("red")
    machine.uses("red", 1)
    machine.do(LoadRequested(model=ModelName("green")))
    machine.wait(1.0)
    assert "takes turns with red" in machine.state("green").text
    machine.do(DropRequested(model=ModelName("green")))
    machine.wait(30.0)
    assert machine.stops == []
    machine.do(LoadRequested(model=ModelName("green")))
    machine.wait(30.0)
    assert machine.status("green") is ModelStatus.WARM


def test_what_a_user_loads_does_not_unload_what_is_pinned_or_where_models_are_not_loaded_on_demand() -> None:
    for policy in (OnDemandPolicy(scope="members", pinned=("red",)), OnDemandPolicy(scope="off")):
        machine = Machine(on_demand=policy)
        machine.do(LoadRequested(model=ModelName("red")))
        machine.wait(20.0)
        effects = machine.do(LoadRequested(model=ModelName("green")))
        assert [one.code for one in effects if isinstance(one, Notice)] == ["does_not_fit"]
        machine.wait(60.0)
        assert (machine.stops, machine.starts) == ([], ["red"])
        assert machine.node.room_for(facts("green", 4.0), pinned=True) == ("red",)


def test_two_models_without_room_for_both_take_turns_by_batches() -> None:
    machine = Machine(load=2.0)
    machine.loads("red")
    machine.uses("red", 1)
    machine.asks("green", 3)
    # The first goes on answering for its turn, and its answers are not cut.
    machine.wait(4.0)
    assert "takes turns with red" in machine.state("green").text
    assert machine.stops == []
    machine.uses("red", 1)
    machine.wait(6.0)
    assert machine.stops == ["red"]
    stop = next(one for one in machine.effects if isinstance(one, StopEngine))
    assert stop.drain_seconds >= 600
    # Requests for the first wait in their place now.
    machine.asks("red", 2)
    machine.wait(0.5)
    assert machine.status("green") is ModelStatus.WARM
    machine.asks("green", 0)
    machine.uses("green", 2)
    assert "takes turns with green" in machine.state("red").text
    # The first comes back soon: turns are twice as long from now on, and who waits is told the time of its own.
    ready = machine.state("red").ready_at
    assert ready is not None
    machine.wait(12.0)
    assert machine.starts == ["red", "green"]
    machine.wait(6.0)
    assert machine.starts == ["red", "green", "red"]
    machine.wait(2.0)
    assert machine.status("red") is ModelStatus.WARM
    assert abs(machine.now - ready) < 3.0


def test_what_others_ask_for_is_kept_for_a_turn_where_it_is_the_last_host() -> None:
    machine = Machine(load=2.0)
    machine.loads("red")
    machine.peers.set(member(2, demand={"red": 3.0}))
    machine.wait(1.0)
    machine.asks("green")
    machine.wait(4.0)
    assert machine.stops == []
    machine.wait(4.0)
    assert machine.stops == ["red"]


def test_what_nobody_asks_for_is_unloaded() -> None:
    machine = Machine(on_demand=OnDemandPolicy(scope="members", ttl=30.0), wanted=(ModelName("red"),))
    machine.wait(20.0)
    machine.uses("red")
    machine.wait(29.0)
    assert machine.stops == []
    machine.wait(2.0)
    assert machine.stops == ["red"]
    # It is not taken up again unasked, and the node is ready all the same.
    machine.wait(60.0)
    assert machine.starts == ["red"]
    assert machine.routes.resting


def test_only_what_a_request_loaded_is_unloaded_without_an_option() -> None:
    machine = Machine(memory=10.0, wanted=(ModelName("red"),))
    machine.wait(3.0)
    machine.loads("green")
    machine.wait(4000.0)
    assert machine.stops == ["green"]


def test_a_model_of_its_own_settings_is_unloaded_by_them() -> None:
    machine = Machine(models={"red": ModelSettings(ttl=10.0)}, wanted=(ModelName("red"),))
    machine.wait(20.0)
    assert machine.stops == ["red"]


def test_a_dropped_model_is_loaded_by_no_request() -> None:
    machine = Machine()
    machine.loads("red")
    machine.do(DropRequested(model=ModelName("red"), drain_seconds=0.0))
    machine.wait(1.0)
    machine.asks("red")
    assert "mesh-llm load red" in machine.state("red").problem
    machine.asks("red", 0)
    machine.do(LoadRequested(model=ModelName("red")))
    machine.wait(3.0)
    assert machine.starts == ["red", "red"]


@pytest.mark.parametrize("begun", [False, True])
def test_who_waits_for_a_model_that_is_dropped_is_told_what_to_type(*, begun: bool) -> None:
    """While it waits for its turn, and while it is loading."""
    machine = Machine(load=4.0)
    if begun:
        machine.asks("red")
    else:
        machine.loads("green", 5.0)
        machine.uses("green", 1)
        machine.asks("red")
    machine.wait(1.0)
    assert machine.starts == (["red"] if begun else ["green"])
    machine.do(DropRequested(model=ModelName("red")))
    machine.wait(1.0)
    assert "mesh-llm load red" in machine.state("red").problem
    # The API takes the requests back, then.
    machine.asks("red", 0)
    machine.wait(60.0)
    assert machine.starts == (["red"] if begun else ["green"])
    assert machine.stops == (["red"] if begun else [])


def test_who_waits_for_a_model_that_is_dropped_here_gets_it_from_another_node_that_has_it() -> None:
    machine = Machine(load=4.0)
    machine.peers.set(member(2, on_disk=(facts("red", 4.0),), loads=LOADS))
    machine.asks("red", here=False)
    machine.wait(1.0)
    machine.do(DropRequested(model=ModelName("red")))
    machine.wait(1.0)
    assert not machine.state("red").problem
    assert any(isinstance(one, AskForLoad) and one.node == OTHER for one in machine.effects)


def test_a_load_that_has_not_begun_when_its_last_client_leaves_does_not_begin() -> None:
    machine = Machine(load=4.0)
    machine.loads("green", 5.0)
    machine.uses("green", 1)
    machine.asks("red", 2)
    machine.wait(1.0)
    machine.asks("red", 1)
    assert "takes turns" in machine.state("red").text
    machine.asks("red", 0)
    machine.wait(60.0)
    assert (machine.starts, machine.stops) == (["green"], [])
    assert not machine.routes.awaited


def test_nothing_is_loaded_where_that_is_off_or_for_others() -> None:
    off = Machine(on_demand=OnDemandPolicy(scope="off"))
    off.asks("red")
    assert "--on-demand off" in off.state("red").problem
    own = Machine(on_demand=OnDemandPolicy(scope="own"))
    own.asks("red", asker=OTHER, here=True, standing="member")
    assert own.state("red").problem_here
    stranger = Machine(on_demand=OnDemandPolicy(scope="clients"))
    stranger.asks("red", asker=OTHER, here=True, standing="stranger")
    assert stranger.state("red").problem_here
    for machine in (off, own, stranger):
        machine.wait(5.0)
        assert machine.starts == []
    assert off.peers.published[-1].loads is None
    assert own.peers.published[-1].loads is None
    assert stranger.peers.published[-1].loads is not None


def test_what_comes_anyway_is_waited_for_where_requests_load_nothing() -> None:
    machine = Machine(disk=(), on_demand=OnDemandPolicy(scope="off"))
    loads = serving("red", status=ModelStatus.LOADING)
    machine.peers.set(member(2, loads, on_disk=(facts("red", 4.0),)))
    machine.wait(1.0)
    assert not [one for one in machine.asks("red") if isinstance(one, AskForLoad)]
    assert "it is loading on" in machine.state("red").text
    machine.wait(100.0)
    assert not machine.state("red").problem
    # It failed there, and nobody wants it any more.
    machine.peers.set(member(2, on_disk=(facts("red", 4.0),)))
    machine.wait(1.0)
    assert "--on-demand off" in machine.state("red").problem


def test_a_model_of_the_mesh_that_nobody_serves_is_waited_for_a_moment() -> None:
    machine = Machine(disk=(), on_demand=OnDemandPolicy(scope="off"))
    machine.peers.set(member(2, on_disk=(facts("red", 4.0),), wanted=(ModelName("red"),)))
    machine.wait(1.0)
    machine.asks("red")
    assert "waited for" in machine.state("red").text
    machine.wait(9.0)
    assert not machine.state("red").problem
    machine.wait(2.0)
    assert "--on-demand off" in machine.state("red").problem
    # Who may ask only this node is not told to wait for others.
    machine.asks("red", 0)
    machine.asks("red", asker=OTHER, here=True, standing="member")
    assert machine.state("red").problem_here


def test_another_node_that_has_the_file_is_asked_and_asked_once() -> None:
    machine = Machine(disk=())
    machine.peers.set(member(2, loads=LOADS, on_disk=(facts("red", 4.0),)))
    machine.wait(1.0)
    asked = [one for one in machine.asks("red") if isinstance(one, AskForLoad)]
    assert asked == [AskForLoad(node=OTHER, model=ModelName("red"))]
    assert not [one for one in machine.asks("red", 2) if isinstance(one, AskForLoad)]
    machine.wait(20.0)
    answered = Serving(model=ModelName("red"), status=ModelStatus.WARM, term=1, context=512, slots=1)
    machine.do(LoadAnswered(node=OTHER, model=ModelName("red"), serving=answered))
    # It is routed to before the announcement comes.
    assert [target.node for target in machine.routes.models[ModelName("red")].targets] == [OTHER]
    assert machine.status("red") is ModelStatus.WARM


def test_the_next_node_is_asked_if_one_will_not() -> None:
    machine = Machine(disk=())
    machine.peers.set(*(member(number, loads=LOADS, on_disk=(facts("red", 4.0),)) for number in (2, 3)))
    machine.wait(1.0)
    (first,) = [one for one in machine.asks("red") if isinstance(one, AskForLoad)]
    machine.do(LoadAnswered(node=first.node, model=ModelName("red"), problem="it is full"))
    asked = [one.node for one in machine.effects if isinstance(one, AskForLoad)]
    assert asked == [first.node, ({OTHER, THIRD} - {first.node}).pop()]
    machine.do(LoadAnswered(node=asked[1], model=ModelName("red"), problem="it is full, too"))
    # The reason names the node that gave it.
    names = [f"{one.label} does not load it: it is full" for one in machine.peers.present]
    assert machine.state("red").problem.startswith(tuple(names))


def test_another_node_is_asked_where_the_first_does_not_load_for_long() -> None:
    machine = Machine(disk=())
    disk = (facts("red", 4.0),)
    machine.peers.set(*(member(number, loads=LOADS, on_disk=disk) for number in (2, 3)))
    machine.wait(1.0)
    (first,) = [one for one in machine.asks("red") if isinstance(one, AskForLoad)]
    other = ({OTHER, THIRD} - {first.node}).pop()
    machine.wait(30.0)
    # Nothing changed: it keeps its place.
    assert [one for one in machine.effects if isinstance(one, EndAsk)] == []
    # The first one's memory is in use now, so that requests take turns there.
    full = LoadOffer(free_bytes=0, room_bytes=16 * GB)
    offers = {first.node: full, other: LOADS}
    machine.peers.set(*(member(number, loads=offers[node_id(number)], on_disk=disk) for number in (2, 3)))
    machine.wait(6.0)
    assert [one.node for one in machine.effects if isinstance(one, EndAsk)] == [first.node]
    assert [one.node for one in machine.effects if isinstance(one, AskForLoad)] == [first.node, other]
    # It stays there while it loads.
    machine.peers.set(
        *(
            member(
                number, *([serving("red", ModelStatus.LOADING, load_seconds=60.0)] if node_id(number) == other else []),
                loads=full if node_id(number) == other else LOADS, on_disk=disk,
            )
            for number in (2, 3)
        )
    )  # fmt: skip
    machine.wait(40.0)
    assert len([one for one in machine.effects if isinstance(one, AskForLoad)]) == 2


def test_a_node_that_left_is_replaced_and_who_waits_no_more_asks_no_more() -> None:
    machine = Machine(disk=())
    others = {number: member(number, loads=LOADS, on_disk=(facts("red", 4.0),)) for number in (2, 3)}
    machine.peers.set(*others.values())
    machine.wait(1.0)
    (first,) = [one for one in machine.asks("red") if isinstance(one, AskForLoad)]
    machine.peers.set(*(one for one in others.values() if one.announcement.node != first.node))
    machine.wait(1.0)
    (_, second) = [one.node for one in machine.effects if isinstance(one, AskForLoad)]
    assert EndAsk(node=second, model=ModelName("red")) in machine.asks("red", 0)


def test_a_model_that_is_loading_elsewhere_is_waited_for_there() -> None:
    machine = Machine()
    machine.peers.set(member(2, serving("red", ModelStatus.LOADING, load_seconds=9.0), loads=LOADS))
    machine.wait(1.0)
    assert AskForLoad(node=OTHER, model=ModelName("red")) in machine.asks("red")
    assert machine.state("red").ready_at == machine.now + 9.0
    machine.wait(3.0)
    assert machine.starts == []


@pytest.mark.parametrize("broken", [False, True])
def test_a_host_that_failed_one_request_and_is_alive_is_asked_again_before_another_loads(*, broken: bool) -> None:
    """A second copy may be gigabytes that are fetched, and would answer all requests from then on."""
    machine = Machine(memory=10.0)
    machine.peers.set(member(2, serving("red"), on_disk=(facts("red", 4.0),)))
    machine.wait(1.0)
    failed = TargetFailed(node=OTHER, model=ModelName("red"), reason="TCP stopped answering", term=1)
    machine.do(failed)
    machine.asks("red")
    machine.wait(1.9)
    assert machine.status("red") is ModelStatus.LOADING
    assert machine.state("red").text == "its host failed a request, and is asked again in a moment"
    machine.wait(0.2)
    assert machine.status("red") is ModelStatus.WARM
    if broken:
        machine.do(failed)
    else:
        machine.asks("red", 0)
    machine.wait(10.0)
    # Where it does not recover, the model is loaded elsewhere.
    assert machine.starts == (["red"] if broken else [])


def test_a_node_that_is_asked_loads_here_or_says_why_not() -> None:
    machine = Machine(disk=("red",))
    machine.asks("red", asker=OTHER, here=True, standing="member")
    machine.asks("green", asker=OTHER, here=True, standing="member")
    machine.wait(3.0)
    assert machine.starts == ["red"]
    assert machine.state("green").problem_here
    assert not machine.state("green").problem


def test_the_file_is_fetched_first_where_nobody_who_has_it_can_load_it() -> None:
    machine = Machine(disk=(), can_fetch=True)
    machine.peers.set(member(2, on_disk=(facts("red", 4.0),), shares=True))
    machine.wait(1.0)
    (fetch,) = [one for one in machine.asks("red") if isinstance(one, FetchModel)]
    assert fetch.model == "red"
    machine.wait(30.0)
    machine.do(ModelsChanged(on_disk=(facts("red", 4.0),)))
    machine.do(FetchEnded(model=ModelName("red")))
    machine.wait(3.0)
    assert machine.starts == ["red"]


def test_a_fetch_that_fails_is_the_reason() -> None:
    machine = Machine(disk=(), can_fetch=True)
    machine.peers.set(member(2, on_disk=(facts("red", 4.0),), shares=True))
    machine.wait(1.0)
    machine.asks("red")
    machine.do(FetchEnded(model=ModelName("red"), problem="nobody gives it"))
    machine.wait(1.0)
    assert "could not be fetched" in machine.state("red").problem


def test_a_model_of_the_catalogue_is_fetched_from_its_source() -> None:
    entry = msgspec.structs.replace(facts("red", 4.0), source="hf:o/r:f")
    policy = OnDemandPolicy(scope="members", hub=True, catalogue=(entry,))
    machine = Machine(disk=(), can_fetch=True, on_demand=policy)
    assert machine.status("red") is ModelStatus.COLD
    (fetch,) = [one for one in machine.asks("red") if isinstance(one, FetchModel)]
    assert fetch.source == "hf:o/r:f"


def test_a_passive_node_asks_the_one_whose_routes_it_follows() -> None:
    machine = Machine(role=Role.CLIENT, disk=())
    source = Machine()
    machine.do(RoutesLearned(source=OTHER, snapshot=source.routes))
    assert AskForLoad(node=OTHER, model=ModelName("red")) in machine.asks("red")


def test_a_nodes_word_counts_until_its_announcement_says_more() -> None:
    machine = Machine(disk=())
    node: dict[str, Any] = {"loads": LOADS, "on_disk": (facts("red", 4.0),)}
    answered = Serving(model=ModelName("red"), status=ModelStatus.WARM, term=1, context=512, slots=1)
    for confirmed in (True, False):
        machine.peers.set(member(2, **node))
        machine.wait(1.0)
        machine.asks("red")
        machine.do(LoadAnswered(node=OTHER, model=ModelName("red"), serving=answered))
        assert machine.status("red") is ModelStatus.WARM
        machine.asks("red", 0)
        if confirmed:
            # An announcement that was on its way takes nothing back.
            machine.peers.set(member(2, serving("red", ModelStatus.LOADING), **node))
            machine.wait(1.0)
            assert machine.status("red") is ModelStatus.WARM
            machine.peers.set(member(2, serving("red"), **node))
            machine.wait(1.0)
            machine.peers.set(member(2, **node))
            machine.wait(1.0)
        else:
            machine.wait(11.0)
        assert machine.status("red") is ModelStatus.COLD


SHARING = Capacity(memory_bytes=30 * GB, rpc_version="8.0.0")
DISTRUSTED = HostsDistrusted(hosts=((ModelName("red"), OTHER),))


def test_a_host_that_is_distrusted_for_a_model_is_not_asked_to_load_it() -> None:
    disk = (facts("red", 4.0), facts("green", 4.0))
    machine = Machine(disk=())
    machine.peers.set(*(member(number, loads=LOADS, on_disk=disk) for number in (2, 3)))
    machine.do(DISTRUSTED)
    for model in ("red", "green"):
        machine.asks(model)
        machine.wait(60.0)
    asked = {one.model: one.node for one in machine.effects if isinstance(one, AskForLoad)}
    assert asked[ModelName("red")] == THIRD
    # Of other models nothing is known against it.
    assert asked[ModelName("green")] in {OTHER, THIRD}
    alone = Machine(disk=())
    alone.do(DISTRUSTED)
    alone.peers.set(member(2, loads=LOADS, on_disk=disk, shares=True, name="liar"))
    alone.wait(3.0)
    alone.asks("red")
    alone.wait(60.0)
    assert not any(isinstance(one, AskForLoad | FetchModel) for one in alone.effects)
    assert "liar is not asked" in alone.state("red").problem


def test_a_host_that_is_distrusted_while_it_loads_is_left_for_another_one() -> None:
    machine = Machine(disk=())
    disk = (facts("red", 4.0),)
    machine.peers.set(member(2, loads=LOADS, on_disk=disk))
    machine.wait(3.0)
    machine.asks("red")
    assert AskForLoad(node=OTHER, model=ModelName("red")) in machine.effects
    loading = serving("red", ModelStatus.LOADING)
    machine.peers.set(member(2, loading, loads=LOADS, on_disk=disk), member(3, loads=LOADS, on_disk=disk))
    machine.wait(1.0)
    machine.do(DISTRUSTED)
    assert EndAsk(node=OTHER, model=ModelName("red")) in machine.effects
    assert AskForLoad(node=THIRD, model=ModelName("red")) in machine.effects
    # What it answers meanwhile counts for nothing: the request goes on waiting for the other one.
    machine.peers.set(member(2, serving("red"), loads=LOADS, on_disk=disk), member(3, loads=LOADS, on_disk=disk))
    machine.wait(5.0)
    assert machine.status("red") is ModelStatus.WARM
    assert EndAsk(node=THIRD, model=ModelName("red")) not in machine.effects


def test_a_split_is_not_begun_at_a_host_that_is_distrusted() -> None:
    offer = SplitOffer(memory_bytes=30 * GB)
    for number, expected in ((3, THIRD), (4, node_id(4))):
        others = [
            member(one, loads=LoadOffer(), on_disk=(facts("big", 16.0),), offer=offer, capacity=SHARING)
            for one in (2, number)
        ]
        machine = Machine(memory=3.0, disk=())
        machine.do(HostsDistrusted(hosts=((ModelName("big"), OTHER),)))
        machine.peers.set(*others)
        machine.wait(3.0)
        machine.asks("big")
        machine.wait(20.0)
        assert [one.node for one in machine.effects if isinstance(one, AskForLoad)][:1] == [expected]
