"""All events of a node, as a closed union. `Node.handle` is its only reader."""

from typing import TypeAlias

import msgspec

from mesh_llm.core.routing.ranking import RoutingSnapshot
from mesh_llm.core.trust.corrections import TimedAnswer
from mesh_llm.core.types.announcement import ListingPolicy, Ownership, Serving, Standing
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId, Term
from mesh_llm.core.types.model import Capacity, LaunchOptions, ModelFacts, Speed
from mesh_llm.core.types.model_settings import ModelSettings


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all events; the tag is the class name, so that a journal can be read back."""


class Started(Event, frozen=True, kw_only=True):
    """The machine is measured and the library read: the node begins. `drafts`: as in ModelsChanged."""

    capacity: Capacity
    on_disk: tuple[ModelFacts, ...] = ()
    drafts: dict[str, str] = {}
    addresses: tuple[str, ...] = ()
    relay: str = ""


class ModelsChanged(Event, frozen=True, kw_only=True):
    """The library on disk changed. `drafts`: for some of the models, by name, their draft model."""

    on_disk: tuple[ModelFacts, ...]
    drafts: dict[str, str] = {}


class AddressesChanged(Event, frozen=True, kw_only=True):
    """The addresses of the endpoint changed."""

    addresses: tuple[str, ...]
    relay: str = ""


class EngineReady(Event, frozen=True, kw_only=True):
    """An engine answers /health. `address`: `host:port` on loopback. `context`: tokens per slot, as it reports."""

    model: ModelName
    term: Term
    address: str
    context: int
    slots: int
    embeddings: bool = True


class EngineExited(Event, frozen=True, kw_only=True):
    """An engine ended, asked to or not. `reason`: its last lines. `never_ready`: it died while loading.

    `out_of_memory`: a device did not give it the memory that it asked for.
    """

    model: ModelName
    term: Term
    code: int
    reason: str = ""
    never_ready: bool = False
    out_of_memory: bool = False


class SpeedMeasured(Event, frozen=True, kw_only=True):
    """This machine's speed was measured. `host_speed`: of its processor, where models are computed on a GPU, too."""

    speed: Speed
    host_speed: Speed = Speed()


class CapacityChanged(Event, frozen=True, kw_only=True):
    """The engine uses other devices from now on: a plugin was built, or a GPU went away or came back.

    `capacity`: as measured; its speed and RPC are reported separately. `reason`: why engines start again, a clause.
    """

    capacity: Capacity
    reason: str


class FetchEnded(Event, frozen=True, kw_only=True):
    """A fetch that the node asked for ended. `problem`: a sentence, if it failed."""

    model: ModelName
    problem: str = ""


class LoadRequested(Event, frozen=True, kw_only=True):
    """A user asks this node to serve a model."""

    model: ModelName
    options: LaunchOptions | None = None


class ModelUnavailable(Event, frozen=True, kw_only=True):
    """A model that the user gave by `--model` cannot be had at present.

    Attributes:
        model: as the user named it.
        reason: why, and what to do; empty: it is no longer so.
    """

    model: ModelName
    reason: str = ""


class DropRequested(Event, frozen=True, kw_only=True):
    """A user asks this node to stop serving a model. `rest`: only until somebody asks for it."""

    model: ModelName
    drain_seconds: float = 30.0
    rest: bool = False


class ModelAwaited(Event, frozen=True, kw_only=True):
    """Requests wait here for a model that does not answer yet, or their number changed.

    Attributes:
        model: its name.
        asker: this node, for requests of its own clients; else the node whose requests wait.
        count: requests that wait for that asker; 0: none any more.
        here: the asker wants it loaded on this node, and on no other.
        standing: who asks.
        circle: owners whose nodes may see every prompt that waits; None: for some of them, all may.
    """

    model: ModelName
    asker: NodeId
    count: int
    here: bool = False
    standing: Standing = "own"
    circle: tuple[OwnerId, ...] | None = None


class LoadAnswered(Event, frozen=True, kw_only=True):
    """A node that was asked to load a model has loaded it, or will not.

    Attributes:
        node: the node that was asked.
        model: the model.
        problem: why it will not, as a sentence; empty: the model is warm there.
        retry_after: seconds after which it may be asked again; 0.0: it did not say.
        serving: how it serves the model, where it does.
    """

    node: NodeId
    model: ModelName
    problem: str = ""
    retry_after: float = 0.0
    serving: Serving | None = None


class StopRequested(Event, frozen=True, kw_only=True):
    """The daemon stops; engines drain first."""

    drain_seconds: float = 0.0


class TrafficSampled(Event, frozen=True, kw_only=True):
    """Requests since the last sample.

    Attributes:
        in_flight: requests now at this node's own engines, per model, from everybody.
        wanted: requests that clients of this node made since the last sample, per model.
        tokens_per_second: measured speed of this node's own engines, per model.
        served: requests that this node's own engines finished since the last sample, per model, from everybody.
        open: requests that this node's API is answering now, from everybody, wherever the model runs.
    """

    in_flight: dict[str, int] = {}
    wanted: dict[str, int] = {}
    tokens_per_second: dict[str, float] = {}
    served: dict[str, int] = {}
    open: int = 0


class OwnerSensed(Event, frozen=True, kw_only=True):
    """What the machine's owner does, as far as `--yield` asks for it.

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
    """A target did not answer a request. `term`: the launch that was meant; 0: the one that is known."""

    node: NodeId
    model: ModelName
    reason: str
    term: int = 0


class ContextRefused(Event, frozen=True, kw_only=True):
    """A host refused a prompt of about `tokens` tokens, or broke an answer off there, although it announces more."""

    node: NodeId
    model: ModelName
    term: int
    tokens: int


class PromptTaken(Event, frozen=True, kw_only=True):
    """A host answered a prompt of `tokens` tokens, which is more than its context is known to be here."""

    node: NodeId
    model: ModelName
    term: int
    tokens: int


class CorrectionsForgotten(Event, frozen=True, kw_only=True):
    """The user wants what a host announces to be believed again. `model` None: of all its models."""

    node: NodeId
    model: ModelName | None = None


class AnswersTimed(Event, frozen=True, kw_only=True):
    """How fast answers of other nodes came."""

    answers: tuple[TimedAnswer, ...]


class PeerConnected(Event, frozen=True, kw_only=True):
    """A connection to a peer is admitted."""

    node: NodeId
    rtt_ms: float = 0.0
    relayed: bool = False


class PeerLost(Event, frozen=True, kw_only=True):
    """The connection to a peer ended. `clean`: it said goodbye."""

    node: NodeId
    reason: str = ""
    clean: bool = False


class PathChanged(Event, frozen=True, kw_only=True):
    """The path to a peer changed, or its round trip changed markedly."""

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
    """The certificates of these nodes have expired, and no newer ones are known: they are not members any more."""

    nodes: tuple[NodeId, ...]


class Readmitted(Event, frozen=True, kw_only=True):
    """A node named by a RevocationLearned was admitted again, by an invite that is not revoked."""

    node: NodeId


class UserWarned(Event, frozen=True, kw_only=True):
    """The network edge found something that the user must know. It becomes a Notice.

    Attributes:
        code: stable name of the message.
        text: what happened, and what to do.
        about: the node that it is about, if any.
        serious: something does not work until the user acts.
    """

    code: str
    text: str
    about: str = ""
    serious: bool = False


class RevocationLearned(Event, frozen=True, kw_only=True):
    """A revocation was verified, or made here: pass it on.

    Attributes:
        revocation: as it travels.
        nodes: nodes that lost their admission by it.
        final: it is signed with the mesh's own key.
        replaces: revocations that made room for it and are not kept any more.
    """

    revocation: bytes
    nodes: tuple[NodeId, ...] = ()
    final: bool = False
    replaces: tuple[bytes, ...] = ()


class ScopeLimited(Event, frozen=True, kw_only=True):
    """A member announces that it takes part in split models, and its certificate does not permit it.

    `scope`: what is permitted, in a word; empty: what it announces counts again.
    """

    node: NodeId
    scope: str


class HostsDistrusted(Event, frozen=True, kw_only=True):
    """Canaries have shown that these hosts answer with other models than they announce: all that are known now."""

    hosts: tuple[tuple[ModelName, NodeId], ...]


class StandingsKnown(Event, frozen=True, kw_only=True):
    """The nodes that are no strangers, by their admissions and their owners.

    After the first such event all others count as strangers, which came by a public listing, until a later one.
    """

    members: frozenset[NodeId]


class RoutesLearned(Event, frozen=True, kw_only=True):
    """A passive node fetched the routing table of `source`. Its targets are as `source` sees them."""

    source: NodeId
    snapshot: RoutingSnapshot


class SettingsChanged(Event, frozen=True, kw_only=True):
    """The user changed what launches are made with. What runs with other options starts again, between two requests.

    Attributes:
        options: for every model.
        models: settings of single models, by name.
    """

    options: LaunchOptions
    models: dict[str, ModelSettings]


class OwnershipChanged(Event, frozen=True, kw_only=True):
    """The owner of this node, as the owner signed it; None: nobody owns it any more."""

    ownership: Ownership | None


class SplitScope(Event, frozen=True, kw_only=True):
    """Whether this node's admission lets it take part in split models. `scope`: what it is for, in a word."""

    granted: bool
    scope: str = ""


class RpcChanged(Event, frozen=True, kw_only=True):
    """Whether this node's engine can share models has changed, or is known in more detail.

    Attributes:
        rpc_version: of the engine; empty where it cannot share.
        obstacle: why not, as in SplitOffer: `plugin`, `building` or `unconfined`; empty where it can.
        detail: more about it, for people.
    """

    rpc_version: str
    obstacle: str = ""
    detail: str = ""


class SplitFailed(Event, frozen=True, kw_only=True):
    """The tunnel to a worker of the split model hosted here could not be opened, or broke.

    `memory_bytes`: the worker did not give its part, so large, of the memory that it offers; 0: it was something else.
    """

    node: NodeId
    model: ModelName
    reason: str = ""
    memory_bytes: int = 0


class PartRefused(Event, frozen=True, kw_only=True):
    """A device of this node did not give its part of a split model, as planned with `memory_bytes`, enough memory."""

    model: ModelName
    memory_bytes: int


class PublishRequested(Event, frozen=True, kw_only=True):
    """The user wants the mesh listed for others to find. None: no longer by this node."""

    publicity: ListingPolicy | None


class ListingOutcome(Event, frozen=True, kw_only=True):
    """How many relays accepted the last listing. `problem`: why one did not."""

    accepted: int
    problem: str = ""


class ClientsCounted(Event, frozen=True, kw_only=True):
    """How many passive nodes follow this one."""

    count: int


class Tick(Event, frozen=True, kw_only=True):
    """The node's deadline has come."""


AnyEvent: TypeAlias = (
    Started
    | AnswersTimed
    | ContextRefused
    | PromptTaken
    | CorrectionsForgotten
    | ModelsChanged
    | AddressesChanged
    | EngineReady
    | EngineExited
    | CapacityChanged
    | FetchEnded
    | SpeedMeasured
    | LoadRequested
    | ModelUnavailable
    | DropRequested
    | ModelAwaited
    | LoadAnswered
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
    | ScopeLimited
    | UserWarned
    | HostsDistrusted
    | StandingsKnown
    | RoutesLearned
    | SettingsChanged
    | OwnershipChanged
    | SplitScope
    | RpcChanged
    | SplitFailed
    | PartRefused
    | PublishRequested
    | ListingOutcome
    | ClientsCounted
    | Tick
)
