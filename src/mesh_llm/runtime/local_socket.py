"""A Unix socket that only the user who runs the node can use: where the command line and the node meet.

The operating system says who is at the other end of one. Two things keep others out: the socket's directory is the
user's own (0700), and each connection's user is looked at. And the place is the proof of the home: whoever answers at
a home's socket is the node of this home, whatever `daemon.json` says of ports.
"""

import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home

NAME = "console.sock"
_LONGEST = 100
"""Bytes of a path that every system takes in a socket's address: Linux 107, macOS 103."""
_ROOT = 0
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID = 0, 1, 2
_XUCRED = struct.Struct("=IIh2x16I")
"""struct xucred of sys/ucred.h on macOS and the BSDs: version, user, number of groups, groups."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end: user id, and process id (0 where the system does not say)."""

    uid: int
    pid: int


def peer_of(connection: socket.socket) -> Peer | None:
    """Who made a connection, or who listens where one leads; None where the system does not say."""
    try:
        if sys.platform == "linux":
            pid, uid, _ = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return Peer(uid, pid)
        credentials = _XUCRED.unpack(connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size))
        process = connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID) if sys.platform == "darwin" else 0
        return Peer(credentials[1], process)
    except (OSError, struct.error):
        return None


def is_own_user(peer: Peer | None) -> bool:
    """Whether a peer is the user of this process, or root, who can read everything anyway."""
    return peer is not None and peer.uid in {os.geteuid(), _ROOT}


class LocalListener:
    """A bound and listening socket, and its place. `close` removes both."""

    def __init__(self, home: Home) -> None:
        """Listen in the home's run directory; or, where a socket cannot be there, in a directory of its own.

        The home must be locked: what is left of a node before is removed. Raises MeshError(cannot_listen).
        """
        try:
            self._own: Path | None = None
            self.path = _private(home.run) / NAME
            self.socket = _bind(self.path)
        except OSError:
            # A path that is too long, or a file system without sockets.
            try:
                self._own = Path(tempfile.mkdtemp(prefix="mesh-llm-"))
                self.path = self._own / NAME
                self.socket = _bind(self.path)
            except OSError as error:
                self._remove_own()
                raise MeshError(
                    code="cannot_listen",
                    message=f"Cannot make a socket for the command line in {home.run}: {error.strerror or error}.",
                    hint="Set MESH_LLM_HOME to a directory of yours, with a short path.",
                ) from error

    @property
    def place(self) -> str:
        """What `daemon.json` says of it: empty where it is in the home's run directory."""
        return str(self.path) if self._own is not None else ""

    def close(self) -> None:
        """Listen no more. Idempotent."""
        self.socket.close()
        self.path.unlink(missing_ok=True)
        self._remove_own()

    def _remove_own(self) -> None:
        if self._own is not None and self._own.exists():
            self._own.rmdir()


def connect(home: Home, timeout: float) -> socket.socket:
    """Connect to the node of a home.

    Raises:
        OSError: nobody listens there (FileNotFoundError, ConnectionRefusedError), or somebody who is neither this
            user, nor the home's owner, nor root (PermissionError).
    """
    holder = home.holder()
    path = Path(holder.socket) if holder is not None and holder.socket else home.run / NAME
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        with _short(path) as name:
            connection.connect(name)
        peer = peer_of(connection)
        if not is_own_user(peer) and (peer is None or peer.uid != home.root.stat().st_uid):
            msg = f"another user listens at {path}"
            raise PermissionError(msg)
    except BaseException:
        connection.close()
        raise
    return connection


def find_node(home: Home) -> Peer | None:
    """Who listens at a home's socket: its node; None where none runs."""
    try:
        with connect(home, 5.0) as connection:
            return peer_of(connection)
    except OSError:
        return None


def _private(directory: Path) -> Path:
    """Make a directory that only this user may enter. Raises OSError where another user's is there."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        msg = f"{directory} is not a directory of this user"
        raise PermissionError(msg)
    directory.chmod(0o700)
    return directory


def _bind(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as name:
            listener.bind(name)
        path.chmod(0o600)
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


@contextmanager
def _short(path: Path) -> Generator[str]:
    """A name of the path that fits into a socket's address."""
    if len(os.fsencode(path)) <= _LONGEST or sys.platform != "linux":
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
