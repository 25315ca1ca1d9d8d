"""The state of a node as the management API shows it: `GET /api/status`, its events, and `mesh-llm status --json`.

Programs read these fields, and the OpenAPI description is made of them. Sizes are bytes, times are UNIX seconds and
durations are seconds, unless a name says otherwise.
"""

import msgspec

from mesh_llm.api.types import StatusRequests
from mesh_llm.core.performance.prediction import PROMPT_TOKENS
from mesh_llm.engine.spec import EnginePart
from mesh_llm.net.admission.records import WaitingNode


class StatusModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the mesh as seen from here. `status`: warm, loading, cold, stopping or failed. Sizes in bytes.

    `hosts` are names and may be alike; `host_ids` are the same nodes in the same order. `vision`: it takes images.
    `predicted_tps` (before the first answer) and `measured_tps`: tokens per second of one request, if this node serves
    all of the model; else null. `predicted_prompt_tps` and `measured_prompt_tps`: the same of prompts of about
    `prompt_tokens` tokens; before the first one, the prediction is for 2,048. `retry_at`: UNIX seconds of the next
    attempt if it failed here; else null.
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
    prompt_tokens: int = PROMPT_TOKENS
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
    mesh: client, serve or split; empty where that is unknown. `owner`: the key of its owner, who signed that; empty:
    nobody did.
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
    owner: str = ""


class StatusSplitWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker of a split model. `ratio`: its part of the layers. What only the host knows is 0 or null on other nodes.

    `direct_push`: whether it reaches all other workers itself; null where it was not tried: what it computed then goes
    through the host. `relayed`: tensors that did so since the model was loaded. `loaded`: the part of its weights that
    is there, 0.0 to 1.0; null elsewhere than on the host.
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
    `predicted_tps`, `measured_tps` and the same of prompts: as of a model that this node serves alone.
    `groups`: engines of the host that answer now, of `groups_planned`; `groups_why`: why that many, as a clause. 0 and
    empty elsewhere than on the host.
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
    prompt_tokens: int = PROMPT_TOKENS
    wire: str = ""
    groups: int = 0
    groups_planned: int = 0
    groups_why: str = ""


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


class StatusCorrection(msgspec.Struct, frozen=True, kw_only=True):
    """What a host announces of a model, and what this node counts on instead. No other node learns of it.

    `kind`: context (tokens), speed (tokens per second of an answer), prompts (the same of a prompt) or memory (bytes
    for a split model); `seen`: what was refused, came, or was not given. `at`: UNIX seconds when that was seen last;
    `until`: when the host is believed again. `times`: how often the host was corrected in this. `text`: all of it in
    words.
    """

    node_id: str
    name: str
    model: str
    kind: str
    announced: float
    seen: float
    at: float
    until: float
    times: int
    text: str


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


class StatusCutOff(msgspec.Struct, frozen=True, kw_only=True):
    """A node that this one refuses for a while, or the strangers of an address; why, and for how many seconds yet.

    `who`: the node's id; with `address`, an IPv4 address or an IPv6 /64.
    """

    who: str
    seconds: float
    reason: str
    address: bool = False


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
    `owner`: the key of the owner whose nodes count as this node's own (`--privacy own`); empty: nobody's.
    `corrections`: what hosts announce and do not keep, as this node saw it.
    `cut_off`: nodes that broke the protocol, and strangers that misused this node.
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
    owner: str = ""
    corrections: tuple[StatusCorrection, ...] = ()
    cut_off: tuple[StatusCutOff, ...] = ()
