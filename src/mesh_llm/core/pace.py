"""How often and how patiently nodes watch each other. Seconds unless said otherwise."""

import math

import msgspec


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Periods and limits of membership. The defaults suit a LAN and a WAN alike: waits scale with the round trip.

    Attributes:
        step: between two exchanges that a node starts, each with the next member of a shuffled round.
        burst: exchanges that urgent news may start ahead of their time; later ones pay for them.
        spacing: least time between two exchanges started.
        patience: shortest wait for an answer.
        impatience: longest wait for an answer, before local health is counted in. A slower answer counts as well, as
            long as it comes before the last question was given up: about three times as late.
        dial: added where no connection is known to stand.
        relays: members asked to probe for this node.
        suspicion: shortest time between suspicion and death, in a mesh of up to ten; grows with log10 of its size.
        stretch: how many times longer that takes while nobody else confirms.
        confirmations: independent accusers after whom the shortest time holds.
        tombstone: how long dead and left ones are remembered.
        retransmit: times that a verdict is passed on by each node, times log10 of the mesh's size.
        eager: times that each node pushes a whole announcement that is new to it.
        numbered: times that it only tells its number after that.
        window: digests per exchange.
        entries: most announcements per message.
        entry_bytes: most bytes of others' announcements per message.
        verdicts: most verdicts per message.
        check: between two checks of doubtful members that hearsay caused, on average.
        checks: as many may be made at once.
        introductions: int = 16
    retry_first, retry_most: between attempts to reach a member directly that only others reach; doubles.
        introductions: members to which a newcomer speaks at once, as soon as it hears of them.
        heal_first, heal_most: between attempts to reach members that died; doubles.
        rejoin_first, rejoin_most: the same for a node without any peer.
        former: members that died and are still tried.
        members: most members and tombstones.
        paths: most connections remembered.
        late: a deadline missed by more than this says that this node slept or was starved, not the others.
        immune_after: refuted suspicions after which hearsay about a node is not believed without a probe of one's own.
        immune_for: how long that holds.
        soft: least time between announcements that differ only in load, per member of the mesh.
    """

    step: float = 0.4
    burst: int = 3
    spacing: float = 0.05
    patience: float = 0.4
    impatience: float = 0.8
    dial: float = 1.0
    relays: int = 3
    suspicion: float = 4.0
    stretch: float = 3.0
    confirmations: int = 3
    tombstone: float = 900.0
    retransmit: float = 4.0
    eager: int = 3
    numbered: int = 2
    window: int = 32
    entries: int = 24
    entry_bytes: int = 24 * 1024
    verdicts: int = 24
    check: float = 0.05
    checks: float = 32.0
    introductions: int = 16
    retry_first: float = 1.0
    retry_most: float = 60.0
    heal_first: float = 2.0
    heal_most: float = 30.0
    rejoin_first: float = 1.0
    rejoin_most: float = 60.0
    former: int = 64
    members: int = 4096
    paths: int = 4096
    late: float = 1.0
    immune_after: int = 3
    immune_for: float = 60.0
    soft: float = 0.05

    def retransmissions(self, size: int) -> int:
        """How many times a mesh of `size` nodes passes a verdict on, per node."""
        return math.ceil(self.retransmit * max(1.0, math.log10(size + 1)))
