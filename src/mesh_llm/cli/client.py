"""Asks the running daemon of this home, over its management API."""

import http.client
from typing import Any, TypeVar

import msgspec

from mesh_llm.core.errors import MeshError
from mesh_llm.runtime.home import Home

_T = TypeVar("_T")


class _ErrorBody(msgspec.Struct):
    code: str = "failed"
    message: str = "The node refused."
    hint: str = ""


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody = msgspec.field(default_factory=_ErrorBody)


class DaemonClient:
    """One home's daemon. Raises MeshError(not_running) from any call when there is none."""

    def __init__(self, home: Home, timeout: float = 10.0) -> None:
        self._home = home
        self._timeout = timeout
        holder = home.holder()
        if holder is None:
            raise self._not_running()
        self.holder = holder

    def _not_running(self) -> MeshError:
        return MeshError(
            code="not_running",
            message=f"No node is running with the home {self._home.root}.",
            hint="Start one with: mesh-llm --model tiny. For another home set MESH_LLM_HOME.",
            status=503,
        )

    def _request(self, method: str, path: str, body: object | None = None) -> bytes:
        headers = {"host": f"localhost:{self.holder.console_port}"}
        try:
            headers["x-mesh-llm-token"] = self._home.control_token.read_text()
        except FileNotFoundError as error:
            raise self._not_running() from error
        payload = None
        if body is not None:
            payload = msgspec.json.encode(body)
            headers["content-type"] = "application/json"
        connection = http.client.HTTPConnection("127.0.0.1", self.holder.console_port, timeout=self._timeout)
        try:
            connection.request(method, path, payload, headers)
            answer = connection.getresponse()
            data = answer.read()
        except ConnectionRefusedError as error:
            raise self._not_running() from error
        except (OSError, http.client.HTTPException) as error:
            raise MeshError(
                code="no_answer",
                message=f"The node (pid {self.holder.pid}) does not answer: {error or type(error).__name__}.",
                hint="Look at its log: mesh-llm logs. If it hangs, end it and start it again.",
            ) from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise _refusal(answer.status, data)
        return data

    def get(self, path: str, kind: type[_T]) -> _T:
        """GET a JSON value of a type."""
        return msgspec.json.decode(self._request("GET", path), type=kind)

    def text(self, path: str) -> str:
        """GET a text."""
        return self._request("GET", path).decode("utf-8", "replace")

    def send(self, method: str, path: str, body: object) -> Any:
        """Make a change; returns the decoded answer."""
        return msgspec.json.decode(self._request(method, path, body))


def _refusal(status: int, data: bytes) -> MeshError:
    try:
        error = msgspec.json.decode(data, type=_ErrorAnswer).error
    except msgspec.MsgspecError:
        error = _ErrorBody(message=f"The console's port answered with status {status}, not as a node does.")
    return MeshError(code=error.code, message=error.message, hint=error.hint, status=status)
