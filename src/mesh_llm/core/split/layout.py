"""How a host lays a model out over its group: whole layers by memory, on no more nodes than needed; or why it cannot.

As llama.cpp does it, the host keeps the output layer, the token embedding, the results and a draft. Each node takes the
weights and cache of its layers, and buffers for the widest layer. Weights and cache are counted as equal per layer,
with a margin for models in which they are not.
"""

import math
from collections.abc import Sequence

import msgspec

from mesh_llm.core.performance.pipeline import Groups, choose_groups, even_ring, measured_ring
from mesh_llm.core.performance.prediction import Links
from mesh_llm.core.placement.fit import (
    BATCH_TOKENS,
    PROCESS_BYTES,
    DoesNotFit,
    Memory,
    cache_bytes,
    choose_size,
    context_bounds,
    launch_memory,
    mtp_memory,
    padded,
    plan_solo,
)
from mesh_llm.core.types.errors import size
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import AUTO_CACHE, LaunchOptions, LaunchPlan, ModelFacts, Speed, SplitLayout, SplitShare


def divide_layers(layers: int, weights: Sequence[float], most: Sequence[int]) -> tuple[int, ...] | None:
    """Divide `layers` over nodes in proportion to `weights`, with at most `most` layers on each.

    Layers that the proportion leaves over go to the largest remainders, the earlier node first. None where `most` is
    too little in total, or no node has any weight.
    """
    if sum(most) < layers or not any(weight > 0 for weight in weights):
        return None
    given = [0] * len(weights)
    left = layers
    open_: list[int] = [index for index, weight in enumerate(weights) if weight > 0 and most[index] > 0]
    while left and open_:
        total = sum(weights[index] for index in open_)
        exact = {index: left * weights[index] / total for index in open_}
        full = [index for index in open_ if given[index] + exact[index] >= most[index]]
        if full:
            for index in full:
                left -= most[index] - given[index]
                given[index] = most[index]
            open_ = [index for index in open_ if index not in full]
            continue
        whole = {index: int(exact[index]) for index in open_}
        rest = left - sum(whole.values())
        order = sorted(open_, key=lambda index: (whole[index] - exact[index], index))
        for place, index in enumerate(order):
            given[index] += whole[index] + (1 if place < rest else 0)
        left = 0
    return tuple(given) if left == 0 else None


def _spread(given: tuple[int, ...], weights: Sequence[float], most: Sequence[int]) -> tuple[int, ...]:
    """Give each worker one layer that rounding left without, where it can hold one, from the node with the most.

    The host comes first, and may have none: it keeps what is no layer. No node loses its last layer for that.
    """
    spread = list(given)
    for index in range(1, len(spread)):
        largest = max(range(len(spread)), key=lambda other: (spread[other], -other))
        if spread[index] == 0 and weights[index] > 0 and most[index] > 0 and spread[largest] > 1:
            spread[largest] -= 1
            spread[index] = 1
    return tuple(spread)


_MARGIN = 1.04
_FLOAT_BYTES = 4
_MASK_BYTES = 2


class SplitMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a split launch, for one context and number of slots.

    Attributes:
        layer: each layer, on any node.
        host: on the host beside its layers.
        worker: on each worker beside its layers.
        layer_weights: of `layer`, without the cache.
        worker_engine: on each worker for each further engine of the host, which shares the weights there.
        solo: the whole model on one machine.
    """

    layer: int
    host: int
    worker: int
    layer_weights: int
    worker_engine: int
    solo: Memory

    def most_layers(self, memories: Sequence[int]) -> tuple[int, ...]:
        """How many layers fit on each node, the host first."""
        beside = [self.host, *([self.worker] * (len(memories) - 1))]
        return tuple(max(0, memory - fixed) // self.layer for memory, fixed in zip(memories, beside, strict=True))

    def total(self, layers: int, nodes: int) -> int:
        """All nodes together."""
        return layers * self.layer + self.host + (nodes - 1) * self.worker


def split_memory(
    facts: ModelFacts,
    context: int,
    slots: int,
    cache_type: str = "f16",
    draft: ModelFacts | None = None,
) -> SplitMemory:
    """The sums for a launch with `slots` slots of `context` tokens each. Raises KeyError for an unknown cache type."""
    solo = launch_memory(facts, context, slots, cache_type)
    layers = max(1, facts.layers)
    inner = max(0, facts.size_bytes - facts.output_bytes)
    weights = min(facts.size_bytes, facts.output_bytes) + (solo.weights - facts.size_bytes)
    width = facts.compute_width or 17 * facts.embedding_length
    buffers = BATCH_TOKENS * width * _FLOAT_BYTES + padded(context) * BATCH_TOKENS * _MASK_BYTES
    cache = cache_bytes(facts, context, slots, cache_type)
    extra = launch_memory(draft, context, slots).total if draft is not None else 0
    layer_weights = int(inner / layers * _MARGIN)
    # Layers that guess tokens ahead (MTP) are on the host, or not loaded.
    extra += mtp_memory(facts, context, slots).cache + facts.mtp_layers * layer_weights
    return SplitMemory(
        layer=max(1, int((inner + cache) / layers * _MARGIN)),
        host=weights + solo.compute + solo.other + extra,
        worker=buffers + PROCESS_BYTES,
        layer_weights=layer_weights,
        worker_engine=buffers,
        solo=solo,
    )


MOST_PIPELINED_TOKENS = 128
_PIECE_TOKENS = 32
_READ_TOKENS = 8.0
_HANDED_TOKENS = 0.3
_PROMPT_TOKENS = 2048


def pipelined_tokens(machines: int) -> int:
    """Tokens of a prompt that a group of processors computes at once; `machines`: that have layers, at least 2.

    The machines of a group work on consecutive micro-batches at the same time. A prompt of P tokens in micro-batches of
    b keeps S machines busy for the part P / (P + (S - 1) * b) of the time, so smaller ones are better, down to the size
    at which what each takes beside its tokens counts more: o tokens' worth, so that sqrt(o * P / (S - 1)) is best. On
    processors reading the weights and beginning a batch is worth some 8 tokens. While the host hands on what there is
    for a worker, about a millisecond, it computes nothing, and all S machines follow its pace: 0.3 * S * (S - 1) where
    one machine reads 300 tokens a second. Measured with one worker at 0 ms on quiet cores, 2,000 tokens, × one machine:
    512: 1.45 and 1.58; 256: 1.58 and 1.62; 128: 1.63 and 1.68; 64: 1.48 and 1.77. Reading the weights alone is worth
    1.7 to 4.7 tokens there (`Speed.batch` over `Speed.full`), which would give 64 and 96: no faster, and less even. A
    GPU reads its weights in the time of hundreds of a prompt's tokens: it keeps `BATCH_TOKENS`.
    """
    workers = max(1, machines - 1)
    beside = _READ_TOKENS + _HANDED_TOKENS * machines * workers
    best = math.sqrt(beside * _PROMPT_TOKENS / workers)
    return min(MOST_PIPELINED_TOKENS, max(1, round(best / _PIECE_TOKENS)) * _PIECE_TOKENS)


_SHARING_RPC = "8."
"""Versions of ggml's RPC whose graphs have numbers, so that several engines can use one rpc-server."""


class MemoryOffer(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the group, and the bytes that it offers; `on_processor` and `speed`: as in `Capacity`."""

    node: NodeId
    memory_bytes: int
    on_processor: bool = False
    speed: Speed = Speed()


class SplitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A model to be laid out.

    Attributes:
        facts: the model.
        options: what the users fixed by hand.
        shares: relative parts fixed by hand, the host's first; empty: by memory.
        asked: split over all nodes, even where fewer are enough (`--split`).
        draft: a draft model beside it on the host.
        groups: most engines of the host; None: as many as pay.
        links: between the nodes, as far as they are known: what engines gain depends on delays.
    """

    facts: ModelFacts
    options: LaunchOptions = LaunchOptions()
    shares: tuple[float, ...] = ()
    asked: bool = False
    draft: ModelFacts | None = None
    groups: int | None = 1
    links: Links = {}

    @property
    def least_context(self) -> int:
        """Least tokens per slot that may be planned."""
        return context_bounds(self.facts, self.options)[0]

    @property
    def cache_type(self) -> str:
        """Element type of the KV cache. Not every node can know which one would be chosen, so none is."""
        return "f16" if self.options.cache_type == AUTO_CACHE else self.options.cache_type

    def memory(self, context: int, slots: int) -> SplitMemory:
        """The memory of a split launch of this size."""
        return split_memory(self.facts, context, slots, self.cache_type, self.draft)


def group_fits(request: SplitRequest, memories: Sequence[int]) -> bool:
    """Whether the smallest permitted launch fits into these memories, the host's first."""
    alone = plan_solo(request.facts, memories[0], request.options, request.draft)
    if not isinstance(alone, DoesNotFit):
        return True
    return _layers(request, memories, request.least_context, request.options.slots or 1) is not None


def plan_split(
    request: SplitRequest, group: Sequence[MemoryOffer], term: int, rpc_version: str
) -> LaunchPlan | DoesNotFit:
    """Lay the model out over `group`: the host first, then the workers in order of preference.

    On the host alone where it fits, unless a split was asked for; else with as few workers as possible.
    """
    alone = plan_solo(request.facts, group[0].memory_bytes, request.options, request.draft)
    whole = None if isinstance(alone, DoesNotFit) else alone
    if whole is not None and (not request.asked or len(group) == 1):
        return whole
    fewest = len(request.shares) if request.shares else len(group) if request.asked else 2
    for count in range(min(max(2, fewest), len(group)), len(group) + 1):
        plan = _over(request, group[:count], term, rpc_version)
        if plan is not None:
            return plan
    return whole or shortfall(request, [offer.memory_bytes for offer in group])


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the group to which a layout gives no layer.

    Attributes:
        node: its id.
        have_bytes: what it offers.
        need_bytes: what one layer needs there, which is more; 0: it could hold one, but the layers do not divide so.
    """

    node: NodeId
    have_bytes: int
    need_bytes: int

    @property
    def reason(self) -> str:
        """A clause for people."""
        if self.need_bytes:
            return f"one layer needs {size(self.need_bytes)} there, and it offers {size(self.have_bytes)}"
        return "its layers do not divide so that it gets one"


def left_out(request: SplitRequest, group: Sequence[MemoryOffer], plan: LaunchPlan) -> tuple[LeftOut, ...]:
    """The workers of `group` that a plan does not use although all are asked to help (`--split`), with the reason.

    Those to which `--tensor-split` gives nothing are not among them.
    """
    if not request.asked:
        return ()
    used = {share.node for share in plan.split.shares} if plan.split is not None else set[NodeId]()
    parts = request.shares or (1.0,) * len(group)
    least = one_layer(request) if plan.split is None else one_layer(request, plan.context, plan.slots)
    return tuple(
        LeftOut(node=one.node, have_bytes=one.memory_bytes, need_bytes=least if one.memory_bytes < least else 0)
        for one, part in zip(group[1:], parts[1:], strict=False)
        if one.node not in used and part > 0
    )


def one_layer(request: SplitRequest, context: int = 0, slots: int = 0) -> int:
    """Bytes that a worker needs for one layer; of the smallest launch if no size is given."""
    memory = request.memory(context or request.least_context, slots or request.options.slots or 1)
    return memory.worker + memory.layer


def shortfall(request: SplitRequest, memories: Sequence[int]) -> DoesNotFit:
    """What the smallest launch over these nodes lacks, as in `need 55.0 GB, have 51.5 GB`."""
    context, slots = request.least_context, request.options.slots or 1
    memory = request.memory(context, slots)
    nodes = max(1, len(memories))
    have = sum(memories)
    need = memory.total(request.facts.layers, nodes) if nodes > 1 else memory.solo.total
    unit, name = (10**9, "GB") if need >= 10**9 else (10**6, "MB")
    where = f"{nodes} nodes" if nodes > 1 else "1 node"
    spread = ", and its layers do not divide so" if need <= have else ""
    return DoesNotFit(
        need_bytes=need,
        have_bytes=have,
        parts=memory.solo,
        context=context,
        slots=slots,
        message=f"need {need / unit:.1f} {name}, have {have / unit:.1f} {name} on {where}{spread}",
        hint="Join another machine, or take a smaller model.",
    )


def _over(request: SplitRequest, group: Sequence[MemoryOffer], term: int, rpc_version: str) -> LaunchPlan | None:
    """The best launch over exactly these nodes."""
    memories = [offer.memory_bytes for offer in group]

    def divides(context: int, slots: int) -> bool:
        layers = _layers(request, memories, context, slots)
        return layers is not None and any(layers[1:])

    chosen = choose_size(request.facts, request.options, divides)
    if chosen is None:
        return None
    context, slots = chosen
    layers = _layers(request, memories, context, slots)
    if layers is None:
        return None
    memory = request.memory(context, slots)
    sizes = [memory.host + layers[0] * memory.layer, *(memory.worker + count * memory.layer for count in layers[1:])]
    shares = [
        SplitShare(node=offer.node, layers=count, memory_bytes=used)
        for place, (offer, count, used) in enumerate(zip(group, layers, sizes, strict=True))
        if count > 0 or not place
    ]
    layout = SplitLayout(
        term=term,
        shares=tuple(shares),
        rpc_version=rpc_version,
        micro_batch=_micro_batch(request.facts, group, len(shares)),
    )
    groups = _groups(request, group, layout, slots)
    # The host's layers are one mapping of the file only where llama.cpp does not rearrange them for the processor.
    more = [memory.host + layers[0] * memory.layer_weights, *([memory.worker_engine] * (len(shares) - 1))]
    have = {offer.node: offer.memory_bytes for offer in group}
    # Only with memory that is left: neither context nor slots are less for it.
    while groups.count > 1 and any(
        share.memory_bytes + (groups.count - 1) * each > have[share.node]
        for share, each in zip(shares, more, strict=True)
    ):
        fewer = max(count for count in range(1, groups.count) if slots % count == 0)
        groups = Groups(count=fewer, why="there is memory for no more")
    further = groups.count - 1
    shares = [
        msgspec.structs.replace(share, memory_bytes=share.memory_bytes + further * each)
        for share, each in zip(shares, more, strict=True)
    ]
    return LaunchPlan(
        model=request.facts.name,
        context=context,
        slots=slots,
        memory_bytes=shares[0].memory_bytes,
        cache_type=request.cache_type,
        split=msgspec.structs.replace(layout, shares=tuple(shares), groups=groups.count, groups_why=groups.why),
    )


def _groups(request: SplitRequest, group: Sequence[MemoryOffer], layout: SplitLayout, slots: int) -> Groups:
    """Engines of the host; one where a machine has a GPU.

    On a GPU, reading the weights takes as long as hundreds of tokens, so that little is gained; and the host's own
    weights would be there once for each engine. A draft model is another one that each engine would have.
    """
    if request.groups == 1:
        return Groups(count=1, why="as set by --groups 1")
    if not layout.rpc_version.startswith(_SHARING_RPC):
        return Groups(count=1, why="the engines' version cannot share weights")
    if not all(offer.on_processor for offer in group):
        return Groups(count=1, why="a GPU takes part")
    if request.draft is not None:
        return Groups(count=1, why="a draft model helps it")
    if request.facts.one_batch:
        return Groups(count=1, why="it answers with embeddings")
    speeds = {offer.node: offer.speed for offer in group}
    machines = sum(1 for share in layout.shares if share.layers > 0)
    ring = measured_ring(request.facts, layout, speeds, request.links) or even_ring(machines)
    return choose_groups(ring, slots, request.groups)


def _micro_batch(facts: ModelFacts, group: Sequence[MemoryOffer], machines: int) -> int:
    """Tokens at once over this group, of which `machines` have layers; 0: as many as usual."""
    pipelined = not facts.one_batch and all(offer.on_processor for offer in group)
    return pipelined_tokens(machines) if pipelined else 0


def _layers(request: SplitRequest, memories: Sequence[int], context: int, slots: int) -> tuple[int, ...] | None:
    """Layers on each node; None where they do not fit."""
    memory = request.memory(context, slots)
    most = memory.most_layers(memories)
    by_hand = request.shares[: len(memories)]
    weights = [*by_hand, *([0.0] * (len(memories) - len(by_hand)))] if by_hand else [float(part) for part in most]
    layers = divide_layers(request.facts.layers, weights, most)
    if layers is None or memory.host > memories[0]:
        return None
    return _spread(layers, weights, most)
