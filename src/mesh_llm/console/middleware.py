"""Around every console request: errors become JSON, and the headers that keep a page in its place are set."""

import msgspec
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mesh_llm.core.errors import MeshError

_log = structlog.get_logger(__name__)

_HEADERS = (
    (
        b"content-security-policy",
        (
            b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
            b" base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


def error_body(error: MeshError) -> bytes:
    """The JSON that tells a MeshError to a program: `{"error": {"code", "message", "hint"}}`."""
    return msgspec.json.encode({"error": {"code": error.code, "message": error.message, "hint": error.hint}})


class Boundary:
    """ASGI middleware: the console's request boundary."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; a MeshError becomes its own answer, anything else a 500 without inside details."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in present)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except MeshError as error:
            failure = error
        except Exception:  # noqa: BLE001 - the request boundary: a fault must not end the connection unanswered
            _log.exception("console request failed", path=scope["path"])
            failure = MeshError(
                code="internal_error",
                message="The console failed to answer; this is a fault in mesh-llm.",
                hint="The daemon's log says more: mesh-llm logs.",
            )
        else:
            return
        if started:
            return
        headers = [(b"content-type", b"application/json")]
        if failure.code == "api_key_required":
            headers.append((b"www-authenticate", b'Basic realm="mesh-llm: any name, an API key as password"'))
        await send_with_headers({"type": "http.response.start", "status": failure.status, "headers": headers})
        await send({"type": "http.response.body", "body": error_body(failure)})
