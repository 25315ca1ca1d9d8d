"""A thousand nodes and ten thousand clients, and all that can go wrong, in one run: `make sim`. Takes minutes."""

import msgspec
import pytest
from tests.sim.catalog import EVERYTHING, LARGE, command, shortcomings

from mesh_llm.simulation import Report, Scenario, run

pytestmark = [pytest.mark.large, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return EVERYTHING.at(LARGE, seed=1)


@pytest.fixture(scope="module")
def report(scenario: Scenario) -> Report:
    seen = run(scenario)
    print(msgspec.json.format(msgspec.json.encode(seen)).decode())
    return seen


def test_everything(scenario: Scenario, report: Report) -> None:
    wrong = shortcomings(report, EVERYTHING.large)
    assert not wrong, f"{wrong}; repeat with: {command('everything', scenario)}"


def test_messages_per_node_stay_flat_from_fifty_to_a_thousand(scenario: Scenario, report: Report) -> None:
    few = run(msgspec.structs.replace(scenario, nodes=50, clients=0)).messages_per_node_second
    many = report.messages_per_node_second
    assert max(few, many) <= 1.2 * min(few, many), f"{few} with 50 nodes, {many} with {LARGE}"


def test_clients_cost_their_hosts_little(report: Report) -> None:
    assert report.polls_per_node_second < 20.0
