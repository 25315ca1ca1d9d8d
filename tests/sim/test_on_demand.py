"""Models on demand in a simulated mesh, in the short form of `make bench ARGS="on_demand.simulated"`."""

import argparse
from typing import Any

from bench.on_demand.simulated import Simulation, report


def simulated(**options: Any) -> dict[str, Any]:
    values = {"nodes": 24, "models": 12, "hosts": 0, "copies": 4, "minutes": 3.0, "rate": 4.0, "delay": 2.0, "seed": 1}
    simulation = Simulation(argparse.Namespace(**(values | options)))
    simulation.run()
    return report(simulation, 0.0)


def test_where_there_is_room_each_model_is_loaded_once_and_stays() -> None:
    found = simulated()
    assert found["failed"] == 0
    assert found["still_waiting"] == 0
    assert found["loads"] <= 12
    assert found["loads_of_what_was_loaded_elsewhere"] == 0
    # Only the load is waited for.
    assert found["wait_longest_s"] < 12.0


def test_where_there_is_too_little_room_models_take_turns_and_no_request_is_lost() -> None:
    found = simulated(hosts=5)
    assert found["failed"] == 0
    # A turn is four loads long, and the load itself comes before it. What is idle goes sooner.
    rooms, turn = 5, 5 * 8.0
    assert 12 <= found["loads"] <= rooms * (3.0 * 60.0 / turn * 2 + 1.0)
    assert found["longest_still_waiting_s"] < 12 * turn


def test_where_there_is_too_little_room_nothing_goes_to_and_fro() -> None:
    found = simulated(nodes=20, models=30, hosts=16, rate=4.5, minutes=4.0)
    assert found["failed"] == 0
    assert found["loaded_again_within_a_minute"] <= 1
    # At 8 s each, a node would load for a fifth of the time at most.
    assert found["loads"] / 16 / 4.0 < 1.5
