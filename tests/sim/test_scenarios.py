"""A hundred nodes through everything that a network and its machines do to them."""

import pytest
from tests.sim.catalog import CASES, SMALL, command, shortcomings

from mesh_llm.simulation import run

FEW = {"leave"}
"""For `make test-fast`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in sorted(CASES)]
)
def test_small(name: str) -> None:
    case = CASES[name]
    scenario = case.at(SMALL, seed=1)
    wrong = shortcomings(run(scenario), case.small)
    assert not wrong, f"{wrong}; repeat with: {command(name, scenario)}"
