"""Switches the speculation of engines that run here, without another start: off while it would do harm, then on.

llama-server gives no log probabilities for tokens that it guessed (server-context.cpp leaves `result.probs` empty), and
has no option of a request to switch that. So an engine guesses nothing while it answers such a request.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from mesh_llm.core.performance.speculation import Answer, Speculating, after
from mesh_llm.engine.slots import SlotError
from mesh_llm.runtime.supervision import TaskScope

_log = structlog.get_logger(__name__)


class Switch(Protocol):
    """Reaches one engine; `engine.slots.SlotControl`."""

    async def speculate(self, *, on: bool) -> None:
        """Guess tokens ahead from now on, or not. Raises SlotError."""
        ...


@dataclass
class _Launch:
    """One engine. `pauses`: how many want it not to guess; `on`: what it was asked last.

    `known`: whether guesses pay, where that decides; None where the user did. `warm`: it has answered before: the first
    answer is slower than all others, and says nothing.
    """

    switch: Switch
    known: Speculating | None = None
    warm: bool = False
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
            auto: it guesses only while that pays.
        """
        if kind:
            self._kinds[model, term] = kind
        if switch is not None:
            self._launches[model, term] = _Launch(switch, Speculating() if auto else None)

    def answered(self, model: str, term: int, answer: Answer) -> None:
        """A launch answered alone on this machine: guess on, or stop that, by what it gained."""
        launch = self._launches.get((model, term))
        if launch is None or launch.known is None:
            return
        if not launch.warm:
            launch.warm = True
            return
        before, launch.known = launch.known, after(launch.known, answer)
        if launch.known.on != before.on:
            gain = None if before.gain is None else round(before.gain, 3)
            _log.info("speculation judged", model=model, on=launch.known.on, gain=gain, next=launch.known.rest)
            self._scope.spawn(self._apply(model, launch), f"guess {model}")

    def closed(self, model: str, term: int) -> None:
        """A launch has ended."""
        self._launches.pop((model, term), None)
        self._kinds.pop((model, term), None)

    def describe(self, model: str, term: int) -> str:
        """How a launch guesses, and what that gains, in words; empty if it does not."""
        kind, launch = self._kinds.get((model, term), ""), self._launches.get((model, term))
        if not kind or launch is None or launch.known is None:
            return kind
        if not launch.known.on:
            return f"{kind}, off for the next tokens"
        gain = launch.known.gain
        return kind if gain is None else f"{kind}, gains {gain:.0%}"

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

    async def _apply(self, model: str, launch: _Launch) -> None:
        async with launch.lock:
            on = not launch.pauses and (launch.known is None or launch.known.on)
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
