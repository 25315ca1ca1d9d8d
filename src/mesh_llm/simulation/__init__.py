"""The real core in a world of virtual time: many nodes, a bad network, faults on a schedule, all from one seed."""

from mesh_llm.simulation.invariants import Report
from mesh_llm.simulation.run import run
from mesh_llm.simulation.scenario import Scenario

__all__ = ["Report", "Scenario", "run"]
