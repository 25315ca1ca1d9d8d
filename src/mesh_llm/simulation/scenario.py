"""What to simulate. Every random choice follows from `seed`: the same scenario gives the same run."""

import msgspec

from mesh_llm.core.config import MembershipConfig


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A mesh, a network and its faults. Times are virtual seconds from the start; None: it does not happen.

    Attributes:
        nodes: active nodes.
        clients: passive nodes, which only fetch routing tables.
        models: models served by the nodes in turn; 0: membership alone is simulated, with made-up announcements.
        standby: as many of the nodes come without a model of their own; they take over where one is missing.
        seed: of all random choices.
        duration: how long to run.
        join_over: the nodes start evenly within this time; 0.0: all at once.
        loss: share of messages that vanish.
        duplicate: share of messages that arrive twice.
        delay_ms: mean one-way delay. Each message takes half to one and a half of it, so messages overtake each other.
        skew_seconds: clocks differ by up to this.
        drift: clocks run faster or slower by up to this share.
        load_every: seconds between two changes of every node's load; 0.0: never.
        crash_at: when `crash` of the nodes are killed at once.
        crash: share of nodes, or their number where it is 1 or more.
        restart_after: seconds after the crash at which they start again, with the same keys.
        freeze_at: when `freeze` nodes are frozen (SIGSTOP).
        freeze: share, or number where it is 1 or more.
        thaw_after: seconds after the freeze at which they go on.
        cut_at: when the network is partitioned in two.
        cut: share of nodes on the smaller side, or their number where it is 1 or more.
        heal_after: seconds after which the partition ends.
        leave_at: when `leave` nodes leave in good order.
        leave: share, or number where it is 1 or more.
        settle: seconds at the end of the run in which the rates are measured.
        encode: every message is encoded and decoded, and its bytes are counted; slower.
        pace: periods and limits of membership.
    """

    nodes: int = 100
    clients: int = 0
    models: int = 0
    standby: int = 0
    seed: int = 1
    duration: float = 60.0
    join_over: float = 5.0
    loss: float = 0.0
    duplicate: float = 0.0
    delay_ms: float = 2.0
    skew_seconds: float = 0.0
    drift: float = 0.0
    load_every: float = 0.0
    crash_at: float | None = None
    crash: float = 0.1
    restart_after: float | None = None
    freeze_at: float | None = None
    freeze: float = 1.0
    thaw_after: float = 30.0
    cut_at: float | None = None
    cut: float = 0.5
    heal_after: float = 30.0
    leave_at: float | None = None
    leave: float = 1.0
    settle: float = 15.0
    encode: bool = False
    pace: MembershipConfig = MembershipConfig()

    def count(self, share: float) -> int:
        """The number of nodes that a share, or a number, means. At least one."""
        return max(1, min(self.nodes, int(share) if share >= 1.0 else round(share * self.nodes)))
