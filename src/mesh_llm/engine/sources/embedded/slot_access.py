"""The slots of the llama-server in this process, through the library of `slot_library.py`.

Children import this: it needs nothing that takes long to import.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import msgspec

from mesh_llm.core.performance.speculation import Guesses
from mesh_llm.engine.slots import Moved, Slot, SlotError, SlotRefusedError
from mesh_llm.engine.sources.embedded.ggml import Ggml
from mesh_llm.engine.sources.embedded.guessing import EngineGuesses

_ROOM = 1 << 20
"""For an answer of the server, bytes: 256 slots need a third of it."""
_OUTCOMES = {-1: "the slot was busy for too long", -2: "the answer is too long", -3: "the engine failed"}


def load(library: Path) -> Any:
    """Load the library beside the engine's. Raises GgmlError, OSError."""
    # The engine's symbols become global, and the library finds them.
    Ggml()
    found = ctypes.CDLL(str(library), mode=os.RTLD_NOW)
    text = (ctypes.c_char_p, ctypes.c_size_t)
    found.mesh_llm_slots_open.restype = ctypes.c_void_p
    found.mesh_llm_slots_open.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    found.mesh_llm_slots_list.argtypes = [ctypes.c_void_p, ctypes.c_double, *text]
    found.mesh_llm_slots_move.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_double),
        *text,
    ]
    found.mesh_llm_guesses_install.restype = ctypes.c_int
    return found


class _Saved(msgspec.Struct):
    n_saved: int = 0
    n_written: int = 0
    n_restored: int = 0
    n_read: int = 0


class _Refused(msgspec.Struct):
    message: str = ""


class EngineSlots:
    """The slots of a server in this process; a SlotAccess. Any thread may call, one at a time."""

    def __init__(self, library: Any, server: Any, guesses: EngineGuesses | None = None) -> None:
        """Find the server's slots.

        Args:
            library: as of `load`.
            server: an xllamacpp.Server.
            guesses: decides how many tokens it guesses ahead; None where it guesses none, or is not asked.

        Raises:
            SlotError: its memory is not laid out as the library expects.
        """
        self._library = library
        self._server = server
        self._guesses = guesses
        # A Server holds nothing but a C++ shared pointer behind Python's own header.
        header = object.__basicsize__
        if type(server).__basicsize__ != header + 2 * ctypes.sizeof(ctypes.c_void_p):
            raise SlotError("the wheel's Server has another layout")
        inner = ctypes.c_void_p.from_address(id(server) + header).value
        self._context = self._library.mesh_llm_slots_open(inner, server.listening_address.encode())
        if not self._context:
            raise SlotError("the wheel's server has another layout than its source")
        self._answer = ctypes.create_string_buffer(_ROOM)

    def list(self, seconds: float) -> tuple[Slot, ...]:
        """All slots now."""
        code = self._library.mesh_llm_slots_list(self._context, seconds, self._answer, _ROOM)
        return msgspec.json.decode(self._checked(code), type=tuple[Slot, ...])

    def move(self, slot: int, path: str, seconds: float, *, save: bool) -> Moved:
        """Save a slot to a file, or restore it from one."""
        code = self._library.mesh_llm_slots_move(
            self._context, int(save), slot, path.encode(), seconds, self._answer, _ROOM
        )
        done = msgspec.json.decode(self._checked(code), type=_Saved)
        return Moved(tokens=done.n_saved or done.n_restored, size=done.n_written or done.n_read)

    def speculate(self, *, on: bool) -> None:
        """Guess tokens ahead from now on, or not."""
        self._deciding().on = on

    def guesses(self) -> Guesses:
        """What guesses gain."""
        return self._deciding().known

    def _deciding(self) -> EngineGuesses:
        if self._guesses is None:
            raise SlotError("this build of the engine cannot be switched")
        return self._guesses

    def _checked(self, code: int) -> bytes:
        if code < 0:
            raise SlotError(_OUTCOMES.get(code, f"status {code}"))
        if code:
            refused = msgspec.json.decode(self._answer.value, type=_Refused).message
            raise SlotRefusedError(refused or "the engine refused it")
        return self._answer.value
