"""What a node says of itself to its own user: the shape of `GET /api/status` and of `mesh-llm status --json`."""

import msgspec

from mesh_llm.core.console_values import WaitingNode


class StatusModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the mesh as seen from here. `status`: warm, loading, cold, stopping or failed. Sizes in bytes.

    `hosts` are names and may be alike; `host_ids` are the same nodes in the same order. `vision`: it takes images.
    `predicted_tps`, `measured_tps`: tokens per second of one request, where this node serves all of it: what was
    foreseen before its first answer, and what came; else null. `retry_at`: UNIX seconds at which this node tries again
    what failed here; else null.
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
    predicted_tps: float | None = None
    measured_tps: float | None = None
    retry_at: float | None = None


class StatusPeer(msgspec.Struct, frozen=True, kw_only=True):
    """Another node. `state`: alive, suspect. `path`: direct, relay or none (no connection at present)."""

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


class StatusSplitWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker of a split model. `ratio`: its part of the layers; what only the host knows is 0 or null elsewhere.

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
    """A model that several nodes compute. `host` is a node id; `ratio` and `layers` are the host's own part."""

    model: str
    host: str
    term: int
    ratio: float
    layers: int
    workers: tuple[StatusSplitWorker, ...]
    round_trips_per_token: float | None = None
    predicted_tps: float | None = None
    measured_tps: float | None = None


class StatusRequests(msgspec.Struct, frozen=True, kw_only=True):
    """The front door's work: over the last minute, except `in_flight`."""

    in_flight: int = 0
    per_minute: float = 0.0
    tokens_per_second: float = 0.0
    ttfb_ms_p50: float = 0.0


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
    """Something of the node that does not work at present: a service that failed and is started again, a file.

    `what` names it; `text` says what is wrong; `since_s`: for how many seconds; `times`: failures in a row.
    """

    what: str
    text: str
    since_s: float = 0.0
    times: int = 1


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One node's whole state. `token` is an invite for this mesh; `split` stays null while nothing is split.

    `clients`: passive nodes that are connected to this one; they are in nobody's list of peers.
    `fingerprint` is this node's key as people compare it; `approvals` are requests to join that wait for an answer.
    `lending`: how an RPC server is confined that lends memory to split models, as in `seccomp and Landlock`, or why
    nothing is lent.
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
    yields_because: str = ""
    fingerprint: str = ""
    approvals: tuple[WaitingNode, ...] = ()
    problems: tuple[StatusProblem, ...] = ()
    lending: str = ""
