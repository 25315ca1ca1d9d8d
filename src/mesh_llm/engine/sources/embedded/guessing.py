"""How many tokens the server of this process guesses ahead: it asks before each pass, through `guesses.h`."""

import ctypes
from typing import Any

from mesh_llm.core.performance.speculation import GuessBudget, Guesses, Pass
from mesh_llm.engine.slots import SlotError

_ALL = -1
"""As many as the engine is set to."""

_DECIDE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_double),
    *(ctypes.c_int, ctypes.c_double),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
)


class EngineGuesses:
    """Decides for one server. It must be made before the server is, and live as long."""

    def __init__(self, library: Any, most: int, *, while_it_pays: bool) -> None:
        """Be asked from now on.

        Args:
            library: as `slot_access.load` returns it.
            most: tokens of the widest guess.
            while_it_pays: guess only what gains; else always as much as the engine is set to.

        Raises:
            SlotError: this build of the engine does not ask.
        """
        self._budget = GuessBudget(most)
        self._while_it_pays = while_it_pays
        self.on = True
        """It guesses at all. Any thread may set it: it is read before each pass."""
        # The library keeps only its address.
        self._callback = _DECIDE(self._decide)
        if not library.mesh_llm_guesses_install(self._callback):
            raise SlotError("this build of the engine cannot be switched")

    @property
    def known(self) -> Guesses:
        """What guesses gain."""
        return self._budget.guesses

    def _decide(
        self,
        answers: int,
        tokens: int,
        guessed: int,
        seconds: float,
        read: int,
        reading: float,
        coming: int,
        begun: int,
        unread: int,
    ) -> int:
        """The callback, on the server's thread: see `Decide` in guesses.h."""
        budget = self._budget
        if seconds > 0.0:
            budget.passed(Pass(answers, tokens, guessed, seconds, read, reading))
        if begun:
            budget.began(coming)
        width = budget.width(coming, unread)
        if not self.on:
            return 0
        return width if self._while_it_pays else _ALL
