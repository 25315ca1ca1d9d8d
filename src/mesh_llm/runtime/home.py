"""Files that are whole or not there: atomic writes, private by default.

Where a daemon keeps its things, and who holds the place: `MESH_LLM_HOME`, default `~/.mesh-llm`.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from mesh_llm.core.types.errors import MeshError


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` with `data` in one step, synced to disk; readers see the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode) if hasattr(os, "fchmod") else None
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon that holds a home: how the CLI finds it."""

    pid: int
    api_port: int
    console_port: int
    started: float
    model: str = ""
    console_host: str = "127.0.0.1"
    socket: str = ""
    """Where the command line reaches it, if that is not in the home's run directory."""


class Home:
    """Paths below one home directory. Creating it makes the directory, 0700.

    Raises:
        MeshError: `home_unusable`, `home_unwritable`: the directory cannot be made, or not be looked into.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with self.explained():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(root, os.R_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))

    @classmethod
    def default(cls) -> "Home":
        """The home that the environment names. Raises MeshError: also `home_unknown`."""
        return cls(home_root())

    @contextmanager
    def explained(self) -> Generator[None]:
        """Say of an OSError about a file of this home what is wrong with the home; other errors pass.

        Raises:
            MeshError: `home_unusable`, `home_unwritable`.
        """
        try:
            yield
        except OSError as error:
            explained = explain(error, self.root)
            if explained is None:
                raise
            raise explained from error

    @property
    def logs(self) -> Path:
        """Rotating log files, one per child and one for the daemon."""
        return self.root / "logs"

    @property
    def key(self) -> Path:
        """The node's Ed25519 secret, 32 bytes as hex, 0600."""
        return self.root / "key"

    @property
    def mesh(self) -> Path:
        """What is kept of the mesh: key or certificate, last-known peers, invites, revocations."""
        return self.root / "mesh"

    @property
    def nostr_key(self) -> Path:
        """The Nostr secret that signs this home's public listings, as nsec, 0600; not there until one is published."""
        return self.root / "nostr.nsec"

    @property
    def control_token(self) -> Path:
        """The secret that the user's scripts show to the running daemon's management API, 0600."""
        return self.root / "control-token"

    @property
    def run(self) -> Path:
        """What is there while a node runs, for its user only (0700): the command line's socket."""
        return self.root / "run"

    @property
    def console_link(self) -> Path:
        """A page that leads the user's browser to the console, with a sign-in code in it, 0600."""
        return self.run / "console.html"

    @property
    def cache(self) -> Path:
        """Things that can be made again: the RPC plugin, measurements."""
        return self.root / "cache"

    @property
    def _holder(self) -> Path:
        return self.root / "daemon.json"

    def holder(self) -> Holder | None:
        """The daemon that last wrote itself down here, running or not; None if there is none.

        Raises:
            MeshError: `home_unusable`: it is another user's.
        """
        try:
            with self.explained():
                return msgspec.json.decode(self._holder.read_bytes(), type=Holder)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def write_holder(self, holder: Holder) -> None:
        """Say who holds this home."""
        write_atomic(self._holder, msgspec.json.encode(holder))

    def clear_holder(self) -> None:
        """Nobody does any more."""
        self._holder.unlink(missing_ok=True)

    def lock(self) -> FileLock:
        """Take the home for this process; released by the operating system when the process ends in any way.

        Raises:
            MeshError: `home_in_use`, when another daemon holds it; `home_unusable`, `home_unwritable`.
        """
        lock = FileLock(self.root / "lock")
        try:
            with self.explained():
                lock.acquire(timeout=0)
        except Timeout:
            holder = self.holder()
            who = f"the daemon with pid {holder.pid} (API on port {holder.api_port})" if holder else "another daemon"
            raise MeshError(
                code="home_in_use",
                message=f"{self.root} is held by {who}.",
                hint="Stop it with `mesh-llm stop`, or give this one its own home: MESH_LLM_HOME=DIR mesh-llm ...",
                status=409,
            ) from None
        self._keep_others_from_writing()
        return lock

    def _keep_others_from_writing(self) -> None:
        """Whoever may write into a directory can put other files in the place of those that only the user may read.

        The home may have been there before, or was made with a umask of 0, as some containers have it. From here on
        this process and its children make nothing that others may write to.
        """
        os.umask(os.umask(0o022) | 0o022)
        for directory in (self.root, self.mesh, self.cache, self.logs):
            with suppress(OSError):
                status = directory.stat()
                mode = stat.S_IMODE(status.st_mode)
                if status.st_uid == _uid() and mode & 0o022:
                    directory.chmod(mode & ~0o022)


def _uid() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_ELSEWHERE = "keep the node's files on another one: MESH_LLM_HOME=DIR mesh-llm ..."


def home_root() -> Path:
    """`MESH_LLM_HOME`, or `.mesh-llm` in the user's home directory. Raises MeshError(home_unknown)."""
    named = os.environ.get("MESH_LLM_HOME")
    return expand(named) if named else user_home() / ".mesh-llm"


def user_home() -> Path:
    """The user's home directory; of a user who has none, as in many containers, `MESH_LLM_HOME`.

    Raises:
        MeshError: `home_unknown`, where that is not set either.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        named = os.environ.get("MESH_LLM_HOME")
        if named and not named.startswith("~"):
            return Path(named)
        raise MeshError(
            code="home_unknown",
            message=f"There is no home directory: HOME is not set, and the system has no entry for {_me()}.",
            hint="Name a directory for the node's files: MESH_LLM_HOME=DIR mesh-llm ...",
        ) from error


def expand(path: str | Path) -> Path:
    """A path with `~` and `~USER` replaced. Raises MeshError(home_unknown) where there is no such user or home."""
    path = Path(path)
    if path.parts[:1] == ("~",):
        return user_home().joinpath(*path.parts[1:])
    try:
        return path.expanduser()
    except RuntimeError as error:
        user = path.parts[0].removeprefix("~")
        raise MeshError(
            code="home_unknown",
            message=f"{path} names the home directory of {user}, and the system has no user of that name.",
            hint="Write the directory in full, as in /srv/mesh-llm.",
        ) from error


def file_of(error: OSError) -> str:
    """The path that an error is about; empty where it names none. `io.FileIO` names what it was given, also a Path."""
    name: object = error.filename
    if isinstance(name, Path):
        return str(name)
    return os.fsdecode(name) if isinstance(name, str | bytes) else ""


def explain(error: OSError, root: Path) -> MeshError | None:
    """What an error about a file below `root` means for its user; None where it is about something else.

    A full or read-only disk counts where no file is named too.
    """
    name = file_of(error)
    named = Path(name) if name else None
    concerns = named is not None and (named == root or root in named.parents or named in root.parents)
    if isinstance(error, FileNotFoundError) or (named is not None and not concerns):
        return None
    if error.errno in _DISK:
        return MeshError(
            code="home_unwritable",
            message=f"{root} cannot be written: {error.strerror}.",
            hint=f"Make room on that disk, or {_ELSEWHERE}",
            status=507,
        )
    if named is None:
        return None
    if error.errno in {errno.EACCES, errno.EPERM}:
        return _denied(named, root)
    if error.errno in {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP}:
        found = _nearest(named)
        what = "is not a directory" if not found.is_dir() else "is a directory, where a file should be"
        return MeshError(
            code="home_unusable",
            message=f"{root} cannot be the node's home: {found} {what}.",
            hint="Move it away, or take another directory: MESH_LLM_HOME=DIR mesh-llm ...",
        )
    return MeshError(
        code="home_unusable",
        message=f"{named} cannot be used: {error.strerror or error}.",
        hint=f"Check the disk, or {_ELSEWHERE}",
    )


def _denied(named: Path, root: Path) -> MeshError:
    found = _nearest(named)
    try:
        owner = found.stat().st_uid
    except OSError:
        owner = -1
    if found != named and found not in {root, *root.parents}:
        found = named
    if hasattr(os, "geteuid") and owner not in {os.geteuid(), -1} and (found == root or root in found.parents):
        # As after `sudo mesh-llm`.
        return MeshError(
            code="home_unusable",
            message=f"{found} belongs to {_user(owner)}, and this is {_me()}.",
            hint=f"Take it back: sudo chown -R {os.geteuid()} {root}   Or take another: MESH_LLM_HOME=DIR mesh-llm ...",
        )
    where = f"{found} may not be written" if found != named else f"{named} may not be used"
    allow = f"Allow it: chmod -R u+rwX {root}   Or take" if root.exists() else "Take"
    return MeshError(
        code="home_unusable",
        message=f"{root} cannot be the node's home: {where} by {_me()}.",
        hint=f"{allow} another directory: MESH_LLM_HOME=DIR mesh-llm ...",
    )


def _nearest(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _user(number: int) -> str:
    try:
        import pwd

        return f"user {pwd.getpwuid(number).pw_name}"
    except (ImportError, KeyError):
        return f"user {number}"


def _me() -> str:
    return _user(os.geteuid()) if hasattr(os, "geteuid") else "this user"
