import asyncio
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from tests.support.other_user import as_nobody

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.asgi import AsgiServer, OwnUserProtocol
from mesh_llm.runtime.home import Holder, Home
from mesh_llm.runtime.local_socket import LocalListener, PrivateDirectory, connect, find_node


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


async def test_a_server_that_nobody_asks_does_not_wake_and_still_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[int] = []
    on_tick = uvicorn.Server.on_tick

    async def counted(self: uvicorn.Server, counter: int) -> bool:
        ticks.append(counter)
        return await on_tick(self, counter)

    monkeypatch.setattr(uvicorn.Server, "on_tick", counted)
    async with serving(Home(tmp_path / "home")):
        # Two of the ticks that uvicorn makes by itself.
        await asyncio.sleep(0.25)
        assert len(ticks) == 1


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


_HOLDS = """
import signal
from mesh_llm.runtime.local_socket import PrivateDirectory
print(PrivateDirectory().path, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="base-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name)


def test_only_this_user_enters_and_it_goes_with_what_is_in_it(base: Path) -> None:
    directory = PrivateDirectory()
    assert directory.path.parent == base
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    (directory.path / "secret").write_text("x")
    directory.close()
    directory.close()
    assert not list(base.iterdir())


def test_a_place_where_others_can_write_is_not_taken(base: Path) -> None:
    base.chmod(0o777)
    directory = PrivateDirectory()
    assert directory.path.parent != base
    directory.close()


def test_what_a_killed_process_left_is_removed_and_what_is_used_is_not(base: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDS], stdout=subprocess.PIPE, env=dict(os.environ)) as other:
        assert other.stdout is not None
        used = Path(other.stdout.readline().decode().strip())
        first = PrivateDirectory()
        assert used.is_dir()
        other.send_signal(signal.SIGKILL)
    second = PrivateDirectory()
    assert not used.exists()
    assert first.path.is_dir()
    first.close()
    second.close()


def test_what_is_not_its_own_stays_whatever_its_name(base: Path) -> None:
    # A home, a checkout, another program's directory; and what `mesh-llm run` and the command line's socket live in.
    for name in ("mesh-llm-home", "mesh-llm.12345678", "mesh-llm-abcdefgh"):
        (base / name / "mesh").mkdir(parents=True, mode=0o700)
        (base / name / "mesh" / "mesh-key").write_text("x")
    (base / "mesh-llm-12345678").mkdir(mode=0o700)
    PrivateDirectory().close()
    assert len(list(base.glob("*/mesh/mesh-key"))) == 3
    assert (base / "mesh-llm-12345678").is_dir()


def test_what_was_killed_before_it_was_marked_is_removed(base: Path) -> None:
    (base / "mesh-llm.12345678").mkdir(mode=0o700)
    PrivateDirectory().close()
    assert not list(base.iterdir())


def test_a_place_whose_path_is_too_long_for_a_socket_is_not_taken(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = base / ("d" * 90)
    deep.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    directory = PrivateDirectory()
    assert directory.path.parent != deep
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory.path / "tunnel-0123456789abcdef.sock"))
    directory.close()


def test_no_place_at_all_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc/nowhere")
    with pytest.raises(MeshError) as caught:
        PrivateDirectory()
    assert caught.value.code == "no_private_directory"
    assert "TMPDIR" in caught.value.hint


def test_without_descriptors_it_fails_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It made one directory after the other, for ever, and with it stopped the loop that would have freed some."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(MeshError, match="Too many open files"):
            PrivateDirectory()
    assert list(tmp_path.iterdir()) == []
    PrivateDirectory().close()
