"""Runs a scenario: starts the machines, injects the faults, measures."""

from random import Random

import msgspec

from mesh_llm.core.types.gossip import Exchange, MeshMessage
from mesh_llm.simulation.faults import Faults
from mesh_llm.simulation.invariants import Invariants, Report
from mesh_llm.simulation.node_adapters import Clients, MembershipAdapter, NodeAdapter, incarnation, node_id
from mesh_llm.simulation.scenario import Scenario
from mesh_llm.simulation.world import Machine, World
from mesh_llm.wire.codec import SIGNATURE_BYTES, Malformed
from mesh_llm.wire.mesh.announcement import encode_announcement
from mesh_llm.wire.mesh.gossip import decode_message, encode_message


def run(scenario: Scenario) -> Report:
    """Run a simulation. The same scenario gives the same report."""
    return Simulation(scenario).run()


class Simulation:
    """One run. It is kept afterwards, so that tests can look at every machine."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = Random(scenario.seed)  # noqa: S311 - not for secrets
        self.report = Report(scenario=scenario)
        self.invariants = Invariants(self.report)
        machines = [self._machine(index) for index in range(scenario.nodes)]
        self.world = World(scenario, self.random, machines, self.invariants.notice)
        self.invariants.watch(self.world)
        self.clients = Clients(self.world, scenario.clients)
        self.world.on_change = self.clients.changed if scenario.clients else None
        self.faults = Faults(self.world, self.invariants, self.clients, self.boot)
        self._bytes = 0
        if scenario.encode:
            self.world.carrier = self._through_bytes

    def boot(self, machine: Machine) -> None:
        """Start the core on a machine that is down."""
        now = machine.local(self.world.time)
        seed = self.random.getrandbits(64)
        machine.first_incarnation = incarnation(now)
        life = machine.first_incarnation
        adapter = (
            NodeAdapter(machine.node, machine.index, life, self.scenario, seed)
            if self.scenario.models
            else MembershipAdapter(machine.node, machine.index, life, self.scenario.pace, seed)
        )
        self.world.start(machine, adapter)

    def run(self) -> Report:
        """Run the scenario and return the report."""
        scenario, world = self.scenario, self.world
        self._join()
        self.faults.schedule()
        measure_at = max(0.0, scenario.duration - scenario.settle)
        world.run(measure_at)
        sent, count, polls = world.sent, self._bytes, self.clients.answered
        world.run(scenario.duration)
        running = sum(machine.runs for machine in world.machines) or 1
        seconds = scenario.duration - measure_at
        self.report.messages_per_node_second = round((world.sent - sent) / running / seconds, 3)
        self.report.bytes_per_node_second = round((self._bytes - count) / running / seconds, 1)
        self.report.polls_per_node_second = round((self.clients.answered - polls) / running / seconds, 3)
        self.report.events = world.events
        self.report.false_suspicions = sum(
            machine.adapter.membership.incarnation - machine.first_incarnation
            for machine in world.machines
            if machine.adapter is not None
        )
        self.invariants.finish()
        return self.report

    def _machine(self, index: int) -> Machine:
        scenario, random = self.scenario, self.random
        offset = 1000.0 + random.uniform(-scenario.skew_seconds, scenario.skew_seconds)
        rate = 1.0 + random.uniform(-scenario.drift, scenario.drift)
        return Machine(index, node_id(scenario.seed, index), offset, rate)

    def _join(self) -> None:
        scenario, world = self.scenario, self.world
        for machine in world.machines:
            at = scenario.join_over * machine.index / scenario.nodes
            world.call(at, lambda machine=machine: self.boot(machine))
            if scenario.load_every > 0.0:
                world.call(at + scenario.load_every * self.random.random(), lambda machine=machine: self._load(machine))
        world.call(scenario.join_over, self._joined)

    def _joined(self) -> None:
        self.invariants.goal("joined", self.invariants.all_trust_all)
        if self.scenario.models:
            self.invariants.goal("models_served", self.invariants.all_models_routed)

    def _load(self, machine: Machine) -> None:
        adapter = machine.adapter
        if adapter is not None and not machine.frozen:
            in_flight = int(self.random.random() * 5)
            self.world.carry_out(machine, adapter.change_load(in_flight, machine.local(self.world.time)))
        wait = self.scenario.load_every * (0.5 + self.random.random())
        self.world.call(self.world.time + wait, lambda: self._load(machine))

    def _through_bytes(self, message: MeshMessage) -> MeshMessage:
        """Send a message as bytes, signed by nobody."""
        if isinstance(message, Exchange):
            entries = tuple(
                entry
                if entry.payload
                else msgspec.structs.replace(
                    entry, payload=encode_announcement(entry.announcement), signature=bytes(SIGNATURE_BYTES)
                )
                for entry in message.entries
            )
            message = msgspec.structs.replace(message, entries=entries)
        data = encode_message(message)
        self._bytes += len(data)
        self.report.largest_message = max(self.report.largest_message, len(data))
        received = decode_message(data)
        if isinstance(received, Malformed):
            self.invariants.problem(f"a message of {len(data)} bytes cannot be read: {received.reason}")
            return message
        return received
