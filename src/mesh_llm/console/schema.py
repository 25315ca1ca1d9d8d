"""What the management API takes and answers, except the node's state (`status.py`).

Programs read these fields, and the OpenAPI description is made of them. Sizes are bytes, times are UNIX seconds and
durations are seconds, unless a name says otherwise.
"""

from typing import Annotated, Any, Literal

import msgspec

from mesh_llm import __version__
from mesh_llm.api.types import Decision
from mesh_llm.console.status import StatusCorrection
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.models.hub.catalog import CatalogRow
from mesh_llm.net.admission.records import InviteRecord, WaitingNode


class Owned(msgspec.Struct, frozen=True, kw_only=True):
    """The owner of this node. `owner`: nodes of this key count as this node's own; `announced`: the mesh knows that."""

    owner: str = ""
    announced: bool = False


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


class TrustRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What canaries say about one model on one host.

    `standing`: undecided, honest (the last test ended well; the next one goes on), or distrusted: this node's requests
    go elsewhere, and `text` says why. `canaries`: answers that were compared; `unanswered`: canaries in a row that got
    no answer to compare; `tests`: tests that ended well. `evidence`: logarithm of how much likelier the answers
    of the present test are if the host serves something else than if it serves what it announces, by probabilities;
    `ordinary`: the same by answers without them. `at`: UNIX seconds of the last canary. `workers`: node ids of
    those that computed layers with it: none of the answers says which of them is to blame.
    """

    node_id: str
    name: str
    model: str
    standing: str
    canaries: int = 0
    workers: tuple[str, ...] = ()
    unanswered: int = 0
    tests: int = 0
    evidence: float = 0.0
    ordinary: float = 0.0
    at: float = 0.0
    text: str = ""


class TrustList(msgspec.Struct, frozen=True, kw_only=True):
    """The hosts that this node checked, distrusted ones first. `asks`: whether it sends canaries.

    `corrections`: what hosts announce and did not keep, as this node saw it.
    """

    asks: bool
    hosts: tuple[TrustRecord, ...]
    corrections: tuple[StatusCorrection, ...] = ()


class TrustForgotten(msgspec.Struct, frozen=True, kw_only=True):
    """What this node found out about a host is forgotten: its requests may go there again.

    `models`: those that canaries said something about. `corrections`: those that ended; the host's figures count again.
    """

    node_id: str
    name: str
    models: tuple[str, ...]
    corrections: tuple[StatusCorrection, ...] = ()


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
