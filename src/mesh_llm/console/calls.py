"""How one call of the management API is described, read and answered.

`Management` and the protocols after it are the console's side of the daemon: the daemon implements them. A `Call` is
one method on one path. `app` binds the calls and `openapi` describes them from the same values, so the two cannot
differ.
"""

from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mesh_llm.api.types import Decision, History
from mesh_llm.console.auth import Access, Caller, Sessions
from mesh_llm.console.logs import LogReader
from mesh_llm.console.schema import (
    DownloadRecord,
    Library,
    MemberRevoked,
    MemberScope,
    ModelAccepted,
    ModelSettingsShown,
    NoticeRecord,
    Owned,
    Publication,
    Reloaded,
    TrustForgotten,
    TrustList,
)
from mesh_llm.console.status import Status, StatusPromptCaches
from mesh_llm.core.performance.plan import PlanAnswer
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.net.admission.records import InviteRecord, WaitingNode

MAX_BODY = 64 * 1024
JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"

_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=msgspec.Struct)


class Management(Protocol):
    """The user's control over a running daemon. Every method may raise MeshError."""

    def status(self) -> Status:
        """The node's whole state now."""
        ...

    def notices(self, after: int = 0) -> list[NoticeRecord]:
        """Notices with an id above `after`, oldest first; old ones are forgotten."""
        ...

    async def next_change(self, timeout: float) -> bool:
        """Wait until the status or the notices may have changed; False when `timeout` seconds passed first."""
        ...

    async def load(self, model: str) -> ModelAccepted:
        """Begin to serve a model here, or to wait for what it needs. Raises model_not_found, does_not_fit."""
        ...

    async def drop(self, model: str, drain_seconds: float, *, rest: bool = False) -> str:
        """Stop serving a model here once its requests have ended; returns its full name.

        `rest`: only until a request asks for it.
        """
        ...

    async def stop(self, drain_seconds: float) -> None:
        """Begin to end the daemon."""
        ...

    async def create_invite(self, scope: str | None, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        """Issue an invite for this mesh; `scope` None: that of the token in the status."""
        ...

    def invites(self) -> list[InviteRecord]:
        """The invites that this node issued, newest first, without their tokens."""
        ...

    async def revoke_invite(self, invite: str) -> InviteRecord:
        """Revoke an invite by id: every node that it admitted is disconnected everywhere."""
        ...

    async def revoke_member(self, node: str) -> MemberRevoked:
        """Cut a member off, by its name or the beginning of its key. Raises node_unknown, node_ambiguous, not_yours."""
        ...

    async def grant(self, node: str, scope: str) -> MemberScope:
        """Raise or lower what a member may do. Raises node_unknown, node_ambiguous, not_yours, grant_not_delivered."""
        ...


class Downloader(Protocol):
    """Downloads to a running node."""

    def records(self) -> list[DownloadRecord]:
        """The downloads of this run, newest first."""
        ...

    async def start(self, model: str, *, load: bool, hub: bool = True) -> DownloadRecord:
        """Begin to fetch a model; `load`: serve it afterwards; `hub` False: only from other nodes.

        Raises model_not_found, already_here, no_neighbour, too_many_downloads.
        """
        ...

    async def cancel(self, download: str) -> DownloadRecord:
        """Stop a download; what has arrived is kept. Raises download_not_found."""
        ...


class Approvals(Protocol):
    """Requests to join without an invite."""

    def waiting(self) -> list[WaitingNode]:
        """The requests that wait for an answer, oldest first."""
        ...

    async def approve(self, node: str, scope: str | None = None) -> WaitingNode:
        """Admit a node, by its id or the beginning of it. `scope` None: what it asks for. Raises not_waiting."""
        ...

    async def deny(self, node: str) -> WaitingNode:
        """Deny a request; the requester is notified. Raises not_waiting."""
        ...


class ListingControl(Protocol):
    """The mesh's public listing."""

    def publication(self) -> Publication:
        """Its present state."""
        ...

    async def publish(self, *, on: bool, agreed: bool = False) -> Publication:
        """Begin or end to be listed. `agreed`: the user has read what becomes public (`consent`), and agrees.

        Raises client_cannot_publish, publication_not_agreed.
        """
        ...


class TrustControl(Protocol):
    """What this node knows of hosts that it checked, and what it does not count on that hosts announce."""

    def trust(self) -> TrustList:
        """All that were checked, distrusted ones first; and all corrections."""
        ...

    async def forget(self, node: str, model: str = "") -> TrustForgotten:
        """Forget one, by its name or the beginning of its key; `model`: about this one only.

        Raises node_unknown, node_ambiguous, model_unknown.
        """
        ...


class ConfigurationControl(Protocol):
    """The node's configuration files. Every method may raise MeshError."""

    async def reload(self) -> Reloaded:
        """Read the files again, and change what can change while the node runs. Raises config_invalid and others."""
        ...

    def model(self, model: str) -> ModelSettingsShown:
        """What the user set for one model."""
        ...

    async def change_model(self, model: str, changes: Mapping[str, Any]) -> Reloaded:
        """Write settings of one model to the user's file, and reload."""
        ...


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What only some nodes have. A call that needs a missing one is answered with `not_available`.

    Attributes:
        library: the models on disk and in the catalogue, and which of them fit.
        downloader: downloads.
        approvals: requests to join.
        listing: the public listing.
        plan: plans a launch of a model, with a context of so many tokens, without doing it. Raises model_not_found.
        decisions: how requests were routed: those with an id above the first argument, newest first, at most as many as
            the second.
        history: the last hour of the API.
        configuration: the configuration files.
        trust: the hosts that were checked.
        clear_prompt_caches: deletes the saved prompt caches, and returns what there was.
        read_ownership: reads again whose node this is, and announces it.
    """

    library: Callable[[], Library] | None = None
    downloader: Downloader | None = None
    approvals: Approvals | None = None
    listing: ListingControl | None = None
    plan: Callable[[str, int | None], Awaitable[PlanAnswer]] | None = None
    decisions: Callable[[int, int], list[Decision]] | None = None
    history: Callable[[], History] | None = None
    configuration: ConfigurationControl | None = None
    trust: TrustControl | None = None
    clear_prompt_caches: Callable[[], Awaitable[StatusPromptCaches]] | None = None
    read_ownership: Callable[[], Owned] | None = None


@dataclass(frozen=True, kw_only=True)
class Integer:
    """A whole number in the query."""

    name: str
    text: str
    lowest: int
    highest: int
    default: int | None


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text in the query. `required`: else it may be left out, and is empty then."""

    name: str
    text: str
    longest: int = 1024
    required: bool = True


Query = Integer | Text


@dataclass(frozen=True)
class Backend:
    """What calls are answered from.

    Attributes:
        management: the daemon.
        logs: the node's logs.
        capabilities: what else this node has.
        sessions: of browsers.
        cookie: the name of the sessions' cookie.
        pages: addresses of the page, this machine's first; empty if there is no page.
    """

    management: Management
    logs: LogReader
    capabilities: Capabilities = field(default_factory=Capabilities)
    sessions: Sessions = field(default_factory=Sessions)
    cookie: str = "mesh-llm"
    pages: tuple[str, ...] = ()


class CallRequest:
    """One request. Reading a value that does not match its description raises MeshError (400, 413, 415)."""

    def __init__(self, request: Request, caller: Caller) -> None:
        self.http = request
        self.caller = caller

    def path(self, name: str) -> str:
        """A parameter of the path."""
        return str(self.http.path_params[name])

    def integer(self, query: Integer) -> int | None:
        """A number from the query, or its default."""
        given = self.http.query_params.get(query.name)
        if given is None:
            return query.default
        if not (
            given.isascii() and given.isdigit() and len(given) < 19 and query.lowest <= int(given) <= query.highest
        ):
            raise _bad_query(query.name, f"a whole number from {query.lowest} to {query.highest}")
        return int(given)

    def text(self, query: Text) -> str:
        """A text from the query."""
        given = self.http.query_params.get(query.name, "")
        if not given and not query.required:
            return ""
        if not 0 < len(given) <= query.longest:
            raise _bad_query(query.name, f"a text of 1 to {query.longest} characters")
        return given

    async def body(self, kind: type[_Body]) -> _Body:
        """The JSON body."""
        if self.http.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise MeshError(
                code="bad_content_type",
                message="This call takes a JSON body.",
                hint="Send content-type: application/json.",
                status=415,
            )
        received = bytearray()
        async for chunk in self.http.stream():
            received += chunk
            if len(received) > MAX_BODY:
                raise MeshError(code="body_too_large", message="The request's body is too large.", status=413)
        return decode(bytes(received), kind)


@dataclass(frozen=True)
class WithHeaders:
    """An answer with extra headers."""

    answer: msgspec.Struct
    headers: Mapping[str, str]


Answer = msgspec.Struct | Sequence[msgspec.Struct] | str | WithHeaders
Handler = Callable[[Backend, CallRequest], Awaitable[Answer]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A method on a path.

    Attributes:
        method: the HTTP method.
        path: with parameters in braces.
        name: unique; OpenAPI's operationId.
        summary: one sentence.
        handler: makes the answer.
        answer: type of the JSON answer, or None for `media`.
        access: who may make the call.
        status: HTTP status of success.
        body: type of the JSON body.
        query: parameters of the query.
        media: content type of an answer that is not JSON.
    """

    method: str
    path: str
    name: str
    summary: str
    handler: Handler
    answer: Any = None
    access: Access = Access.READ
    status: int = 200
    body: type[msgspec.Struct] | None = None
    query: tuple[Query, ...] = ()
    media: str = JSON


def require(found: _T | None, what: str) -> _T:
    """The capability that a call needs. Raises MeshError(not_available) if this node lacks it."""
    if found is None:
        raise MeshError(
            code="not_available",
            message=f"This node has no {what}.",
            hint="A client (--client) has no models. Run this on a node that serves.",
            status=409,
        )
    return found


def respond(call: Call, answer: Answer) -> Response:
    """The HTTP answer."""
    if isinstance(answer, WithHeaders):
        return Response(msgspec.json.encode(answer.answer), call.status, answer.headers, media_type=JSON)
    if isinstance(answer, str):
        return Response(answer, call.status, media_type=f"{call.media}; charset=utf-8")
    return Response(msgspec.json.encode(answer), call.status, media_type=JSON)


def _bad_query(name: str, wanted: str) -> MeshError:
    return MeshError(
        code="bad_request",
        message=f"The query's {name} must be {wanted}.",
        hint="GET /api/openapi.json describes each call.",
        status=400,
        param=name,
    )


def decode(body: bytes, kind: type[_Body]) -> _Body:
    """Decode one call's JSON body; a byte order mark is ignored. Raises MeshError(bad_request, 400)."""
    try:
        return msgspec.convert(_integral(msgspec.json.decode(body.removeprefix(BOM_UTF8) or b"{}")), kind)
    except UNREADABLE as error:
        raise MeshError(
            code="bad_request",
            message=f"The request's body is not what this call takes: {error}.",
            hint="GET /api/openapi.json describes each call's fields.",
            status=400,
        ) from error


def _integral(value: object) -> object:
    """The value with whole floats as integers: in JSON Schema, 2.0 is an integer (Validation, section 4.2.2)."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {key: _integral(one) for key, one in cast("dict[str, object]", value).items()}
        case list():
            return [_integral(one) for one in cast("list[object]", value)]
        case _:
            return value
