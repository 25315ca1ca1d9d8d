"""What this node alone knows of another one: whether it answers, how fast, and what is being done to find out."""

from dataclasses import dataclass, field
from enum import IntEnum

from mesh_llm.core.ids import NodeId
from mesh_llm.core.pace import Pace
from mesh_llm.core.suspicion import Suspicion

_MOST_VOUCHERS = 4
_NEVER = float("-inf")


class Stage(IntEnum):
    """How hard a silent node is being asked. Each stage that passes without an answer leads to the next."""

    EXCHANGE = 0
    PING = 1
    RELAYS = 2


@dataclass(slots=True)
class Probe:
    """A question that waits for an answer: anything from its target itself, or a relayed Ack with its nonce."""

    stage: Stage
    since: float
    nonce: int = 0


@dataclass(slots=True)
class Path:
    """A connection that stands."""

    rtt_ms: float
    relayed: bool


@dataclass(slots=True)
class Contact:
    """One other member.

    Attributes:
        proven: there is proof that its present incarnation lived after this node heard of it.
        doubted: something failed at it, and it has not been heard since.
        reachable: False while others reach it and this node does not.
        heard: when anything came from it directly.
        rtt: seconds, as measured by answers; 0.0 unknown.
        vouchers: peers that told of proof of their own, while there is none here.
        suspicion: the case against it, if there is one.
        probe: the question that it owes an answer to.
    """

    proven: bool = False
    doubted: bool = False
    reachable: bool = True
    heard: float = _NEVER
    rtt: float = 0.0
    vouchers: set[NodeId] = field(default_factory=set[NodeId])
    suspicion: Suspicion | None = None
    probe: Probe | None = None
    _missed: int = 0
    _refuted: int = 0
    _refuted_at: float = _NEVER

    @property
    def doubtful(self) -> bool:
        """Whether nothing should be sent to it that matters: unproven, suspected, or out of reach from here."""
        return not self.proven or self.doubted or not self.reachable or self.suspicion is not None

    def present(self) -> bool:
        """Note that it answered this node itself; says whether it was thought less of before."""
        if self.proven and self.reachable and not self.doubted:
            return False
        self.proven = self.reachable = True
        self.doubted = False
        self._missed = 0
        return True

    def unprove(self) -> None:
        """What was proven is not so any more: this is another life of it, or this node was away for long."""
        self.proven = False
        self.vouchers.clear()

    def out_of_reach(self, pace: Pace) -> float:
        """Note that others reach it and this node does not; returns the seconds after which to try again."""
        self.proven = True
        self.doubted = self.reachable = False
        self._missed += 1
        return min(pace.retry_most, pace.retry_first * 2.0 ** (self._missed - 1))

    def vouched(self, teller: NodeId) -> bool:
        """Note that a peer has proof; says whether that makes two: one alone may be telling old stories."""
        if len(self.vouchers) < _MOST_VOUCHERS:
            self.vouchers.add(teller)
        return len(self.vouchers) >= 2

    def refuted(self, pace: Pace, now: float) -> None:
        """Note that it refuted a suspicion."""
        self._refuted = 1 if now - self._refuted_at > pace.immune_for else self._refuted + 1
        self._refuted_at = now
        self.suspicion = None

    def immune(self, pace: Pace, now: float) -> bool:
        """Whether it refuted so much lately that others' word against it is checked before it is believed."""
        return self._refuted >= pace.immune_after and now - self._refuted_at <= pace.immune_for

    def accused_again(self, now: float, heard_within: float) -> None:
        """Note that it is still being accused: as long as it is heard itself, it stays immune."""
        if now - self.heard <= heard_within:
            self._refuted_at = now

    def measured(self, seconds: float) -> None:
        """Smooth in one measured round trip."""
        self.rtt = seconds if self.rtt == 0.0 else 0.75 * self.rtt + 0.25 * seconds
