"""Whether a model fits into a machine's memory, and with how much context for how many requests at once."""

import msgspec

from mesh_llm.core.fit_memory import CONTEXT_STEP, Memory, launch_memory, padded
from mesh_llm.core.model import LaunchOptions, LaunchPlan, ModelFacts

DEFAULT_CONTEXT = 32_768
"""Most tokens per slot that are planned unasked: more is rarely used, and costs memory and speed."""

COMFORTABLE_CONTEXT = 16_384
"""Slots are given up until each has this much."""

MINIMUM_CONTEXT = 2_048
"""Least tokens per slot that are planned unasked; less is of no use for chat."""


class DoesNotFit(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model cannot be launched: the sum for the smallest launch that would honour the options.

    Attributes:
        need_bytes: the sum.
        have_bytes: what there is.
        parts: the sum's parts.
        context: tokens per slot that were counted.
        slots: slots that were counted.
        message: as in `need 55.0 GB, have 51.5 GB: weights 40.1 + KV 12.0 + compute 2.9`, and for what.
        hint: what to do next.
    """

    need_bytes: int
    have_bytes: int
    parts: Memory
    context: int
    slots: int
    message: str
    hint: str


def plan_solo(
    facts: ModelFacts, free_bytes: int, options: LaunchOptions, draft: ModelFacts | None = None
) -> LaunchPlan | DoesNotFit:
    """Plan a launch of `facts`, and of `draft` beside it, within `free_bytes`.

    What the options fix is kept or refused. What they leave open is chosen: as much context per slot as fits, up to
    the trained context and DEFAULT_CONTEXT; DEFAULT_SLOTS slots, fewer where that leaves each with less than
    COMFORTABLE_CONTEXT.

    Raises:
        KeyError: the options name an unknown cache type.
    """
    ask = _Ask(facts, draft, free_bytes, options)
    wanted = options.slots_to_try
    for slots in wanted:
        context = ask.most_context(slots)
        comfortable = min(COMFORTABLE_CONTEXT, ask.highest)
        if context is not None and (context >= comfortable or slots == wanted[-1]):
            return LaunchPlan(
                model=facts.name,
                context=context,
                slots=slots,
                memory_bytes=ask.memory(context, slots).total,
                cache_type=options.cache_type,
            )
    return ask.refuse(ask.lowest, wanted[-1])


class _Ask:
    """One question: a model, what there is, and the bounds of the context."""

    def __init__(self, facts: ModelFacts, draft: ModelFacts | None, free_bytes: int, options: LaunchOptions) -> None:
        self.facts = facts
        self.draft = draft
        self.free_bytes = free_bytes
        self.options = options
        trained = max(1, facts.context_train)
        if options.context is not None:
            self.highest = self.lowest = options.context
        else:
            self.highest = min(DEFAULT_CONTEXT, trained)
            self.lowest = min(MINIMUM_CONTEXT, trained)

    def memory(self, context: int, slots: int) -> Memory:
        """The sum for a launch; a draft keeps its own f16 cache of the same tokens."""
        total = launch_memory(self.facts, context, slots, self.options.cache_type)
        return total if self.draft is None else total + launch_memory(self.draft, context, slots)

    def most_context(self, slots: int) -> int | None:
        """The most tokens per slot that fit; None where even the least does not."""
        if self.memory(self.lowest, slots).total > self.free_bytes:
            return None
        low, high = padded(self.lowest) // CONTEXT_STEP, padded(self.highest) // CONTEXT_STEP
        while low < high:
            middle = (low + high + 1) // 2
            if self.memory(middle * CONTEXT_STEP, slots).total <= self.free_bytes:
                low = middle
            else:
                high = middle - 1
        return min(low * CONTEXT_STEP, self.highest)

    def refuse(self, context: int, slots: int) -> DoesNotFit:
        """The sum for the least that was asked for, in words."""
        parts = self.memory(context, slots)
        return DoesNotFit(
            need_bytes=parts.total,
            have_bytes=self.free_bytes,
            parts=parts,
            context=context,
            slots=slots,
            message=_message(self.facts, parts, self.free_bytes, context, slots),
            hint=self._hint(parts),
        )

    def _hint(self, parts: Memory) -> str:
        fixed = self.options.context is not None or (self.options.slots or 1) > 1
        smallest = _Ask(self.facts, None, self.free_bytes, LaunchOptions(cache_type=self.options.cache_type))
        if smallest.most_context(1) is not None:
            if fixed:
                return "Ask for less with --ctx-size and --parallel, or leave them out: then what fits is chosen."
            return "Leave out the draft model: --no-draft."
        if parts.weights > self.free_bytes:
            return "Take a smaller model or a smaller quantisation, or join a mesh with more memory."
        return "Take a smaller model, or free memory on this machine."


def _message(facts: ModelFacts, parts: Memory, have: int, context: int, slots: int) -> str:
    unit, name = (10**9, "GB") if parts.total >= 10**9 else (10**6, "MB")

    def shown(value: int) -> str:
        return f"{value / unit:.1f}"

    sums = f"weights {shown(parts.weights)} + KV {shown(parts.cache)} + compute {shown(parts.compute + parts.other)}"
    where = f"{context} tokens in each of {slots} slots" if slots > 1 else f"{context} tokens in one slot"
    return (
        f"{facts.name} does not fit: need {shown(parts.total)} {name}, have {shown(have)} {name}: {sums}, for {where}."
    )
