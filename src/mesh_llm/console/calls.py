"""The bodies of the management API's changing calls, checked on the way in.

One call of the management API: where it is, what it takes and gives, and who may make it.

The same description binds it (`app`) and tells of it (`openapi`), so that the two cannot differ.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mesh_llm.console.logs import LogReader
from mesh_llm.console.ports import ConsoleParts, Management
from mesh_llm.console.sessions import Sessions
from mesh_llm.core.types.errors import MeshError

MAX_BODY = 64 * 1024

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]


class LoadBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/load. `model`: a name, the beginning of one, or a file's path."""

    model: _Name


class DropBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/drop. Running answers may finish for `drain_seconds`."""

    model: _Name
    drain_seconds: _Seconds = 30.0


class StopBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/stop. Running answers may finish for `drain_seconds`."""

    drain_seconds: _Seconds = 0.0


class InviteBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/invites. Lifetime in seconds, a minute to a year; `uses` null: any number."""

    scope: Literal["client", "serve", "split"] = "serve"
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
    """POST /api/approvals/{node}. Let it in, or turn it away. `scope`: what it may do, instead of what it asks for."""

    approved: bool
    scope: Literal["client", "serve", "split"] | None = None


class PublicationBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/publication. List this mesh publicly, or take it off the list."""

    on: bool


class SignInBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /api/session. `code`: of a sign-in link; empty for who shows in another way to be the node's user."""

    code: Annotated[str, msgspec.Meta(max_length=200)] = ""


_Body = TypeVar("_Body", bound=msgspec.Struct)


def decode(body: bytes, kind: type[_Body]) -> _Body:
    """Decode one call's JSON body. Raises MeshError(bad_request, 400)."""
    try:
        return msgspec.convert(_integral(msgspec.json.decode(body or b"{}")), kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise MeshError(
            code="bad_request",
            message=f"The request's body is not what this call takes: {error}.",
            hint="GET /api/openapi.json describes each call's fields.",
            status=400,
        ) from error


def _integral(value: object) -> object:
    """The same with whole numbers for floats that are whole: to JSON Schema, 2.0 is an integer (Validation, 4.2.2)."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {key: _integral(one) for key, one in cast("dict[str, object]", value).items()}
        case list():
            return [_integral(one) for one in cast("list[object]", value)]
        case _:
            return value


_T = TypeVar("_T")
JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"


class Access(Enum):
    """Who may make a call; see `guard`."""

    OPEN = "open"
    """Whoever is on this machine. It tells nothing of the node but that it is here."""
    READ = "read"
    """The node's user. Where other machines reach the console: also a browser that has only an API key."""
    CHANGE = "change"
    """The node's user, shown by more than what a browser sends by itself: it changes something, or tells a secret."""


class Asker(Enum):
    """By what a request was let in; see `guard`."""

    ANYBODY = "anybody"
    """By nothing: the call is open."""
    USER = "user"
    """The user's own socket, or the control token."""
    SESSION = "session"
    KEY = "key"
    """An API key that a program sent; only where other machines reach the console."""
    BROWSER_KEY = "browser_key"
    """An API key that a browser sends by itself."""


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
    """A text in the query; required."""

    name: str
    text: str
    longest: int = 1024


Query = Integer | Text


@dataclass(frozen=True)
class Desk:
    """What calls are answered from.

    Attributes:
        sessions: of browsers.
        cookie: the name of the sessions' cookie.
        pages: addresses of the page, the first one to be opened on this machine; empty where there is no page.
    """

    management: Management
    logs: LogReader
    parts: ConsoleParts = field(default_factory=ConsoleParts)
    sessions: Sessions = field(default_factory=Sessions)
    cookie: str = "mesh-llm"
    pages: tuple[str, ...] = ()


class Asked:
    """One request, as a handler sees it. Reading what is not as described raises MeshError(400, 413, 415)."""

    def __init__(self, request: Request, asker: Asker) -> None:
        self._request = request
        self.asker = asker

    def cookie(self, name: str) -> str:
        """A cookie's value; empty where there is none."""
        return self._request.cookies.get(name, "")

    def path(self, name: str) -> str:
        """A part of the path."""
        return str(self._request.path_params[name])

    def header(self, name: str) -> str | None:
        """A header's value."""
        return self._request.headers.get(name)

    def integer(self, query: Integer) -> int | None:
        """A number of the query, or its default."""
        given = self._request.query_params.get(query.name)
        if given is None:
            return query.default
        if not (
            given.isascii() and given.isdigit() and len(given) < 19 and query.lowest <= int(given) <= query.highest
        ):
            raise _bad_query(query.name, f"a whole number from {query.lowest} to {query.highest}")
        return int(given)

    def text(self, query: Text) -> str:
        """A text of the query."""
        given = self._request.query_params.get(query.name, "")
        if not 0 < len(given) <= query.longest:
            raise _bad_query(query.name, f"a text of 1 to {query.longest} characters")
        return given

    async def body(self, kind: type[_Body]) -> _Body:
        """The JSON body."""
        if self._request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise MeshError(
                code="bad_content_type",
                message="This call takes a JSON body.",
                hint="Send content-type: application/json.",
                status=415,
            )
        received = bytearray()
        async for chunk in self._request.stream():
            received += chunk
            if len(received) > MAX_BODY:
                raise MeshError(code="body_too_large", message="The request's body is too large.", status=413)
        return decode(bytes(received), kind)


@dataclass(frozen=True)
class WithHeaders:
    """An answer with headers of its own."""

    answer: msgspec.Struct
    headers: Mapping[str, str]


Answer = msgspec.Struct | Sequence[msgspec.Struct] | str | WithHeaders
Handler = Callable[[Desk, Asked], Awaitable[Answer]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A method on a path.

    Attributes:
        method: HTTP's.
        path: with parameters in braces.
        name: unique; OpenAPI's operationId.
        summary: one sentence.
        handler: answers.
        answer: type of the JSON answer, or None for `media`.
        access: who may.
        status: of the answer that is no error.
        body: type of the JSON body.
        query: what the query may hold.
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


def part(found: _T | None, what: str) -> _T:
    """A part of the node that a call needs. Raises MeshError(not_available) where it has none."""
    if found is None:
        raise MeshError(
            code="not_available",
            message=f"This node has no {what}.",
            hint="A passive client (--client) only asks; run this on a node that serves.",
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


async def off_loop(work: Callable[[], _T]) -> _T:
    """Run what reads the disk on a thread."""
    return await asyncio.to_thread(work)


def _bad_query(name: str, wanted: str) -> MeshError:
    return MeshError(
        code="bad_request",
        message=f"The query's {name} must be {wanted}.",
        hint="GET /api/openapi.json describes each call.",
        status=400,
        param=name,
    )
