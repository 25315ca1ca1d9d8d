"""JSON files that keep what parts of the node know over a restart. They are bounded, and may be damaged."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.runtime.home import write_atomic

_SAVE_SECONDS = 10.0
_log = structlog.get_logger(__name__)

State = TypeVar("State")


def read_state(path: Path | None, kind: type[State], most: int, about: str) -> tuple[State | None, str]:
    """What was saved, and what is wrong with the file, as the end of a sentence.

    None: nothing that can be used; if the file is damaged, that is logged. `kind`: of the state; `most`: bytes of the
    file; `about`: what it is, for the log.
    """
    if path is None:
        return None, ""
    try:
        with path.open("rb") as opened:
            data = opened.read(most + 1)
        if len(data) <= most:
            return msgspec.json.decode(data, type=kind), ""
        damage, reason = "is too large", ""
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        damage, reason = "cannot be read", str(error)
    except UNREADABLE as error:
        damage, reason = "is damaged", str(error)
    _log.warning("a saved state is not used", about=about, file=str(path), damage=damage, reason=reason)
    return None, damage


def write_state(path: Path, state: object, about: str) -> None:
    """Save a state. Where that fails, it is logged."""
    try:
        write_atomic(path, msgspec.json.encode(state))
    except OSError as error:
        _log.warning("a state is not saved", about=about, file=str(path), reason=str(error))


class StateFile:
    """Saves a state soon after each change, and not too often."""

    def __init__(self, path: Path | None, about: str, present: Callable[[], object]) -> None:
        """`path`: None: nothing is saved. `about`: as in `read_state`. `present`: the state; None: none yet."""
        self._path = path
        self._about = about
        self._present = present
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """There is something new to save."""
        self._changed.set()

    async def keep(self) -> None:
        """Save the state when it has changed, at most every few seconds; until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.to_thread(self.save)
            await asyncio.sleep(_SAVE_SECONDS)

    def save(self) -> None:
        """Write the state. Where that fails it stays in memory, and is written after the next change."""
        if self._path is not None and (state := self._present()) is not None:
            write_state(self._path, state, self._about)
