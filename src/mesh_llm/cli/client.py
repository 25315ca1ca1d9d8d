"""A client of the management API of the node that runs with this home.

It connects to a Unix socket in the home (`runtime.local_socket`), where the operating system identifies both ends. So
no secret is sent, and no program that happens to hold a port can answer in the node's place.
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
    """The node of one home. Raises MeshError(not_running) if none runs. `pid`: its process; 0 if unknown."""

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
            hint="Start one: mesh-llm --model tiny. For a node with another home, set MESH_LLM_HOME.",
            status=503,
        )

    def _request(self, method: str, path: str, body: object | None = None) -> bytes:
        with self.stream(method, path, body, timeout=self._timeout) as answer:
            return answer.read()

    @contextmanager
    def stream(
        self, method: str, path: str, body: object | None = None, *, timeout: float
    ) -> Generator[http.client.HTTPResponse]:
        """A response to read in pieces, with `read1` or as `events`. Failures while reading become MeshErrors too.

        `timeout`: the longest silence, in seconds.
        """
        headers: dict[str, str] = {}
        payload = None
        if body is not None:
            try:
                payload = msgspec.json.encode(body)
            except UnicodeEncodeError as error:
                raise MeshError(
                    code="not_text",
                    message="An argument is not valid UTF-8.",
                    hint="Write it in UTF-8. Rename a file that has such a name.",
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
                hint="See its log: mesh-llm logs. If it hangs, end it and start it again.",
            ) from error
        finally:
            connection.close()

    def get(self, path: str, kind: type[_T]) -> _T:
        """GET a value of this type."""
        return msgspec.json.decode(self._request("GET", path), type=kind)

    def text(self, path: str) -> str:
        """GET a text."""
        return self._request("GET", path).decode("utf-8", "replace")

    def send(self, method: str, path: str, body: object) -> Any:
        """Send a request that changes something; return the decoded answer."""
        return msgspec.json.decode(self._request(method, path, body))


def events(answer: http.client.HTTPResponse) -> Iterator[SseEvent]:
    """The server-sent events of a streamed response, as they arrive. Raises MeshError(no_answer) for anything else."""
    parser = SseParser()
    try:
        while piece := answer.read1(_PIECE):
            yield from parser.feed(piece)
    except SseError as error:
        raise MeshError(
            code="no_answer",
            message=f"The node sent an event that makes no sense: {error}.",
            hint="Its version may differ from this command's. Start it again.",
        ) from error


def _refusal(status: int, data: bytes) -> MeshError:
    try:
        error = msgspec.json.decode(data, type=_ErrorAnswer).error
    except msgspec.MsgspecError:
        error = _ErrorBody(message=f"The node answered with HTTP status {status} and no reason.")
    return MeshError(code=str(error.code), message=error.message, hint=error.hint, status=status)
