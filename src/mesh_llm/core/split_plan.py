"""How a host lays a model out over its group: no more nodes than it takes, whole layers by memory, or why not."""

from collections.abc import Sequence

import msgspec

from mesh_llm.core.fit import (
    COMFORTABLE_CONTEXT,
    DEFAULT_CONTEXT,
    MINIMUM_CONTEXT,
    DoesNotFit,
    plan_solo,
)
from mesh_llm.core.fit_memory import CONTEXT_STEP, padded
from mesh_llm.core.ids import NodeId
from mesh_llm.core.model import LaunchOptions, LaunchPlan, ModelFacts
from mesh_llm.core.ratios import share_layers
from mesh_llm.core.split_layout import SplitLayout, SplitShare
from mesh_llm.core.split_memory import SplitMemory, split_memory


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
