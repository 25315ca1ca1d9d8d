"""Counts the API's requests, and reports them to the core once a second."""

import asyncio
from collections import Counter
from collections.abc import Callable

from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.circle import common
from mesh_llm.core.trust.corrections import TimedAnswer
from mesh_llm.core.types.announcement import Standing
from mesh_llm.core.types.events import (
    AnswersTimed,
    AnyEvent,
    ContextRefused,
    ModelAwaited,
    PromptTaken,
    TargetFailed,
    TrafficSampled,
)
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.ports import LoadAsker

_PERIOD = 1.0
_LEAST_TOKENS = 8
"""A shorter answer says little about speed."""
_LEARN_TOKENS = 16
"""The machine's speed is learned from longer answers: an answer's first token includes the prompt."""
_LEARN_PROMPT = 256
"""Tokens of a prompt that fill most of a micro-batch."""
_SMOOTHING = 0.2
_MAX_WANTED = 256
_MAX_TIMED = 64
"""Answers of other nodes that are timed in one period."""


ObserveAnswer = Callable[[str, int, float, int, int], None]
"""Model, tokens, their seconds, how many were guessed, and how many tokens were before them, on average."""

ObservePrompt = Callable[[str, int, float, int], None]
"""Model, new tokens, their seconds, and how many tokens before them were cached."""


class TrafficMeter:
    """Counts requests at this node's engines, and what its clients ask for; implements core.types.ports.Traffic."""

    def __init__(self, post: Callable[[AnyEvent], None]) -> None:
        self._post = post
        self._in_flight: Counter[str] = Counter()
        self._idle: dict[str, asyncio.Event] = {}
        self._wanted: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._speeds: dict[str, float] = {}
        self._counted: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._last: TrafficSampled | None = None
        self._timed: list[TimedAnswer] = []
        self._alone = True
        self.observe: ObserveAnswer = lambda _model, _tokens, _seconds, _guessed, _context: None
        """Called for each answer that ran alone on this node's engines."""
        self.observe_prompt: ObservePrompt = lambda _model, _tokens, _seconds, _cached: None
        """The same for each long prompt."""
        self.observe_end: Callable[[str, int], None] = lambda _model, _term: None
        """Called for each answer of this node's engines that has ended: model, term."""
        self._awaited: dict[tuple[str, NodeId | None], Counter[LoadAsker]] = {}
        self.node = NodeId("")
        """This node; set when it is known."""
        self.standing: Callable[[NodeId], Standing] = lambda _: "member"
        """Who another node is that asks for a model; set when the mesh is known."""
        self.open: Callable[[], int] = lambda: 0
        """How many requests the API is answering; set when it exists."""

    def started(self, model: str, target: Target) -> None:
        """A request was sent to a target."""
        if target.local:
            self._alone = not self.busy()
            self._in_flight[model] += 1
            self._idle.setdefault(model, asyncio.Event()).clear()

    def finished(
        self, model: str, target: Target, *, ok: bool, tokens: int, seconds: float, guessed: int = 0, prompt: int = 0
    ) -> None:
        """A request ended. Its speed counts if it succeeded."""
        if not target.local:
            return
        self._in_flight[model] -= 1
        if self._in_flight[model] <= 0:
            del self._in_flight[model]
            self._idle.setdefault(model, asyncio.Event()).set()
        self._served[model] += 1
        if self._awaited and model not in self._in_flight:
            # A model may be waiting for this one's memory.
            self._report()
        self._tokens[model] += tokens
        if ok and tokens >= _LEAST_TOKENS and seconds > 0.0:
            # The first few have equal weight: the very first is slower than those that follow.
            self._counted[model] += 1
            weight = max(_SMOOTHING, 1.0 / self._counted[model])
            before = self._speeds.get(model, 0.0)
            self._speeds[model] = before + weight * (tokens / seconds - before)
            if self._alone and tokens >= _LEARN_TOKENS:
                self.observe(model, tokens, seconds, guessed, prompt + tokens // 2)
        self.observe_end(model, target.term)

    def read(self, model: str, target: Target, tokens: int, seconds: float, cached: int = 0) -> None:
        """A prompt's new tokens were read. Long prompts that ran alone are learned from."""
        if target.local and self._alone and tokens >= _LEARN_PROMPT and seconds > 0.0:
            self.observe_prompt(model, tokens, seconds, cached)

    def tokens(self, model: str) -> int:
        """How many tokens this node's engine of a model has generated."""
        return self._tokens[model]

    def busy(self) -> bool:
        """Whether any request is at one of this node's engines."""
        return any(self._in_flight.values())

    def unreachable(self, model: str, target: Target, reason: str) -> None:
        """A target could not be reached or died."""
        self._post(TargetFailed(node=target.node, model=ModelName(model), reason=reason[:500], term=target.term))

    def refused_context(self, model: str, target: Target, tokens: int) -> None:
        """A target refused a prompt that fits what it announces."""
        self._post(ContextRefused(node=target.node, model=ModelName(model), term=target.term, tokens=tokens))

    def took_prompt(self, model: str, target: Target, tokens: int) -> None:
        """A target answered a prompt that is longer than its context is known to be here."""
        self._post(PromptTaken(node=target.node, model=ModelName(model), term=target.term, tokens=tokens))

    def timed(self, answer: TimedAnswer) -> None:
        """Another node's answer was timed; reported with the next sample."""
        if len(self._timed) < _MAX_TIMED:
            self._timed.append(answer)

    def wanted(self, model: str) -> None:
        """A client of this node asked for a model."""
        if model in self._wanted or len(self._wanted) < _MAX_WANTED:
            self._wanted[model] += 1

    def awaiting(self, model: str, asker: LoadAsker, change: int) -> None:
        """One request more or less waits for a model."""
        key = (model, asker.peer)
        waiting = self._awaited.setdefault(key, Counter())
        waiting[asker] += change
        if waiting[asker] <= 0:
            del waiting[asker]
        if not waiting:
            del self._awaited[key]
        # While others wait that any node may answer, it is loaded for those: what they leave over is loaded here.
        asking = list(waiting) or [asker]
        circles = [one.circle for one in asking if one.circle is not None]
        # The core decides by what is idle now, not a second ago.
        self._report()
        standing = "own" if asker.peer is None else self.standing(asker.peer)
        self._post(
            ModelAwaited(
                model=ModelName(model),
                asker=asker.peer or self.node,
                count=waiting.total(),
                here=not any(one.anywhere for one in asking),
                standing="client" if asker.for_clients and standing == "member" else standing,
                circle=tuple(sorted(common(circles))) if len(circles) == len(asking) else None,
            )
        )

    async def idle(self, model: str) -> None:
        """Return once no request is at this node's engine of a model."""
        while self._in_flight[model] > 0:
            await self._idle.setdefault(model, asyncio.Event()).wait()

    def sample(self) -> TrafficSampled | None:
        """The counts since the last sample; None if nothing changed and no request is running."""
        sampled = TrafficSampled(
            in_flight=dict(self._in_flight),
            wanted=dict(self._wanted),
            served=dict(self._served),
            tokens_per_second={model: round(speed, 3) for model, speed in self._speeds.items()},
            open=self.open(),
        )
        self._wanted.clear()
        self._served.clear()
        if sampled == self._last and not sampled.in_flight:
            return None
        self._last = sampled
        return sampled

    async def run(self) -> None:
        """Post a sample every second; until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD)
            self._report()
            if self._timed:
                self._post(AnswersTimed(answers=tuple(self._timed)))
                self._timed.clear()

    def _report(self) -> None:
        sampled = self.sample()
        if sampled is not None:
            self._post(sampled)
