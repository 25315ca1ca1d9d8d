"""The slots of a llama-server that runs in a child process of this node: list them, save one, restore one.

The child serves a Unix socket of its own for this, in a directory that only this user can enter. A connection carries
one question: a line of JSON and, to save or restore, the descriptor of a file in memory (memfd) that the caller made.
So no prompt is ever written to a disk in the clear, and the child needs no key for encryption. Nothing of this can be
reached over HTTP. Linux.
"""

import hmac
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from mesh_llm.core.performance.speculation import Guesses
from mesh_llm.core.types.errors import UNREADABLE

LIST_SECONDS = 5.0
MOVE_SECONDS = 60.0
_READ_SECONDS = 10.0
_MOST_QUESTION = 4096
_MOST_ANSWER = 1 << 20
_BACKLOG = 8


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One slot.

    Attributes:
        id: its number.
        busy: it works on a request.
        task: the number of its last task, rising over all slots; -1 before the first.
        tokens: tokens in its cache.
    """

    id: int
    busy: bool = msgspec.field(name="is_processing", default=False)
    task: int = msgspec.field(name="id_task", default=-1)
    tokens: int = msgspec.field(name="n_prompt_tokens", default=0)


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """What was saved or restored: tokens, and bytes of the state."""

    tokens: int
    size: int


class SlotError(Exception):
    """The engine did not do it, or did not answer; the text says why. The slot may have been emptied."""


class SlotRefusedError(SlotError):
    """The engine read what it was given, and did not take it."""


class _Question(msgspec.Struct, frozen=True, kw_only=True):
    action: str
    key: str
    slot: int = 0
    seconds: float = LIST_SECONDS


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    error: str = ""
    refused: bool = False
    slots: tuple[Slot, ...] = ()
    moved: Moved | None = None
    guesses: Guesses | None = None


class SlotAccess(Protocol):
    """The slots, in the process that has them. The methods block, and raise SlotError."""

    def list(self, seconds: float) -> tuple[Slot, ...]:
        """All slots now."""
        ...

    def move(self, slot: int, path: str, seconds: float, *, save: bool) -> Moved:
        """Save a slot to a file, or restore it from one. Waits until the slot is idle, at most `seconds`."""
        ...

    def speculate(self, *, on: bool) -> None:
        """Guess tokens ahead from now on, or not: at once, also in answers under way."""
        ...

    def guesses(self) -> Guesses:
        """What guesses gain."""
        ...


@dataclass(frozen=True)
class SlotControl:
    """This node's side. `path`: the child's socket; `key`: what it requires."""

    path: Path
    key: str

    async def list(self) -> tuple[Slot, ...]:
        """All slots now. Raises SlotError."""
        return (await self._ask(_Question(action="list", key=self.key))).slots

    async def save(self, slot: int, file: int, seconds: float = MOVE_SECONDS) -> Moved:
        """Write a slot's state to an open file in memory, once the slot is idle. Raises SlotError."""
        return await self._move("save", slot, file, seconds)

    async def restore(self, slot: int, file: int, seconds: float = MOVE_SECONDS) -> Moved:
        """Replace a slot's state by what an open file in memory holds, once the slot is idle.

        Only for what this node has written or checked itself: llama.cpp trusts the file.

        Raises:
            SlotRefusedError: the engine refused it, and the slot is empty.
            SlotError: the slot was busy for too long, or the engine did not answer.
        """
        return await self._move("restore", slot, file, seconds)

    async def speculate(self, *, on: bool) -> None:
        """Guess tokens ahead from now on, or not: at once, also in answers under way. Raises SlotError."""
        await self._ask(_Question(action="guess" if on else "no guesses", key=self.key))

    async def guesses(self) -> Guesses:
        """What its guesses gain. Raises SlotError."""
        found = (await self._ask(_Question(action="guesses", key=self.key))).guesses
        if found is None:
            raise SlotError("the engine's answer says nothing")
        return found

    async def _move(self, action: str, slot: int, file: int, seconds: float) -> Moved:
        question = _Question(action=action, key=self.key, slot=slot, seconds=seconds)
        moved = (await self._ask(question, file)).moved
        if moved is None:
            raise SlotError("the engine's answer says nothing")
        return moved

    async def _ask(self, question: _Question, file: int | None = None) -> _Answer:
        import asyncio  # the child's side, which imports this too, needs none

        # Duplicated: a caller that is cancelled may close its file while the thread still sends it.
        own = None if file is None else os.dup(file)
        try:
            return await asyncio.to_thread(self._exchange, question, own)
        except (OSError, *UNREADABLE) as error:
            raise SlotError(f"the engine did not answer: {error}") from error

    def _exchange(self, question: _Question, file: int | None) -> _Answer:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(question.seconds + _READ_SECONDS)
                connection.connect(str(self.path))
                line = msgspec.json.encode(question) + b"\n"
                if file is None:
                    connection.sendall(line)
                else:
                    socket.send_fds(connection, [line], [file])
                answer = msgspec.json.decode(_read_line(connection, _MOST_ANSWER), type=_Answer)
        finally:
            if file is not None:
                os.close(file)
        if answer.error:
            raise SlotRefusedError(answer.error) if answer.refused else SlotError(answer.error)
        return answer


class SlotListener:
    """The child's side. It listens from the beginning, so that nobody finds it missing once the engine is ready."""

    def __init__(self, path: Path) -> None:
        """Bind the socket. Raises OSError."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen(_BACKLOG)

    def serve(self, key: str, access: SlotAccess) -> None:
        """Answer questions, one after the other, until the process ends."""
        while True:
            connection, _ = self._socket.accept()
            with connection:
                try:
                    connection.settimeout(_READ_SECONDS)
                    _answer(connection, key, access)
                except OSError:
                    # The caller has gone.
                    continue

    def close(self) -> None:
        """Refuse questions from now on."""
        self._socket.close()
        self._path.unlink(missing_ok=True)


def _answer(connection: socket.socket, key: str, access: SlotAccess) -> None:
    data, files, _, _ = socket.recv_fds(connection, _MOST_QUESTION, 1)
    try:
        if data and not data.endswith(b"\n"):
            data += _read_line(connection, _MOST_QUESTION)
        try:
            answer = _answered(msgspec.json.decode(data, type=_Question), files, key, access)
        except UNREADABLE as error:
            answer = _Answer(error=f"not a question: {error}")
        connection.sendall(msgspec.json.encode(answer) + b"\n")
    finally:
        for file in files:
            os.close(file)


def _answered(question: _Question, files: list[int], key: str, access: SlotAccess) -> _Answer:
    if not hmac.compare_digest(question.key.encode(), key.encode()):
        return _Answer(error="wrong key")
    try:
        if question.action == "list":
            return _Answer(slots=access.list(question.seconds))
        if question.action in {"guess", "no guesses"}:
            access.speculate(on=question.action == "guess")
            return _Answer()
        if question.action == "guesses":
            return _Answer(guesses=access.guesses())
        if question.action in {"save", "restore"} and files:
            # The descriptor's own name: reading it needs no file system, and works for a process that is not dumpable.
            path = f"/proc/self/fd/{files[0]}"
            save = question.action == "save"
            return _Answer(moved=access.move(question.slot, path, question.seconds, save=save))
    except SlotError as error:
        return _Answer(error=str(error), refused=isinstance(error, SlotRefusedError))
    return _Answer(error="unknown action")


def _read_line(connection: socket.socket, most: int) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        data = connection.recv(65536)
        if not data or len(line) > most:
            break
        line += data
    return bytes(line)
