"""What a simulation showed."""

import msgspec

from mesh_llm.simulation.scenario import Scenario


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
