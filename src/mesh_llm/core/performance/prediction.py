"""How fast a model will answer, predicted before it is loaded.

A token of one request costs one read of all weights, and what its attention takes (`attention.py`); in a split model,
also the way around the ring, since each worker computes its layers after the one before it. Only what every token costs
an engine and a tunnel is added. `calibration.py` corrects it by how fast models really were.
"""

from collections.abc import Mapping

import msgspec

from mesh_llm.core.performance.attention import prompt_attention, token_attention
from mesh_llm.core.placement.offload import layers_of
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelFacts, Offload, Speed, SplitLayout, SplitShare

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
"""The prompt whose speed is predicted where nothing says how long it is: its speed depends on that."""

SPLIT_GAIN = 1.25
"""How many times as fast a group must be predicted as one node's GPU and processor, before it is formed."""

FLOAT_BYTES = 4.0
"""Of an element of an activation, where it travels as it is."""


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


def solo_seconds(facts: ModelFacts, speed: Speed | None, context: int = 0) -> float | None:
    """Seconds of one token on one machine, after `context` others; None where nothing is known."""
    if speed is None or not speed.known or not facts.active_bytes:
        return None
    read = speed.seconds(facts.weight_bits, facts.size_bytes, facts.active_bytes, facts.layers)
    return ENGINE_SECONDS + read + token_attention(facts, speed, context)


def offload_seconds(
    facts: ModelFacts, offload: Offload, device: Speed | None, host: Speed | None, context: int = 0
) -> float | None:
    """Seconds of one token on a GPU and the processor beside it, after `context` others; None: nothing is known.

    Each reads its own weights. The GPU's results go to the processor and back for each layer whose experts are there.
    """
    if not offload.gpu_layers:
        return solo_seconds(facts, host, context)
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
    # The KV cache of a layer is where the layer is.
    on_device += token_attention(facts, device, context, layers=facts.layer_facts[first:])
    on_host += token_attention(facts, host, context, layers=facts.layer_facts[:first])
    return ENGINE_SECONDS + on_device + on_host + crossings * CROSSING_SECONDS


def prompt_seconds(facts: ModelFacts, speed: Speed | None, tokens: int = PROMPT_TOKENS, start: int = 0) -> float | None:
    """Seconds until one machine has read `tokens` tokens of a prompt, after `start` others; None: nothing is known."""
    if speed is None or not facts.active_bytes:
        return None
    blocks = facts.active_bytes - facts.head_bytes
    read = speed.prompt_seconds(facts.weight_bits, facts.size_bytes, blocks, tokens)
    return None if read is None else ENGINE_SECONDS + read + prompt_attention(facts, speed, tokens, start)


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


def read_bytes(facts: ModelFacts, share: SplitShare, *, output: bool) -> float:
    """Bytes of weights that a node reads for its layers, and with `output` for the output layer."""
    layers = share.layers * ((facts.active_bytes - facts.head_bytes) / facts.layers)
    return layers + (facts.head_bytes if output else 0)


def split_seconds(
    facts: ModelFacts,
    layout: SplitLayout,
    speeds: Mapping[NodeId, Speed],
    links: Links,
    element_bytes: float = FLOAT_BYTES,
    context: int = 0,
) -> SplitSeconds | None:
    """Seconds of one token around the layout's ring; None where a machine or a link is not known.

    `element_bytes`: of an element of an activation as it travels; `context`: tokens before this one.
    """
    ring = ring_links(layout, links)
    if ring is None or not facts.active_bytes or not facts.layers:
        return None
    total = ENGINE_SECONDS + TUNNEL_SECONDS
    for share in layout.shares:
        speed = speeds.get(share.node)
        if speed is None or not speed.known:
            return None
        hosted = share is layout.host
        part = read_bytes(facts, share, output=hosted)
        total += speed.seconds(facts.weight_bits, facts.size_bytes, part, share.layers)
        total += token_attention(facts, speed, context, share.layers / facts.layers)
        total += 0.0 if hosted else WORKER_SECONDS
    message = facts.embedding_length * element_bytes
    return SplitSeconds(machines=total, network=sum(link.seconds(message) for link in ring))


class _Stage(msgspec.Struct, frozen=True):
    """Seconds of one machine for a prompt: for its first and its last micro-batch, and for all of them."""

    first: float
    last: float
    whole: float


def split_prompt_seconds(
    facts: ModelFacts,
    layout: SplitLayout,
    speeds: Mapping[NodeId, Speed],
    links: Links,
    tokens: int = PROMPT_TOKENS,
    element_bytes: float = FLOAT_BYTES,
    start: int = 0,
) -> SplitSeconds | None:
    """Seconds until a ring has read `tokens` tokens of a prompt; None where a machine or a link is not known.

    `element_bytes`: of an element of an activation as it travels; `start`: tokens of the prompt that are cached.

    Micro-batches pass all machines in turn, at the pace of the slowest machine or link: machines before it have begun
    with the first micro-batch, and those behind it end with the last, which takes longest.
    """
    ring = ring_links(layout, links)
    if ring is None or not facts.active_bytes or not facts.layers or tokens <= 0:
        return None
    together = min(tokens, layout.micro_batch or MICRO_BATCH)
    following = tokens / together - 1.0
    stages: list[_Stage] = []
    for share in layout.shares:
        speed = speeds.get(share.node)
        stage = None if speed is None else _stage(facts, layout, share, speed, tokens, together, start)
        if stage is None:
            return None
        stages.append(stage)
    ways = [
        sum(stage.first for stage in stages[:place]) + slowest.whole + sum(stage.last for stage in stages[place + 1 :])
        for place, slowest in enumerate(stages)
    ]
    machines = max(ways)
    slowest = stages[ways.index(machines)]
    token = facts.embedding_length * element_bytes
    there, back = ring[:-1], ring[-1]
    carried = max((link.seconds(token * together) - link.one_way_seconds for link in there), default=0.0)
    return SplitSeconds(
        machines=ENGINE_SECONDS + machines,
        # The last machine returns the state of the last token alone.
        network=sum(link.seconds(token * together) for link in there)
        + back.seconds(token)
        + max(0.0, following * carried - (slowest.whole - slowest.first)),
    )


def _stage(
    facts: ModelFacts, layout: SplitLayout, share: SplitShare, speed: Speed, tokens: int, together: int, start: int
) -> _Stage | None:
    """What a prompt takes on one machine, in micro-batches of `together`; None where nothing of it was measured."""
    part = read_bytes(facts, share, output=False)
    read = speed.prompt_seconds(facts.weight_bits, facts.size_bytes, part, together)
    if read is None:
        return None
    # The host hands on what each worker needs, and computes nothing meanwhile.
    each = read + (TUNNEL_SECONDS * len(layout.workers) if share is layout.host else WORKER_SECONDS)

    def attention(count: int, before: int) -> float:
        return prompt_attention(facts, speed, count, before, share.layers / facts.layers)

    return _Stage(
        first=each + attention(together, start),
        last=each + attention(together, start + tokens - together),
        whole=each * tokens / together + attention(tokens, start),
    )


def ring_seconds(layout: SplitLayout, links: Links) -> float | None:
    """The network's part for small messages; None where a link is not known."""
    ring = ring_links(layout, links)
    return None if ring is None else sum(link.one_way_seconds for link in ring)


def per_second(seconds: float | None) -> float | None:
    """Tokens per second, rounded for people."""
    return None if seconds is None or seconds <= 0.0 else round(1.0 / seconds, 2)


def ring_links(layout: SplitLayout, links: Links) -> list[Link] | None:
    """The links in the order in which a token passes them; None where one is not known."""
    nodes = [share.node for share in layout.shares]
    found = [link_between(links, one, other) for one, other in zip(nodes, (*nodes[1:], nodes[0]), strict=True)]
    known = [link for link in found if link is not None]
    return known if len(known) == len(found) else None
