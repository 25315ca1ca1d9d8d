"""Everything that can happen to a node. A closed union: `node.handle(event, now)` is its only reader."""

from typing import TypeAlias

import msgspec

from mesh_llm.core.routing.ranking import RoutingSnapshot
from mesh_llm.core.types.announcement import Publicity
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import ModelName, NodeId, Term
from mesh_llm.core.types.model import Capacity, LaunchOptions, ModelFacts, Speed


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all events; the tag is the class name, so that a journal can be read back."""


class Started(Event, frozen=True, kw_only=True):
    """The machine was measured, the library read: the node may begin. `drafts`: see ModelsChanged."""

    capacity: Capacity
    on_disk: tuple[ModelFacts, ...] = ()
    drafts: dict[str, str] = {}
    addresses: tuple[str, ...] = ()
    relay: str = ""


class ModelsChanged(Event, frozen=True, kw_only=True):
    """The library on disk changed. `drafts`: for some of the models, by name, the one that can guess ahead for it."""

    on_disk: tuple[ModelFacts, ...]
    drafts: dict[str, str] = {}


class AddressesChanged(Event, frozen=True, kw_only=True):
    """The endpoint can be reached elsewhere now."""

    addresses: tuple[str, ...]
    relay: str = ""


class EngineReady(Event, frozen=True, kw_only=True):
    """An engine answers /health. `address` is `host:port` on loopback; context is per slot, as the engine says it."""

    model: ModelName
    term: Term
    address: str
    context: int
    slots: int
    embeddings: bool = True


class EngineExited(Event, frozen=True, kw_only=True):
    """An engine ended, asked to or not; `reason` holds its last lines. `never_ready`: it died while loading."""

    model: ModelName
    term: Term
    code: int
    reason: str = ""
    never_ready: bool = False


class SpeedMeasured(Event, frozen=True, kw_only=True):
    """How fast this machine reads weights is known now."""

    speed: Speed


class FetchEnded(Event, frozen=True, kw_only=True):
    """A fetch that the node asked for ended; `problem`, a sentence: it failed."""

    model: ModelName
    problem: str = ""


class LoadRequested(Event, frozen=True, kw_only=True):
    """A user asks this node to serve a model."""

    model: ModelName
    options: LaunchOptions | None = None


class DropRequested(Event, frozen=True, kw_only=True):
    """A user asks this node to stop serving a model."""

    model: ModelName
    drain_seconds: float = 30.0


class StopRequested(Event, frozen=True, kw_only=True):
    """The daemon is to end; engines drain first."""

    drain_seconds: float = 0.0


class TrafficSampled(Event, frozen=True, kw_only=True):
    """What the front door saw since the last sample.

    Attributes:
        in_flight: requests now at this node's own engines, per model, whoever asked.
        wanted: requests that clients of this node made since the last sample, per model.
        tokens_per_second: measured speed of this node's own engines, per model.
        served: requests that this node's own engines finished since the last sample, per model, whoever asked.
        open: requests that this node's front door is answering now, whoever asked and whoever gives the answer.
    """

    in_flight: dict[str, int] = {}
    wanted: dict[str, int] = {}
    tokens_per_second: dict[str, float] = {}
    served: dict[str, int] = {}
    open: int = 0


class OwnerSensed(Event, frozen=True, kw_only=True):
    """What the machine's owner does, as far as the node was told to look for it (`--yield`).

    Attributes:
        busy: part of the processors that other programs use, 0.0 to 1.0.
        on_battery: the machine runs on its battery.
        fullscreen: a program fills the screen.
        minute: of the local day, from midnight.
    """

    busy: float = 0.0
    on_battery: bool = False
    fullscreen: bool = False
    minute: int = 0


class TargetFailed(Event, frozen=True, kw_only=True):
    """A request ran into a target that does not answer. `term`: the launch that was meant; 0: whichever is known."""

    node: NodeId
    model: ModelName
    reason: str
    term: int = 0


class PeerConnected(Event, frozen=True, kw_only=True):
    """An admitted connection to a peer stands."""

    node: NodeId
    rtt_ms: float = 0.0
    relayed: bool = False


class PeerLost(Event, frozen=True, kw_only=True):
    """The connection to a peer ended. `clean`: it said goodbye."""

    node: NodeId
    reason: str = ""
    clean: bool = False


class PathChanged(Event, frozen=True, kw_only=True):
    """The path to a peer is another one now, or its round trip changed markedly."""

    node: NodeId
    rtt_ms: float
    relayed: bool = False


class MessageReceived(Event, frozen=True, kw_only=True):
    """A verified message of an admitted peer."""

    peer: NodeId
    message: MeshMessage


class SendFailed(Event, frozen=True, kw_only=True):
    """A message could not be handed to a peer: no connection and none could be made."""

    peer: NodeId
    reason: str = ""


class RejoinFailed(Event, frozen=True, kw_only=True):
    """None of the tokens and last-known peers answered."""

    reason: str = ""


class AdmissionEnded(Event, frozen=True, kw_only=True):
    """The certificates of these nodes have run out, and no newer ones are known: they are no members any more."""

    nodes: tuple[NodeId, ...]


class Readmitted(Event, frozen=True, kw_only=True):
    """A node that a RevocationLearned named was admitted again, by something that is not revoked."""

    node: NodeId


class UserWarned(Event, frozen=True, kw_only=True):
    """The network's edge saw something that the user must know: it becomes a Notice.

    Attributes:
        code: stable name of the message.
        text: what happened, and what to do.
        about: node that it is about, if any.
        serious: something does not work until the user acts.
    """

    code: str
    text: str
    about: str = ""
    serious: bool = False


class RevocationLearned(Event, frozen=True, kw_only=True):
    """A revocation was verified (or made here): it is to spread.

    Attributes:
        revocation: as it travels.
        nodes: lost their admission by it.
        final: it is signed with the mesh's own key.
        replaces: those that made room for it, and are not kept any more.
    """

    revocation: bytes
    nodes: tuple[NodeId, ...] = ()
    final: bool = False
    replaces: tuple[bytes, ...] = ()


class RoutesLearned(Event, frozen=True, kw_only=True):
    """A passive node fetched the routing table of `source`: targets there are as `source` sees them."""

    source: NodeId
    snapshot: RoutingSnapshot


class SplitScope(Event, frozen=True, kw_only=True):
    """Whether this node's own admission lets it share models with others (scope `split`)."""

    granted: bool


class SplitFailed(Event, frozen=True, kw_only=True):
    """The tunnel to a worker of the split model that this node hosts could not be opened, or broke."""

    node: NodeId
    model: ModelName
    reason: str = ""


class PublishRequested(Event, frozen=True, kw_only=True):
    """The user asks that the mesh be listed for others to find; None: no longer by this node."""

    publicity: Publicity | None


class ListingOutcome(Event, frozen=True, kw_only=True):
    """How many relays took the listing last published; `problem`: why one did not."""

    accepted: int
    problem: str = ""


class ClientsCounted(Event, frozen=True, kw_only=True):
    """How many passive nodes follow this one."""

    count: int


class Tick(Event, frozen=True, kw_only=True):
    """The node's deadline has come."""


AnyEvent: TypeAlias = (
    Started
    | ModelsChanged
    | AddressesChanged
    | EngineReady
    | EngineExited
    | FetchEnded
    | SpeedMeasured
    | LoadRequested
    | DropRequested
    | StopRequested
    | TrafficSampled
    | OwnerSensed
    | TargetFailed
    | PeerConnected
    | PeerLost
    | PathChanged
    | MessageReceived
    | SendFailed
    | RejoinFailed
    | RevocationLearned
    | AdmissionEnded
    | Readmitted
    | UserWarned
    | RoutesLearned
    | SplitScope
    | SplitFailed
    | PublishRequested
    | ListingOutcome
    | ClientsCounted
    | Tick
)
