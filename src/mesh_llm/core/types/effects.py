"""All effects that a node asks for, as a closed union. The daemon's driver carries each out."""

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
    """Launch a model. EngineReady or EngineExited follows, with the same term."""

    plan: LaunchPlan
    options: LaunchOptions
    term: Term


class StopEngine(Effect, frozen=True, kw_only=True):
    """Stop a launch after its requests had `drain_seconds` to finish. EngineExited follows."""

    model: ModelName
    term: Term
    drain_seconds: float = 0.0


class FetchModel(Effect, frozen=True, kw_only=True):
    """Fetch a model from nodes that have it, or from its source. ModelsChanged follows, then FetchEnded.

    Attributes:
        model: served name.
        source: where it comes from (`hf:owner/repo:file@revision`); empty: unknown.
        fingerprint: of the file that others have; empty where only the source is known.
    """

    model: ModelName
    source: str
    fingerprint: str = ""


class AskForLoad(Effect, frozen=True, kw_only=True):
    """Ask another node to load a model for requests that wait here, and go on asking until `EndAsk`.

    LoadAnswered follows. `for_clients`: the requests are those of passive clients only.
    """

    node: NodeId
    model: ModelName
    for_clients: bool = False


class EndAsk(Effect, frozen=True, kw_only=True):
    """No request here waits for that model of that node any more."""

    node: NodeId
    model: ModelName


class Lend(Effect, frozen=True, kw_only=True):
    """Compute a part of a split model for one host from now on; None: for no host.

    `facts`: of the model, even if its file is not here; None where nothing is lent, or no member announces it any more.
    """

    lending: Lending | None
    facts: ModelFacts | None = None


class SetRoutes(Effect, frozen=True, kw_only=True):
    """Replace the routing snapshot."""

    snapshot: RoutingSnapshot


class SendMessage(Effect, frozen=True, kw_only=True):
    """Send a message to a peer; dial `addresses` if there is no connection. SendFailed may follow."""

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
    """Try the invites and these last-known peers once. PeerConnected or RejoinFailed follows."""

    peers: tuple[KnownPeer, ...] = ()


class Publish(Effect, frozen=True, kw_only=True):
    """Publish this listing of the mesh; None: delete it. ListingOutcome follows."""

    listing: Listing | None


class NoticeLevel(StrEnum):
    """How much a notice matters to a user."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Notice(Effect, frozen=True, kw_only=True):
    """Something that a user should know. It is logged, shown at start and kept for the console.

    Attributes:
        code: stable name, as in `model_assigned`, `peer_joined`, `model_failed`.
        text: one sentence for people that says why.
        about: the node id or model name that it is about, if any.
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
    | AskForLoad
    | EndAsk
    | Lend
    | SetRoutes
    | SendMessage
    | Disconnect
    | Rejoin
    | Publish
    | Notice
    | Finished
)
