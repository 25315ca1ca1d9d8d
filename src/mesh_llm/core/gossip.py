"""What nodes say to each other about the mesh: values only; `wire.gossip` turns them into bytes."""

from typing import TypeAlias

import msgspec

from mesh_llm.core.announcement import SignedAnnouncement
from mesh_llm.core.ids import Incarnation, NodeId


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages between nodes."""


class Ping(Message, frozen=True, kw_only=True):
    """Are you there? Answered by Ack with the same nonce."""

    nonce: int


class Ack(Message, frozen=True, kw_only=True):
    """I am here; or, relayed for a PingRequest, `about` is."""

    nonce: int
    about: NodeId | None = None


class PingRequest(Message, frozen=True, kw_only=True):
    """Please probe `target` for me, and Ack with my nonce if it answers."""

    nonce: int
    target: NodeId


class Digest(msgspec.Struct, frozen=True, array_like=True):
    """What the sender knows of one node: the newest (incarnation, sequence), and how it holds it.

    `state` is a letter: `a` alive, and the sender has had proof of it; `u` unproven, known by hearsay only or in doubt;
    `s` suspect; `d` dead.
    """

    node: NodeId
    incarnation: Incarnation
    sequence: int
    state: str = "a"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A suspicion (`s`) or death (`d`): about an incarnation of a node, never about the node. `by`: who says it."""

    node: NodeId
    incarnation: Incarnation
    state: str
    by: NodeId


class Exchange(Message, frozen=True, kw_only=True):
    """One step of gossip: fresh news pushed, and a stretch of the view compared.

    Attributes:
        digests: what the sender knows of some nodes: all those in `span`, and some with fresh news.
        entries: announcements that the receiver may lack.
        wanted: nodes whose announcement the sender asks for.
        verdicts: fresh suspicions and deaths.
        revocations: opaque to the core; the edge verifies them, and tells the core by RevocationLearned.
        reply: whether an Exchange is asked for in return. It is the proof of life that a step waits for.
        fingerprint: sums up the sender's members: equal views have equal ones. 0: not said.
        span: (after, until): `digests` holds all that the sender knows with `after < node <= until`, around the ring of
            ids in order; equal ends mean all of it. Whatever the receiver knows there beyond that, the sender lacks.
    """

    digests: tuple[Digest, ...] = ()
    entries: tuple[SignedAnnouncement, ...] = ()
    wanted: tuple[NodeId, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    revocations: tuple[bytes, ...] = ()
    reply: bool = False
    fingerprint: int = 0
    span: tuple[NodeId, NodeId] | None = None


MeshMessage: TypeAlias = Ping | Ack | PingRequest | Exchange
