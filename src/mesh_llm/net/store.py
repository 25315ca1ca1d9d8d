"""What is kept of one mesh: a directory below `Home.mesh`, or memory for a node that is to leave nothing behind."""

from pathlib import Path

import structlog

from mesh_llm.core.ids import MeshId
from mesh_llm.runtime.files import write_atomic

PEERS_FILE = "peers.json"
"""Last-known peers."""
INVITES_FILE = "invites.json"
"""Invites that were made here."""
_CURRENT = "current"

_log = structlog.get_logger(__name__)


class MeshStore:
    """Named byte strings of one mesh; writing is atomic, 0600."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._memory: dict[str, bytes] = {}
        self._failing: set[str] = set()

    def read(self, name: str) -> bytes | None:
        """What was written under this name, if anything was."""
        if self._directory is None:
            return self._memory.get(name)
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Keep it. Raises OSError."""
        if self._directory is None:
            self._memory[name] = data
        else:
            write_atomic(self._directory / name, data, 0o600)

    def try_write(self, name: str, data: bytes) -> bool:
        """Keep what this life can do without: a full disk must not stop what a node does. Says whether it is kept.

        It is asked for again and again; only the first failure of several in a row is logged as a warning.
        """
        try:
            self.write(name, data)
        except OSError as error:
            log = _log.debug if name in self._failing else _log.warning
            log("not kept for the next start", name=name, reason=error.strerror or str(error))
            self._failing.add(name)
            return False
        self._failing.discard(name)
        return True


class MeshStores:
    """The meshes that a home knows, and which one it belongs to at present."""

    def __init__(self, root: Path | None) -> None:
        """`root` None: everything in memory."""
        self._root = root
        self._current: MeshId | None = None

    def current(self) -> MeshId | None:
        """The mesh that this home was last a member of."""
        if self._root is None:
            return self._current
        try:
            text = (self._root / _CURRENT).read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return MeshId(text) if len(text) == 64 else None

    def open(self, mesh: MeshId) -> MeshStore:
        """The store of this mesh."""
        return MeshStore(None if self._root is None else self._root / mesh[:32])

    def choose(self, mesh: MeshId) -> None:
        """Make this mesh the present one."""
        self._current = mesh
        if self._root is not None:
            write_atomic(self._root / _CURRENT, mesh.encode() + b"\n", 0o600)
