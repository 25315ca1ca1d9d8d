"""The launches on this node, each a small state machine: loading, warm, stopping, failed.

Terms number the launches of a model. Invariants: each model has at most one engine at a time, and the memory reserved
for all launches never exceeds what the node offers. A launch keeps its memory from the decision to start until its
engine is seen to have ended. An engine that dies is restarted after a growing delay; after a crash loop its model is
FAILED for a growing pause.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from mesh_llm.core.config import RestartPolicy
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel, StartEngine, StopEngine
from mesh_llm.core.types.events import EngineExited, EngineReady
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts, ModelStatus

_RENEW_SECONDS = 120.0
"""The longest wait for a moment without requests, before an engine starts again with other settings."""
_MOVE_SECONDS = 600.0
"""The same, before it starts again on other devices: nobody asked for that at this moment, and nothing shall be cut."""
_RENEW_DRAIN = 30.0
_MAX_REASON = 500
_MAX_BRIEF = 200


class Origin(StrEnum):
    """Why a model is served here: a user asked for it, the mesh needs it, or a request asked for it.

    What no user asked for may be given up again.
    """

    USER = "user"
    MESH = "mesh"
    DEMAND = "demand"


@dataclass(frozen=True, kw_only=True)
class LaunchOrder:
    """A decision to serve a model."""

    facts: ModelFacts
    plan: LaunchPlan
    options: LaunchOptions
    origin: Origin


class CrashHistory(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a launch's deaths.

    Attributes:
        deaths: their times within the window.
        never_ready: deaths in a row while loading.
        pauses: pauses without a calm time after them.
        paused_until: end of the last pause.
    """

    deaths: tuple[float, ...] = ()
    never_ready: int = 0
    pauses: int = 0
    paused_until: float = 0.0


class RestartAt(msgspec.Struct, frozen=True, kw_only=True):
    """Start the engine again at `time`. `attempt` counts the deaths within the window."""

    time: float
    attempt: int


class GiveUp(msgspec.Struct, frozen=True, kw_only=True):
    """It is a crash loop: `why` names the limit that was reached. The model is tried again at `until`."""

    why: str
    until: float


def after_death(
    history: CrashHistory, now: float, *, never_ready: bool, policy: RestartPolicy
) -> tuple[CrashHistory, RestartAt | GiveUp]:
    """Decide after an engine ended unasked. Returns what to remember and what to do."""
    deaths = (*(time for time in history.deaths if now - time < policy.window), now)
    in_a_row = history.never_ready + 1 if never_ready else 0
    pauses = history.pauses if now - history.paused_until < policy.calm else 0
    remembered = CrashHistory(deaths=deaths, never_ready=in_a_row, pauses=pauses, paused_until=history.paused_until)
    if in_a_row >= policy.never_ready:
        return _paused(remembered, f"it ended {in_a_row} times in a row while loading", now, policy)
    if in_a_row and pauses:
        # It had its attempts before the pause. One more shows that nothing has changed.
        return _paused(remembered, "it ended while loading, again", now, policy)
    if len(deaths) >= policy.deaths:
        return _paused(remembered, f"it ended {len(deaths)} times within {policy.window:.0f} seconds", now, policy)
    delay = min(policy.first_delay * policy.factor ** (len(deaths) - 1), policy.longest_delay)
    return remembered, RestartAt(time=now + delay, attempt=len(deaths))


def _paused(history: CrashHistory, why: str, now: float, policy: RestartPolicy) -> tuple[CrashHistory, GiveUp]:
    """Pause, for longer each time. Deaths after the pause are counted from zero."""
    until = now + min(policy.first_pause * 2.0 ** min(history.pauses, 32), policy.longest_pause)
    return CrashHistory(pauses=history.pauses + 1, paused_until=until), GiveUp(why=why, until=until)


class Renewal(msgspec.Struct, frozen=True, kw_only=True):
    """A running engine starts again as soon as no request is at it, at the latest at `by`. `why`: a clause.

    `elsewhere`: on other devices, so that what the engine takes now does not count there.
    """

    by: float
    why: str
    elsewhere: bool = False


@dataclass(kw_only=True)
class Launch:
    """One model on this node.

    Attributes:
        order: what is being served.
        term: number of the current or last launch of this model here.
        status: as announced; LOADING also while it waits for a restart.
        running: an engine was started and has not been seen to end.
        address: `host:port` once warm.
        context: tokens per slot; once warm, as the engine reports it.
        slots: requests at once.
        embeddings: whether the engine answers /v1/embeddings.
        reason: why it is not warm, or why it has less context than its options ask for; empty when it is warm and has
            all of it, or is loading for the first time.
        history: deaths that count.
        restart_at: when a dead engine is started again, or a FAILED model is tried again.
        next_order: what to start once the engine has ended; None: nothing.
        renewal: the engine is for devices or settings that do not hold any more, and `next_order` replaces it.
        since: when the status last changed.
    """

    order: LaunchOrder
    term: Term
    status: ModelStatus = ModelStatus.LOADING
    running: bool = False
    address: str = ""
    context: int = 0
    slots: int = 1
    embeddings: bool = True
    reason: str = ""
    history: CrashHistory = field(default_factory=CrashHistory)
    restart_at: float | None = None
    next_order: LaunchOrder | None = None
    renewal: Renewal | None = None
    since: float = 0.0

    @property
    def model(self) -> ModelName:
        """The served name."""
        return self.order.facts.name

    @property
    def latest_order(self) -> LaunchOrder:
        """What is served, or will be once the engine that stops has ended."""
        return self.next_order or self.order

    @property
    def announced_status(self) -> ModelStatus:
        """The status for others: an engine that stops to start again is about to answer."""
        if self.status is ModelStatus.STOPPING and self.next_order is not None:
            return ModelStatus.LOADING
        return self.status

    @property
    def _moves(self) -> bool:
        return self.renewal is not None and self.renewal.elsewhere

    @property
    def reserved_bytes(self) -> int:
        """Memory that no other model may take, of the devices that models use now."""
        if self.status is ModelStatus.FAILED:
            return 0
        after = self.next_order.plan.memory_bytes if self.next_order else 0
        return after if self._moves else max(self.order.plan.memory_bytes, after)

    @property
    def reserved_host_bytes(self) -> int:
        """The same of main memory beside a GPU's."""
        if self.status is ModelStatus.FAILED:
            return 0
        after = self.next_order.plan.host_bytes if self.next_order else 0
        return after if self._moves else max(self.order.plan.host_bytes, after)

    def enter(self, status: ModelStatus, reason: str, now: float) -> None:
        """Change the state."""
        self.status = status
        self.reason = reason
        self.since = now


class Launches:
    """All launches on this node, by model. Methods return the effects that follow."""

    def __init__(self, policy: RestartPolicy, epoch: float = 0.0) -> None:
        """`epoch`: UNIX seconds at time 0, for times in messages."""
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
        """Whether nothing is served, loading, stopping or about to restart."""
        return all(launch.status is ModelStatus.FAILED for launch in self)

    @property
    def running(self) -> bool:
        """Whether some engine has not been seen to end."""
        return any(launch.running for launch in self)

    def reserved_bytes(self, *besides: ModelName | None) -> int:
        """Memory that launches of other models than `besides` take."""
        return sum(launch.reserved_bytes for launch in self if launch.model not in besides)

    def reserved_host_bytes(self, *besides: ModelName | None) -> int:
        """The same of main memory beside a GPU's."""
        return sum(launch.reserved_host_bytes for launch in self if launch.model not in besides)

    def load(self, order: LaunchOrder, now: float) -> list[AnyEffect]:
        """Serve a model; start it anew if it failed or its options changed. The caller checked that it fits."""
        if self._stopping:
            return []
        model = order.facts.name
        launch = self._launches.get(model)
        if launch is None:
            launch = self._launches[model] = Launch(order=order, term=Term(0))
            return self._start(launch, now)
        if launch.status in {ModelStatus.LOADING, ModelStatus.WARM} and _same(launch.order, order):
            launch.order = _merged(launch.order, order)
            if launch.running:
                return []
        if not launch.running:
            launch.order = order
            launch.history = CrashHistory()
            return self._start(launch, now)
        launch.next_order = order
        if launch.status is ModelStatus.STOPPING:
            return []
        launch.enter(ModelStatus.STOPPING, "starting again with other options", now)
        return [StopEngine(model=model, term=launch.term, drain_seconds=0.0)]

    def drop(self, model: ModelName, drain_seconds: float, now: float, why: str) -> list[AnyEffect]:
        """Stop serving a model once its requests have ended. Forget it at once if no engine runs."""
        launch = self._launches.get(model)
        if launch is None:
            return []
        launch.next_order = None
        launch.restart_at = None
        if not launch.running:
            del self._launches[model]
            return [_notice(NoticeLevel.INFO, "model_stopped", f"{model} is no longer served here: {why}.", model)]
        launch.enter(ModelStatus.STOPPING, why, now)
        return [StopEngine(model=model, term=launch.term, drain_seconds=drain_seconds)]

    def outdate(self, now: float, why: str) -> list[Launch]:
        """Models use other devices from now on: returns the launches to plan anew; their present plans do not count.

        The caller gives each of them a plan by `renew`, or drops it. What failed on the old devices is tried again.
        """
        found: list[Launch] = []
        for launch in self:
            stopping = launch.status is ModelStatus.STOPPING
            if launch.status is ModelStatus.FAILED:
                launch.restart_at = now
            elif launch.order.plan.split is None and (not stopping or launch.next_order is not None):
                at_once = stopping or launch.status is ModelStatus.LOADING
                by = now if at_once else now + _MOVE_SECONDS
                launch.renewal = Renewal(by=by, why=why, elsewhere=True)
                if not at_once:
                    latest = _clock(self._epoch + by)
                    launch.reason = f"{why} as soon as no request is at it, at {latest} at the latest"
                launch.order = launch.next_order if stopping and launch.next_order is not None else launch.order
                launch.next_order = None
                found.append(launch)
        return found

    def renew(self, launch: Launch, order: LaunchOrder) -> None:
        """Start a model again with this plan; see `due`."""
        launch.next_order = order

    def revise(self, launch: Launch, order: LaunchOrder, now: float, why: str) -> None:
        """Serve a model with another order from now on, from a moment without requests; see `due`. `why`: a clause.

        What failed is tried again with it. What is being dropped stays so.
        """
        if launch.status is ModelStatus.FAILED:
            launch.order, launch.restart_at = order, now
        elif not launch.running:
            launch.order = order
        elif launch.status is ModelStatus.STOPPING:
            launch.next_order = order if launch.next_order is not None else None
        else:
            wait = 0.0 if launch.status is ModelStatus.LOADING else _RENEW_SECONDS
            launch.next_order, launch.renewal = order, Renewal(by=now + wait, why=why)

    def stop_all(self, drain_seconds: float, now: float) -> list[AnyEffect]:
        """Stop everything for good. Nothing is started any more."""
        self._stopping = True
        effects = [
            effect
            for model in list(self._launches)
            for effect in self.drop(model, drain_seconds, now, "the node is stopping")
        ]
        return [effect for effect in effects if isinstance(effect, StopEngine)]

    def ready(self, event: EngineReady, now: float) -> list[AnyEffect]:
        """An engine answers, or one more or one fewer of a split model. Ignored for an old term and while it stops."""
        launch = self._running(event)
        if launch is None or launch.status not in {ModelStatus.LOADING, ModelStatus.WARM}:
            return []
        if launch.status is ModelStatus.WARM:
            launch.slots = event.slots
            return []
        launch.address = event.address
        launch.context = event.context
        launch.slots = event.slots
        launch.embeddings = event.embeddings
        launch.history = msgspec.structs.replace(launch.history, never_ready=0)
        took = now - launch.since
        clipped = _clipped(launch.order)
        launch.enter(ModelStatus.WARM, clipped, now)
        text = (
            f"{event.model} is ready after {took:.1f} s: {event.slots} at once, {event.context} tokens of context each."
        )
        notices: list[AnyEffect] = [_notice(NoticeLevel.INFO, "model_ready", text, event.model)]
        if clipped:
            notices.append(_notice(NoticeLevel.WARNING, "context_clipped", f"{event.model}: {clipped}.", event.model))
        return notices

    def exited(
        self, event: EngineExited, now: float, smaller: Callable[[LaunchOrder], LaunchOrder | None] = lambda _: None
    ) -> list[AnyEffect]:
        """An engine ended. Ignored for an old term.

        `smaller`: the same model with less of the memory that was too little; None where there is no such launch. Of a
        split model the group makes it; what is due here is only the restart in case it makes none.
        """
        launch = self._running(event)
        if launch is None:
            return []
        launch.running = False
        launch.address = ""
        if launch.status is ModelStatus.STOPPING or launch.renewal is not None:
            return self._stopped(launch, now)
        order = smaller(launch.order) if event.out_of_memory else None
        if order is not None:
            launch.order = order
            return [_stepped_down(order), *self._start(launch, now)]
        launch.history, decision = after_death(launch.history, now, never_ready=event.never_ready, policy=self._policy)
        last = event.reason.strip() or f"exit code {event.code}"
        brief = _brief(last, event.code)
        match decision:
            case GiveUp(why=why, until=until):
                launch.restart_at = until
                again = _clock(self._epoch + until)
                launch.enter(ModelStatus.FAILED, _bounded(f"{why}; tried again at {again}: {last}"), now)
                text = f"{event.model} is given up here until {again}: {why}; last: {brief}. See mesh-llm logs."
                return [_notice(NoticeLevel.ERROR, "model_failed", text, event.model)]
            case RestartAt(time=time, attempt=attempt):
                launch.restart_at = time
                launch.enter(ModelStatus.LOADING, f"starting again after it ended: {brief}", now)
                if event.out_of_memory and launch.order.plan.split is not None:
                    text = f"{event.model} got too little memory from the device here, so it is divided anew."
                    return [_notice(NoticeLevel.WARNING, "model_stepped_down", text, event.model)]
                text = f"{event.model} ended: {brief}. Restart {attempt} in {time - now:.1f} s."
                return [_notice(NoticeLevel.WARNING, "model_restarting", text, event.model)]

    def due(self, now: float, in_flight: Mapping[str, int]) -> list[AnyEffect]:
        """Restart dead engines whose delay is over, and engines on outdated devices between two requests.

        FAILED launches are left to `retryable`. `in_flight`: requests at the engines, by model.
        """
        effects = [
            effect
            for launch in list(self)
            if launch.restart_at is not None and launch.restart_at <= now and launch.status is not ModelStatus.FAILED
            for effect in (self._stopped(launch, now) if launch.renewal is not None else self._start(launch, now))
        ]
        for launch in self:
            if launch.renewal is None or not launch.running or launch.status is ModelStatus.STOPPING:
                continue
            if launch.renewal.by <= now or not in_flight.get(launch.model):
                launch.enter(ModelStatus.STOPPING, launch.renewal.why, now)
                effects.append(StopEngine(model=launch.model, term=launch.term, drain_seconds=_RENEW_DRAIN))
        return effects

    def retryable(self, now: float) -> list[Launch]:
        """FAILED launches whose pause is over. The caller checks whether they still fit."""
        return [
            launch
            for launch in self
            if launch.status is ModelStatus.FAILED and launch.restart_at is not None and launch.restart_at <= now
        ]

    def retry(self, launch: Launch, order: LaunchOrder, now: float) -> list[AnyEffect]:
        """Start a FAILED launch once more. Its pauses are remembered."""
        launch.order = order
        launch.reason = ""
        text = f"{launch.model} is tried again here."
        return [_notice(NoticeLevel.INFO, "model_retried", text, launch.model), *self._start(launch, now)]

    def postpone(self, launch: Launch, why: str, now: float) -> None:
        """A FAILED launch cannot be retried yet. `why`: one sentence; empty: keep the present reason."""
        launch.restart_at = now + self._policy.first_pause
        if why:
            launch.reason = _bounded(f"tried again at {_clock(self._epoch + launch.restart_at)}: {why}")

    def forget(self, model: ModelName) -> None:
        """Forget a FAILED launch."""
        del self._launches[model]

    def deadline(self) -> float | None:
        """When `due` or `retryable` has something to do."""
        times = [launch.restart_at for launch in self if launch.restart_at is not None]
        times += [
            launch.renewal.by
            for launch in self
            if launch.renewal is not None and launch.running and launch.status is not ModelStatus.STOPPING
        ]
        return min(times, default=None)

    def _running(self, event: EngineReady | EngineExited) -> Launch | None:
        launch = self._launches.get(event.model)
        return launch if launch is not None and launch.term == event.term and launch.running else None

    def _start(self, launch: Launch, now: float) -> list[AnyEffect]:
        model = launch.model
        launch.term = self._terms[model] = Term(self._terms.get(model, 0) + 1)
        launch.restart_at = launch.renewal = None
        launch.next_order = None
        launch.running = True
        launch.context = launch.order.plan.context
        launch.slots = launch.order.plan.slots
        launch.enter(ModelStatus.LOADING, launch.reason if launch.history.deaths else "", now)
        return [StartEngine(plan=launch.order.plan, options=launch.order.options, term=launch.term)]

    def _stopped(self, launch: Launch, now: float) -> list[AnyEffect]:
        if launch.next_order is not None:
            launch.order = launch.next_order
            launch.history = CrashHistory()
            return self._start(launch, now)
        del self._launches[launch.model]
        text = f"{launch.model} is no longer served here: {launch.reason}."
        return [_notice(NoticeLevel.INFO, "model_stopped", text, launch.model)]


def _same(present: LaunchOrder, asked: LaunchOrder) -> bool:
    """Whether the running engine already does what is asked. Plans may differ by the memory that is free right now."""
    if present.plan.split != asked.plan.split:
        return False
    return present.facts.fingerprint == asked.facts.fingerprint and present.options == asked.options


def _merged(present: LaunchOrder, asked: LaunchOrder) -> LaunchOrder:
    """A model that a user asks for is not given up again, even if the mesh or a request asked for it first."""
    origin = Origin.USER if asked.origin is Origin.USER else present.origin
    return LaunchOrder(facts=present.facts, plan=present.plan, options=present.options, origin=origin)


def _stepped_down(order: LaunchOrder) -> Notice:
    """A device gave less memory than it offers, and the model is started again with less."""
    plan, name = order.plan, order.facts.name
    where = f"{plan.offload.text(order.facts.layers)}, and " if plan.offload is not None else ""
    requests = "one request" if plan.slots == 1 else f"each of {plan.slots} requests"
    text = (
        f"{name} got too little memory from the device, so it is started again with less: "
        f"{where}{plan.context} tokens of context for {requests}."
    )
    return _notice(NoticeLevel.WARNING, "model_stepped_down", text, name)


def _clipped(order: LaunchOrder) -> str:
    """What is said of a model that has less context than its options ask for, because it is trained for no more."""
    asked, trained = order.options.context, order.facts.context_train
    if asked is None or not 0 < trained < asked:
        return ""
    return f"its context is {trained} tokens, the most that it is trained for; --ctx-size asks for {asked}"


def _brief(reason: str, code: int) -> str:
    """One line of a reason: the first one names a signal; in the last one an engine says why it gave up."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return lines[0 if code < 0 else -1][:_MAX_BRIEF] if lines else ""


def _bounded(text: str) -> str:
    """The first line, and as much of the end as fits."""
    if len(text) <= _MAX_REASON:
        return text
    first = text.splitlines()[0][:_MAX_BRIEF]
    return f"{first} ... {text[len(first) :][-(_MAX_REASON - len(first) - 5) :]}"


def _clock(seconds: float) -> str:
    """UNIX seconds as a time of day."""
    minutes, second = divmod(round(seconds) % 86_400, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02} UTC"


def _notice(level: NoticeLevel, code: str, text: str, about: str) -> Notice:
    return Notice(level=level, code=code, text=text, about=about)
