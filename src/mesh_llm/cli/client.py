"""Asks the running daemon of this home, over its management API.

The way is a Unix socket in the home (`runtime.local_socket`), where the operating system says who is at either end. So
no secret is sent, and no other program or home that happens to hold a port can answer in this home's name.
"""

import http.client
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.local_socket import connect, find_node
from mesh_llm.wire.http.sse import SseError, SseEvent, SseParser

_PIECE = 64 * 1024
_MOST_REFUSAL = 64 * 1024

_T = TypeVar("_T")


class _ErrorBody(msgspec.Struct):
    code: str | int | None = "failed"
    """An engine's own errors have a number here."""
    message: str = "The node refused."
    hint: str = ""


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody = msgspec.field(default_factory=_ErrorBody)


class _Connection(http.client.HTTPConnection):
    """HTTP over the socket of a home's node."""

    def __init__(self, home: Home, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._home = home
        self._wait = timeout

    def connect(self) -> None:
        """Connect. Raises OSError."""
        self.sock: socket.socket = connect(self._home, self._wait)


class DaemonClient:
    """One home's daemon. Raises MeshError(not_running) when there is none. `pid`: its process; 0 where unknown."""

    def __init__(self, home: Home, timeout: float = 10.0) -> None:
        self._home = home
        self._timeout = timeout
        found = find_node(home)
        if found is None:
            raise self._not_running()
        self.pid = found.pid

    def _not_running(self) -> MeshError:
        return MeshError(
            code="not_running",
            message=f"No node is running with the home {self._home.root}.",
            hint="Start one with: mesh-llm --model tiny. For another home set MESH_LLM_HOME.",
            status=503,
        )

    def _request(self, method: str, path: str, body: object | None = None) -> bytes:
        with self.stream(method, path, body, timeout=self._timeout) as answer:
            return answer.read()

    @contextmanager
    def stream(
        self, method: str, path: str, body: object | None = None, *, timeout: float
    ) -> Generator[http.client.HTTPResponse]:
        """An answer that comes piece by piece: read it by `read1`, or as `events`.

        `timeout`: the longest silence, in seconds. Also what goes wrong while it is read becomes a MeshError.
        """
        headers: dict[str, str] = {}
        payload = None
        if body is not None:
            try:
                payload = msgspec.json.encode(body)
            except UnicodeEncodeError as error:
                raise MeshError(
                    code="not_text",
                    message="An argument of the command is not valid UTF-8.",
                    hint="Write it in UTF-8. A file with such a name must be renamed first.",
                ) from error
            headers["content-type"] = "application/json"
        connection = _Connection(self._home, timeout)
        try:
            connection.request(method, path, payload, headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise _refusal(answer.status, answer.read(_MOST_REFUSAL))
            yield answer
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise self._not_running() from error
        except (OSError, http.client.HTTPException) as error:
            raise MeshError(
                code="no_answer",
                message=f"The node (pid {self.pid}) does not answer: {error or type(error).__name__}.",
                hint="Look at its log: mesh-llm logs. If it hangs, end it and start it again.",
            ) from error
        finally:
            connection.close()

    def get(self, path: str, kind: type[_T]) -> _T:
        """GET a JSON value of a type."""
        return msgspec.json.decode(self._request("GET", path), type=kind)

    def text(self, path: str) -> str:
        """GET a text."""
        return self._request("GET", path).decode("utf-8", "replace")

    def send(self, method: str, path: str, body: object) -> Any:
        """Make a change; returns the decoded answer."""
        return msgspec.json.decode(self._request(method, path, body))


def events(answer: http.client.HTTPResponse) -> Iterator[SseEvent]:
    """The server-sent events of a streamed answer, as they come. Raises MeshError(no_answer) for what is none."""
    parser = SseParser()
    try:
        while piece := answer.read1(_PIECE):
            yield from parser.feed(piece)
    except SseError as error:
        raise MeshError(
            code="no_answer", message=f"The node sent what is no event: {error}.", hint="Is its version another one?"
        ) from error


def _refusal(status: int, data: bytes) -> MeshError:
    try:
        error = msgspec.json.decode(data, type=_ErrorAnswer).error
    except msgspec.MsgspecError:
        error = _ErrorBody(message=f"The node answered with status {status}, and gave no reason.")
    return MeshError(code=str(error.code), message=error.message, hint=error.hint, status=status)
