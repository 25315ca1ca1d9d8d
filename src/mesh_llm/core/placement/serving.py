"""Whether and when an engine that died is started again: back-off, and a growing pause after a crash loop.

The models on this node, each a small state machine: cold, loading, warm, stopping, failed. Terms number launches.

At most one engine per model lives at a time, and what is reserved for all never exceeds what the node offers: a launch
keeps its memory from the decision to start until its engine is seen to have ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import msgspec

from mesh_llm.core.config import RestartPolicy
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel, StartEngine, StopEngine
from mesh_llm.core.types.events import EngineExited, EngineReady
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts, ModelStatus


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a launch's deaths.

    Attributes:
        deaths: their times within the window.
        never_ready: how many in a row while loading.
        pauses: how many pauses there were, none of them followed by calm.
        paused_until: when the last of them ended.
    """

    deaths: tuple[float, ...] = ()
    never_ready: int = 0
    pauses: int = 0
    paused_until: float = 0.0


class RestartAt(msgspec.Struct, frozen=True, kw_only=True):
    """Start it again at this time; `attempt` counts the deaths within the window."""

    time: float
    attempt: int


class GiveUp(msgspec.Struct, frozen=True, kw_only=True):
    """It is a crash loop: `why` says which limit was met. It is tried again at `until`."""

    why: str
    until: float


Verdict: TypeAlias = RestartAt | GiveUp


def became_ready(history: History) -> History:
    """Forget the launches that died while loading: this one did not."""
    return msgspec.structs.replace(history, never_ready=0)


def died(history: History, now: float, *, never_ready: bool, policy: RestartPolicy) -> tuple[History, Verdict]:
    """Decide after an unasked end at `now`; returns what to remember, and what to do."""
    deaths = (*(time for time in history.deaths if now - time < policy.window), now)
    in_a_row = history.never_ready + 1 if never_ready else 0
    pauses = history.pauses if now - history.paused_until < policy.calm else 0
    remembered = History(deaths=deaths, never_ready=in_a_row, pauses=pauses, paused_until=history.paused_until)
    if in_a_row >= policy.never_ready:
        return _paused(remembered, f"it ended {in_a_row} times in a row while loading", now, policy)
    if in_a_row and pauses:
        # It had its tries before the pause; one is enough to see that nothing has changed.
        return _paused(remembered, "it ended while loading, again", now, policy)
    if len(deaths) >= policy.deaths:
        return _paused(remembered, f"it ended {len(deaths)} times within {policy.window:.0f} seconds", now, policy)
    delay = min(policy.first_delay * policy.factor ** (len(deaths) - 1), policy.longest_delay)
    return remembered, RestartAt(time=now + delay, attempt=len(deaths))


def _paused(history: History, why: str, now: float, policy: RestartPolicy) -> tuple[History, Verdict]:
    """Give it up for a while, longer each time; what comes after the pause starts with a clean count."""
    until = now + min(policy.first_pause * 2.0 ** min(history.pauses, 32), policy.longest_pause)
    return History(pauses=history.pauses + 1, paused_until=until), GiveUp(why=why, until=until)


_MOST_REASON = 500
_MOST_BRIEF = 200


class Origin(StrEnum):
    """Why a model is served here: a user said so, or the mesh called for it (then it may be given up again)."""

    USER = "user"
    MESH = "mesh"


@dataclass(frozen=True, kw_only=True)
class Order:
    """A decision to serve a model: what, how, and who wanted it."""

    facts: ModelFacts
    plan: LaunchPlan
    options: LaunchOptions
    origin: Origin


@dataclass(kw_only=True)
class Launch:
    """One model on this node.

    Attributes:
        order: what is being served.
        term: number of the present or last launch of this model here.
        status: as others see it; LOADING also while it waits for a restart.
        running: an engine was started and has not been seen to end.
        address: `host:port` once warm.
        context: tokens per slot, as the engine says once warm.
        slots: requests at once.
        embeddings: whether the engine answers /v1/embeddings.
        reason: why it is not warm; empty when it is, or is merely loading.
        history: deaths that count against it.
        restart_at: when a dead engine is started again, or a model that FAILED is tried again.
        then: what to start once the engine has ended; None: nothing.
        since: when the status last changed.
    """

    order: Order
    term: Term
    status: ModelStatus = ModelStatus.LOADING
    running: bool = False
    address: str = ""
    context: int = 0
    slots: int = 1
    embeddings: bool = True
    reason: str = ""
    history: History = field(default_factory=History)
    restart_at: float | None = None
    then: Order | None = None
    since: float = 0.0

    @property
    def model(self) -> ModelName:
        """The served name."""
        return self.order.facts.name

    @property
    def reserved_bytes(self) -> int:
        """Memory that nobody else here may be given."""
        if self.status is ModelStatus.FAILED:
            return 0
        after = self.then.plan.memory_bytes if self.then else 0
        return max(self.order.plan.memory_bytes, after)


class Launches:
    """All models on this node. Each method returns what must be done now."""

    def __init__(self, policy: RestartPolicy, epoch: float = 0.0) -> None:
        """`epoch`: UNIX seconds at time 0, for people."""
        self._policy = policy
        self._epoch = epoch
        self._launches: dict[ModelName, Launch] = {}
        self._terms: dict[ModelName, Term] = {}
        self._stopping = False

    def __iter__(self) -> Iterator[Launch]:
        """In the order in which they were asked for."""
        return iter(self._launches.values())

    def get(self, model: ModelName) -> Launch | None:
        """The launch of a model, if there is one."""
        return self._launches.get(model)

    @property
    def idle(self) -> bool:
        """Nothing is served, loading, stopping or about to restart."""
        return all(launch.status is ModelStatus.FAILED for launch in self)

    @property
    def running(self) -> bool:
        """Some engine has not been seen to end."""
        return any(launch.running for launch in self)

    def reserved_bytes(self, *, besides: ModelName | None = None) -> int:
        """Memory that is taken by launches other than `besides`."""
        return sum(launch.reserved_bytes for launch in self if launch.model != besides)

    def load(self, order: Order, now: float) -> list[AnyEffect]:
        """Serve a model, anew if it failed or its options changed. The caller checked that it fits beside others."""
        if self._stopping:
            return []
        model = order.facts.name
        launch = self._launches.get(model)
        if launch is None:
            launch = Launch(order=order, term=Term(0))
            self._launches[model] = launch
            return self._start(launch, now)
        if launch.status in {ModelStatus.LOADING, ModelStatus.WARM} and _same(launch.order, order):
            launch.order = _merged(launch.order, order)
            if launch.running:
                return []
        if not launch.running:
            launch.order = order
            launch.history = History()
            return self._start(launch, now)
        launch.then = order
        if launch.status is ModelStatus.STOPPING:
            return []
        self._enter(launch, ModelStatus.STOPPING, "starting again with other options", now)
        return [StopEngine(model=model, term=launch.term, drain_seconds=0.0)]

    def drop(self, model: ModelName, drain_seconds: float, now: float, why: str) -> list[AnyEffect]:
        """Stop serving a model, letting its requests end; forget it if nothing runs."""
        launch = self._launches.get(model)
        if launch is None:
            return []
        launch.then = None
        launch.restart_at = None
        if not launch.running:
            del self._launches[model]
            return [_notice(NoticeLevel.INFO, "model_stopped", f"{model} is no longer served here: {why}.", model)]
        self._enter(launch, ModelStatus.STOPPING, why, now)
        return [StopEngine(model=model, term=launch.term, drain_seconds=drain_seconds)]

    def stop_all(self, drain_seconds: float, now: float) -> list[AnyEffect]:
        """Stop everything for good: nothing is started any more."""
        self._stopping = True
        effects: list[AnyEffect] = []
        for model in list(self._launches):
            effects.extend(
                effect
                for effect in self.drop(model, drain_seconds, now, "the node is stopping")
                if isinstance(effect, StopEngine)
            )
        return effects

    def ready(self, event: EngineReady, now: float) -> list[AnyEffect]:
        """An engine answers. Word of an old term, or of one that is being stopped, changes nothing."""
        launch = self._launches.get(event.model)
        if (
            launch is None
            or launch.term != event.term
            or not launch.running
            or launch.status is not ModelStatus.LOADING
        ):
            return []
        launch.address = event.address
        launch.context = event.context
        launch.slots = event.slots
        launch.embeddings = event.embeddings
        launch.history = became_ready(launch.history)
        took = now - launch.since
        self._enter(launch, ModelStatus.WARM, "", now)
        text = (
            f"{event.model} is ready after {took:.1f} s: {event.slots} at once, {event.context} tokens of context each."
        )
        return [_notice(NoticeLevel.INFO, "model_ready", text, event.model)]

    def exited(self, event: EngineExited, now: float) -> list[AnyEffect]:
        """An engine ended. Word of an old term changes nothing."""
        launch = self._launches.get(event.model)
        if launch is None or launch.term != event.term or not launch.running:
            return []
        launch.running = False
        launch.address = ""
        if launch.status is ModelStatus.STOPPING:
            return self._stopped(launch, now)
        launch.history, verdict = died(launch.history, now, never_ready=event.never_ready, policy=self._policy)
        last = event.reason.strip() or f"exit code {event.code}"
        brief = _brief(last, event.code)
        match verdict:
            case GiveUp(why=why, until=until):
                launch.restart_at = until
                again = _clock(self._epoch + until)
                self._enter(launch, ModelStatus.FAILED, _bounded(f"{why}; tried again at {again}: {last}"), now)
                text = f"{event.model} is given up here until {again}: {why}; last: {brief}. See mesh-llm logs."
                return [_notice(NoticeLevel.ERROR, "model_failed", text, event.model)]
            case RestartAt(time=time, attempt=attempt):
                launch.restart_at = time
                self._enter(launch, ModelStatus.LOADING, f"starting again after it ended: {brief}", now)
                text = f"{event.model} ended: {brief}. Restart {attempt} in {time - now:.1f} s."
                return [_notice(NoticeLevel.WARNING, "model_restarting", text, event.model)]

    def due(self, now: float) -> list[AnyEffect]:
        """Restart what waited long enough, but for what has FAILED: whether that still fits is asked first."""
        effects: list[AnyEffect] = []
        for launch in list(self):
            waits = launch.restart_at is not None and launch.restart_at <= now
            if waits and launch.status is not ModelStatus.FAILED:
                effects.extend(self._start(launch, now))
        return effects

    def failed_and_due(self, now: float) -> list[Launch]:
        """The launches that FAILED, and whose pause is over."""
        return [
            launch
            for launch in self
            if launch.status is ModelStatus.FAILED and launch.restart_at is not None and launch.restart_at <= now
        ]

    def retry(self, launch: Launch, order: Order, now: float) -> list[AnyEffect]:
        """Start a launch that FAILED once more. Its pauses are remembered."""
        launch.order = order
        launch.reason = ""
        text = f"{launch.model} is tried again here."
        return [_notice(NoticeLevel.INFO, "model_retried", text, launch.model), *self._start(launch, now)]

    def postpone(self, launch: Launch, why: str, now: float) -> None:
        """A launch that FAILED cannot be tried again yet: `why`, one sentence; empty where its reason stays."""
        launch.restart_at = now + self._policy.first_pause
        if why:
            launch.reason = _bounded(f"tried again at {_clock(self._epoch + launch.restart_at)}: {why}")

    def forget(self, model: ModelName) -> None:
        """Nothing is known any more of a launch that FAILED."""
        del self._launches[model]

    def deadline(self) -> float | None:
        """When `due` has something to do."""
        return min((launch.restart_at for launch in self if launch.restart_at is not None), default=None)

    def _start(self, launch: Launch, now: float) -> list[AnyEffect]:
        model = launch.model
        term = Term(self._terms.get(model, 0) + 1)
        self._terms[model] = term
        launch.term = term
        launch.restart_at = None
        launch.then = None
        launch.running = True
        launch.context = launch.order.plan.context
        launch.slots = launch.order.plan.slots
        self._enter(launch, ModelStatus.LOADING, launch.reason if launch.history.deaths else "", now)
        return [StartEngine(plan=launch.order.plan, options=launch.order.options, term=term)]

    def _stopped(self, launch: Launch, now: float) -> list[AnyEffect]:
        if launch.then is not None:
            launch.order = launch.then
            launch.history = History()
            return self._start(launch, now)
        del self._launches[launch.model]
        text = f"{launch.model} is no longer served here: {launch.reason}."
        return [_notice(NoticeLevel.INFO, "model_stopped", text, launch.model)]

    def _enter(self, launch: Launch, status: ModelStatus, reason: str, now: float) -> None:
        launch.status = status
        launch.reason = reason
        launch.since = now


def _same(present: Order, asked: Order) -> bool:
    """Whether a running engine already is what is asked for: the plan may differ by what is free at the moment."""
    if present.plan.split != asked.plan.split:
        return False
    return present.facts.fingerprint == asked.facts.fingerprint and present.options == asked.options


def _merged(present: Order, asked: Order) -> Order:
    """A model that a user asks for is not given up again, even if the mesh called for it first."""
    origin = Origin.USER if Origin.USER in {present.origin, asked.origin} else Origin.MESH
    return Order(facts=present.facts, plan=present.plan, options=present.options, origin=origin)


def _brief(reason: str, code: int) -> str:
    """One line of a reason: a signal is named in the first one; an engine that gives up says why in the last one."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return lines[0 if code < 0 else -1][:_MOST_BRIEF] if lines else ""


def _bounded(text: str) -> str:
    """The first line and as much of the end as there is room for."""
    if len(text) <= _MOST_REASON:
        return text
    first = text.splitlines()[0][:_MOST_BRIEF]
    return f"{first} ... {text[len(first) :][-(_MOST_REASON - len(first) - 5) :]}"


def _clock(seconds: float) -> str:
    """A time of day, of UNIX seconds."""
    minutes, second = divmod(round(seconds) % 86_400, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02} UTC"


def _notice(level: NoticeLevel, code: str, text: str, about: str) -> Notice:
    return Notice(level=level, code=code, text=text, about=about)
