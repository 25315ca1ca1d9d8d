"""Unix sockets that only the node's user can reach, and private directories for them.

The command line talks to the node over one. Two things keep other users out: the directory has mode 0700, and the node
checks the user of each connection, which the operating system reports. The path also proves which node answers: it is
the node of this home, whatever `daemon.json` says of ports.
"""

import contextlib
import errno
import fcntl
import os
import shutil
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

SOCKET_NAME = "console.sock"
_LONGEST = 100
"""Most bytes of a path in a socket's address on every system: Linux allows 107, macOS 103."""
_ROOT = 0
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID = 0, 1, 2
_XUCRED = struct.Struct("=IIh2x16I")
"""struct xucred of sys/ucred.h on macOS and the BSDs: version, user, number of groups, groups."""


@dataclass(frozen=True)
class Peer:
    """The process at the other end: user id, and process id (0 if the system does not report it)."""

    uid: int
    pid: int


def peer_of(connection: socket.socket) -> Peer | None:
    """The process at the other end of a connection; None if the system does not report it."""
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
    """Whether a peer is the user of this process, or root."""
    return peer is not None and peer.uid in {os.geteuid(), _ROOT}


class LocalListener:
    """A listening socket in the file system. `close` removes it."""

    def __init__(self, home: Home) -> None:
        """Listen in the home's run directory or, if no socket can be there, in a directory of its own.

        The home must be locked, because a socket of an earlier node is removed. Raises MeshError(cannot_listen).
        """
        try:
            self._own: Path | None = None
            self.path = _private(home.run) / SOCKET_NAME
            self.socket = _bind(self.path)
        except OSError:
            # The path is too long, or the file system has no sockets.
            try:
                self._own = Path(tempfile.mkdtemp(prefix="mesh-llm-"))
                self.path = self._own / SOCKET_NAME
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
        """The path for `daemon.json`; empty if the socket is in the home's run directory."""
        return str(self.path) if self._own is not None else ""

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self.socket.close()
        self.path.unlink(missing_ok=True)
        self._remove_own()

    def _remove_own(self) -> None:
        if self._own is not None and self._own.exists():
            self._own.rmdir()


def connect(home: Home, timeout: float) -> socket.socket:
    """Connect to the node of a home.

    Raises:
        OSError: no process listens there (FileNotFoundError, ConnectionRefusedError), or one that does not belong to
            this user, the home's owner, or root (PermissionError).
    """
    holder = home.holder()
    path = Path(holder.socket) if holder is not None and holder.socket else home.run / SOCKET_NAME
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
    """The node of a home; None if none runs."""
    try:
        with connect(home, 5.0) as connection:
            return peer_of(connection)
    except OSError:
        return None


def _private(directory: Path) -> Path:
    """Make a directory that only this user may enter. Raises OSError if another user owns it."""
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
    """A name of the path that is short enough for a socket's address."""
    if len(os.fsencode(path)) <= _LONGEST or sys.platform != "linux":
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


_PREFIX = "mesh-llm."
_TRIES = 16
_MARK = ".mesh-llm-private"
"""A file in each directory: without it the directory is not removed, whatever its name."""
_LONGEST_BASE = 103 - len("/mesh-llm.12345678/tunnel-0123456789abcdef.sock")


class PrivateDirectory:
    """A directory that only this user can enter, for sockets and secrets of one process.

    It is below `XDG_RUNTIME_DIR` or the system's directory for temporary files, because paths of sockets must be short.
    It is locked (flock) while it is used. So the next process recognises and removes what a killed process left behind.
    """

    def __init__(self) -> None:
        """Raises MeshError `no_private_directory`."""
        base = _base()
        _sweep(base)
        self._lock: int | None = None
        try:
            self.path, self._lock = _made(base)
        except OSError as error:
            raise MeshError(
                code="no_private_directory",
                message=f"No private directory can be made in {base}: {error.strerror}.",
                hint="Set TMPDIR to a directory that you can write to.",
                status=503,
            ) from error
        with contextlib.suppress(OSError):
            # If the disk is full, the directory is only not removed by a later process.
            (self.path / _MARK).touch(mode=0o600)

    def close(self) -> None:
        """Remove the directory and its content. Idempotent."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _made(base: Path) -> tuple[Path, int]:
    """A new directory, and its lock. Raises OSError, also if no file descriptor is left."""
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        try:
            lock = _locked(path, must_open=True)
        except OSError:
            with contextlib.suppress(OSError):
                path.rmdir()
            raise
        if lock is not None:
            return path, lock
        # Another process removed it before it was locked: it looked like one that was left behind.
    raise OSError(errno.EBUSY, "other programs remove each new one")


def _base() -> Path:
    """The parent directory: the path of a socket must fit into 103 bytes (sockaddr_un of macOS; Linux has 4 more)."""
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    places = [Path(own)] if own and _is_own(Path(own)) else []
    places += [Path(tempfile.gettempdir()), Path("/tmp")]  # noqa: S108 - what is made there is private
    return next((place for place in places if len(os.fsencode(place)) <= _LONGEST_BASE), places[-1])


def _is_own(path: Path) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o022 and os.access(path, os.W_OK)


def _locked(path: Path, *, must_open: bool = False) -> int | None:
    """Lock the directory; None if another process holds the lock or has just removed the directory.

    `must_open`: raise OSError if the directory exists and cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        if must_open:
            raise
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False)):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _sweep(base: Path) -> None:
    with contextlib.suppress(OSError):
        for path in base.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if path.stat(follow_symlinks=False).st_uid != os.getuid():
                    continue
                lock = _locked(path)
                if lock is None:
                    continue
                try:
                    if (path / _MARK).is_file():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        # A process that was killed before it made the mark left the directory empty.
                        path.rmdir()
                finally:
                    os.close(lock)
