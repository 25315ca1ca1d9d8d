"""What the management API takes and answers; `Status` is also `mesh-llm status --json`.

Programs read these fields, and the OpenAPI description is made of them. Sizes are bytes, times are UNIX seconds and
durations are seconds, unless a name says otherwise.
"""

from typing import Annotated, Any, Literal

import msgspec

from mesh_llm import __version__
from mesh_llm.api.types import Decision, StatusRequests
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.engine.spec import EnginePart
from mesh_llm.models.hub.catalog import CatalogRow
from mesh_llm.net.admission.records import InviteRecord, WaitingNode


class StatusModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the mesh as seen from here. `status`: warm, loading, cold, stopping or failed. Sizes in bytes.

    `hosts` are names and may be alike; `host_ids` are the same nodes in the same order. `vision`: it takes images.
    `predicted_tps` (before the first answer) and `measured_tps`: tokens per second of one request, if this node serves
    all of the model; else null. `predicted_prompt_tps` and `measured_prompt_tps`: the same of a prompt; the prediction
    is for one of 2,048 tokens. `retry_at`: UNIX seconds of the next attempt if it failed here; else null.
    `left_out`: of a model that this node splits over all nodes (`--split`), sentences on those that compute nothing.
    If this node serves all of the model: `cache_type` of its KV cache; `offload`: what its GPU computes and what its
    processor, in words, where it needs both; `device_bytes` and `host_bytes`: what it takes of its devices, and of main
    memory beside a GPU.
    `waiting`: requests that wait here for it to be loaded; `awaited`: what becomes of them, in words. `pinned`: this
    node never unloads it; `speculation`: how its engine here guesses tokens ahead, and what that gains, in words;
    `unload_at`: UNIX seconds at which it unloads it if no request comes; else null.
    """

    name: str
    status: str
    hosts: tuple[str, ...] = ()
    host_ids: tuple[str, ...] = ()
    nodes: int = 0
    context: int = 0
    slots: int = 0
    size_bytes: int = 0
    reason: str = ""
    here: bool = False
    vision: bool = False
    left_out: tuple[str, ...] = ()
    predicted_tps: float | None = None
    measured_tps: float | None = None
    predicted_prompt_tps: float | None = None
    measured_prompt_tps: float | None = None
    retry_at: float | None = None
    cache_type: str = ""
    offload: str = ""
    device_bytes: int = 0
    host_bytes: int = 0
    waiting: int = 0
    awaited: str = ""
    pinned: bool = False
    unload_at: float | None = None
    speculation: str = ""


class StatusPeer(msgspec.Struct, frozen=True, kw_only=True):
    """Another node. `state`: alive, suspect. `path`: direct, relay or none (no connection at present).

    `transport`: what carries requests and split models to it: tcp, quic or relay; empty without a connection.
    `transport_reason`: why that is not tcp; empty where it is, or nothing was tried. `scope`: what it may do in the
    mesh: client, serve or split; empty where that is unknown.
    """

    node_id: str
    name: str
    role: str
    state: str
    serving: tuple[str, ...] = ()
    memory_bytes: int = 0
    rtt_ms: float = 0.0
    path: str = "none"
    version: str = ""
    devices: tuple[str, ...] = ()
    engine: str = ""
    memory_total_bytes: int = 0
    scope: str = ""
    transport: str = ""
    transport_reason: str = ""


class StatusSplitWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker of a split model. `ratio`: its part of the layers. What only the host knows is 0 or null on other nodes.

    `direct_push`: whether it reaches all other workers itself; null where it was not tried: what it computed then goes
    through the host. `relayed`: tensors that did so in this session. `loaded`: the part of its weights that is there,
    0.0 to 1.0; null elsewhere than on the host.
    """

    node_id: str
    name: str
    ratio: float
    layers: int
    memory_bytes: int
    rtt_ms: float = 0.0
    direct_push: bool | None = None
    relayed: int = 0
    weight_bytes_sent: int = 0
    weight_bytes_by_reference: int = 0
    loaded: float | None = None


class StatusSplit(msgspec.Struct, frozen=True, kw_only=True):
    """A split model. `host` is a node id; `ratio` and `layers` are the host's own part.

    `wire`: how activations travel from node to node, in words, as in `f32` or `f16 for prompts, f32 for tokens`; with
    the reason where that is not what was asked for. Empty elsewhere than on the host.
    """

    model: str
    host: str
    term: int
    ratio: float
    layers: int
    workers: tuple[StatusSplitWorker, ...]
    round_trips_per_token: float | None = None
    predicted_tps: float | None = None
    measured_tps: float | None = None
    predicted_prompt_tps: float | None = None
    measured_prompt_tps: float | None = None
    wire: str = ""


class StatusWaitingNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node that could share a waiting model. `takes_part` False: `reason` says why not, and what to type.

    `memory_bytes`: what it offers. `obstacle`: the reason for programs, as in `scope`, `plugin`, `far`; empty where it
    takes part.
    """

    node_id: str
    name: str
    memory_bytes: int
    takes_part: bool
    obstacle: str = ""
    reason: str = ""


class StatusWaiting(msgspec.Struct, frozen=True, kw_only=True):
    """A model that fits no node alone, and waits for other nodes' memory. `reason` is all of it in words.

    `need_bytes`: on the nodes that take part; `alone_bytes`: on one node; `have_bytes`: what those offer together.
    """

    model: str
    reason: str
    need_bytes: int
    alone_bytes: int
    have_bytes: int
    nodes: tuple[StatusWaitingNode, ...]


class StatusListing(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh's public listing as this node sees it.

    `state`: off (this node does not publish), starting, listed, resting (`publisher`, a node id, does it), full (there
    is no room for clients), failing (`problem` says why). `clients`: passive nodes of the whole mesh;
    `max_clients` 0: no cap.
    """

    state: str = "off"
    publisher: str = ""
    region: str = ""
    scope: str = ""
    max_clients: int = 0
    clients: int = 0
    problem: str = ""


class StatusProblem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that does not work at present: a service that failed and is restarted, or a file.

    `what` names it; `text` says what is wrong; `since_s`: for how many seconds; `times`: failures in a row.
    """

    what: str
    text: str
    since_s: float = 0.0
    times: int = 1


class StatusPromptCaches(msgspec.Struct, frozen=True, kw_only=True):
    """The saved prompt caches of this node: how many, the bytes of their files, and the most that there may be.

    Since the start: how many `moved_in` from other nodes and `moved_out` to them, and the bytes that both moved; how
    many were `refused` because what came was not as it must be.
    """

    count: int = 0
    bytes: int = 0
    limit: int = 0
    moved_in: int = 0
    moved_out: int = 0
    moved_bytes: int = 0
    refused: int = 0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One node's whole state. `token` is an invite for this mesh; `split` is null while nothing is split.

    `health`: ready, loading, waiting (nothing loads, and no model is ready), failed or stopping.
    `scope`: what this node may do in the mesh (client, serve or split; empty before its first admission);
    `token_scope`: what the invite lets its holder do.
    `clients`: passive nodes that are connected to this one; they are in nobody's list of peers.
    `fingerprint` is this node's key as people compare it; `approvals` are requests to join that wait for an answer.
    `waiting`: models that wait for other nodes' memory, wanted here or elsewhere.
    `lending`: how an RPC server is confined that lends memory to split models, as in `seccomp and Landlock`, or why
    nothing is lent. `engine_parts`: what is built for the engine on this machine, and what became of it.
    `host_bytes`: main memory that is offered beside a GPU's.
    `prompt_caches`: null where none are saved: they are off, or this node runs no engine.
    `ollama_base`: the address of the second port for clients of Ollama; empty where there is none (`--ollama-port`).
    `needs_key`: whether requests to the API must carry a key.
    """

    version: str
    node_id: str
    mesh_id: str
    mesh_name: str
    name: str
    role: str
    ready: bool
    health: str
    api_port: int
    api_base: str
    token: str
    uptime_s: float
    pid: int
    home: str
    memory_bytes: int
    memory_total_bytes: int
    devices: tuple[str, ...]
    engine: str
    models: tuple[StatusModel, ...]
    peers: tuple[StatusPeer, ...]
    clients: int = 0
    split: StatusSplit | None = None
    listing: StatusListing = StatusListing()
    requests: StatusRequests = StatusRequests()
    yield_reason: str = ""
    fingerprint: str = ""
    approvals: tuple[WaitingNode, ...] = ()
    problems: tuple[StatusProblem, ...] = ()
    lending: str = ""
    scope: str = ""
    token_scope: str = ""
    engine_parts: tuple[EnginePart, ...] = ()
    host_bytes: int = 0
    waiting: tuple[StatusWaiting, ...] = ()
    prompt_caches: StatusPromptCaches | None = None
    ollama_base: str = ""
    needs_key: bool = False


class LogNames(msgspec.Struct, frozen=True, kw_only=True):
    """Names of the logs: the node's own (`daemon`), and one for each engine."""

    logs: tuple[str, ...]


class ModelAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a model has begun; `model` is its full name. The status shows the progress.

    `waiting`: what a model waits for that this node cannot serve alone at present; else empty.
    """

    model: str
    waiting: str = ""


class Stopping(msgspec.Struct, frozen=True, kw_only=True):
    """The node is ending."""

    stopping: bool = True


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error: its code for programs, what happened, and what to do next (may be empty)."""

    code: str
    message: str
    hint: str = ""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every error answer."""

    error: Problem


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Whether and where a model would run if it were loaded now.

    `where`: here, mesh (this node cannot, but the mesh's memory together or another node's can), no, or unknown (this
    node runs no engine and nobody told). `context` tokens for each of `slots` requests at once, where it is `here`.
    `text` says why not; empty where it is `here`.
    """

    where: str
    context: int = 0
    slots: int = 0
    need_bytes: int = 0
    have_bytes: int = 0
    text: str = ""


class DiskModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model on this node's disk. `kind`: chat, embedding or draft. `store`: another program that owns it, or empty.

    `status`: of the model in the mesh, as in the status; `here`: this node serves it or is about to.
    """

    name: str
    kind: str
    size_bytes: int
    context: int
    fit: Fit
    architecture: str = ""
    path: str = ""
    store: str = ""
    source: str = ""
    draft: str = ""
    builtin: bool = False
    vision: bool = False
    status: str = "cold"
    here: bool = False


class CatalogueModel(CatalogRow, frozen=True, kw_only=True):
    """A model of the catalogue. `parameters` in billions; `on_disk`: its name on this node's disk, empty if it is not.

    `capabilities`: of chat, code, reasoning, tools, vision. `draft`: catalogue name of a model that guesses ahead.
    """

    fit: Fit
    on_disk: str = ""


class UnusableFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file on this node's disk that looks like a model but cannot be used, and the reason."""

    name: str
    path: str
    reason: str
    incomplete: bool = False


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """The models that this node could serve. `mesh_memory_bytes`: of all nodes together, this one included."""

    memory_bytes: int
    mesh_memory_bytes: int
    disk: tuple[DiskModel, ...]
    catalogue: tuple[CatalogueModel, ...]
    unusable: tuple[UnusableFile, ...] = ()


class DownloadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A download, under way or ended.

    `phase`: asking (what and how big), waiting (another program fetches it), fetching, checking, done, failed or
    cancelled. `model`: as asked; `name`: what it will be served as, empty until known. `origin`: hub, or mesh where
    other nodes give it; `origin_name`: the same for people. `eta_s` null: not known. `load`: it is served afterwards; a
    `done` one with an `error` is on disk, and could not be served; with `waiting`, it is served once that is there.
    `path`: of its first file, once it is done.
    """

    id: str
    model: str
    phase: str
    started: float
    name: str = ""
    source: str = ""
    origin: str = "hub"
    origin_name: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_second: float = 0.0
    eta_s: float | None = None
    ended: float | None = None
    load: bool = False
    error: Problem | None = None
    path: str = ""
    waiting: str = ""


class Downloads(msgspec.Struct, frozen=True, kw_only=True):
    """Downloads of this run of the node, newest first; old ended ones are forgotten."""

    downloads: tuple[DownloadRecord, ...]


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes that wait for an answer, oldest first."""

    waiting: tuple[WaitingNode, ...]


class Approved(msgspec.Struct, frozen=True, kw_only=True):
    """A request to join was answered. `approved` False: it was denied. `scope`: what the node may do."""

    id: str
    approved: bool
    name: str = ""
    scope: str = ""


class MemberScope(msgspec.Struct, frozen=True, kw_only=True):
    """What a member may do from now on. The rest of the mesh learns it within seconds."""

    node_id: str
    name: str
    scope: str


class MemberRevoked(msgspec.Struct, frozen=True, kw_only=True):
    """A member is cut off, in the whole mesh. `others`: the names of those that went with it, since they came by it.

    `final`: the founder did it, and no invite admits the member again. Else it can come back by an invite that does
    not rest on this node.
    """

    node_id: str
    name: str
    others: tuple[str, ...] = ()
    final: bool = False


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """Whether this mesh is listed publicly, and where. `problem`: why it is wanted but not listed.

    `consent`: what becomes public, for the user to agree to before it is listed; empty: the user has agreed.
    """

    on: bool
    name: str = ""
    relays: tuple[str, ...] = ()
    listed: bool = False
    expires: float | None = None
    problem: str = ""
    consent: str = ""


class Decisions(msgspec.Struct, frozen=True, kw_only=True):
    """The API's last routing decisions, newest first."""

    decisions: tuple[Decision, ...]


class SessionKey(msgspec.Struct, frozen=True, kw_only=True):
    """The half of a new session that the page keeps. The other half is the cookie of this answer."""

    key: str


class SessionState(msgspec.Struct, frozen=True, kw_only=True):
    """The request was authenticated. `sessions`: how many are open."""

    sessions: int


class SignInLink(msgspec.Struct, frozen=True, kw_only=True):
    """Links that open the page signed in: on this machine, and by each `--console-origin`. One code, good once."""

    urls: tuple[str, ...]
    code: str
    expires_seconds: float


class SignedOut(msgspec.Struct, frozen=True, kw_only=True):
    """How many sessions were ended."""

    ended: int


class Invites(msgspec.Struct, frozen=True, kw_only=True):
    """The invites that this node issued, newest first, without their tokens."""

    invites: tuple[InviteRecord, ...]


class NoticeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A notice as it is kept. `id` rises by one; `at` is UNIX seconds; the rest is as in core.types.effects.Notice."""

    id: int
    at: float
    level: str
    code: str
    text: str
    about: str = ""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """All that this port says to a stranger: a node is here. Whether it is ready: `GET :9337/health`."""

    status: str = "ok"
    version: str = __version__


_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]


class LoadBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/load. `model`: a name, the beginning of one, or a file's path."""

    model: _Name


class ModelSettingsBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/model-settings. `settings`: what changes, by the keys of the file; null takes a setting away."""

    model: _Name
    settings: dict[str, Any]


class ModelSettingsShown(msgspec.Struct, frozen=True, kw_only=True):
    """What the user set for one model; what is not there is not set. `file`: where the page writes it."""

    model: str
    settings: ModelSettings
    file: str


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload of the configuration changed.

    `applied`: options, tables and models whose change is in effect; an engine that must start again for it does so
    between two requests. `restart`: options that take effect at the next start of the node. `text`: the same for
    people. `files`: those that were read.
    """

    applied: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    text: str = ""
    files: tuple[str, ...] = ()


class DropBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/drop. Running answers may finish for `drain_seconds`. `rest`: a request may load it again."""

    model: _Name
    drain_seconds: _Seconds = 30.0
    rest: bool = False


class StopBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/stop. Running answers may finish for `drain_seconds`."""

    drain_seconds: _Seconds = 0.0


class InviteBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/invites. Lifetime in seconds, a minute to a year; `uses` null: any number.

    `scope` null: `split`, or less if the node was told so (`--invite-scope`) or may itself do less.
    """

    scope: Literal["client", "serve", "split"] | None = None
    lifetime_seconds: Annotated[float, msgspec.Meta(ge=60, le=366 * 86400)] = 7 * 86400.0
    uses: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None


class DownloadBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/downloads. `model`: the catalogue's name, `hf:OWNER/REPO`, or a URL; `load`: serve it afterwards.

    `hub` false: take it from other nodes of the mesh only; the hub is asked at most what its content must be.
    """

    model: _Name
    load: bool = False
    hub: bool = True


class ApprovalBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/approvals/{node}. Admit the node or deny its request. `scope`: replaces the scope that it asks for."""

    approved: bool
    scope: Literal["client", "serve", "split"] | None = None


class ScopeBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/members/{node}. Raise or lower what the member may do."""

    scope: Literal["serve", "split"]


class PublicationBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/publication. List this mesh publicly, or remove its listing. `agreed`: to what `consent` says."""

    on: bool
    agreed: bool = False


class SignInBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/session. `code`: of a sign-in link; empty with another proof of the node's user."""

    code: Annotated[str, msgspec.Meta(max_length=200)] = ""
