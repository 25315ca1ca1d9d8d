"""Whole layers for each node, by what it offers or by hand.

What each node of a split model holds, as llama.cpp lays it out: whole layers, and what the host keeps to itself.

The host keeps the output layer and the token embedding, the results, and a draft; each node takes its layers' weights
and cache, and buffers for the widest layer. Weights and cache are counted as equal per layer, with a margin for the
models in which they are not.

How a host lays a model out over its group: no more nodes than it takes, whole layers by memory, or why not.
"""

from collections.abc import Sequence

import msgspec

from mesh_llm.core.placement.fit import (
    BATCH_TOKENS,
    COMFORTABLE_CONTEXT,
    CONTEXT_STEP,
    DEFAULT_CONTEXT,
    MINIMUM_CONTEXT,
    PROCESS_BYTES,
    DoesNotFit,
    Memory,
    cache_bytes,
    launch_memory,
    padded,
    plan_solo,
)
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts, SplitLayout, SplitShare


def share_layers(layers: int, weights: Sequence[float], most: Sequence[int]) -> tuple[int, ...] | None:
    """Divide `layers` in proportion to `weights`, nobody getting more than `most` says.

    What the proportion leaves over goes to those with the largest remainder, the earlier one first. None where all of
    `most` together is too little, or nobody has any weight.
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


_MARGIN = 1.04
_FLOAT_BYTES = 4
_MASK_BYTES = 2


class SplitMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, for one context and number of slots.

    Attributes:
        layer: each layer, wherever it lies.
        host: on the host besides its layers.
        worker: on each worker besides its layers.
        solo: the whole on one machine.
    """

    layer: int
    host: int
    worker: int
    solo: Memory

    def most_layers(self, memories: Sequence[int]) -> tuple[int, ...]:
        """How many layers fit each node, the host first."""
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
    return SplitMemory(
        layer=max(1, int((inner + cache) / layers * _MARGIN)),
        host=weights + solo.compute + solo.other + extra,
        worker=buffers + PROCESS_BYTES,
        solo=solo,
    )


class Lender(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the group and the bytes that it offers."""

    node: NodeId
    memory_bytes: int


class SplitAsk(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be laid out.

    Attributes:
        facts: the model.
        options: what was fixed by hand.
        shares: relative parts by hand, the host's first; empty: by memory.
        asked: over all nodes, even where it fits fewer (`--split`).
        draft: a draft model beside it, on the host.
    """

    facts: ModelFacts
    options: LaunchOptions = LaunchOptions()
    shares: tuple[float, ...] = ()
    asked: bool = False
    draft: ModelFacts | None = None

    @property
    def lowest(self) -> int:
        """Least tokens per slot."""
        trained = max(1, self.facts.context_train)
        return self.options.context or min(MINIMUM_CONTEXT, trained)

    @property
    def highest(self) -> int:
        """Most tokens per slot."""
        trained = max(1, self.facts.context_train)
        return self.options.context or min(DEFAULT_CONTEXT, trained)

    def memory(self, context: int, slots: int) -> SplitMemory:
        """The sums."""
        return split_memory(self.facts, context, slots, self.options.cache_type, self.draft)


def fits(ask: SplitAsk, memories: Sequence[int]) -> bool:
    """Whether the least that may be launched fits into these memories, the host's first."""
    slots = ask.options.slots or 1
    alone = plan_solo(ask.facts, memories[0], ask.options, ask.draft)
    if not isinstance(alone, DoesNotFit):
        return True
    return _layers(ask, memories, ask.lowest, slots) is not None


def plan_split(ask: SplitAsk, group: Sequence[Lender], term: int, rpc_version: str) -> LaunchPlan | DoesNotFit:
    """Lay the model out over `group`, the host first and then the workers to be preferred.

    The host alone where the model fits it, unless split was asked for; else with as few workers as it takes.
    """
    if not ask.asked or len(group) == 1:
        alone = plan_solo(ask.facts, group[0].memory_bytes, ask.options, ask.draft)
        if not isinstance(alone, DoesNotFit):
            return alone
    fewest = len(ask.shares) if ask.shares else len(group) if ask.asked else 2
    for count in range(min(max(2, fewest), len(group)), len(group) + 1):
        plan = _over(ask, group[:count], term, rpc_version)
        if plan is not None:
            return plan
    if ask.asked:
        alone = plan_solo(ask.facts, group[0].memory_bytes, ask.options, ask.draft)
        if not isinstance(alone, DoesNotFit):
            return alone
    return shortfall(ask, [lender.memory_bytes for lender in group])


def shortfall(ask: SplitAsk, memories: Sequence[int]) -> DoesNotFit:
    """What is missing, in words: the least launch over these nodes, as in `need 55.0 GB, have 51.5 GB`."""
    slots = ask.options.slots or 1
    memory = ask.memory(ask.lowest, slots)
    nodes = max(1, len(memories))
    have = sum(memories)
    need = memory.total(ask.facts.layers, nodes) if nodes > 1 else memory.solo.total
    unit, name = (10**9, "GB") if need >= 10**9 else (10**6, "MB")
    where = f"{nodes} nodes" if nodes > 1 else "1 node"
    spread = ", and its layers do not divide so" if need <= have else ""
    return DoesNotFit(
        need_bytes=need,
        have_bytes=have,
        parts=memory.solo,
        context=ask.lowest,
        slots=slots,
        message=f"need {need / unit:.1f} {name}, have {have / unit:.1f} {name} on {where}{spread}",
        hint="Join another machine, or take a smaller model.",
    )


def _over(ask: SplitAsk, group: Sequence[Lender], term: int, rpc_version: str) -> LaunchPlan | None:
    """The best launch over exactly these nodes."""
    memories = [lender.memory_bytes for lender in group]
    wanted = ask.options.slots_to_try
    for slots in wanted:
        context = _most_context(ask, memories, slots)
        comfortable = min(COMFORTABLE_CONTEXT, ask.highest)
        if context is not None and (context >= comfortable or slots == wanted[-1]):
            return _plan(ask, group, context, slots, term, rpc_version)
    return None


def _most_context(ask: SplitAsk, memories: Sequence[int], slots: int) -> int | None:
    if _layers(ask, memories, ask.lowest, slots) is None:
        return None
    low, high = padded(ask.lowest) // CONTEXT_STEP, padded(ask.highest) // CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if _layers(ask, memories, middle * CONTEXT_STEP, slots) is not None:
            low = middle
        else:
            high = middle - 1
    return min(low * CONTEXT_STEP, ask.highest)


def _layers(ask: SplitAsk, memories: Sequence[int], context: int, slots: int) -> tuple[int, ...] | None:
    """Layers per node; None where they do not fit."""
    most = ask.memory(context, slots).most_layers(memories)
    by_hand = ask.shares[: len(memories)]
    weights = [*by_hand, *([0.0] * (len(memories) - len(by_hand)))] if by_hand else [float(part) for part in most]
    layers = share_layers(ask.facts.layers, weights, most)
    if layers is None or ask.memory(context, slots).host > memories[0]:
        return None
    return layers


def _plan(
    ask: SplitAsk, group: Sequence[Lender], context: int, slots: int, term: int, rpc_version: str
) -> LaunchPlan | None:
    layers = _layers(ask, [lender.memory_bytes for lender in group], context, slots)
    if layers is None:
        return None
    memory = ask.memory(context, slots)
    host = SplitShare(node=group[0].node, layers=layers[0], memory_bytes=memory.host + layers[0] * memory.layer)
    workers = [
        SplitShare(node=lender.node, layers=count, memory_bytes=memory.worker + count * memory.layer)
        for lender, count in zip(group[1:], layers[1:], strict=True)
        if count > 0
    ]
    if not workers:
        return None
    return LaunchPlan(
        model=ask.facts.name,
        context=context,
        slots=slots,
        memory_bytes=host.memory_bytes,
        cache_type=ask.options.cache_type,
        split=SplitLayout(term=term, shares=(host, *workers), rpc_version=rpc_version),
    )
