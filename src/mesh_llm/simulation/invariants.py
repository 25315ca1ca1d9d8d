"""What a simulation showed.

Watches a run from outside: measures how long the mesh takes, and notes what must never happen.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from mesh_llm.core.types.effects import Notice
from mesh_llm.core.types.ids import NodeId
from mesh_llm.simulation.node_adapters import NodeMind, model_name
from mesh_llm.simulation.scenario import Scenario
from mesh_llm.simulation.world import Machine, World


class Report(msgspec.Struct, kw_only=True):
    """Virtual seconds and rates. None: did not happen, or not within the run.

    Attributes:
        scenario: what was simulated.
        problems: what should not have happened, in words; empty when all is well.
        events: events handled by all nodes.
        joined: from the start of the last node until all know and trust all.
        crash_noticed: from the crash until no node would route to any of the dead.
        crash_noticed_half: the same for the median node.
        crash_settled: from the crash until every node holds all of them for dead.
        restart_used: from the restart until all trust all of them again.
        freeze_noticed: from the stop until no node would route to the stopped.
        thaw_used: from their going on until all trust all of them again.
        heal_settled: from the end of the cut until all trust all again.
        leave_settled: from the leaving until nobody counts them as members.
        clients_settled: from the crash until no client's table holds any of the dead.
        models_served: with `models`: from the start of the last node until every node has a route to every model.
        models_restored: the same from the crash, to machines that run.
        takeovers: models that nodes took which did not come with them.
        false_deaths: times that a node held another for dead which ran and could be reached.
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


_LOOK_EVERY = 0.25
_GHOST_AFTER = 30.0
_GRACE = 20.0
_MOST_PROBLEMS = 20


@dataclass
class _Goal:
    name: str
    since: float
    reached: Callable[[], bool]
    limit: float | None


class Judge:
    """Holds goals until they are reached; each writes its time into the report field of its name."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._goals: list[_Goal] = []
        self._world: World | None = None
        self._disturbed: dict[NodeId, float] = {}
        self._suspect = 0

    def watch(self, world: World) -> None:
        """Begin to look at a world, now and then."""
        self._world = world
        world.call(world.time + _LOOK_EVERY, self._look)

    def goal(self, name: str, reached: Callable[[], bool], limit: float | None = None) -> None:
        """Measure from now how long it takes until something holds; beyond `limit` seconds that is a problem."""
        world = self._seen()
        self._goals = [goal for goal in self._goals if goal.name != name]
        self._goals.append(_Goal(name, world.time, reached, limit))

    def drop(self, *names: str) -> None:
        """Measure these no longer: another fault makes them meaningless."""
        self._goals = [goal for goal in self._goals if goal.name not in names]

    def disturb(self, machines: Iterable[Machine]) -> None:
        """These are being tampered with: that others hold them for dead is no mistake for a while."""
        for machine in machines:
            self._disturbed[machine.node] = self._seen().time

    def notice(self, machine: Machine, notice: Notice) -> None:
        """A node told its user something."""
        if notice.code == "model_assigned":
            self.report.takeovers += 1
        if notice.code != "peer_lost":
            return
        world = self._seen()
        lost = world.by_id.get(NodeId(notice.about))
        if lost is None or not lost.runs or not machine.runs or not world.reachable(machine, lost):
            return
        for one in (machine, lost):
            if world.time - self._disturbed.get(one.node, float("-inf")) < _GRACE:
                return
        self.report.false_deaths += 1
        self.problem(f"at {world.time:.1f} s node {machine.index} held node {lost.index} for dead, which ran")

    def problem(self, text: str) -> None:
        """Note what must not happen."""
        if len(self.report.problems) < _MOST_PROBLEMS:
            self.report.problems.append(text)

    def finish(self) -> None:
        """The run is over: what was not reached is a problem."""
        for goal in self._goals:
            self.problem(f"{goal.name}: not reached in the {self._seen().time - goal.since:.0f} s until the end")

    # What is looked for.

    def all_trust_all(self) -> bool:
        """Whether every running machine holds exactly the running ones for members, and doubts none of them.

        Where messages get lost, doubts come and go: then one pair in a hundred may be in doubt at any moment.
        """
        running = [machine for machine in self._seen().machines if machine.runs]
        if not running:
            return True
        doubts = 0.01 * len(running) ** 2 if self._seen().scenario.loss else 0.0
        start = self._suspect % len(running)
        for machine in running[start:] + running[:start]:
            mind = machine.mind
            if mind is None:
                continue
            membership = mind.membership
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
        """Make a question: does this share of the running machines route to none of those?"""

        def holds() -> bool:
            running = [machine.mind for machine in self._seen().machines if machine.runs and machine.mind is not None]
            wrong = sum(any(mind.membership.trusts(other.node) for other in gone) for mind in running)
            return wrong <= (1.0 - share) * len(running)

        return holds

    def nobody_knows(self, gone: list[Machine]) -> Callable[[], bool]:
        """Make a question: do no running machines count any of those as a member?"""

        def holds() -> bool:
            running = [machine.mind for machine in self._seen().machines if machine.runs and machine.mind is not None]
            return not any(mind.membership.knows(other.node) for mind in running for other in gone)

        return holds

    def all_models_routed(self) -> bool:
        """Whether every running node would send a request for every model to a machine that runs and serves it."""
        world = self._seen()
        minds = {
            machine.node: machine.mind
            for machine in world.machines
            if machine.runs and isinstance(machine.mind, NodeMind)
        }
        for mind in minds.values():
            for index in range(world.scenario.models):
                model = model_name(index)
                targets = mind.routes_to(model)
                if not targets or not all(node in minds and model in minds[node].serves for node in targets):
                    return False
        return True

    def _seen(self) -> World:
        if self._world is None:
            msg = "the judge watches no world yet"
            raise RuntimeError(msg)
        return self._world

    def _look(self) -> None:
        world = self._seen()
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
        self._look_for_ghosts(world)
        world.call(world.time + _LOOK_EVERY, self._look)

    def _look_for_ghosts(self, world: World) -> None:
        gone = [
            machine for machine in world.machines if machine.mind is None and world.time - machine.since > _GHOST_AFTER
        ]
        if not gone:
            return
        for machine in world.machines:
            mind = machine.mind
            if mind is None or machine.frozen or world.time - machine.since < _GHOST_AFTER:
                continue
            for other in gone:
                if mind.membership.trusts(other.node):
                    self.problem(f"at {world.time:.1f} s node {machine.index} would route to {other.index}, long gone")
