"""The speculation of engines that run here: what guesses gain, and off while they would do harm.

Whether a guess pays is decided inside the engine, before each pass (`core/performance/speculation.py`). Here the node
learns of it.

llama-server gives no log probabilities for tokens that it guessed (server-context.cpp leaves `result.probs` empty), and
has no option of a request to switch that. So an engine guesses nothing while it answers such a request.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from mesh_llm.core.performance.speculation import Guesses
from mesh_llm.engine.slots import SlotError
from mesh_llm.runtime.supervision import TaskScope

_log = structlog.get_logger(__name__)


class Switch(Protocol):
    """Reaches one engine; `engine.slots.SlotControl`."""

    async def speculate(self, *, on: bool) -> None:
        """Guess tokens ahead from now on, or not. Raises SlotError."""
        ...

    async def guesses(self) -> Guesses:
        """What guesses gain. Raises SlotError."""
        ...


@dataclass
class _Launch:
    """One engine. `pauses`: how many want it not to guess; `on`: what it was asked last.

    `known`: what guesses gained when it was last asked; `asking`: it is being asked.
    """

    switch: Switch
    auto: bool
    known: Guesses = field(default_factory=Guesses)
    asking: bool = False
    pauses: int = 0
    on: bool = True
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class EngineGuessing:
    """The speculation of this node's engines; a `Guessing` of core.types.ports."""

    def __init__(self) -> None:
        self._launches: dict[tuple[str, int], _Launch] = {}
        self._kinds: dict[tuple[str, int], str] = {}
        self._scope = TaskScope("speculation")

    def opened(self, model: str, term: int, switch: Switch | None, *, kind: str = "", auto: bool = False) -> None:
        """A launch is ready.

        Args:
            model: its name.
            term: the launch's number.
            switch: None where it does not guess, or cannot be switched.
            kind: of its guesses, as llama.cpp names it; empty for none.
            auto: nobody named that kind: it guesses only while that pays.
        """
        if kind:
            self._kinds[model, term] = kind
        if switch is not None:
            self._launches[model, term] = _Launch(switch, auto)

    def ended(self, model: str, term: int) -> None:
        """A launch has ended an answer: look at what its guesses gain."""
        launch = self._launches.get((model, term))
        if launch is not None and not launch.asking:
            launch.asking = True
            self._scope.spawn(self._look(model, launch), f"guesses {model}")

    def closed(self, model: str, term: int) -> None:
        """A launch has ended."""
        self._launches.pop((model, term), None)
        self._kinds.pop((model, term), None)

    def describe(self, model: str, term: int) -> str:
        """How a launch guesses, and what that gains, in words; empty if it does not."""
        kind, launch = self._kinds.get((model, term), ""), self._launches.get((model, term))
        if not kind or launch is None:
            return kind
        known = launch.known
        words = [f"{kind} (auto)" if launch.auto else kind]
        if known.gain is None:
            words.append("nothing guessed yet")
        else:
            words.append(f"{'gains' if known.gain >= 0.0 else 'loses'} {abs(known.gain):.0%}")
            words.append(f"{known.accepted / max(1, known.guessed):.0%} of guesses right")
        if launch.auto and known.waits:
            words.append("waits: the last guesses did not pay")
        return ", ".join(words)

    def active(self, model: str, term: int) -> bool:
        """Whether a launch guesses, and can be switched."""
        return (model, term) in self._launches

    async def pause(self, model: str, term: int) -> Callable[[], None]:
        """Let a launch guess nothing until the result is called. An engine that does not answer goes on as it was."""
        launch = self._launches.get((model, term))
        if launch is None:
            return _nothing
        launch.pauses += 1
        resumed = False

        def resume() -> None:
            nonlocal resumed
            if not resumed:
                resumed = True
                launch.pauses -= 1
                if self.active(model, term):
                    self._scope.spawn(self._apply(model, launch), f"guess {model}")

        try:
            await self._apply(model, launch)
        except BaseException:
            resume()
            raise
        return resume

    async def close(self) -> None:
        """Stop. Engines stay as they are."""
        await self._scope.close()

    async def _look(self, model: str, launch: _Launch) -> None:
        try:
            known = await launch.switch.guesses()
        except SlotError as error:
            _log.debug("guesses not known", model=model, reason=str(error))
            return
        finally:
            launch.asking = False
        before, launch.known = launch.known, known
        if launch.auto and known.waits != before.waits:
            gain = None if known.gain is None else round(known.gain, 3)
            _log.info("speculation judged", model=model, on=not known.waits, gain=gain)

    async def _apply(self, model: str, launch: _Launch) -> None:
        async with launch.lock:
            on = not launch.pauses
            if on == launch.on:
                return
            # If this is cancelled, the engine may have heard it or not.
            launch.on = on
            try:
                await launch.switch.speculate(on=on)
            except SlotError as error:
                launch.on = not on
                _log.warning("speculation not switched", model=model, on=on, reason=str(error))


def _nothing() -> None:
    return None
