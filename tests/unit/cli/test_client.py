"""The command line's way to the daemon."""

import http.server
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from mesh_llm.cli.client import DaemonClient
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.doctor import nodes_here
from mesh_llm.runtime.home import Holder, Home
from mesh_llm.runtime.local_socket import SOCKET_NAME, LocalListener


class Handler(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, tuple[int, bytes]]] = {}
    seen: ClassVar[list[tuple[str, str, str | None, bytes]]] = []

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.seen.append((self.command, self.path, self.headers.get("x-mesh-llm-token"), body))
        status, data = self.answers[self.path]
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _serve  # noqa: N815

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


class Server(socketserver.UnixStreamServer):
    """Stands in for a node at a home's socket."""


@pytest.fixture
def client(home: Home) -> Iterator[DaemonClient]:
    Handler.seen.clear()
    home.run.mkdir()
    with Server(str(home.run / SOCKET_NAME), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield DaemonClient(home)
        server.shutdown()
        thread.join()


def test_nobody_ever_ran_here(home: Home) -> None:
    with pytest.raises(MeshError) as caught:
        DaemonClient(home)
    assert caught.value.code == "not_running"
    assert "mesh-llm --model tiny" in caught.value.hint


def test_it_ran_but_is_gone_and_another_node_has_its_port(home: Home) -> None:
    """A stale `daemon.json` names a port at which another home's node answers: this one's is not running."""
    Handler.answers = {"/api/status": (200, b'{"token": "of another mesh"}')}
    Handler.seen.clear()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        home.write_holder(Holder(pid=os.getpid(), api_port=1, console_port=other.server_port, started=0.0))
        home.control_token.write_text("secret")
        LocalListener(home).socket.close()
        with pytest.raises(MeshError) as caught:
            DaemonClient(home).text("/api/status")
        assert caught.value.code == "not_running"
        assert nodes_here(home) == []
        # The token of this home would have been given away with the question.
        assert Handler.seen == []
        other.shutdown()


def test_a_change_is_sent_without_any_secret(client: DaemonClient) -> None:
    Handler.answers = {"/api/load": (202, b'{"model":"tiny"}')}
    assert client.send("POST", "/api/load", {"model": "t"}) == {"model": "tiny"}
    assert Handler.seen == [("POST", "/api/load", None, b'{"model":"t"}')]
    assert client.pid == os.getpid()


def test_a_refusal_is_told_as_the_daemon_told_it(client: DaemonClient) -> None:
    Handler.answers = {"/api/load": (409, b'{"error":{"code":"does_not_fit","message":"m","hint":"h"}}')}
    with pytest.raises(MeshError) as caught:
        client.send("POST", "/api/load", {"model": "t"})
    assert (caught.value.code, caught.value.message, caught.value.hint) == ("does_not_fit", "m", "h")


def test_a_refusal_without_a_reason_is_told_as_one(client: DaemonClient) -> None:
    Handler.answers = {"/api/status": (500, b"<html>")}
    with pytest.raises(MeshError, match="status 500"):
        client.text("/api/status")


def test_words_that_are_not_utf_8_are_refused(client: DaemonClient) -> None:
    with pytest.raises(MeshError) as caught:
        client.send("POST", "/api/load", {"model": "m\udce8le"})
    assert (caught.value.code, Handler.seen) == ("not_text", [])
