"""A thousand nodes and ten thousand clients: `make sim`."""

import msgspec
import pytest
from tests.sim.catalog import CASES, LARGE, command, shortcomings

from mesh_llm.simulation import Scenario, run

pytestmark = [pytest.mark.large, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_large(name: str) -> None:
    case = CASES[name]
    stretched = msgspec.structs.replace(case.scenario, duration=case.scenario.duration + 45.0)
    scenario = msgspec.structs.replace(stretched, nodes=LARGE, seed=1)
    wrong = shortcomings(run(scenario), case.large)
    assert not wrong, f"{wrong}; repeat with: {command(name, scenario)}"


def test_messages_per_node_stay_flat_from_fifty_to_a_thousand() -> None:
    rates = {
        nodes: run(
            Scenario(nodes=nodes, duration=90.0, loss=0.05, load_every=10.0, settle=30.0)
        ).messages_per_node_second
        for nodes in (50, 200, LARGE)
    }
    assert max(rates.values()) <= 1.2 * min(rates.values()), rates


def test_ten_thousand_clients() -> None:
    report = run(
        Scenario(nodes=LARGE, clients=10 * LARGE, duration=140.0, crash_at=75.0, crash=0.1, loss=0.05, settle=20.0)
    )
    assert report.problems == []
    assert report.clients_settled is not None
    assert report.clients_settled <= 60.0
    assert report.polls_per_node_second < 20.0
