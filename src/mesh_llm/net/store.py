"""What is kept of one mesh: a directory below `Home.mesh`, or memory for a node that is to leave nothing behind."""

from collections.abc import Callable
from pathlib import Path

import structlog

from mesh_llm.core.ids import MeshId
from mesh_llm.runtime.files import write_atomic
from mesh_llm.runtime.supervision import WriteHealth

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
        self._unwritten: dict[str, bytes] = {}
        self._put_off: dict[str, Callable[[], bytes]] = {}
        self._health = WriteHealth("what is known of the mesh", "It is written as soon as that works.")

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
        # An older text of the same file must not replace this one.
        self._unwritten.pop(name, None)

    def try_write(self, name: str, data: bytes) -> bool:
        """Keep what this life can do without: a full disk must not stop what a node does. Says whether it is kept.

        What is not kept is written by a later `retry`.
        """
        self._unwritten[name] = data
        return self.retry()

    def put_off(self, name: str, data: Callable[[], bytes]) -> None:
        """Have something written by the next `write_put_off`, as it is then: for what changes many times a second."""
        self._put_off[name] = data

    def write_put_off(self) -> None:
        """Write what was put off, as `try_write` does. Never raises."""
        while self._put_off:
            name, data = self._put_off.popitem()
            self.try_write(name, data())

    def retry(self) -> bool:
        """Write what could not be written before; whether all is kept now. Never raises."""
        try:
            while self._unwritten:
                name, data = next(iter(self._unwritten.items()))
                self.write(name, data)
                self._unwritten.pop(name, None)
        except OSError as error:
            self._health.failed(error)
            return False
        self._health.wrote()
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
