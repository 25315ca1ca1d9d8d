"""What goes wrong, and when; and what is to be measured from then on."""

from collections.abc import Callable

from mesh_llm.simulation.invariants import Judge
from mesh_llm.simulation.node_adapters import Clients
from mesh_llm.simulation.world import Machine, World

_UNNOTICED = 5.0
"""A shorter stop need not be noticed."""


class Faults:
    """Brings a scenario's faults on."""

    def __init__(self, world: World, judge: Judge, clients: Clients, boot: Callable[[Machine], None]) -> None:
        self._world = world
        self._judge = judge
        self._clients = clients
        self._boot = boot
        self._scenario = world.scenario

    def schedule(self) -> None:
        """Put all of them on the calendar."""
        scenario, world = self._scenario, self._world
        for at, happen in (
            (scenario.crash_at, self._crash),
            (scenario.freeze_at, self._freeze),
            (scenario.cut_at, self._cut),
            (scenario.leave_at, self._leave),
        ):
            if at is not None:
                world.call(at, happen)

    def _some(self, share: float) -> list[Machine]:
        running = [machine for machine in self._world.machines if machine.runs]
        return self._world.random.sample(running, min(len(running), self._scenario.count(share)))

    def _crash(self) -> None:
        world, judge, after = self._world, self._judge, self._scenario.restart_after
        victims = self._some(self._scenario.crash)
        for machine in victims:
            world.kill(machine)
        judge.drop("joined")
        judge.goal("crash_noticed", judge.nobody_trusts(victims))
        judge.goal("crash_noticed_half", judge.nobody_trusts(victims, 0.5))
        if self._scenario.models:
            judge.goal("models_restored", judge.all_models_routed)
        if self._scenario.clients:
            dead = frozenset(machine.node for machine in victims)
            judge.goal("clients_settled", lambda: not self._clients.holds_any(dead))
        if after is None:
            judge.goal("crash_settled", judge.nobody_knows(victims))
        else:
            world.call(world.time + after, lambda: self._restart(victims))

    def _restart(self, victims: list[Machine]) -> None:
        self._judge.drop("crash_noticed", "crash_noticed_half", "clients_settled")
        self._judge.disturb(victims)
        for machine in victims:
            self._boot(machine)
        self._judge.goal("restart_used", self._judge.all_trust_all)

    def _freeze(self) -> None:
        world, judge = self._world, self._judge
        victims = self._some(self._scenario.freeze)
        judge.disturb(victims)
        for machine in victims:
            machine.frozen = True
        judge.goal("freeze_noticed", judge.nobody_trusts(victims))
        world.call(world.time + self._scenario.thaw_after, lambda: self._thaw(victims))

    def _thaw(self, victims: list[Machine]) -> None:
        if self._scenario.thaw_after < _UNNOTICED:
            self._judge.drop("freeze_noticed")
        self._judge.disturb(victims)
        for machine in victims:
            self._world.thaw(machine)
        self._judge.goal("thaw_used", self._judge.all_trust_all)

    def _cut(self) -> None:
        world = self._world
        for machine in self._some(self._scenario.cut):
            machine.side = 1
        world.cut_since = world.time
        world.call(world.time + self._scenario.heal_after, self._heal)

    def _heal(self) -> None:
        world, judge = self._world, self._judge
        judge.disturb(world.machines)
        world.cut_since = None
        for machine in world.machines:
            machine.side = 0
        judge.goal("heal_settled", judge.all_trust_all)

    def _leave(self) -> None:
        world = self._world
        leavers = self._some(self._scenario.leave)
        for machine in leavers:
            mind = machine.mind
            if mind is not None:
                world.carry_out(machine, mind.stop(machine.local(world.time)))
                world.kill(machine)
        self._judge.goal("leave_settled", self._judge.nobody_knows(leavers))
