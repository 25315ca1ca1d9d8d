"""What a node has learned of its own speed, by which predictions are corrected; and how good those were.

A probe takes a second or two of the idle machine, and engines meet what it does not: other work, heat, full caches. So
observed speeds are kept beside the probe, and all are weighed by how recent they are. What an engine takes longer than
a probe of the same moment is the engine's own (`lag`), and is remembered for longer. Times are seconds of one clock,
given by the caller.
"""

import math
from collections.abc import Callable

import msgspec

from mesh_llm.core.performance.attention import prompt_attention
from mesh_llm.core.performance.prediction import (
    ENGINE_SECONDS,
    PROMPT_TOKENS,
    SplitSeconds,
    per_second,
    prompt_seconds,
    solo_seconds,
)
from mesh_llm.core.types.model import AttentionRates, ModelFacts, Speed

HALVING_SECONDS = 1800.0
"""An observation counts half after this time."""

FRESH_SECONDS = 600.0
"""An older probe is repeated before it is used, if the machine is idle."""

MAX_SEEN = 8
PROBE, MACHINE, MODEL = "probe", "machine", "model"
"""Where most of a prediction comes from: the probe, other models on this machine, or this very model."""

_OWN_WEIGHT = 4.0
"""Weight of an observation of the model itself, relative to one of another model, or a probe."""

_SMOOTHING = 0.2
_PROMPT_SMOOTHING = 0.5
"""Prompts differ from the probe by the engine's kernels for them, which stay the same: a few are enough."""
_MIN_FACTOR, _MAX_FACTOR = 1 / 16, 16.0
_MIN_LAG, _MAX_LAG = 0.5, 4.0
_LEAST_PROMPT = 256
"""Tokens of a prompt from which a speed is learned."""
_DISAGREES = math.log(1.3)
_ENOUGH = 3
_PROMPT_PART = 0.3
"""Of the latest prompt in the speed that is shown."""


class TokenCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a token of a model reads, as Speed.seconds takes it."""

    bits: float
    size_bytes: int
    active_bytes: int
    layers: int


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one model was here, alone on the machine and undivided.

    Attributes:
        model: its fingerprint, or its name where it has none.
        weights: what a token reads.
        seconds: of a token, smoothed.
        at: when it was last observed.
        count: observations since the probe.
        drafted: a draft model helped; such a speed says nothing of other models.
    """

    model: str
    weights: TokenCost
    seconds: float
    at: float
    count: int = 1
    drafted: bool = False


class Slowdown(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as long as in the probe this machine takes, and where that comes from: PROBE, MACHINE or MODEL."""

    factor: float
    basis: str


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has learned of its own speed. Immutable: each observation gives a new one. Kept in a file.

    Attributes:
        speed: of the last probe.
        host: beside a GPU: of the processor, in the same probe.
        probed_at: when that was.
        lag: how many times as long engines take as a probe of the same moment.
        split_lag: the same for the machines' part of a token of split models that this node hosts.
        prompt_lag: the same for prompts of models that this node serves alone.
        split_prompt_lag: the same for the machines' part of prompts of split models that this node hosts.
        attention_lag: how many times as long as predicted attention takes, in prompts of models that this node serves
            alone; `prompt_lag` is for the rest of them.
        seen: models, the latest last.
    """

    speed: Speed
    probed_at: float
    lag: float = 1.0
    split_lag: float = 1.0
    seen: tuple[Seen, ...] = ()
    host: Speed = Speed()
    prompt_lag: float = 1.0
    split_prompt_lag: float = 1.0
    attention_lag: float = 1.0

    @property
    def plausible(self) -> bool:
        """Whether its numbers are possible. A file may hold anything."""
        lags = all(_MIN_LAG <= lag <= _MAX_LAG for lag in (self.lag, self.split_lag))
        prompts = (self.prompt_lag, self.split_prompt_lag, self.attention_lag)
        lags &= all(_MIN_FACTOR <= lag <= _MAX_FACTOR for lag in prompts)
        times = all(0.0 < one.seconds < math.inf and math.isfinite(one.at) for one in self.seen)
        return lags and times and math.isfinite(self.probed_at)

    def probed(self, speed: Speed, now: float, host: Speed = Speed()) -> "Calibration":  # noqa: B008 - frozen
        """The machine was probed again. Observations stay and fade."""
        seen = tuple(msgspec.structs.replace(one, count=0) for one in self.seen)
        return msgspec.structs.replace(self, speed=speed, host=host, probed_at=now, seen=seen)

    def observed(
        self, facts: ModelFacts, seconds: float, now: float, *, drafted: bool = False, context: int = 0
    ) -> "Calibration":
        """A token of a model took `seconds` after `context` others, alone on the machine."""
        key = _key(facts)
        # What is kept is of a token without a context.
        first, here = solo_seconds(facts, self.speed), solo_seconds(facts, self.speed, context)
        if first is not None and here is not None:
            seconds *= first / here
        cost = TokenCost(
            bits=facts.weight_bits, size_bytes=facts.size_bytes, active_bytes=facts.active_bytes, layers=facts.layers
        )
        fresh = Seen(model=key, weights=cost, seconds=seconds, at=now, drafted=drafted)
        if seconds <= 0.0 or not math.isfinite(seconds) or self._ratio(fresh) is None:
            return self
        before = next((one for one in self.seen if (one.model, one.drafted) == (key, drafted)), None)
        if before is not None:
            # Smoothed like the traffic's own numbers, except that an old one is given up at once.
            keep = (1.0 - _SMOOTHING) * _half(now - before.at, FRESH_SECONDS)
            mixed = math.exp(keep * math.log(before.seconds) + (1.0 - keep) * math.log(seconds))
            fresh = msgspec.structs.replace(fresh, seconds=mixed, count=before.count + 1)
        others = tuple(one for one in self.seen if one is not before)
        lag = self.lag
        ratio = self._ratio(fresh)
        if ratio is not None and not drafted and now - self.probed_at < FRESH_SECONDS:
            lag = _mixed(lag, ratio, _SMOOTHING)
        return msgspec.structs.replace(self, lag=lag, seen=(*others, fresh)[-MAX_SEEN:])

    def observed_split(self, predicted: SplitSeconds, seconds: float) -> "Calibration":
        """A token of a split model that this node hosts took `seconds`. Counts the less, the more is the network's."""
        if seconds <= 0.0 or not math.isfinite(seconds) or predicted.machines <= 0.0:
            return self
        machines = max(seconds - predicted.network, predicted.machines * _MIN_LAG)
        part = predicted.machines / predicted.total()
        lag = _mixed(self.split_lag, machines / predicted.machines, _SMOOTHING * part)
        return msgspec.structs.replace(self, split_lag=lag)

    def observed_prompt(
        self, facts: ModelFacts, tokens: int, seconds: float, now: float, start: int = 0
    ) -> "Calibration":
        """`tokens` new tokens of a prompt, after `start` cached ones, were read in `seconds`, alone on the machine.

        What they took longer than predicted is attention's and the rest's, each by its part in the prediction, so that
        prompts of different lengths tell the two apart.
        """
        speed = self.paced(self.slowdown(now, facts).factor)
        predicted = prompt_seconds(facts, speed, tokens, start)
        if predicted is None or not _says_much(tokens, seconds):
            return self
        part = prompt_attention(facts, speed, tokens, start) / predicted
        ratio = min(_MAX_FACTOR, max(_MIN_FACTOR, seconds / predicted))
        step = _PROMPT_SMOOTHING * math.log(ratio) / (part**2 + (1.0 - part) ** 2)
        return msgspec.structs.replace(
            self,
            prompt_lag=_moved(self.prompt_lag, step * (1.0 - part)),
            attention_lag=_moved(self.attention_lag, step * part),
        )

    def observed_split_prompt(self, predicted: SplitSeconds, tokens: int, seconds: float) -> "Calibration":
        """A prompt of `tokens` new tokens of a split model that this node hosts was read in `seconds`.

        `predicted`: for a prompt of this length. What links take is not corrected, as with a token.
        """
        if predicted.machines <= 0.0 or not _says_much(tokens, seconds):
            return self
        machines = max(seconds - predicted.network, predicted.machines * _MIN_FACTOR)
        ratio = min(_MAX_FACTOR, machines / predicted.machines)
        step = _PROMPT_SMOOTHING * math.log(ratio / self.split_prompt_lag)
        return msgspec.structs.replace(self, split_prompt_lag=_moved(self.split_prompt_lag, step))

    def slowdown(self, now: float, model: ModelFacts | None = None, *, besides: ModelFacts | None = None) -> Slowdown:
        """How many times as long as in the probe the machine takes at present: a weighted mean of logarithms.

        Args:
            now: the time.
            model: the model to predict; its own observations count more. None: any model.
            besides: a model to leave out, as if it had never run here.
        """
        wanted = None if model is None else _key(model)
        left_out = None if besides is None else _key(besides)
        votes = [(PROBE, self.probed_at, 1.0, math.log(self.lag))]
        for one in self.seen:
            own = one.model == wanted
            ratio = self._ratio(one)
            if ratio is None or one.model == left_out or (one.drafted and not own):
                continue
            votes.append((MODEL if own else MACHINE, one.at, _OWN_WEIGHT if own else 1.0, math.log(ratio)))
        # Ages count relative to the latest: where all are old, nothing better is known.
        latest = max(min(at, now) for _, at, _, _ in votes)
        weights: dict[str, float] = {PROBE: 0.0, MACHINE: 0.0, MODEL: 0.0}
        total = 0.0
        for kind, at, weight, vote in votes:
            weighed = weight * _half(latest - at, HALVING_SECONDS)
            weights[kind] += weighed
            total += weighed * vote
        whole = sum(weights.values())
        basis = max(weights, key=lambda kind: weights[kind] / whole)
        return Slowdown(factor=min(_MAX_FACTOR, max(_MIN_FACTOR, math.exp(total / whole))), basis=basis)

    def current_speed(self, now: float) -> Speed:
        """The machine's speed as it is announced."""
        return self.paced(self.slowdown(now).factor)

    def paced(self, factor: float) -> Speed:
        """The machine's speed where it takes `factor` times as long as in the probe."""
        speed = self.speed.slowed(factor)
        attention = AttentionRates(prompt=int(speed.prompt_attention / self.attention_lag), token=speed.attention.token)
        return msgspec.structs.replace(speed, batch=speed.batch.slowed(self.prompt_lag), attention=attention)

    def stale(self, now: float) -> bool:
        """Whether the probe is to be repeated before it is used; also after the clock was set back."""
        return not 0.0 <= now - self.probed_at < FRESH_SECONDS

    def disagrees(self, now: float) -> bool:
        """Whether observed speeds have differed from an old probe for a while: the machine has changed."""
        votes = [ratio for one in self.seen if not one.drafted and (ratio := self._ratio(one)) is not None]
        times = sum(one.count for one in self.seen if not one.drafted)
        if not votes or times < _ENOUGH or not self.stale(now):
            return False
        mean = sum(map(math.log, votes)) / len(votes)
        return abs(mean - math.log(self.lag)) > _DISAGREES

    def _ratio(self, one: Seen) -> float | None:
        """How many times as long as in the probe a model took; None where the probe says nothing."""
        cost = one.weights
        if not self.speed.known or not cost.active_bytes:
            return None
        probed = self.speed.seconds(cost.bits, cost.size_bytes, cost.active_bytes, cost.layers)
        spent = max(one.seconds - ENGINE_SECONDS, one.seconds / 4)
        return min(_MAX_FACTOR, max(_MIN_FACTOR, spent / probed)) if probed > 0.0 else None


def _key(facts: ModelFacts) -> str:
    return facts.fingerprint or facts.name


def _half(age: float, halving: float) -> float:
    return 2.0 ** (-max(0.0, age) / halving)


def _says_much(tokens: int, seconds: float) -> bool:
    """Whether a prompt is long enough to learn from, and its time is one."""
    return tokens >= _LEAST_PROMPT and 0.0 < seconds < math.inf


def _moved(lag: float, step: float) -> float:
    return min(_MAX_FACTOR, max(_MIN_FACTOR, lag * math.exp(step)))


def _mixed(lag: float, ratio: float, part: float) -> float:
    mixed = math.exp((1.0 - part) * math.log(lag) + part * math.log(ratio))
    return min(_MAX_LAG, max(_MIN_LAG, mixed))


class PromptSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of a model's prompts here.

    Attributes:
        predicted: from what was known before the first one.
        measured: of those that were read, the latest most; None before the first.
        tokens: how long a prompt is for which both are: PROMPT_TOKENS before the first, then as long as those were.
    """

    predicted: float | None = None
    measured: float | None = None
    tokens: int = PROMPT_TOKENS

    def read(self, tokens: int, rate: float, predicted: float | None) -> "PromptSpeed":
        """One more was read: how long it was, how fast it was, and how fast it was predicted to be."""
        if self.measured is None:
            return PromptSpeed(predicted=predicted, measured=rate, tokens=tokens)
        length = self.tokens + _PROMPT_PART * (tokens - self.tokens)
        measured = self.measured + _PROMPT_PART * (rate - self.measured)
        if predicted is not None and self.predicted is not None:
            predicted = self.predicted + _PROMPT_PART * (predicted - self.predicted)
        return PromptSpeed(predicted=predicted, measured=measured, tokens=round(length))


PredictPrompt = Callable[[int, int], float | None]
"""Predicted seconds of so many new tokens of a prompt after so many cached ones; None where something is not known."""


class PromptScore(msgspec.Struct, frozen=True, kw_only=True):
    """A model's prompts, and what they are compared with: `predict`, from what was known before the first one."""

    predict: PredictPrompt
    speed: PromptSpeed

    @classmethod
    def before_any(cls, predict: PredictPrompt) -> "PromptScore":
        """None was read yet."""
        foreseen = predict(PROMPT_TOKENS, 0)
        rate = None if foreseen is None else per_second(foreseen / PROMPT_TOKENS)
        return cls(predict=predict, speed=PromptSpeed(predicted=rate))

    def read(self, tokens: int, seconds: float, cached: int) -> "PromptScore":
        """So many new tokens, after `cached` others, were read in `seconds`."""
        foreseen = self.predict(tokens, cached)
        predicted = None if foreseen is None else tokens / foreseen
        return msgspec.structs.replace(self, speed=self.speed.read(tokens, tokens / seconds, predicted))
