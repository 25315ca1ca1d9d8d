"""The last hour in numbers, a bucket a minute: for the console's charts.

The front door's memory of its last requests: who could have answered, how each was judged, and what came of it.

A request pays for a few references only; words and estimates are made when somebody looks.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress

from mesh_llm.api.transcript import Usage
from mesh_llm.core.routing.ranking import Target, Warmth, expected_seconds, typical_speed
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.status import Attempt, Bucket, Decision, History, RankedTarget

PERIOD = 60
COUNT = 60
_SAMPLES = 512
"""Latencies kept of one bucket: beyond them each new one takes an old one's place."""


class _Minute:
    """What ended in one minute."""

    __slots__ = ("failed", "prompt", "requests", "seconds", "tokens", "ttfb")

    def __init__(self) -> None:
        self.requests = self.failed = self.tokens = self.prompt = 0
        self.ttfb: list[float] = []
        self.seconds: list[float] = []


class LastHour:
    """Sums by the minute. `wall_clock`: UNIX seconds; where it is set back, the buckets ahead are forgotten."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._minutes: dict[int, _Minute] = {}

    def ended(self, *, failed: bool, tokens: int, prompt: int, ttfb: float | None, seconds: float) -> None:
        """A request ended now; `ttfb` None where no answer began."""
        now = int(self._wall_clock()) // PERIOD
        minute = self._minutes.get(now)
        if minute is None:
            self._minutes = {at: kept for at, kept in self._minutes.items() if now - COUNT < at <= now}
            minute = self._minutes[now] = _Minute()
        minute.requests += 1
        minute.failed += failed
        minute.tokens += tokens
        minute.prompt += prompt
        _keep(minute.seconds, seconds, minute.requests)
        if ttfb is not None:
            _keep(minute.ttfb, ttfb, minute.requests)

    def history(self) -> History:
        """All buckets of the hour, empty ones as well."""
        now = int(self._wall_clock()) // PERIOD
        empty = _Minute()
        return History(
            period_s=PERIOD,
            buckets=tuple(_bucket(at, self._minutes.get(at, empty)) for at in range(now - COUNT + 1, now + 1)),
        )


def _keep(samples: list[float], value: float, position: int) -> None:
    if len(samples) < _SAMPLES:
        samples.append(value)
    else:
        samples[position % _SAMPLES] = value


def _bucket(at: int, minute: _Minute) -> Bucket:
    ttfb, seconds = sorted(minute.ttfb), sorted(minute.seconds)
    return Bucket(
        at=float(at * PERIOD),
        requests=minute.requests,
        failed=minute.failed,
        tokens=minute.tokens,
        prompt_tokens=minute.prompt,
        ttfb_ms_p50=_part(ttfb, 0.5, 1000.0),
        ttfb_ms_p95=_part(ttfb, 0.95, 1000.0),
        seconds_p50=_part(seconds, 0.5, 1.0),
        seconds_p95=_part(seconds, 0.95, 1.0),
    )


def _part(ordered: Sequence[float], part: float, scale: float) -> float | None:
    """The value that a part of all are not above."""
    return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * scale, 3) if ordered else None


KEPT = 500
MOST_TARGETS = 16
_LEFT = 499
_LEAST_ERROR = 400
_COLD = Warmth(prefix_bytes=0)


class Trace:
    """One request being answered."""

    __slots__ = ("_attempts", "_first_byte", "_targets", "_usage", "at", "began", "model", "path", "refusal", "via")

    def __init__(self, at: float, began: float, via: str, path: str) -> None:
        """`at`: UNIX seconds; `began`: the same moment on the door's clock; `via`: client or peer."""
        self.at = at
        self.began = began
        self.via = via
        self.path = path
        self.model = ""
        self.refusal: MeshError | None = None
        self._targets: list[tuple[Target, int, Warmth]] = []
        self._attempts: list[tuple[NodeId, int, str]] = []
        self._usage: list[Usage] = []
        self._first_byte: float | None = None

    def ranked(
        self, model: str, targets: Sequence[Target], in_flight: Mapping[NodeId, int], warmth: Mapping[NodeId, Warmth]
    ) -> None:
        """These could answer, the first one best."""
        self.model = model
        self._targets = [
            (target, in_flight.get(target.node, 0), warmth.get(target.node, _COLD)) for target in targets[:MOST_TARGETS]
        ]

    def first_byte(self, at: float) -> None:
        """A target's answer has begun."""
        if self._first_byte is None:
            self._first_byte = at

    def ended(self, node: NodeId, status: int, reason: str, usage: Usage) -> None:
        """An attempt is over; `status` as in `ledger.Entry.close`."""
        self._attempts.append((node, status, reason))
        self._usage.append(usage)

    @property
    def status(self) -> int:
        """As the asker got it."""
        if self.refusal is not None:
            return self.refusal.status
        return (self._attempts[-1][1] or 502) if self._attempts else _LEFT

    @property
    def outcome(self) -> str:
        """See Decision."""
        if self.refusal is not None:
            return "refused"
        return _outcome(self._attempts[-1][1]) if self._attempts else "left"

    @property
    def ttfb(self) -> float | None:
        """Seconds to the first byte of an answer."""
        return self._first_byte - self.began if self._first_byte is not None else None

    def tokens(self) -> tuple[int, int]:
        """Of the prompt and of the answer, over all targets that took part."""
        return max((u.prompt for u in self._usage), default=0), sum(u.generated for u in self._usage)

    def told(self, number: int, seconds: float) -> Decision:
        """The same for people."""
        fallback = typical_speed([target for target, _, _ in self._targets])
        prompt, generated = self.tokens()
        attempts = tuple(
            Attempt(node_id=node, outcome=_outcome(status), reason=reason) for node, status, reason in self._attempts
        )
        if self.refusal is not None:
            attempts += (Attempt(node_id="", outcome="refused", reason=self.refusal.message),)
        answered = [node for node, status, _ in self._attempts if _outcome(status) == "answered"]
        return Decision(
            id=number,
            at=self.at,
            model=self.model,
            path=self.path,
            via=self.via,
            targets=tuple(_told(target, busy, warm, fallback) for target, busy, warm in self._targets),
            attempts=attempts,
            chosen=answered[-1] if answered else "",
            outcome=self.outcome,
            status=self.status,
            seconds=round(seconds, 6),
            ttfb_ms=round(self.ttfb * 1000.0, 3) if self.ttfb is not None else None,
            prompt_tokens=prompt,
            tokens=generated,
        )


class DecisionBook:
    """Keeps the last decisions, numbered from 1, and the last hour's sums. `clock` never goes back."""

    def __init__(self, clock: Callable[[], float], wall_clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._kept: deque[tuple[int, Trace, float]] = deque(maxlen=KEPT)
        self._count = 0
        self.hour = LastHour(wall_clock)

    @contextmanager
    def following(self, path: str, via: str, began: float) -> Generator[Trace]:
        """Write down what becomes of one request; a MeshError that passes is what it was refused with."""
        trace = Trace(self._wall_clock() - (self._clock() - began), began, via, path)
        try:
            yield trace
        except MeshError as error:
            trace.refusal = error
            raise
        finally:
            self._close(trace)

    def refused(self, path: str, via: str, began: float, error: MeshError) -> None:
        """Write down a request that was turned away at the door."""
        with suppress(MeshError), self.following(path, via, began):
            raise error

    def _close(self, trace: Trace) -> None:
        seconds = self._clock() - trace.began
        self._count += 1
        self._kept.append((self._count, trace, seconds))
        prompt, generated = trace.tokens()
        failed = trace.status >= 500 or trace.status == 429
        self.hour.ended(failed=failed, tokens=generated, prompt=prompt, ttfb=trace.ttfb, seconds=seconds)

    def after(self, number: int, limit: int) -> list[Decision]:
        """Decisions with a higher number, newest first, at most `limit`."""
        found = [entry for entry in reversed(self._kept) if entry[0] > number]
        return [trace.told(identity, seconds) for identity, trace, seconds in found[:limit]]


def _outcome(status: int) -> str:
    if status == _LEFT:
        return "left"
    if status == 0:
        return "lost"
    return "refused" if status >= _LEAST_ERROR else "answered"


def _told(target: Target, busy: int, warm: Warmth, fallback: float) -> RankedTarget:
    return RankedTarget(
        node_id=target.node,
        name="",
        local=target.local,
        expected_s=round(expected_seconds(target, busy, warm, fallback), 3),
        in_flight=busy,
        load=target.load,
        slots=target.slots,
        tokens_per_second=target.tokens_per_second,
        rtt_ms=round(target.rtt_ms, 3),
        warm_bytes=warm.prefix_bytes,
        why=why(target, busy, warm),
    )


def why(target: Target, busy: int, warm: Warmth) -> str:
    """What a target was judged by, in words."""
    busy = max(busy, round(target.load * target.slots))
    words = ["this node" if target.local else f"{target.rtt_ms:.1f} ms away"]
    words.append(f"{busy} of {target.slots} slots busy" if busy else "idle")
    words.append(f"{target.tokens_per_second:.0f} tokens/s" if target.tokens_per_second else "speed not known")
    if warm.conversation:
        words.append("knows this conversation")
    elif warm.prefix_bytes:
        words.append("knows the prompt's beginning")
    return ", ".join(words)
