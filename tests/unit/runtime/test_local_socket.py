"""The socket of a home: only its user gets through, and what is left of a node before is no hindrance."""

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.other_user import as_nobody

from mesh_llm.runtime.asgi import AsgiServer, OwnUserProtocol
from mesh_llm.runtime.home import Holder, Home
from mesh_llm.runtime.local_socket import LocalListener, connect, find_node


async def hello(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@asynccontextmanager
async def serving(home: Home) -> AsyncGenerator[LocalListener]:
    listener = LocalListener(home)
    server = AsgiServer(hello, listener.socket, "test", http=OwnUserProtocol)
    await server.start()
    try:
        yield listener
    finally:
        await server.stop(0.1)
        listener.close()


def ask(open_socket: Callable[[], socket.socket]) -> str:
    with open_socket() as connection:
        received = b""
        try:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            while data := connection.recv(4096):
                received += data
        except (ConnectionResetError, BrokenPipeError):
            return "reset"
    return received.decode().partition("\r\n\r\n")[2] or "nothing"


async def test_its_user_is_answered_and_knows_whose_node_it_is(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert find_node(home) is None
    async with serving(home) as listener:
        assert listener.place == ""
        assert (home.run.stat().st_mode & 0o777, listener.path.stat().st_mode & 0o777) == (0o700, 0o600)
        assert await asyncio.to_thread(ask, lambda: connect(home, 5.0)) == "hello"
        found = await asyncio.to_thread(find_node, home)
        assert found is not None
        assert (found.uid, found.pid) == (os.geteuid(), os.getpid())
    assert not listener.path.exists()
    assert find_node(home) is None


async def test_another_user_is_cut_off_even_where_the_directory_lets_it_in(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    async with serving(home) as listener:
        path = listener.path

        def try_it() -> str:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
            except PermissionError:
                return "kept out"
            return ask(lambda: connection)

        # Nobody can reach pytest's own directories: a socket that anybody finds is what is looked at here.
        assert await asyncio.to_thread(as_nobody, try_it) == "kept out"
        for directory in (path.parent, *path.parents):
            if directory.stat().st_uid == os.geteuid() and directory.stat().st_mode & 0o777 == 0o700:
                directory.chmod(0o711)
        path.chmod(0o777)
        assert await asyncio.to_thread(as_nobody, try_it) in {"reset", "nothing"}
        assert await asyncio.to_thread(ask, lambda: connect(home, 5.0)) == "hello"


async def test_a_long_path_and_what_a_killed_node_left(tmp_path: Path) -> None:
    home = Home(tmp_path / ("a" * 60) / ("b" * 60) / ("\u00e9" * 20))
    async with serving(home) as listener:
        assert len(str(listener.path)) > 108
        assert listener.path.is_socket()
        assert await asyncio.to_thread(ask, lambda: connect(home, 5.0)) == "hello"
    left = LocalListener(home)
    left.socket.close()
    with pytest.raises(ConnectionRefusedError):
        connect(home, 1.0)
    assert find_node(home) is None
    async with serving(home):
        assert await asyncio.to_thread(ask, lambda: connect(home, 5.0)) == "hello"


async def test_a_home_that_takes_no_socket_gets_one_elsewhere(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.run.write_text("in the way")
    listener = LocalListener(home)
    assert listener.place == str(listener.path)
    assert listener.path.parent.stat().st_mode & 0o777 == 0o700
    listener.close()
    assert not listener.path.parent.exists()


def test_a_socket_at_which_another_user_listens_is_not_asked(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with tempfile.TemporaryDirectory() as shared, socket.socket(socket.AF_UNIX) as listener:
        Path(shared).chmod(0o777)
        place = f"{shared}/console.sock"

        def squat() -> str:
            listener.bind(place)
            listener.listen(1)
            return "listening"

        home.write_holder(Holder(pid=1, api_port=1, console_port=1, started=0.0, socket=place))
        assert as_nobody(squat) == "listening"
        with pytest.raises(PermissionError, match="another user"):
            connect(home, 1.0)
        assert find_node(home) is None
