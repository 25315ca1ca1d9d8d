"""A directory that only this user can enter, for sockets and secrets of one process; gone when the process is."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from mesh_llm.core.types.errors import MeshError

_PREFIX = "mesh-llm."
_TRIES = 16
_MARK = ".mesh-llm-private"
"""A file in each: what does not hold one is not swept away, whatever its name."""
_LONGEST = 103 - len("/mesh-llm.12345678/tunnel-0123456789abcdef.sock")


class PrivateDirectory:
    """Mode 0700, below `XDG_RUNTIME_DIR` or the system's directory for temporary files: paths of sockets must be short.

    It is locked (flock) as long as it is used, so that what a killed process left behind is recognised and removed by
    the next one, and nobody clears away what is in use.
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
            # On a full disk it is only not swept away.
            (self.path / _MARK).touch(mode=0o600)

    def close(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _made(base: Path) -> tuple[Path, int]:
    """A new directory, and its lock. Raises OSError: also where descriptors are used up."""
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
        # Before it was locked another process has taken it for one that was left behind.
    raise OSError(errno.EBUSY, "other programs take each new one away")


def _base() -> Path:
    """Where it is made: the path of a socket in it must fit into 103 bytes (sockaddr_un of macOS; Linux has 4 more)."""
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    places = [Path(own)] if own and _is_own(Path(own)) else []
    places += [Path(tempfile.gettempdir()), Path("/tmp")]  # noqa: S108 - what is made there is private
    return next((place for place in places if len(os.fsencode(place)) <= _LONGEST), places[-1])


def _is_own(path: Path) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o022 and os.access(path, os.W_OK)


def _locked(path: Path, *, must_open: bool = False) -> int | None:
    """Take the directory's lock: None where another process has it, or has just removed the directory.

    `must_open`: raise OSError where the directory is there and cannot be opened.
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
                        # One that was killed before it made the mark left it empty.
                        path.rmdir()
                finally:
                    os.close(lock)
