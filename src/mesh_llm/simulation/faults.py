"""Injects a scenario's faults at their times, and sets what is measured from then on."""

from collections.abc import Callable

from mesh_llm.simulation.invariants import Invariants
from mesh_llm.simulation.node_adapters import Clients
from mesh_llm.simulation.world import Machine, World

_UNNOTICED = 5.0
"""Seconds; a shorter freeze need not be noticed."""


class Faults:
    """Crashes, freezes, partitions and departures of a scenario."""

    def __init__(self, world: World, invariants: Invariants, clients: Clients, boot: Callable[[Machine], None]) -> None:
        self._world = world
        self._judge = invariants
        self._clients = clients
        self._boot = boot
        self._scenario = world.scenario

    def schedule(self) -> None:
        """Put all faults on the world's calendar."""
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
        world, invariants, after = self._world, self._judge, self._scenario.restart_after
        victims = self._some(self._scenario.crash)
        for machine in victims:
            world.kill(machine)
        invariants.drop("joined")
        invariants.goal("crash_noticed", invariants.nobody_trusts(victims))
        invariants.goal("crash_noticed_half", invariants.nobody_trusts(victims, 0.5))
        if self._scenario.models:
            invariants.goal("models_restored", invariants.all_models_routed)
        if self._scenario.clients:
            dead = frozenset(machine.node for machine in victims)
            invariants.goal("clients_settled", lambda: not self._clients.holds_any(dead))
        if after is None:
            invariants.goal("crash_settled", invariants.nobody_knows(victims))
        else:
            world.call(world.time + after, lambda: self._restart(victims))

    def _restart(self, victims: list[Machine]) -> None:
        self._judge.drop("crash_noticed", "crash_noticed_half", "clients_settled")
        self._judge.disturb(victims)
        for machine in victims:
            self._boot(machine)
        self._judge.goal("restart_used", self._judge.all_trust_all)

    def _freeze(self) -> None:
        world, invariants = self._world, self._judge
        victims = self._some(self._scenario.freeze)
        invariants.disturb(victims)
        for machine in victims:
            machine.frozen = True
        invariants.goal("freeze_noticed", invariants.nobody_trusts(victims))
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
        world, invariants = self._world, self._judge
        invariants.disturb(world.machines)
        world.cut_since = None
        for machine in world.machines:
            machine.side = 0
        invariants.goal("heal_settled", invariants.all_trust_all)

    def _leave(self) -> None:
        world = self._world
        leavers = self._some(self._scenario.leave)
        for machine in leavers:
            adapter = machine.adapter
            if adapter is not None:
                world.carry_out(machine, adapter.stop(machine.local(world.time)))
                world.kill(machine)
        self._judge.goal("leave_settled", self._judge.nobody_knows(leavers))
