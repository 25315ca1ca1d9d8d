"""What the tunnel did, in numbers: for status, and for whoever wants to know what a token costs."""

from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class WorkerStats:
    """The traffic with one worker. Bytes and counts since the session began.

    Attributes:
        connections: of the engine to this worker's endpoint.
        streams: tunnel streams that were needed for them.
        requests: of the engine.
        answered_here: requests answered without asking the worker.
        round_trips: requests for which the engine waited for the worker.
        writes: batches written to the worker.
        bytes_sent: to the worker on tunnel streams.
        bytes_received: from the worker on tunnel streams.
        weight_bytes_referenced: weights that were named.
        weight_bytes_sent: tensor data from the host's model that had to be sent.
        weight_bytes_filled: weights that the worker says to have read from its own disk so far.
        graphs: whole graphs sent.
        pushed: tensors that went to another worker directly.
        relayed: tensors of another worker that went through the host.
        rescued: pushed tensors that did not arrive and went through the host then.
        filling: bytes of nothing that came behind answers (split.window).
    """

    connections: int = 0
    streams: int = 0
    requests: int = 0
    answered_here: int = 0
    round_trips: int = 0
    writes: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    weight_bytes_referenced: int = 0
    weight_bytes_sent: int = 0
    weight_bytes_filled: int = 0
    graphs: int = 0
    pushed: int = 0
    relayed: int = 0
    rescued: int = 0
    filling: int = 0

    def minus(self, earlier: "WorkerStats") -> "WorkerStats":
        """What happened since."""
        return WorkerStats(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def copy(self) -> "WorkerStats":
        """As it is now."""
        return self.minus(WorkerStats())


@dataclass(frozen=True, slots=True)
class PairState:
    """Whether one worker reaches another."""

    source: str
    target: str
    reachable: bool
    reason: str = ""


@dataclass(slots=True)
class SplitStats:
    """All of a group, by worker's name; `pairs` that were tried."""

    workers: dict[str, WorkerStats] = field(default_factory=dict[str, WorkerStats])
    pairs: list[PairState] = field(default_factory=list[PairState])

    @property
    def total(self) -> WorkerStats:
        """The sum over workers."""
        total = WorkerStats()
        for stats in self.workers.values():
            for each in fields(total):
                setattr(total, each.name, getattr(total, each.name) + getattr(stats, each.name))
        return total
