"""A hundred nodes through everything that a network and its machines do to them."""

import pytest
from tests.sim.catalog import CASES, SMALL, command, shortcomings

from mesh_llm.simulation import run


@pytest.mark.parametrize("name", sorted(CASES))
def test_small(name: str) -> None:
    case = CASES[name]
    scenario = case.at(SMALL, seed=1)
    wrong = shortcomings(run(scenario), case.small)
    assert not wrong, f"{wrong}; repeat with: {command(name, scenario)}"
