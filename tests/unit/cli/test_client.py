"""The command line's way to the daemon."""

import http.server
import os
import socketserver
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import click
import pytest

from mesh_llm.cli.client import DaemonClient, neighbours, node_home, node_option
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


@contextmanager
def runs(place: Home, role: str, port: int) -> Generator[None]:
    """A node that runs in this place, as far as the command line can see."""
    listener = LocalListener(place)
    place.write_holder(
        Holder(pid=1, api_port=port, console_port=port + 1, started=0.0, role=role, socket=listener.place)
    )
    try:
        yield
    finally:
        listener.close()
        place.clear_holder()


def chosen(*words: str) -> Home:
    """The node that a verb with these words would talk to."""
    homes: list[Home] = []

    @click.command()
    @node_option
    def verb() -> None:
        homes.append(node_home())

    verb.main(list(words), standalone_mode=False)
    return homes[0]


def test_which_of_several_nodes_a_verb_talks_to(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_HOME", str(home.root))
    first, second = (Home(home.root / "guests" / number, home.root) for number in "12")
    assert chosen().root == home.root, "if none runs, it is said of the home"
    with runs(first, "client", 9338):
        assert chosen().root == first.root, "the only one"
        with runs(second, "ephemeral", 9339):
            with pytest.raises(MeshError) as several:
                chosen()
            assert several.value.hint == "Say which one: --port 9338 or --port 9339"
            assert chosen("--port", "9339").root == second.root
            with runs(home, "serve", 9337):
                assert chosen().root == home.root, "the one that serves"
                assert chosen("--port", "9338").root == first.root
                assert neighbours(home, "stop") == [
                    "Also here: a client, API on port 9338 (mesh-llm stop --port 9338)",
                    "Also here: an ephemeral node, API on port 9339 (mesh-llm stop --port 9339)",
                ]
                assert neighbours(first, "stop")[0] == "Also here: the serving node, API on port 9337 (mesh-llm stop)"
                with pytest.raises(MeshError) as unknown:
                    chosen("--port", "9340")
                assert "the serving node, API on port 9337; a client, API on port 9338" in unknown.value.hint
    assert nodes_here(home) == []
