"""Two connections between the same two nodes: which one stays. Both sides come to the same answer by themselves."""

from typing import Protocol

from mesh_llm.core.ids import NodeId
from mesh_llm.net.peer import Peer

SIMULTANEOUS = 5.0
"""Seconds within which two dials in opposite directions count as one meeting; later ones replace a lost connection."""


class Twin(Protocol):
    """What of a connection matters here."""

    @property
    def dialed(self) -> bool:
        """Whether this side made it."""
        ...

    @property
    def established(self) -> float:
        """When, in monotonic seconds."""
        ...

    @property
    def peer(self) -> Peer:
        """With whom."""
        ...


def keep_new(old: Twin, new: Twin, own: NodeId) -> bool:
    """Whether the new connection takes the old one's place.

    It does where the peer's process is another one now, or where the same side dialled again: nobody dials a peer that
    it has a living connection to. Two that were made at once in opposite directions are told apart by their dialers:
    the one with the lower id wins.
    """
    if old.peer.session != new.peer.session or old.dialed == new.dialed:
        return True
    if new.established - old.established > SIMULTANEOUS:
        return True
    dialer = own if new.dialed else new.peer.node
    other = own if old.dialed else old.peer.node
    return dialer < other
