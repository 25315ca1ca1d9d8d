"""What the front door tells, counted; once a second it becomes an event for the core. Satisfies core.ports.Traffic.

The front door as the settings want it, and where it is.
"""

import asyncio
from collections import Counter
from collections.abc import Callable

from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.events import AnyEvent, TargetFailed, TrafficSampled
from mesh_llm.core.types.ids import ModelName
from mesh_llm.daemon.settings import Settings

_PERIOD = 1.0
_LEAST_TOKENS = 8
"""Shorter answers say little about speed."""
_TELLING_TOKENS = 16
"""Answers from which a machine's speed is learned are longer: the first token of each is the prompt's."""
_SMOOTHING = 0.2
_MOST_WANTED = 256


class TrafficMeter:
    """Counts requests at this node's own engines and wishes of its own clients."""

    def __init__(self, post: Callable[[AnyEvent], None]) -> None:
        self._post = post
        self._in_flight: Counter[str] = Counter()
        self._idle: dict[str, asyncio.Event] = {}
        self._wanted: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._speeds: dict[str, float] = {}
        self._counted: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._said: TrafficSampled | None = None
        self._alone = True
        self.observe: Callable[[str, int, float], None] = lambda _model, _tokens, _seconds: None
        """Told of each answer that had all of this node's engines for itself: model, tokens, seconds."""
        self.open: Callable[[], int] = lambda: 0
        """How many requests the front door is answering; set once there is one."""

    def started(self, model: str, target: Target) -> None:
        """A request was sent to a target."""
        if target.local:
            self._alone = not self.busy()
            self._in_flight[model] += 1
            self._idle.setdefault(model, asyncio.Event()).clear()

    def finished(self, model: str, target: Target, *, ok: bool, tokens: int, seconds: float) -> None:
        """A request ended; its speed counts if it went well."""
        if not target.local:
            return
        self._in_flight[model] -= 1
        if self._in_flight[model] <= 0:
            del self._in_flight[model]
            self._idle.setdefault(model, asyncio.Event()).set()
        self._served[model] += 1
        self._tokens[model] += tokens
        if ok and tokens >= _LEAST_TOKENS and seconds > 0.0:
            # The first few count alike: the very first is slower than all that follow.
            self._counted[model] += 1
            weight = max(_SMOOTHING, 1.0 / self._counted[model])
            before = self._speeds.get(model, 0.0)
            self._speeds[model] = before + weight * (tokens / seconds - before)
            if self._alone and tokens >= _TELLING_TOKENS:
                self.observe(model, tokens, seconds)

    def tokens(self, model: str) -> int:
        """How many were generated at this node's own engine of a model."""
        return self._tokens[model]

    def busy(self) -> bool:
        """Whether any request is at one of this node's own engines."""
        return any(self._in_flight.values())

    def unreachable(self, model: str, target: Target, reason: str) -> None:
        """A target could not be reached or died."""
        self._post(TargetFailed(node=target.node, model=ModelName(model), reason=reason[:500], term=target.term))

    def wanted(self, model: str) -> None:
        """A client of this node asked for a model."""
        if model in self._wanted or len(self._wanted) < _MOST_WANTED:
            self._wanted[model] += 1

    async def idle(self, model: str) -> None:
        """Return once no request is at this node's own engine of a model."""
        while self._in_flight[model] > 0:
            await self._idle.setdefault(model, asyncio.Event()).wait()

    def sample(self) -> TrafficSampled | None:
        """What happened since the last sample; None if nothing did and nothing is going on."""
        sampled = TrafficSampled(
            in_flight=dict(self._in_flight),
            wanted=dict(self._wanted),
            served=dict(self._served),
            tokens_per_second={model: round(speed, 3) for model, speed in self._speeds.items()},
            open=self.open(),
        )
        self._wanted.clear()
        self._served.clear()
        if sampled == self._said and not sampled.in_flight:
            return None
        self._said = sampled
        return sampled

    async def run(self) -> None:
        """Post a sample every second; until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD)
            sampled = self.sample()
            if sampled is not None:
                self._post(sampled)


def api_config(settings: Settings) -> ApiConfig:
    """What the front door is told."""
    return ApiConfig(
        host=settings.listen,
        port=settings.api_port,
        keys=settings.api_keys,
        resume_wait=settings.resume_wait,
    )


def api_base(listen: str, port: int) -> str:
    """The API's URL for clients on this machine."""
    host = "127.0.0.1" if listen in {"0.0.0.0", "::", "localhost"} else listen  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
