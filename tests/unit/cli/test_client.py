"""The command line's way to the daemon."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from mesh_llm.cli.client import DaemonClient
from mesh_llm.core.errors import MeshError
from mesh_llm.runtime.home import Holder, Home


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

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def client(home: Home) -> Iterator[DaemonClient]:
    Handler.seen.clear()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        home.write_holder(Holder(pid=1, api_port=1, console_port=server.server_port, started=0.0))
        home.control_token.write_text("secret")
        yield DaemonClient(home)
        server.shutdown()
        thread.join()


def test_nobody_ever_ran_here(home: Home) -> None:
    with pytest.raises(MeshError) as caught:
        DaemonClient(home)
    assert caught.value.code == "not_running"
    assert "mesh-llm --model tiny" in caught.value.hint


def test_it_ran_but_is_gone(home: Home) -> None:
    home.write_holder(Holder(pid=1, api_port=1, console_port=1, started=0.0))
    home.control_token.write_text("secret")
    with pytest.raises(MeshError) as caught:
        DaemonClient(home).text("/api/status")
    assert caught.value.code == "not_running"


def test_a_change_carries_the_token(client: DaemonClient) -> None:
    Handler.answers = {"/api/load": (202, b'{"model":"tiny"}')}
    assert client.send("POST", "/api/load", {"model": "t"}) == {"model": "tiny"}
    assert Handler.seen == [("POST", "/api/load", "secret", b'{"model":"t"}')]


def test_a_refusal_is_told_as_the_daemon_told_it(client: DaemonClient) -> None:
    Handler.answers = {"/api/load": (409, b'{"error":{"code":"does_not_fit","message":"m","hint":"h"}}')}
    with pytest.raises(MeshError) as caught:
        client.send("POST", "/api/load", {"model": "t"})
    assert (caught.value.code, caught.value.message, caught.value.hint) == ("does_not_fit", "m", "h")


def test_another_program_on_the_port_is_no_node(client: DaemonClient) -> None:
    Handler.answers = {"/api/status": (500, b"<html>")}
    with pytest.raises(MeshError, match="not as a node does"):
        client.text("/api/status")
