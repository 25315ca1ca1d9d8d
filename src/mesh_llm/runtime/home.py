"""Where a daemon keeps its things, and who holds the place: `MESH_LLM_HOME`, default `~/.mesh-llm`."""

import os
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from mesh_llm.core.errors import MeshError
from mesh_llm.runtime.files import write_atomic


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon that holds a home: how the CLI finds it."""

    pid: int
    api_port: int
    console_port: int
    started: float
    model: str = ""
    console_host: str = "127.0.0.1"


class Home:
    """Paths below one home directory. Creating it makes the directory, 0700."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    @classmethod
    def default(cls) -> "Home":
        """The home that the environment names."""
        return cls(Path(os.environ.get("MESH_LLM_HOME") or Path.home() / ".mesh-llm").expanduser())

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
        """The secret that the CLI shows to the running daemon's management API, 0600."""
        return self.root / "control-token"

    @property
    def cache(self) -> Path:
        """Things that can be made again: the RPC plugin, measurements."""
        return self.root / "cache"

    @property
    def _holder(self) -> Path:
        return self.root / "daemon.json"

    def holder(self) -> Holder | None:
        """The daemon that last wrote itself down here, running or not; None if there is none."""
        try:
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
            MeshError: `home_in_use`, when another daemon holds it.
        """
        lock = FileLock(self.root / "lock")
        try:
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
        return lock
