"""How fast a model will answer, before it is loaded: from what machines and the ways between them were seen to do.

A token of one request costs reading all weights once, and in a split model the way around: each worker computes its
layers when the one before it is done. Nothing else is counted but what every token costs an engine and a tunnel. How
what came differed from it is learned in core.experience.
"""

from collections.abc import Mapping

import msgspec

from mesh_llm.core.ids import NodeId
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.speed import Speed
from mesh_llm.core.split_layout import SplitLayout

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
