"""What hosts announce, corrected by what this node saw of them: context, speeds, and memory for split models.

A correction is this node's own view. No other node learns of it, and it ends: with the next launch of the model there,
when the host does what it announces, when the user says so, and after a while in any case. It may have been wrong: a
machine was busy, or a link was slow.

Everything here is a value or a rule; time is an argument.
"""

from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from statistics import median
from typing import NamedTuple

import msgspec

from mesh_llm.core.types.errors import size
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId

_HOUR = 3600.0
_LONGEST = 24 * _HOUR
_STUBBORN = 3
"""So often corrected, a correction outlasts the launches that it was made for: restarting does not shed it."""
_MOST = 256
"""Corrections, and hosts whose speeds are watched."""

_KEPT = 8
_LEAST_ANSWERS = 5
_LEAST_SECONDS = 4.0
"""Answers that a speed is judged by come from a time as long as this at least: one bad moment is none of the host's."""
_SLOW = 0.5
"""Part of the announced speed below which a host is corrected."""
_SLOW_PROMPTS = 1 / 3
"""The same for prompts: nobody announces how fast it reads them. That is foretold from how fast the machine is."""
_AS_ANNOUNCED = 0.7
"""Part of the announced speed from which on it counts again."""
_IN_LUMPS = 2.0
"""Tokens that arrive at once, on average, where something between the engine and this node holds them up."""


class Kind(StrEnum):
    """What was announced: tokens of context, tokens a second of an answer or a prompt, bytes for a split model."""

    CONTEXT = "context"
    SPEED = "speed"
    PROMPTS = "prompts"
    MEMORY = "memory"


class Life(NamedTuple):
    """One launch of a model on a host."""

    incarnation: Incarnation
    term: int


class Correction(msgspec.Struct, frozen=True, kw_only=True):
    """One announced figure that is not used, and what this node uses instead.

    Attributes:
        node, model: the host, and of which model.
        kind: of the figure; it says the unit.
        announced: what the host announces.
        seen: what this node saw: the length of a prompt that was refused, a speed, the bytes that did not come.
        at: when that was seen last, on the node's clock.
        until: when the host is believed again.
        life: the launch that it is about.
        times: how often the host was corrected in this.
    """

    node: NodeId
    model: ModelName
    kind: Kind
    announced: float
    seen: float
    at: float
    until: float
    life: Life
    times: int = 1


class TimedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one answer, or the reading of its prompt, was as this node saw it; and as the host says.

    Attributes:
        node, model, term: who answered.
        kind: SPEED or PROMPTS.
        tokens: of which that is the speed.
        start: tokens before them that the host had in a cache.
        seen: tokens a second here, without the round trip.
        said: tokens a second as the host counted them; 0.0: it did not say.
        lump: tokens that arrived at once on average. Where it is large, the host may not be at fault.
    """

    node: NodeId
    model: ModelName
    term: int
    kind: Kind
    tokens: int
    seen: float
    said: float = 0.0
    lump: float = 1.0
    start: int = 0


class _Measured(NamedTuple):
    at: float
    announced: float
    answer: TimedAnswer


_Key = tuple[NodeId, ModelName, Kind]


class Corrections:
    """All corrections of one node. The methods that learn return the correction where it is new or has changed."""

    def __init__(self) -> None:
        self._entries: dict[_Key, Correction] = {}
        self._answers: dict[_Key, tuple[Life, deque[_Measured]]] = {}
        self._checked = float("-inf")

    def refused(
        self, node: NodeId, model: ModelName, life: Life, *, announced: int, tokens: int, now: float
    ) -> Correction | None:
        """A host refused a prompt of so many tokens, or broke its answer off there, below its announced context."""
        before = self._current(node, model, Kind.CONTEXT, life)
        if not 0 < tokens < announced or (before is not None and before.seen <= tokens):
            return None
        return self._correct(node, model, Kind.CONTEXT, life, announced=announced, seen=tokens, now=now)

    def taken(self, node: NodeId, model: ModelName, life: Life, *, tokens: int) -> bool:
        """A host answered a prompt of so many tokens. True where its announced context counts again."""
        entry = self._current(node, model, Kind.CONTEXT, life)
        if entry is None or tokens < entry.seen:
            return False
        self._entries[node, model, Kind.CONTEXT] = msgspec.structs.replace(entry, until=entry.at)
        return True

    def failed(
        self, node: NodeId, model: ModelName, life: Life, *, announced: int, wanted: int, now: float
    ) -> Correction | None:
        """A host did not give `wanted` bytes of the memory that it announces. The layout of the group does without."""
        if not 0 < wanted <= announced:
            return None
        return self._correct(node, model, Kind.MEMORY, life, announced=announced, seen=wanted, now=now)

    def timed(self, answer: TimedAnswer, life: Life, *, announced: float, now: float) -> bool:
        """An answer of a host was timed. True where a correction begins, changes much, or ends.

        `announced`: tokens a second; 0.0: nothing is announced, and nothing is judged.
        """
        if announced <= 0.0 or answer.seen <= 0.0:
            return False
        key = (answer.node, answer.model, answer.kind)
        known = self._answers.pop(key, None)
        answers = known[1] if known is not None and known[0] == life else deque[_Measured](maxlen=_KEPT)
        answers.append(_Measured(now, announced, answer))
        self._answers[key] = (life, answers)
        while len(self._answers) > _MOST:
            del self._answers[next(iter(self._answers))]
        return self._judge(key, life, announced, now)

    def _judge(self, key: _Key, life: Life, announced: float, now: float) -> bool:
        entry = self._current(*key, life)
        slow = _SLOW_PROMPTS if key[2] is Kind.PROMPTS else _SLOW
        answers = [one for one in self._answers[key][1] if not _held_up(one, slow)]
        parts = sorted((_came(one.answer) / one.announced for one in answers), reverse=True)
        if entry is not None and len(parts) > 1 and parts[1] >= _AS_ANNOUNCED:
            self._entries[key] = msgspec.structs.replace(entry, until=entry.at)
            return True
        if len(parts) < _LEAST_ANSWERS or answers[-1].at - answers[0].at < _LEAST_SECONDS or parts[1] >= slow:
            return False
        if self._slow_here(key, answers, slow):
            return False
        came = median(_came(one.answer) for one in answers)
        if entry is not None and 0.8 < came / max(entry.seen, 1e-9) < 1.25:
            # It is as slow as before: the correction lasts, and what is routed by it does not change.
            self._entries[key] = msgspec.structs.replace(entry, at=now, until=now + (entry.until - entry.at))
            return False
        self._correct(*key, life, announced=announced, seen=came, now=now)
        return True

    def _slow_here(self, key: _Key, answers: Sequence[_Measured], slow: float) -> bool:
        """Whether the host says that it is as fast as announced, and others' answers come more slowly than said, too.

        Then something of this node is slow: its link, or the machine.
        """
        own = [_admits(one, slow) for one in answers]
        if sum(own) * 2 > len(own):
            return False
        others = [
            max(one.answer.seen / one.answer.said for one in measured if one.answer.said > 0.0)
            for other, (_, measured) in self._answers.items()
            if other[0] != key[0]
            and other[2] is key[2]
            and sum(one.answer.said > 0.0 for one in measured) >= _LEAST_ANSWERS
        ]
        return bool(others) and median(others) < _SLOW

    def _correct(
        self, node: NodeId, model: ModelName, kind: Kind, life: Life, *, announced: float, seen: float, now: float
    ) -> Correction:
        before = self._entries.pop((node, model, kind), None)
        renewed = before is not None and before.life == life and now < before.until and kind is not Kind.MEMORY
        times = 1 if before is None else before.times + (not renewed)
        made = Correction(
            node=node,
            model=model,
            kind=kind,
            announced=announced,
            seen=seen,
            at=now,
            until=now + min(_LONGEST, _HOUR * 2.0 ** (min(times, 16) - 1)),
            life=life,
            times=times,
        )
        while len(self._entries) >= _MOST:
            del self._entries[min(self._entries, key=lambda one: self._entries[one].at)]
        self._entries[node, model, kind] = made
        return made

    def forget(self, node: NodeId, model: ModelName | None) -> bool:
        """Believe a host again at once, of one model or of all. True where something was corrected."""

        def about(key: _Key) -> bool:
            return key[0] == node and model in (None, key[1])

        corrected = any(about(key) for key in self._entries)
        self._entries = {key: one for key, one in self._entries.items() if not about(key)}
        self._answers = {key: one for key, one in self._answers.items() if not about(key)}
        return corrected

    def _current(self, node: NodeId, model: ModelName, kind: Kind, life: Life) -> Correction | None:
        """What holds for a launch, if anything does; `due` has looked at the time."""
        entry = self._entries.get((node, model, kind))
        if entry is None or entry.until <= max(self._checked, entry.at):
            return None
        return entry if entry.life == life or entry.times >= _STUBBORN else None

    def context(self, node: NodeId, model: ModelName, life: Life, announced: int) -> int:
        """The context to count on."""
        entry = self._current(node, model, Kind.CONTEXT, life)
        return announced if entry is None else min(announced, int(entry.seen)) if announced else announced

    def speed(self, node: NodeId, model: ModelName, life: Life, announced: float) -> float:
        """The tokens a second of an answer to count on."""
        entry = self._current(node, model, Kind.SPEED, life)
        return announced if entry is None else min(announced, entry.seen)

    def slow_prompts(self, node: NodeId, model: ModelName, life: Life) -> float:
        """The tokens a second with which a host reads prompts, where that is slower than foretold; else 0.0."""
        entry = self._current(node, model, Kind.PROMPTS, life)
        return 0.0 if entry is None else entry.seen

    def of(self, node: NodeId, model: ModelName, life: Life) -> list[Correction]:
        """All that hold for one launch."""
        found = (self._current(node, model, kind, life) for kind in Kind)
        return [one for one in found if one is not None]

    def deadline(self) -> float | None:
        """When a correction ends."""
        return min((one.until for one in self._entries.values() if one.until > self._checked), default=None)

    def due(self, now: float) -> bool:
        """Whether a correction has ended since the last call. Forgets those that ended long ago."""
        ended = any(self._checked < one.until <= now for one in self._entries.values())
        self._checked = max(self._checked, now)
        self._entries = {key: one for key, one in self._entries.items() if now < one.until + _LONGEST}
        return ended


def _admits(one: _Measured, slow: float) -> bool:
    """Whether the host itself says that it was slow."""
    return 0.0 < one.answer.said < slow * one.announced


def _came(answer: TimedAnswer) -> float:
    """The speed that counts. The host's own word counts where something on the way held the answer up."""
    return answer.said if answer.said > 0.0 and answer.lump >= _IN_LUMPS else answer.seen


def _held_up(one: _Measured, slow: float) -> bool:
    """Whether an answer was slow and says nothing about its host: it came in lumps, and the host says it was fast."""
    answer = one.answer
    return answer.lump >= _IN_LUMPS and answer.seen < slow * one.announced and not _admits(one, slow)


def describe(correction: Correction, name: str) -> str:
    """A correction for people, as a sentence. `name`: of the host."""
    announced, seen, model = correction.announced, correction.seen, correction.model
    match correction.kind:
        case Kind.CONTEXT:
            what = f"announced a context of {announced:,.0f}, refused {seen:,.0f}"
        case Kind.SPEED:
            what = f"announced {announced:,.1f} tokens/s, {seen:,.1f} came"
        case Kind.PROMPTS:
            what = f"was to read prompts at {announced:,.0f} tokens/s, {seen:,.0f} came"
        case Kind.MEMORY:
            what = f"announced {size(int(announced))} for it, and did not give {size(int(seen))}"
    return f"{name}, {model}: {what}"
