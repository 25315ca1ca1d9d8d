"""How fast a model will answer, predicted before it is loaded, and corrected by how fast models really were.

Prediction: a token of one request costs one read of all weights; in a split model, also the way around the ring, since
each worker computes its layers after the one before it. Only what every token costs an engine and a tunnel is added.

Calibration: a probe takes a second or two of the idle machine, and engines meet what it does not: other work, heat,
full caches. So observed speeds are kept beside the probe, and all are weighed by how recent they are. What an engine
takes longer than a probe of the same moment is the engine's own (`lag`), and is remembered for longer. Times are
seconds of one clock, given by the caller.
"""

import math
from collections.abc import Mapping

import msgspec

from mesh_llm.core.placement.offload import layers_of
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelFacts, Offload, Speed, SplitLayout

ENGINE_SECONDS = 0.0001
"""Per token on its host, beside computing: sampling, and the way out of the engine."""

TUNNEL_SECONDS = 0.001
"""Per token of a split model on its host, in addition: the tunnel's end there, and an engine that has waited.

This and WORKER_SECONDS: measured at each socket, `bench split` at 0 ms, 2026-11-26, two cores of an Intel Xeon.
"""

WORKER_SECONDS = 0.0013
"""Per token on each worker, beside computing and the network: the RPC server, and the tunnel's two ends there."""

CROSSING_SECONDS = 0.00005
"""For a result that goes from a GPU to the processor or back: a copy, and both wait for it. Not measured on a card."""

MICRO_BATCH = 512
"""Tokens of a prompt that an engine computes at once, unless a layout says otherwise; in a split, machines work on
different ones at the same time."""

PROMPT_TOKENS = 2048
"""The prompt whose speed is predicted, since over several machines the speed depends on the length."""

SPLIT_GAIN = 1.25
"""How many times as fast a group must be predicted as one node's GPU and processor, before it is formed."""

HALVING_SECONDS = 1800.0
"""An observation counts half after this time."""

FRESH_SECONDS = 600.0
"""An older probe is repeated before it is used, if the machine is idle."""

MAX_SEEN = 8
PROBE, MACHINE, MODEL = "probe", "machine", "model"
"""Where most of a prediction comes from: the probe, other models on this machine, or this very model."""

FLOAT_BYTES = 4.0
"""Of an element of an activation, where it travels as it is."""

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


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A path between two nodes, as a program's messages experience it.

    Attributes:
        one_way_seconds: of a small message, from the write to the read.
        bytes_per_second: of much data; 0.0 unknown.
    """

    one_way_seconds: float
    bytes_per_second: float = 0.0

    def seconds(self, size: float) -> float:
        """For a message of `size` bytes."""
        return self.one_way_seconds + (size / self.bytes_per_second if self.bytes_per_second else 0.0)


Links = Mapping[tuple[NodeId, NodeId], Link]
"""By two nodes, in either order."""


def link_between(links: Links, one: NodeId, other: NodeId) -> Link | None:
    """The link of two nodes, whichever of them measured it."""
    return links.get((one, other)) or links.get((other, one))


def solo_seconds(facts: ModelFacts, speed: Speed | None) -> float | None:
    """Seconds of one token on one machine; None where nothing is known."""
    if speed is None or not speed.known or not facts.active_bytes:
        return None
    return ENGINE_SECONDS + speed.seconds(facts.weight_bits, facts.size_bytes, facts.active_bytes, facts.layers)


def offload_seconds(facts: ModelFacts, offload: Offload, device: Speed | None, host: Speed | None) -> float | None:
    """Seconds of one token on a GPU and the processor beside it; None where nothing is known.

    Each reads its own weights. The GPU's results go to the processor and back for each layer whose experts are there.
    """
    if not offload.gpu_layers:
        return solo_seconds(facts, host)
    if device is None or host is None or not device.known or not host.known or not facts.active_bytes:
        return None
    layers = layers_of(facts)
    first = facts.layers - offload.gpu_layers
    experts = sum(layer.experts for layer in layers)
    plain = sum(layer.weights for layer in layers) - experts
    part = min(1.0, max(0.0, facts.active_bytes - facts.head_bytes - plain) / experts) if experts else 0.0
    moved = range(first, max(first, min(offload.cpu_moe, facts.layers)))
    read = sum(layer.weights - layer.experts + part * layer.experts for layer in layers[:first])
    read += sum(part * layers[place].experts for place in moved)
    bits, size = facts.weight_bits, facts.size_bytes
    on_device = device.seconds(bits, size, max(0.0, facts.active_bytes - read), offload.gpu_layers)
    # Of a layer whose experts alone are on the processor, it computes about a third of the operations.
    on_host = host.seconds(bits, size, read, first + len(moved) // 3) if read else 0.0
    crossings = (1 if first else 0) + 2 * len(moved)
    return ENGINE_SECONDS + on_device + on_host + crossings * CROSSING_SECONDS


def prompt_seconds(facts: ModelFacts, speed: Speed | None, tokens: int = PROMPT_TOKENS) -> float | None:
    """Seconds until one machine has read a prompt of `tokens` tokens; None where nothing is known."""
    if speed is None or not facts.active_bytes:
        return None
    blocks = facts.active_bytes - facts.head_bytes
    read = speed.prompt_seconds(facts.weight_bits, facts.size_bytes, blocks, tokens)
    return None if read is None else ENGINE_SECONDS + read


def prefers_split(split: float | None, offload: float | None) -> bool:
    """Whether a model is split rather than computed by one node's GPU and processor, by the seconds of a token.

    The group must be clearly faster. Where one of both is not known, the model is split: then video memory computes it.
    """
    return split is None or offload is None or split * SPLIT_GAIN < offload


class SplitSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one token around a ring: of engines and tunnels on all nodes, and of the network."""

    machines: float
    network: float

    def total(self, lag: float = 1.0) -> float:
        """The sum. `lag`: how many times as long the machines were observed to take."""
        return self.machines * lag + self.network


def split_seconds(
    facts: ModelFacts,
    layout: SplitLayout,
    speeds: Mapping[NodeId, Speed],
    links: Links,
    element_bytes: float = FLOAT_BYTES,
) -> SplitSeconds | None:
    """Seconds of one token around the layout's ring; None where a machine or a link is not known.

    `element_bytes`: of an element of an activation as it travels.
    """
    ring = _ring(layout, links)
    if ring is None or not facts.active_bytes or not facts.layers:
        return None
    total = ENGINE_SECONDS + TUNNEL_SECONDS
    each = (facts.active_bytes - facts.head_bytes) / facts.layers
    for share in layout.shares:
        speed = speeds.get(share.node)
        if speed is None or not speed.known:
            return None
        hosted = share is layout.host
        part = share.layers * each + (facts.head_bytes if hosted else 0)
        total += speed.seconds(facts.weight_bits, facts.size_bytes, part, share.layers)
        total += 0.0 if hosted else WORKER_SECONDS
    message = facts.embedding_length * element_bytes
    return SplitSeconds(machines=total, network=sum(link.seconds(message) for link in ring))


def split_prompt_seconds(
    facts: ModelFacts,
    layout: SplitLayout,
    speeds: Mapping[NodeId, Speed],
    links: Links,
    tokens: int = PROMPT_TOKENS,
    element_bytes: float = FLOAT_BYTES,
) -> SplitSeconds | None:
    """Seconds until a ring has read a prompt of `tokens` tokens; None where a machine or a link is not known.

    `element_bytes`: of an element of an activation as it travels.

    The first micro-batch passes all machines; the others follow at the pace of the slowest machine or link.
    """
    ring = _ring(layout, links)
    if ring is None or not facts.active_bytes or not facts.layers or tokens <= 0:
        return None
    together = min(tokens, layout.micro_batch or MICRO_BATCH)
    each = (facts.active_bytes - facts.head_bytes) / facts.layers
    stages: list[float] = []
    for share in layout.shares:
        speed = speeds.get(share.node)
        part = share.layers * each
        read = None if speed is None else speed.prompt_seconds(facts.weight_bits, facts.size_bytes, part, together)
        if read is None:
            return None
        # The host hands on what each worker needs, and computes nothing meanwhile.
        beside = TUNNEL_SECONDS * len(layout.workers) if share is layout.host else WORKER_SECONDS
        stages.append(read + beside)
    token = facts.embedding_length * element_bytes
    there, back = ring[:-1], ring[-1]
    carried = max((link.seconds(token * together) - link.one_way_seconds for link in there), default=0.0)
    following, slowest = tokens / together - 1.0, max(stages)
    return SplitSeconds(
        machines=ENGINE_SECONDS + sum(stages) + following * slowest,
        # The last machine returns the state of the last token alone.
        network=sum(link.seconds(token * together) for link in there)
        + back.seconds(token)
        + following * max(0.0, carried - slowest),
    )


def ring_seconds(layout: SplitLayout, links: Links) -> float | None:
    """The network's part for small messages; None where a link is not known."""
    ring = _ring(layout, links)
    return None if ring is None else sum(link.one_way_seconds for link in ring)


def per_second(seconds: float | None) -> float | None:
    """Tokens per second, rounded for people."""
    return None if seconds is None or seconds <= 0.0 else round(1.0 / seconds, 2)


def _ring(layout: SplitLayout, links: Links) -> list[Link] | None:
    """The links in the order in which a token passes them; None where one is not known."""
    nodes = [share.node for share in layout.shares]
    found = [link_between(links, one, other) for one, other in zip(nodes, (*nodes[1:], nodes[0]), strict=True)]
    known = [link for link in found if link is not None]
    return known if len(known) == len(found) else None


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

    @property
    def plausible(self) -> bool:
        """Whether its numbers are possible. A file may hold anything."""
        lags = all(_MIN_LAG <= lag <= _MAX_LAG for lag in (self.lag, self.split_lag))
        lags &= all(_MIN_FACTOR <= lag <= _MAX_FACTOR for lag in (self.prompt_lag, self.split_prompt_lag))
        times = all(0.0 < one.seconds < math.inf and math.isfinite(one.at) for one in self.seen)
        return lags and times and math.isfinite(self.probed_at)

    def probed(self, speed: Speed, now: float, host: Speed = Speed()) -> "Calibration":  # noqa: B008 - frozen
        """The machine was probed again. Observations stay and fade."""
        seen = tuple(msgspec.structs.replace(one, count=0) for one in self.seen)
        return msgspec.structs.replace(self, speed=speed, host=host, probed_at=now, seen=seen)

    def observed(self, facts: ModelFacts, seconds: float, now: float, *, drafted: bool = False) -> "Calibration":
        """A token of a model took `seconds`, alone on the machine."""
        key = _key(facts)
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

    def observed_prompt(self, facts: ModelFacts, tokens: int, seconds: float, now: float) -> "Calibration":
        """A prompt of `tokens` new tokens was read in `seconds`, alone on the machine and undivided."""
        speed = self.speed.slowed(self.slowdown(now, facts).factor)
        lag = _prompt_lag(self.prompt_lag, prompt_seconds(facts, speed, tokens), tokens, seconds)
        return msgspec.structs.replace(self, prompt_lag=lag)

    def observed_split_prompt(self, predicted: SplitSeconds, tokens: int, seconds: float) -> "Calibration":
        """A prompt of `tokens` new tokens of a split model that this node hosts was read in `seconds`.

        `predicted`: for a prompt of this length. What links take is not corrected, as with a token.
        """
        machines = max(seconds - predicted.network, predicted.machines * _MIN_FACTOR)
        lag = _prompt_lag(self.split_prompt_lag, predicted.machines, tokens, machines)
        return msgspec.structs.replace(self, split_prompt_lag=lag)

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
        return msgspec.structs.replace(speed, batch=speed.batch.slowed(self.prompt_lag))

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


def _prompt_lag(lag: float, predicted: float | None, tokens: int, seconds: float) -> float:
    """How many times as long as predicted prompts take, after one that took `seconds`."""
    if predicted is None or predicted <= 0.0 or seconds <= 0.0 or not math.isfinite(seconds) or tokens < _LEAST_PROMPT:
        return lag
    ratio = min(_MAX_FACTOR, max(_MIN_FACTOR, seconds / predicted))
    return math.exp((1.0 - _PROMPT_SMOOTHING) * math.log(lag) + _PROMPT_SMOOTHING * math.log(ratio))


def _mixed(lag: float, ratio: float, part: float) -> float:
    mixed = math.exp((1.0 - part) * math.log(lag) + part * math.log(ratio))
    return min(_MAX_LAG, max(_MIN_LAG, mixed))
