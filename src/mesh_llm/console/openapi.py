"""The OpenAPI description of the management API, made from its calls. It is kept in `openapi.json` beside this file.

python -m mesh_llm.console.openapi      writes that file again
"""

import re
from pathlib import Path
from typing import Any

import msgspec

from mesh_llm import __version__
from mesh_llm.console.auth import SESSION_HEADER, TOKEN_HEADER, Access
from mesh_llm.console.calls import EVENTS, JSON, Call, Integer, Query
from mesh_llm.console.routes import CALLS
from mesh_llm.console.schema import DownloadRecord, NoticeRecord, Refusal
from mesh_llm.console.status import Status

FILE = Path(__file__).with_name("openapi.json")
_PARAMETER = re.compile(r"{(\w+)}")
_REFERENCE = "#/components/schemas/{name}"

_ABOUT = """\
What a node's own user can see and do, on loopback. Requests with another host's name (DNS rebinding) or another origin
are refused. There are three ways to prove to be the user: the Unix socket `MESH_LLM_HOME/run/console.sock`, which only
this user reaches; the content of `MESH_LLM_HOME/control-token` in the `x-mesh-llm-token` header; or a session of the
page: a cookie and the `x-mesh-llm-session` header, opened by the code of a link of `mesh-llm console`. Bodies are JSON,
with that content type. Errors have the shape of `Refusal`. docs/console.md says more."""
_USER: list[dict[str, list[str]]] = [{"token": []}, {"session": [], "session_cookie": []}]


def describe() -> dict[str, Any]:
    """The whole description."""
    bodies = [call.body for call in CALLS if call.body is not None]
    answers = [call.answer for call in CALLS if call.answer is not None]
    types = [*bodies, *answers, Refusal, NoticeRecord, DownloadRecord]
    refs, schemas = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    schema = dict(zip((_key(kind) for kind in types), refs, strict=True))
    refusal = {"description": "Refused or failed.", "content": {JSON: {"schema": schema[_key(Refusal)]}}}
    paths: dict[str, dict[str, Any]] = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call, schema, refusal)
    paths["/api/events"] = {"get": _events(schema, refusal)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mesh-llm management API",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost:3131"}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "token": {"type": "apiKey", "in": "header", "name": TOKEN_HEADER},
                "session": {"type": "apiKey", "in": "header", "name": SESSION_HEADER},
                "session_cookie": {"type": "apiKey", "in": "cookie", "name": "mesh-llm-NODE"},
            },
        },
    }


def text() -> str:
    """The description as the file holds it."""
    return msgspec.json.format(msgspec.json.encode(describe()), indent=1).decode() + "\n"


def _key(kind: Any) -> str:
    return repr(kind)


def _operation(call: Call, schema: dict[str, Any], refusal: dict[str, Any]) -> dict[str, Any]:
    content = {"type": "string"} if call.answer is None else schema[_key(call.answer)]
    operation: dict[str, Any] = {
        "operationId": call.name,
        "summary": call.summary,
        "parameters": [*map(_path_parameter, _PARAMETER.findall(call.path)), *map(_query_parameter, call.query)],
        "responses": {
            str(call.status): {"description": "Done.", "content": {call.media: {"schema": content}}},
            "default": refusal,
        },
    }
    if call.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema[_key(call.body)]}}}
    if call.access is not Access.OPEN:
        operation["security"] = _USER
    return operation


def _events(schema: dict[str, Any], refusal: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": "events",
        "summary": (
            "Server-sent events: `status` (Status) at first and on every change, `notice` (NoticeRecord) for each"
            " occurrence, `download` (DownloadRecord) on progress."
        ),
        "parameters": [
            {
                "name": "last-event-id",
                "in": "header",
                "description": "The id of the last event seen: notices after it follow. Browsers send it themselves.",
                "schema": {"type": "string"},
            }
        ],
        "security": _USER,
        "responses": {
            "200": {
                "description": "The stream. It does not end.",
                "content": {EVENTS: {"schema": {"type": "string"}}},
            },
            "default": refusal,
        },
        "x-events": {
            "status": schema[_key(Status)],
            "notice": schema[_key(NoticeRecord)],
            "download": schema[_key(DownloadRecord)],
        },
    }


def _path_parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameter(query: Query) -> dict[str, Any]:
    schema: dict[str, Any]
    if isinstance(query, Integer):
        schema = {"type": "integer", "minimum": query.lowest, "maximum": query.highest}
        if query.default is not None:
            schema["default"] = query.default
    else:
        schema = {"type": "string", "minLength": 1, "maxLength": query.longest}
    return {
        "name": query.name,
        "in": "query",
        "required": not isinstance(query, Integer) and query.required,
        "description": query.text,
        "schema": schema,
    }


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
