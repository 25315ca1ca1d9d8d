"""A client of the management API of the node that runs with this home.

It connects to a Unix socket in the home (`runtime.local_socket`), where the operating system identifies both ends. So
no secret is sent, and no program that happens to hold a port can answer in the node's place.
"""

import http.client
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
import msgspec

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.local_socket import connect, find_node
from mesh_llm.runtime.nodes import running_nodes
from mesh_llm.wire.http.sse import SseError, SseEvent, SseParser

_PIECE = 64 * 1024
_MOST_REFUSAL = 64 * 1024

_PORT = "mesh_llm.node_port"

_T = TypeVar("_T")
_Command = TypeVar("_Command", bound=Callable[..., Any])


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


def node_option(command: _Command) -> _Command:
    """Add `--port` to a verb that talks to a node: which one, where several run with one home."""
    return click.option(
        "--port",
        "node_port",
        type=click.IntRange(1, 65535),
        metavar="PORT",
        expose_value=False,
        callback=_choose,
        help="The node of this home whose API is on this port.  [default: the one that serves]",
    )(command)


def _choose(context: click.Context, _: click.Parameter, port: int | None) -> None:
    context.meta[_PORT] = port


def node_home() -> Home:
    """The home, or the guest's place in it, of the node to talk to: by `--port`, or else the one that serves.

    If no node runs, the home itself.

    Raises:
        MeshError: `no_such_node`; `several_nodes` if only guests run, and more than one.
    """
    home = Home.default()
    context = click.get_current_context(silent=True)
    port = context.meta.get(_PORT) if context is not None else None
    nodes = running_nodes(home)
    if port is not None:
        found = next((node for node in nodes if node.holder.api_port == port), None)
        if found is None:
            listed = "; ".join(node.described for node in nodes) or "none"
            raise MeshError(
                code="no_such_node",
                message=f"No node with the home {home.root} has its API on port {port}.",
                hint=f"Nodes that run: {listed}.",
                status=404,
            )
        return found.home
    if len(nodes) > 1 and nodes[0].home.is_guest:
        ports = " or ".join(f"--port {node.holder.api_port}" for node in nodes)
        raise MeshError(
            code="several_nodes",
            message=f"{len(nodes)} nodes run with the home {home.root}: {'; '.join(node.described for node in nodes)}.",
            hint=f"Say which one: {ports}",
            status=409,
        )
    return nodes[0].home if nodes else home


def neighbours(home: Home, verb: str) -> list[str]:
    """Lines about the other nodes that run with the same home, and how to call a verb for each."""
    return [
        f"Also here: {node.described} (mesh-llm {verb}"
        + (f" --port {node.holder.api_port})" if node.home.is_guest else ")")
        for node in running_nodes(home)
        if node.home.root != home.root
    ]


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
    except UNREADABLE:
        error = _ErrorBody(message=f"The node answered with HTTP status {status} and no reason.")
    return MeshError(code=str(error.code), message=error.message, hint=error.hint, status=status)
