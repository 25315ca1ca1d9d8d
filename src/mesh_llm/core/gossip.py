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
    """What is known of one node: newest (incarnation, sequence), and a state letter (`a`live, `s`uspect, `d`ead)."""

    node: NodeId
    incarnation: Incarnation
    sequence: int
    state: str = "a"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A suspicion or death: about an incarnation of a node, never about the node for ever. `by`: who says it."""

    node: NodeId
    incarnation: Incarnation
    state: str
    by: NodeId


class Exchange(Message, frozen=True, kw_only=True):
    """One step of anti-entropy: some digests, entries the other lacked, verdicts; `reply` asks for the same back."""

    digests: tuple[Digest, ...] = ()
    entries: tuple[SignedAnnouncement, ...] = ()
    wanted: tuple[NodeId, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    revocations: tuple[bytes, ...] = ()
    reply: bool = False


MeshMessage: TypeAlias = Ping | Ack | PingRequest | Exchange
