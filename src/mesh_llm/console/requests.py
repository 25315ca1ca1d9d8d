"""The bodies of the management API's changing calls, checked on the way in."""

from typing import Annotated, Literal, TypeVar, cast

import msgspec

from mesh_llm.core.errors import MeshError

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

    let_in: bool
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
