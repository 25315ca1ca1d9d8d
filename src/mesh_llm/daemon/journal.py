"""The journal: every event of a node with its time, in a file. A replay compares the effects with the recorded ones."""

from hashlib import blake2b
from io import FileIO
from pathlib import Path
from random import Random
from typing import BinaryIO, TypeVar

import msgspec
import structlog

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.node import Node
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.runtime.supervision import WriteHealth

FORMAT = 1
MOST_BYTES = 1 << 30
MOST_WAITING = 16 << 20

_log = structlog.get_logger(__name__)

_encode = msgspec.json.Encoder(order="deterministic").encode


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first line: how to make the node again."""

    format: int
    config: NodeConfig
    seed: int


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One event. `effects`: the types of its effects; `digest`: over all of them. Both are empty if handling failed."""

    now: float
    event: AnyEvent
    effects: tuple[str, ...] = ()
    digest: str = ""


class Journal:
    """Writes a journal. Each line is handed to the operating system at once; past `most_bytes` no more are written.

    Lines that a full disk does not take wait in memory, up to `MOST_WAITING` bytes: a journal with a gap could not be
    replayed. When more wait, it ends where it is. Writing never raises.
    """

    def __init__(self, path: Path, config: NodeConfig, seed: int, most_bytes: int = MOST_BYTES) -> None:
        """Begin a new file.

        Raises:
            MeshError: `journal_not_writable`.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: FileIO | None = FileIO(path, "wb")
        except OSError as error:
            raise MeshError(
                code="journal_not_writable",
                message=f"The journal {path} cannot be written: {error.strerror}.",
                hint="Give another file with --journal, or leave the option out.",
            ) from error
        self._most_bytes = most_bytes
        self._written = 0
        self._waiting = bytearray()
        self._health = WriteHealth("the journal", "Its lines wait in memory.")
        self._write(_encode(Head(format=FORMAT, config=config, seed=seed)))

    @property
    def full(self) -> bool:
        """Whether the journal has ended; later events are not recorded."""
        return self._file is None

    def record(self, now: float, event: AnyEvent, effects: list[AnyEffect] | None) -> None:
        """Record an event. `effects` is None if handling it failed."""
        if self._file is None:
            return
        names = () if effects is None else tuple(type(effect).__name__ for effect in effects)
        entry = Entry(now=now, event=event, effects=names, digest="" if effects is None else digest(effects))
        self._write(_encode(entry))

    def close(self) -> None:
        """End the file. Idempotent."""
        if self._file is not None:
            self._flush()
            self._health.close()
            self._file.close()
            self._file = None

    def _write(self, line: bytes) -> None:
        if self._file is None:
            return
        self._written += len(line) + 1
        if self._written > self._most_bytes:
            self.close()
            return
        self._waiting += line + b"\n"
        self._flush()
        if len(self._waiting) > MOST_WAITING:
            self._waiting.clear()
            _log.error("the journal ends here: too many lines waited for free space on its disk")
            self.close()

    def _flush(self) -> None:
        try:
            while self._waiting and self._file is not None:
                count = self._file.write(self._waiting) or 0
                del self._waiting[:count]
        except OSError as error:
            self._health.failed(error)
        else:
            self._health.wrote()


def digest(effects: list[AnyEffect]) -> str:
    """A short hash over the effects with all their fields."""
    return blake2b(_encode(effects), digest_size=8).hexdigest()


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first difference of a replay: the line, the event, and the effects then and now."""

    line: int
    now: float
    event: AnyEvent
    recorded: tuple[str, ...]
    replayed: tuple[AnyEffect, ...]


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a replay: the number of events, and the first difference if there is one."""

    events: int
    difference: Difference | None = None


def replay(path: Path) -> Replay:
    """Run a journal through the core again.

    A last line that was cut off (the machine died) is left out. An event whose handling failed then is handled again,
    so that its failure shows.

    Raises:
        MeshError: `journal_unreadable`.
    """
    try:
        with path.open("rb") as file:
            return _replay(path, file)
    except OSError as error:
        raise _unreadable(path, error.strerror or "it cannot be opened") from error


def _replay(path: Path, file: BinaryIO) -> Replay:
    head = _decoded(file.readline(), Head, path, 1)
    if head.format != FORMAT:
        raise _unreadable(path, f"its format is {head.format}, and this version reads {FORMAT}")
    node = Node(head.config, Random(head.seed))  # noqa: S311 - it must be repeatable
    events = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        events += 1
        entry = _decoded(line, Entry, path, events + 1)
        effects = node.handle(entry.event, entry.now)
        if digest(effects) != entry.digest:
            difference = Difference(
                line=events + 1, now=entry.now, event=entry.event, recorded=entry.effects, replayed=tuple(effects)
            )
            return Replay(events=events, difference=difference)
    return Replay(events=events)


_Line = TypeVar("_Line", Head, Entry)


def _decoded(line: bytes, kind: type[_Line], path: Path, number: int) -> _Line:
    try:
        return msgspec.json.decode(line, type=kind)
    except UNREADABLE as error:
        raise _unreadable(path, f"line {number}: {error}") from error


def _unreadable(path: Path, why: str) -> MeshError:
    return MeshError(
        code="journal_unreadable",
        message=f"{path} cannot be replayed: {why}.",
        hint="A journal is written by `mesh-llm --journal FILE`, and replayed by the version that wrote it.",
        status=400,
    )
