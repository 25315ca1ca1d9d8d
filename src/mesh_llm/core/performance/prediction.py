"""How fast a model will answer, before it is loaded: from what machines and the ways between them were seen to do.

A token of one request costs reading all weights once, and in a split model the way around: each worker computes its
layers when the one before it is done. Nothing else is counted but what every token costs an engine and a tunnel. How
what came differed from it is learned in core.experience.

What a node learns of its own speed: its probe, and how fast its models really were.

The probe (core.speed) takes a second or two of the idle machine, and engines meet what it does not: other work, heat,
other programs' caches. So what came is kept beside it, and both are weighed by how recent they are. What an engine
takes beyond the probe even right after it is the engine's own (`lag`), and is remembered for longer. Times are of one
clock, in seconds, told by the caller.
"""

import math
from collections.abc import Mapping

import msgspec

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelFacts, Speed, SplitLayout

ENGINE_SECONDS = 0.0001
"""Of each token on its host, beside computing: sampling, and the way out of the engine."""

TUNNEL_SECONDS = 0.001
"""Of each token of a split model on its host, beside that: the tunnel's end there, and an engine that has waited.

This and WORKER_SECONDS: taken at each socket, `bench split` at 0 ms, 2026-11-26, two cores of an Intel Xeon.
"""

WORKER_SECONDS = 0.0013
"""Of each token on each worker, beside computing and the network: the RPC server, and the tunnel's two ends there."""

_FLOAT_BYTES = 4


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A way between two nodes, as messages of a program experience it.

    Attributes:
        one_way_seconds: of a small message, from when it is written to when it is read.
        bytes_per_second: of much data; 0.0 unknown.
    """

    one_way_seconds: float
    bytes_per_second: float = 0.0

    def seconds(self, size: int) -> float:
        """For a message of `size` bytes."""
        return self.one_way_seconds + (size / self.bytes_per_second if self.bytes_per_second else 0.0)


Links = Mapping[tuple[NodeId, NodeId], Link]
"""Between two nodes, in either order."""


def link_between(links: Links, one: NodeId, other: NodeId) -> Link | None:
    """The way between two nodes, whichever of them measured it."""
    return links.get((one, other)) or links.get((other, one))


def solo_seconds(facts: ModelFacts, speed: Speed | None) -> float | None:
    """Of one token on one machine; None where nothing is known."""
    if speed is None or not speed.known or not facts.active_bytes:
        return None
    whole = speed.seconds(facts.weight_bits, facts.size_bytes, facts.active_bytes, facts.layers)
    return whole + ENGINE_SECONDS


class SplitSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """Of one token around a ring.

    Attributes:
        machines: what engines and tunnels take, on all nodes.
        network: what the ways take.
    """

    machines: float
    network: float

    def total(self, lag: float = 1.0) -> float:
        """Both; `lag`: how many times as long the machines were seen to take."""
        return self.machines * lag + self.network


def split_seconds(
    facts: ModelFacts, layout: SplitLayout, speeds: Mapping[NodeId, Speed], links: Links
) -> SplitSeconds | None:
    """Of one token around the layout's ring; None where a machine or a way is not known."""
    if not facts.active_bytes or not facts.layers:
        return None
    total = ENGINE_SECONDS + TUNNEL_SECONDS
    each = (facts.active_bytes - facts.head_bytes) / facts.layers
    ring = [share.node for share in layout.shares]
    for share in layout.shares:
        speed = speeds.get(share.node)
        if speed is None or not speed.known:
            return None
        hosted = share is layout.host
        part = share.layers * each + (facts.head_bytes if hosted else 0)
        total += speed.seconds(facts.weight_bits, facts.size_bytes, part, share.layers)
        total += 0.0 if hosted else WORKER_SECONDS
    network = 0.0
    for one, other in zip(ring, (*ring[1:], ring[0]), strict=True):
        link = link_between(links, one, other)
        if link is None:
            return None
        network += link.seconds(facts.embedding_length * _FLOAT_BYTES)
    return SplitSeconds(machines=total, network=network)


def ring_seconds(layout: SplitLayout, links: Links) -> float | None:
    """The network's part of it, for small messages."""
    ring = [share.node for share in layout.shares]
    ways = [link_between(links, one, other) for one, other in zip(ring, (*ring[1:], ring[0]), strict=True)]
    return None if None in ways else sum(way.one_way_seconds for way in ways if way is not None)


def per_second(seconds: float | None) -> float | None:
    """Tokens per second, as shown."""
    return None if seconds is None or seconds <= 0.0 else round(1.0 / seconds, 2)


HALVING_SECONDS = 1800.0
"""What is older by so much counts half."""

FRESH_SECONDS = 600.0
"""A probe that is older is taken again before it is believed, where the machine is at rest."""

MOST_SEEN = 8
_OWN_WEIGHT = 4.0
"""Of what came of the very model, against that of another one, or a probe."""

_SMOOTHING = 0.2
_LEAST, _MOST = 1 / 16, 16.0
_LEAST_LAG, _MOST_LAG = 0.5, 4.0
_DISAGREES = math.log(1.3)
_ENOUGH = 3

PROBE, MACHINE, MODEL = "probe", "machine", "model"
"""What most of a prediction comes from: the probe, other models on this machine, or this very model."""


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """What a token of a model reads: as Speed.seconds takes it."""

    bits: float
    size_bytes: int
    active_bytes: int
    layers: int

    @staticmethod
    def of(facts: ModelFacts) -> "Weights":
        """A model's."""
        return Weights(
            bits=facts.weight_bits, size_bytes=facts.size_bytes, active_bytes=facts.active_bytes, layers=facts.layers
        )


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one model was here, alone on the machine and undivided.

    Attributes:
        model: its fingerprint, or its name where it has none.
        weights: what a token reads.
        seconds: of a token, smoothed.
        at: when it was last seen.
        count: how often since the probe.
        drafted: another model guessed ahead; such a speed says nothing of others.
    """

    model: str
    weights: Weights
    seconds: float
    at: float
    count: int = 1
    drafted: bool = False


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as long as by the probe this machine takes, and what that comes from: PROBE, MACHINE or MODEL."""

    factor: float
    basis: str


class Experience(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; each method gives a new one.

    Attributes:
        speed: the last probe's.
        probed_at: when that was.
        lag: how many times as long engines take as a probe of the same moment.
        split_lag: the same of split models that this node hosts, in what machines take of a token.
        seen: models, the latest last.
    """

    speed: Speed
    probed_at: float
    lag: float = 1.0
    split_lag: float = 1.0
    seen: tuple[Seen, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether it could have come about: a file may hold anything."""
        lags = all(_LEAST_LAG <= lag <= _MOST_LAG for lag in (self.lag, self.split_lag))
        times = all(0.0 < one.seconds < math.inf and math.isfinite(one.at) for one in self.seen)
        return lags and times and math.isfinite(self.probed_at)

    def probed(self, speed: Speed, now: float) -> "Experience":
        """The machine was probed again. What was seen stays, for as long as it counts."""
        seen = tuple(msgspec.structs.replace(one, count=0) for one in self.seen)
        return msgspec.structs.replace(self, speed=speed, probed_at=now, seen=seen)

    def observed(self, facts: ModelFacts, seconds: float, now: float, *, drafted: bool = False) -> "Experience":
        """A token of a model took so long, alone on the machine."""
        key = _key(facts)
        fresh = Seen(model=key, weights=Weights.of(facts), seconds=seconds, at=now, drafted=drafted)
        if seconds <= 0.0 or not math.isfinite(seconds) or self._ratio(fresh) is None:
            return self
        before = next((one for one in self.seen if (one.model, one.drafted) == (key, drafted)), None)
        if before is not None:
            # As smooth as the traffic's own numbers, but what is old is left behind at once.
            keep = (1.0 - _SMOOTHING) * _half(now - before.at, FRESH_SECONDS)
            mixed = math.exp(keep * math.log(before.seconds) + (1.0 - keep) * math.log(seconds))
            fresh = msgspec.structs.replace(fresh, seconds=mixed, count=before.count + 1)
        others = tuple(one for one in self.seen if one is not before)
        lag = self.lag
        ratio = self._ratio(fresh)
        if ratio is not None and not drafted and now - self.probed_at < FRESH_SECONDS:
            lag = _mixed(lag, ratio, _SMOOTHING)
        return msgspec.structs.replace(self, lag=lag, seen=(*others, fresh)[-MOST_SEEN:])

    def observed_split(self, foreseen: SplitSeconds, seconds: float) -> "Experience":
        """A token of a split model that this node hosts took so long, and was foreseen like this.

        It teaches the more, the less of it was the network's.
        """
        if seconds <= 0.0 or not math.isfinite(seconds) or foreseen.machines <= 0.0:
            return self
        machines = max(seconds - foreseen.network, foreseen.machines * _LEAST_LAG)
        share = foreseen.machines / foreseen.total()
        lag = _mixed(self.split_lag, machines / foreseen.machines, _SMOOTHING * share)
        return msgspec.structs.replace(self, split_lag=lag)

    def pace(self, now: float, model: ModelFacts | None = None, *, besides: ModelFacts | None = None) -> Pace:
        """How many times as long as by the probe it takes at present.

        Args:
            now: the time.
            model: what it is asked for: counts more; None: for any.
            besides: a model to be left out, as if it had never run here.
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
        # Only how recent they are beside each other: where all is old, nothing better is known.
        latest = max(min(at, now) for _, at, _, _ in votes)
        weights: dict[str, float] = {PROBE: 0.0, MACHINE: 0.0, MODEL: 0.0}
        total = 0.0
        for kind, at, weight, vote in votes:
            weighed = weight * _half(latest - at, HALVING_SECONDS)
            weights[kind] += weighed
            total += weighed * vote
        whole = sum(weights.values())
        basis = max(weights, key=lambda kind: weights[kind] / whole)
        return Pace(factor=min(_MOST, max(_LEAST, math.exp(total / whole))), basis=basis)

    def at_present(self, now: float) -> Speed:
        """The machine's speed as it is told to others."""
        return self.speed.slowed(self.pace(now).factor)

    def stale(self, now: float) -> bool:
        """Whether the probe is to be taken again before somebody relies on it. A clock that went back counts."""
        return not 0.0 <= now - self.probed_at < FRESH_SECONDS

    def disagrees(self, now: float) -> bool:
        """Whether what comes has been another speed than the probe's for a while: the machine is not what it was."""
        votes = [ratio for one in self.seen if not one.drafted and (ratio := self._ratio(one)) is not None]
        times = sum(one.count for one in self.seen if not one.drafted)
        if not votes or times < _ENOUGH or not self.stale(now):
            return False
        mean = sum(map(math.log, votes)) / len(votes)
        return abs(mean - math.log(self.lag)) > _DISAGREES

    def _ratio(self, one: Seen) -> float | None:
        """How many times as long as by the probe a model took; None where the probe says nothing."""
        what = one.weights
        if not self.speed.known or not what.active_bytes:
            return None
        probed = self.speed.seconds(what.bits, what.size_bytes, what.active_bytes, what.layers)
        spent = max(one.seconds - ENGINE_SECONDS, one.seconds / 4)
        return min(_MOST, max(_LEAST, spent / probed)) if probed > 0.0 else None


def _key(facts: ModelFacts) -> str:
    return facts.fingerprint or facts.name


def _half(age: float, halving: float) -> float:
    return 2.0 ** (-max(0.0, age) / halving)


def _mixed(lag: float, ratio: float, part: float) -> float:
    mixed = math.exp((1.0 - part) * math.log(lag) + part * math.log(ratio))
    return min(_MOST_LAG, max(_LEAST_LAG, mixed))
