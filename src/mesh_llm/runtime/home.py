"""A node's home: the directory of its files (`MESH_LLM_HOME`, default `~/.mesh-llm`), and which daemons use it.

One daemon locks the home: it has the key, the mesh and the listings. Clients and ephemeral nodes keep none of these.
They are guests: any number of them run beside it, each with its logs, its token and its socket in `guests/NUMBER`.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mesh_llm.core.types.errors import UNREADABLE, MeshError

if TYPE_CHECKING:
    # It takes longer to import than most commands take otherwise, and only daemons lock a home.
    from filelock import FileLock


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` with `data` and sync it to disk. Readers see the old or the new file, never a part."""
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
    """The daemon that uses a home, as `daemon.json` records it for the command line."""

    pid: int
    api_port: int
    console_port: int
    started: float
    model: str = ""
    console_host: str = "127.0.0.1"
    socket: str = ""
    """Path of the command line's socket, if it is not in the home's run directory."""
    role: str = "serve"


_MOST_GUESTS = 64


class Home:
    """Paths below one home directory. Creating it makes the directory, 0700.

    Raises:
        MeshError: `home_unusable`, `home_unwritable`: the directory cannot be made or read.
    """

    def __init__(self, root: Path, shared: Path | None = None) -> None:
        """`shared`: for a guest, the home beside whose node it runs."""
        self.root = root
        self.shared = shared or root
        """What all nodes of a home share is below this: `MESH_LLM_HOME`."""
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
        """Turn an OSError about a file of this home into a MeshError for the user; other errors pass.

        Raises:
            MeshError: `home_unusable`, `home_unwritable`.
        """
        try:
            yield
        except OSError as error:
            explained = explain_os_error(error, self.root)
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
    def owner_key(self) -> Path:
        """The secret of the person whose nodes these are, as hex, 0600; on one of the person's machines."""
        return self.shared / "owner-key"

    @property
    def ownership(self) -> Path:
        """An owner's statement that the node of this home is theirs."""
        return self.shared / "ownership"

    @property
    def trust(self) -> Path:
        """What this node knows of hosts that it checked by canaries, and recorded answers."""
        return self.root / "trust.json"

    @property
    def mesh(self) -> Path:
        """Data of the mesh: key or certificate, last-known peers, invites, revocations."""
        return self.root / "mesh"

    @property
    def quic_ports(self) -> Path:
        """The UDP ports of the mesh at the last run, to be bound again: invites have them."""
        return self.root / "quic-ports"

    @property
    def nostr_key(self) -> Path:
        """The Nostr secret that signs this home's public listings, as nsec, 0600; made at the first publication."""
        return self.root / "nostr.nsec"

    @property
    def publication(self) -> Path:
        """The public listing that the user of this home agreed to, 0600."""
        return self.root / "publication.json"

    @property
    def gpu_answer(self) -> Path:
        """What the user answered when a plugin for the GPU was offered."""
        return self.shared / "gpu.json"

    @property
    def responses(self) -> Path:
        """Answers to Responses that clients of this node can come back to; files 0600."""
        return self.root / "responses"

    @property
    def control_token(self) -> Path:
        """The secret with which scripts of the user call the running daemon's management API, 0600."""
        return self.root / "control-token"

    @property
    def run(self) -> Path:
        """Files of a running node, for its user only (0700): the command line's socket."""
        return self.root / "run"

    @property
    def console_link(self) -> Path:
        """A page with a sign-in code that forwards the user's browser to the console, 0600."""
        return self.run / "console.html"

    @property
    def cache(self) -> Path:
        """Data that can be made again: the RPC plugin, measurements. Shared: each file is replaced as a whole."""
        return self.shared / "cache"

    @property
    def own_cache(self) -> Path:
        """Data that can be made again, in files that one node at a time may change."""
        return self.root / "cache"

    @property
    def is_guest(self) -> bool:
        """Whether this is the place of a client or an ephemeral node in a home."""
        return self.root != self.shared

    @property
    def _holder(self) -> Path:
        return self.root / "daemon.json"

    def holder(self) -> Holder | None:
        """The daemon that last used this home, running or not; None if there was none.

        Raises:
            MeshError: `home_unusable`: the record belongs to another user.
        """
        try:
            with self.explained():
                return msgspec.json.decode(self._holder.read_bytes(), type=Holder)
        except (FileNotFoundError, *UNREADABLE):
            return None

    def write_holder(self, holder: Holder) -> None:
        """Record which daemon uses this home."""
        write_atomic(self._holder, msgspec.json.encode(holder))

    def clear_holder(self) -> None:
        """Record that no daemon uses this home."""
        self._holder.unlink(missing_ok=True)

    def guests(self) -> list["Home"]:
        """The places of guests, running or not, in the order of their numbers."""
        with self.explained(), suppress(FileNotFoundError):
            numbers = sorted(int(path.name) for path in self._guests.iterdir() if path.name.isdigit())
            return [Home(self._guests / str(number), self.shared) for number in numbers]
        return []

    @property
    def _guests(self) -> Path:
        return self.shared / "guests"

    def enter(self, *, guest: bool) -> tuple["Home", "FileLock"]:
        """Lock a place for this process: this home or, for a guest, the first free place in it.

        Raises:
            MeshError: see `lock`; `home_full` if no place is left.
        """
        from filelock import FileLock, Timeout

        if not guest:
            return self, self.lock()
        with self.explained():
            for number in range(1, _MOST_GUESTS + 1):
                place = Home(self._guests / str(number), self.shared)
                lock = FileLock(place.root / "lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                self._keep_others_from_writing()
                return place, lock
        raise MeshError(
            code="home_full",
            message=f"{_MOST_GUESTS} clients run with the home {self.shared} already.",
            hint="Stop one: mesh-llm stop --port PORT. Or give this one its own home: MESH_LLM_HOME=DIR mesh-llm ...",
            status=409,
        )

    def lock(self) -> "FileLock":
        """Lock the home for this process. The operating system releases the lock when the process ends.

        Raises:
            MeshError: `home_in_use`, if another daemon uses it; `home_unusable`, `home_unwritable`.
        """
        from filelock import FileLock, Timeout

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
                hint="Stop it with `mesh-llm stop`, or give this one its own home: MESH_LLM_HOME=DIR mesh-llm ... "
                "Only clients (--client) can run beside it.",
                status=409,
            ) from None
        self._keep_others_from_writing()
        return lock

    def _keep_others_from_writing(self) -> None:
        """Remove other users' write permission, with which they could replace the user's private files.

        The home may be older than this check, or was made with a umask of 0, as in some containers. Sets the umask, so
        that this process and its children make nothing that other users may write to.
        """
        os.umask(os.umask(0o022) | 0o022)
        for directory in (self.root, self._guests, self.mesh, self.cache, self.logs):
            with suppress(OSError):
                status = directory.stat()
                mode = stat.S_IMODE(status.st_mode)
                if status.st_uid == _uid() and mode & 0o022:
                    directory.chmod(mode & ~0o022)


def _uid() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


_DISK = {
    errno.ENOSPC: "Make room on that disk",
    errno.EDQUOT: "Make room: your quota on that disk is used up",
    errno.EROFS: "Make that disk writable",
}
_ELSEWHERE = "keep the node's files on another one: MESH_LLM_HOME=DIR mesh-llm ..."


def home_root() -> Path:
    """`MESH_LLM_HOME`, or `.mesh-llm` in the user's home directory. Raises MeshError(home_unknown)."""
    named = os.environ.get("MESH_LLM_HOME")
    return expand(named) if named else user_home() / ".mesh-llm"


def user_home() -> Path:
    """The user's home directory, or `MESH_LLM_HOME` for a user without one, as in many containers.

    Raises:
        MeshError: `home_unknown`, if neither exists.
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
    """A path with `~` and `~USER` replaced. Raises MeshError(home_unknown) if there is no such user or home."""
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
    """The path in an error; empty if it has none. `io.FileIO` puts in what it was given, also a Path."""
    name: object = error.filename
    if isinstance(name, Path):
        return str(name)
    return os.fsdecode(name) if isinstance(name, str | bytes) else ""


def explain_os_error(error: OSError, root: Path) -> MeshError | None:
    """The error for the user if an OSError concerns a file below `root`, else None.

    A full or read-only disk counts even if the error names no file.
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
            hint=f"{_DISK[error.errno]}, or {_ELSEWHERE}",
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
        # For example after `sudo mesh-llm`.
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
    """The path, or the nearest directory above it that exists."""
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
