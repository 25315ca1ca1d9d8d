"""Everything that a node can ask of the world. A closed union: the daemon's driver carries each out."""

from enum import StrEnum
from typing import TypeAlias

import msgspec

from mesh_llm.core.listing.content import Listing
from mesh_llm.core.routing.ranking import RoutingSnapshot
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import ModelName, NodeId, Term
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, Lending, ModelFacts


class Effect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all effects."""


class StartEngine(Effect, frozen=True, kw_only=True):
    """Launch a model; its end, or its being ready, comes back as an event with the same term."""

    plan: LaunchPlan
    options: LaunchOptions
    term: Term


class StopEngine(Effect, frozen=True, kw_only=True):
    """Stop a launch: let requests finish for `drain_seconds`, then end it. EngineExited follows."""

    model: ModelName
    term: Term
    drain_seconds: float = 0.0


class FetchModel(Effect, frozen=True, kw_only=True):
    """Fetch a model from nodes that have it, or from its source. FetchEnded follows, ModelsChanged before it.

    Attributes:
        model: served name.
        source: where it came from (`hf:owner/repo:file@revision`); empty where nobody knows.
        fingerprint: of the very file that others have; empty where only the source is known.
    """

    model: ModelName
    source: str
    fingerprint: str = ""


class Lend(Effect, frozen=True, kw_only=True):
    """Compute a part of a split model for this host from now on, and for nobody else; None: for nobody.

    `facts`: of the model, whose file need not be here; None where nothing is lent, or nobody tells of it any more.
    """

    lending: Lending | None
    facts: ModelFacts | None = None


class SetRoutes(Effect, frozen=True, kw_only=True):
    """Replace the routing snapshot."""

    snapshot: RoutingSnapshot


class SendMessage(Effect, frozen=True, kw_only=True):
    """Hand a message to a peer, dialling it at `addresses` if there is no connection. Lost silently or SendFailed."""

    peer: NodeId
    message: MeshMessage
    addresses: tuple[str, ...] = ()
    relay: str = ""


class Disconnect(Effect, frozen=True, kw_only=True):
    """Close the connection to a peer (dead, left, revoked)."""

    peer: NodeId
    reason: str


class KnownPeer(msgspec.Struct, frozen=True, kw_only=True):
    """Where a peer was last reached."""

    node: NodeId
    addresses: tuple[str, ...] = ()
    relay: str = ""


class Rejoin(Effect, frozen=True, kw_only=True):
    """Try the tokens and these last-known peers once. PeerConnected or RejoinFailed follows."""

    peers: tuple[KnownPeer, ...] = ()


class Publish(Effect, frozen=True, kw_only=True):
    """List the mesh for others to find, as this says; None: delete the listing. ListingOutcome follows."""

    listing: Listing | None


class NoticeLevel(StrEnum):
    """How much a notice matters to a user."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Notice(Effect, frozen=True, kw_only=True):
    """Something that a user should know: logged, shown at start, kept for the console's events.

    Attributes:
        code: stable name, as in `model_assigned`, `peer_joined`, `model_failed`.
        text: one sentence for people, saying why.
        about: node id or model name, where one thing is meant.
    """

    level: NoticeLevel
    code: str
    text: str
    about: str = ""


class Finished(Effect, frozen=True, kw_only=True):
    """Everything has stopped: the daemon may exit."""


AnyEffect: TypeAlias = (
    StartEngine
    | StopEngine
    | FetchModel
    | Lend
    | SetRoutes
    | SendMessage
    | Disconnect
    | Rejoin
    | Publish
    | Notice
    | Finished
)
