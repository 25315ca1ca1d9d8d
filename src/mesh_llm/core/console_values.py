"""What the management API answers beyond the status: the shapes that its OpenAPI description is made of.

Sizes are bytes, times UNIX seconds, durations seconds, unless a name says otherwise.
"""

import msgspec


class LogNames(msgspec.Struct, frozen=True, kw_only=True):
    """Names of the logs that there are: the node's own (`daemon`), and one for each engine."""

    logs: tuple[str, ...]


class ModelAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a model has begun; `model` is its full name. The status tells how it goes on."""

    model: str


class Stopping(msgspec.Struct, frozen=True, kw_only=True):
    """The node is ending."""

    stopping: bool = True


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What happened, for programs and for people, and what to do next (may be empty)."""

    code: str
    message: str
    hint: str = ""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is an error."""

    error: Problem


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Whether and where a model would run, were it loaded now.

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
    """A model on this node's disk. `kind`: chat, embedding or draft. `store`: another program's; empty: the user's.

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


class CatalogueRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the catalogue says of a model. `parameters` in billions.

    `capabilities`: of chat, code, reasoning, tools, vision. `draft`: catalogue name of a model that guesses ahead.
    """

    name: str
    title: str
    size_bytes: int
    parameters: float
    active_parameters: float
    context: int
    quant: str
    licence: str
    capabilities: tuple[str, ...]
    draft: str
    source: str


class CatalogueModel(CatalogueRow, frozen=True, kw_only=True):
    """A model of the catalogue. `parameters` in billions; `on_disk`: its name on this node's disk, empty if it is not.

    `capabilities`: of chat, code, reasoning, tools, vision. `draft`: catalogue name of a model that guesses ahead.
    """

    fit: Fit
    on_disk: str = ""


class UnusableFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file on this node's disk that looks like a model and cannot be used, and why."""

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
    other nodes give it; `whence`: the same for people. `eta_s` null: not known. `load`: it is served afterwards; a
    `done` one with an `error` is on disk, and could not be served. `path`: of its first file, once it is done.
    """

    id: str
    model: str
    phase: str
    started: float
    name: str = ""
    source: str = ""
    origin: str = "hub"
    whence: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_second: float = 0.0
    eta_s: float | None = None
    ended: float | None = None
    load: bool = False
    error: Problem | None = None
    path: str = ""


class Downloads(msgspec.Struct, frozen=True, kw_only=True):
    """Downloads of this run of the node, newest first; old ended ones are forgotten."""

    downloads: tuple[DownloadRecord, ...]


class WaitingNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node near by that asks to be let in without an invite. Times are UNIX seconds; texts bounded and printable.

    Attributes:
        id: the fingerprint of its key, which its own screen shows too.
        name: what it calls itself; nobody vouches for it.
        scope: what it asks for, or was given: `client`, `serve` or `split`.
        since: of its first knock.
        expires: until when it waits.
        address: where it knocks from.
        version: of its program.
        node_id: its key.
        state: pending, approved, denied or expired.
    """

    id: str
    name: str
    scope: str
    since: float
    expires: float = 0.0
    address: str = ""
    version: str = ""
    node_id: str = ""
    state: str = "pending"


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes that wait for an answer, oldest first."""

    waiting: tuple[WaitingNode, ...]


class Approved(msgspec.Struct, frozen=True, kw_only=True):
    """A waiting node was answered. `let_in` False: it was turned away. `scope`: what it may do from now on."""

    id: str
    let_in: bool
    name: str = ""
    scope: str = ""


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """Whether strangers can find this mesh, and where it is listed. `problem`: why not, although it is wanted."""

    on: bool
    name: str = ""
    relays: tuple[str, ...] = ()
    listed: bool = False
    expires: float | None = None
    problem: str = ""


class RankedTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A node that could have answered a request, as the front door judged it then.

    `expected_s`: how long a typical answer would take there; the least is asked first. `warm_bytes`: how much of the
    prompt's beginning it has seen. `why`: the same in words.
    """

    node_id: str
    name: str
    local: bool
    expected_s: float
    in_flight: int = 0
    load: float = 0.0
    slots: int = 0
    tokens_per_second: float = 0.0
    rtt_ms: float = 0.0
    warm_bytes: int = 0
    why: str = ""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One target that was asked. `outcome`: answered, refused, lost or left (the client went)."""

    node_id: str
    outcome: str
    reason: str = ""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """How one request was routed, and what came of it.

    `via`: client or peer. `chosen`: the node that answered; empty if none did. `outcome`: answered, refused, lost or
    left; `status`: as the client got it, 499 where it left. `ttfb_ms` null: no byte of an answer came.
    """

    id: int
    at: float
    model: str
    path: str
    via: str
    targets: tuple[RankedTarget, ...]
    attempts: tuple[Attempt, ...]
    chosen: str
    outcome: str
    status: int
    seconds: float
    ttfb_ms: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0


class Decisions(msgspec.Struct, frozen=True, kw_only=True):
    """The front door's last decisions, newest first."""

    decisions: tuple[Decision, ...]


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """What ended in one period. Percentiles are null where nothing was measured."""

    at: float
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    ttfb_ms_p50: float | None = None
    ttfb_ms_p95: float | None = None
    seconds_p50: float | None = None
    seconds_p95: float | None = None


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The front door's last hour, oldest first, without gaps; the last bucket is still being filled."""

    period_s: int
    buckets: tuple[Bucket, ...]


class SessionKey(msgspec.Struct, frozen=True, kw_only=True):
    """The half of a new session that the page keeps; the other half is the cookie that comes with this answer."""

    key: str


class SessionState(msgspec.Struct, frozen=True, kw_only=True):
    """The request was let in. `sessions`: how many are open."""

    sessions: int


class SignInLink(msgspec.Struct, frozen=True, kw_only=True):
    """Links that open the page signed in: on this machine, and by each `--console-origin`. One code, good once."""

    urls: tuple[str, ...]
    code: str
    expires_seconds: float


class SignedOut(msgspec.Struct, frozen=True, kw_only=True):
    """How many sessions have been ended."""

    ended: int
