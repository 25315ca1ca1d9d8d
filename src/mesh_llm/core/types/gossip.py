"""Messages between the nodes of a mesh, as values. `wire/mesh/gossip.py` writes them as bytes.

Ping, Ack and PingRequest are those of SWIM (Das, Gupta, Motivala: "SWIM: Scalable Weakly-consistent Infection-style
Process Group Membership Protocol", 2002). An Exchange is one step of push-pull gossip.
"""

from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.types.announcement import SignedAnnouncement
from mesh_llm.core.types.ids import Incarnation, NodeId

MAX_DIGESTS = 192
MAX_ENTRIES = 48
MAX_ASKED = 64
MAX_VERDICTS = 64
MAX_REVOCATIONS = 4
"""Items of one Exchange."""

MAX_REVOCATION = 4096
"""Bytes of one revocation. Most of them are the certificate of its target, which has at most 2,048."""

MOST_REVOCATIONS = 4096
"""Revocations that a node keeps and passes on."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages between nodes."""


class Ping(Message, frozen=True, kw_only=True):
    """Asks whether the receiver is there. It answers with an Ack of the same nonce."""

    nonce: int


class Ack(Message, frozen=True, kw_only=True):
    """The sender is there; or, in answer to a PingRequest, `about` is."""

    nonce: int
    about: NodeId | None = None


class PingRequest(Message, frozen=True, kw_only=True):
    """Asks the receiver to ping `target`, and to send an Ack with this nonce if it answers (SWIM's indirect probe)."""

    nonce: int
    target: NodeId


class Digest(msgspec.Struct, frozen=True, array_like=True):
    """What the sender knows of one node: its newest (incarnation, sequence) and its state.

    `state`: `a` alive, and the sender has proof of it; `u` unproven, known by hearsay only or doubted; `s` suspect;
    `d` dead.
    """

    node: NodeId
    incarnation: Incarnation
    sequence: int
    state: Annotated[str, msgspec.Meta(pattern="^[ausd]$")] = "a"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A suspicion (`s`) or death (`d`) of one incarnation of a node, reported by `by`."""

    node: NodeId
    incarnation: Incarnation
    state: Annotated[str, msgspec.Meta(pattern="^[sd]$")]
    by: NodeId


class Exchange(Message, frozen=True, kw_only=True):
    """One step of push-pull gossip: pushes news and compares a span of the view.

    Attributes:
        digests: what the sender knows of all nodes in `span`, and of some with news.
        entries: announcements that the receiver may lack.
        wanted: nodes whose announcement the sender asks for.
        verdicts: recent suspicions and deaths.
        revocations: opaque to the core; the edge verifies them and reports them as RevocationLearned.
        reply: the sender asks for an Exchange in return. That answer is the proof of life that it waits for.
        fingerprint: over the sender's members: equal views have equal fingerprints. 0: not given.
        ceilings: revocations that only narrow a node's scope. The edge moves them here, because versions before them
            expel whoever sends one among the others.
        span: (after, until): `digests` holds all that the sender knows with `after < node <= until`, around the ring of
            ids in order; equal ends mean the whole ring. The sender lacks whatever the receiver knows there besides.
    """

    digests: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=MAX_DIGESTS)] = ()
    entries: Annotated[tuple[SignedAnnouncement, ...], msgspec.Meta(max_length=MAX_ENTRIES)] = ()
    wanted: Annotated[tuple[NodeId, ...], msgspec.Meta(max_length=MAX_ASKED)] = ()
    verdicts: Annotated[tuple[Verdict, ...], msgspec.Meta(max_length=MAX_VERDICTS)] = ()
    revocations: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_REVOCATION)], ...],
        msgspec.Meta(max_length=MAX_REVOCATIONS),
    ] = ()
    reply: bool = False
    fingerprint: int = 0
    span: tuple[NodeId, NodeId] | None = None
    ceilings: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_REVOCATION)], ...],
        msgspec.Meta(max_length=MAX_REVOCATIONS),
    ] = ()


MeshMessage: TypeAlias = Ping | Ack | PingRequest | Exchange
