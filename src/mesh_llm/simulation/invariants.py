"""Watches a simulation from outside: how long the mesh takes for what, and what must never happen."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from mesh_llm.core.types.effects import Notice
from mesh_llm.core.types.ids import NodeId
from mesh_llm.simulation.node_adapters import NodeAdapter, model_name
from mesh_llm.simulation.scenario import Scenario
from mesh_llm.simulation.world import Machine, World


class Report(msgspec.Struct, kw_only=True):
    """What a simulation showed, in virtual seconds and rates. None: it did not happen within the run.

    Attributes:
        scenario: what was simulated.
        problems: violated invariants, in words.
        events: events handled by all nodes.
        joined: from the start of the last node until all trust all.
        crash_noticed: from the crash until no node would route to any of the dead.
        crash_noticed_half: the same for the median node.
        crash_settled: from the crash until every node believes that all of them are dead.
        restart_used: from the restart until all trust all of them again.
        freeze_noticed: from the freeze until no node would route to the frozen.
        thaw_used: from the thaw until all trust all of them again.
        heal_settled: from the end of the partition until all trust all again.
        leave_settled: from the departure until no node counts them as members.
        clients_settled: from the crash until no client's table holds any of the dead.
        models_served: with `models`: from the start of the last node until every node has a route to every model.
        models_restored: the same from the crash, to machines that run.
        takeovers: models that the mesh assigned to nodes.
        false_deaths: times that a node declared another dead that ran and could be reached.
        false_suspicions: times that a running node had to refute.
        messages_per_node_second: messages sent per node and second, at the end of the run.
        bytes_per_node_second: the same in bytes; with `encode` only.
        largest_message: bytes; with `encode` only.
        polls_per_node_second: requests for tables that an active node answered per second, at the end of the run.
    """

    scenario: Scenario
    problems: list[str] = []
    events: int = 0
    joined: float | None = None
    crash_noticed: float | None = None
    crash_noticed_half: float | None = None
    crash_settled: float | None = None
    restart_used: float | None = None
    freeze_noticed: float | None = None
    thaw_used: float | None = None
    heal_settled: float | None = None
    leave_settled: float | None = None
    clients_settled: float | None = None
    models_served: float | None = None
    models_restored: float | None = None
    takeovers: int = 0
    false_deaths: int = 0
    false_suspicions: int = 0
    messages_per_node_second: float = 0.0
    bytes_per_node_second: float = 0.0
    largest_message: int = 0
    polls_per_node_second: float = 0.0


_CHECK_EVERY = 0.25
_GHOST_AFTER = 30.0
_GRACE = 20.0
_MOST_PROBLEMS = 20


@dataclass
class _Goal:
    name: str
    since: float
    reached: Callable[[], bool]
    limit: float | None


class Invariants:
    """Goals with their times, and invariants. A reached goal writes its time into the report's field of its name."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._goals: list[_Goal] = []
        self._world: World | None = None
        self._disturbed: dict[NodeId, float] = {}
        self._suspect = 0

    def watch(self, world: World) -> None:
        """Begin to check a world every quarter of a second."""
        self._world = world
        world.call(world.time + _CHECK_EVERY, self._check)

    def goal(self, name: str, reached: Callable[[], bool], limit: float | None = None) -> None:
        """Measure from now how long it takes until `reached` holds. More than `limit` seconds are a problem."""
        world = self._watched()
        self._goals = [goal for goal in self._goals if goal.name != name]
        self._goals.append(_Goal(name, world.time, reached, limit))

    def drop(self, *names: str) -> None:
        """Measure these no longer: another fault makes them meaningless."""
        self._goals = [goal for goal in self._goals if goal.name not in names]

    def disturb(self, machines: Iterable[Machine]) -> None:
        """A fault hits these machines: to declare them dead is no mistake for a while."""
        for machine in machines:
            self._disturbed[machine.node] = self._watched().time

    def notice(self, machine: Machine, notice: Notice) -> None:
        """A node notified its user."""
        if notice.code == "model_assigned":
            self.report.takeovers += 1
        if notice.code != "peer_lost":
            return
        world = self._watched()
        lost = world.by_id.get(NodeId(notice.about))
        if lost is None or not lost.runs or not machine.runs or not world.reachable(machine, lost):
            return
        for one in (machine, lost):
            if world.time - self._disturbed.get(one.node, float("-inf")) < _GRACE:
                return
        self.report.false_deaths += 1
        self.problem(f"at {world.time:.1f} s node {machine.index} declared node {lost.index} dead, which ran")

    def problem(self, text: str) -> None:
        """Note a violation."""
        if len(self.report.problems) < _MOST_PROBLEMS:
            self.report.problems.append(text)

    def finish(self) -> None:
        """The run is over: a goal that was not reached is a problem."""
        for goal in self._goals:
            self.problem(f"{goal.name}: not reached in the {self._watched().time - goal.since:.0f} s until the end")

    # Conditions.

    def all_trust_all(self) -> bool:
        """Whether the members of every running machine are exactly the running ones, and it doubts none of them.

        Where messages get lost, doubts come and go: one pair in a hundred may be in doubt at any moment.
        """
        running = [machine for machine in self._watched().machines if machine.runs]
        if not running:
            return True
        doubts = 0.01 * len(running) ** 2 if self._watched().scenario.loss else 0.0
        start = self._suspect % len(running)
        for machine in running[start:] + running[:start]:
            adapter = machine.adapter
            if adapter is None:
                continue
            membership = adapter.membership
            trusts, knows = membership.trusts, membership.knows
            whole = len(membership.view.ring) == len(running)
            for other in running if whole else ():
                node = other.node
                if not trusts(node) and other is not machine:
                    doubts -= 1
                    whole = doubts >= 0 and knows(node)
                    if not whole:
                        break
            if not whole:
                self._suspect = running.index(machine)
                return False
        return True

    def nobody_trusts(self, gone: list[Machine], share: float = 1.0) -> Callable[[], bool]:
        """Make a condition: this share of the running machines routes to none of `gone`."""

        def holds() -> bool:
            running = [
                machine.adapter for machine in self._watched().machines if machine.runs and machine.adapter is not None
            ]
            wrong = sum(any(adapter.membership.trusts(other.node) for other in gone) for adapter in running)
            return wrong <= (1.0 - share) * len(running)

        return holds

    def nobody_knows(self, gone: list[Machine]) -> Callable[[], bool]:
        """Make a condition: no running machine counts any of `gone` as a member."""

        def holds() -> bool:
            running = [
                machine.adapter for machine in self._watched().machines if machine.runs and machine.adapter is not None
            ]
            return not any(adapter.membership.knows(other.node) for adapter in running for other in gone)

        return holds

    def all_models_routed(self) -> bool:
        """Whether every running node would send a request for every model to a machine that runs and serves it."""
        world = self._watched()
        adapters = {
            machine.node: machine.adapter
            for machine in world.machines
            if machine.runs and isinstance(machine.adapter, NodeAdapter)
        }
        for adapter in adapters.values():
            for index in range(world.scenario.models):
                model = model_name(index)
                targets = adapter.routes_to(model)
                if not targets or not all(node in adapters and model in adapters[node].serves for node in targets):
                    return False
        return True

    def _watched(self) -> World:
        if self._world is None:
            msg = "no world is watched yet"
            raise RuntimeError(msg)
        return self._world

    def _check(self) -> None:
        world = self._watched()
        remaining: list[_Goal] = []
        for goal in self._goals:
            taken = world.time - goal.since
            if goal.reached():
                setattr(self.report, goal.name, round(taken, 3))
                if goal.limit is not None and taken > goal.limit:
                    self.problem(f"{goal.name}: took {taken:.1f} s, allowed are {goal.limit:.1f} s")
            else:
                remaining.append(goal)
        self._goals = remaining
        self._check_ghosts(world)
        world.call(world.time + _CHECK_EVERY, self._check)

    def _check_ghosts(self, world: World) -> None:
        gone = [
            machine
            for machine in world.machines
            if machine.adapter is None and world.time - machine.since > _GHOST_AFTER
        ]
        if not gone:
            return
        for machine in world.machines:
            adapter = machine.adapter
            if adapter is None or machine.frozen or world.time - machine.since < _GHOST_AFTER:
                continue
            for other in gone:
                if adapter.membership.trusts(other.node):
                    self.problem(f"at {world.time:.1f} s node {machine.index} would route to {other.index}, long gone")
