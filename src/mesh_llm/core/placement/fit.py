"""What one launch of a model takes: weights, KV cache, compute buffers, and the process around them.

The formulas are llama.cpp's own allocations, read from its source (llama-kv-cache.cpp, llama-kv-cache-iswa.cpp,
llama-memory-recurrent.cpp) and checked against what the pinned engine prints as `KV buffer size`, `RS buffer size` and
`compute buffer size` (tests/integration/test_models_memory.py): the cache is exact, compute buffers are at most
a little over. They hold for separate caches per slot (`kv_unified` off), flash attention on, and the default batch.

Whether a model fits into a machine's memory, and with how much context for how many requests at once.
"""

import msgspec

from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts, cache_row_bytes

BATCH_TOKENS = 512
"""Tokens computed at once: llama.cpp's default `--ubatch-size`."""

CONTEXT_STEP = 256
"""llama.cpp rounds each slot's context up to a multiple of this."""

PROCESS_BYTES = 96 << 20
"""What the engine's process takes besides: code, vocabulary, HTTP, and small buffers."""

_FLOAT_BYTES = 4
_MASK_BYTES = 2
_VOCABULARY_ENTRY_BYTES = 256


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """The sum, by part, bytes. `other` is the process around the model."""

    weights: int
    cache: int
    compute: int
    other: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.cache + self.compute + self.other

    def __add__(self, more: "Memory") -> "Memory":
        return Memory(
            weights=self.weights + more.weights,
            cache=self.cache + more.cache,
            compute=self.compute + more.compute,
            other=self.other + more.other,
        )


def launch_memory(facts: ModelFacts, context: int, slots: int, cache_type: str = "f16") -> Memory:
    """Memory of a launch with `slots` slots of `context` tokens each. Raises KeyError for an unknown cache type."""
    return Memory(
        weights=facts.size_bytes + facts.companion_bytes,
        cache=cache_bytes(facts, context, slots, cache_type),
        compute=compute_bytes(facts, context, slots),
        other=PROCESS_BYTES + facts.vocabulary * _VOCABULARY_ENTRY_BYTES,
    )


def batch_tokens(facts: ModelFacts, context: int) -> int:
    """Tokens computed at once: the whole context where an input cannot be divided."""
    return max(BATCH_TOKENS, padded(context)) if facts.one_batch else BATCH_TOKENS


def cache_bytes(facts: ModelFacts, context: int, slots: int, cache_type: str = "f16") -> int:
    """KV cache and recurrent state of all slots."""
    cells = padded(context)
    window_cells = min(cells, padded(facts.window + batch_tokens(facts, context)))
    window_row = facts.kv_window_bytes_per_token if facts.window else 0
    row = facts.kv_bytes_per_token - window_row
    per_slot = cells * _row_bytes(row, cache_type) + window_cells * _row_bytes(window_row, cache_type)
    return slots * (per_slot + facts.state_bytes)


def compute_bytes(facts: ModelFacts, context: int, slots: int) -> int:
    """Buffers for computing one batch, and for the results.

    Logits count for a whole batch, which is what an engine that also answers embeddings allocates; one that does not
    takes less, and an encoder has none. The attention mask is what grows with the context.
    """
    width = facts.embedding_length
    batch = batch_tokens(facts, context)
    widest = max(facts.compute_width or 17 * width, 0 if facts.encoder else facts.vocabulary + 6 * width)
    masks = 2 if facts.window else 1
    mask = padded(context) * batch * _MASK_BYTES * masks
    results = slots * (facts.vocabulary + width) * _FLOAT_BYTES
    return batch * widest * _FLOAT_BYTES + mask + results


def padded(context: int) -> int:
    """Cells that llama.cpp makes for a slot of `context` tokens."""
    return -(-max(1, context) // CONTEXT_STEP) * CONTEXT_STEP


def _row_bytes(f16_bytes: int, cache_type: str) -> int:
    return cache_row_bytes(cache_type, f16_bytes // 2)


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
