"""What one launch of a model takes of a machine's memory, and how much context and how many slots fit.

The formulas are llama.cpp's own allocations, read from its source (llama-kv-cache.cpp, llama-kv-cache-iswa.cpp,
llama-memory-recurrent.cpp) and compared with what the pinned engine prints as `KV buffer size`, `RS buffer size` and
`compute buffer size` (tests/integration/test_models_memory.py). The cache is exact; compute buffers are a little too
high at most. They hold for separate caches per slot (`kv_unified` off), flash attention on, and the default batch.
"""

from collections.abc import Callable

import msgspec

from mesh_llm.core.types.model import AUTO_CACHE, LaunchOptions, LaunchPlan, LayerFacts, ModelFacts, cache_row_bytes

BATCH_TOKENS = 512
"""Tokens computed at once: llama.cpp's default `--ubatch-size`."""

CONTEXT_STEP = 256
"""llama.cpp rounds each slot's context up to a multiple of this."""

PROCESS_BYTES = 96 << 20
"""What the engine's process takes besides the model: code, HTTP, and small buffers."""

_AUTO_CACHES = ("f16", "q8_0", "q4_0")
_FLOAT_BYTES = 4
_MASK_BYTES = 2
_BATCH = 2048
"""Tokens of a prompt in one batch: llama.cpp's default."""
_VOCABULARY_ENTRY_BYTES = 256


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a launch, by part. `other` is the process around the model."""

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
    """Memory of a launch with `slots` slots of `context` tokens each. Raises KeyError for an unknown cache type.

    Layers that guess tokens ahead (MTP) are counted as used.
    """
    whole = Memory(
        weights=facts.size_bytes + facts.companion_bytes,
        cache=cache_bytes(facts, context, slots, cache_type),
        compute=compute_bytes(facts, context, slots),
        other=PROCESS_BYTES + facts.vocabulary * _VOCABULARY_ENTRY_BYTES,
    )
    return whole + mtp_memory(facts, context, slots)


def mtp_memory(facts: ModelFacts, context: int, slots: int) -> Memory:
    """What layers that guess tokens ahead (MTP) take beside their weights: they are computed in a context of their own.

    It has logits of each slot's last token only, and the hidden states of a whole batch. Its cache is always f16.
    """
    if not facts.mtp_layers:
        return Memory(weights=0, cache=0, compute=0, other=0)
    width, cells = facts.embedding_length, padded(context)
    widest = facts.compute_width or 17 * width
    compute = BATCH_TOKENS * (widest * _FLOAT_BYTES + cells * _MASK_BYTES) + _BATCH * width * _FLOAT_BYTES
    return Memory(weights=0, cache=slots * cells * facts.mtp_row, compute=compute, other=0)


def batch_tokens(facts: ModelFacts, context: int) -> int:
    """Tokens computed at once: the whole context where an input must be one batch."""
    return max(BATCH_TOKENS, padded(context)) if facts.one_batch else BATCH_TOKENS


def cache_bytes(facts: ModelFacts, context: int, slots: int, cache_type: str = "f16") -> int:
    """KV cache and recurrent state of all slots."""
    cells, window_cells = _cells(facts, context)
    window_row = facts.kv_window_bytes_per_token if facts.window else 0
    row = facts.kv_bytes_per_token - window_row
    per_slot = cells * _row_bytes(row, cache_type) + window_cells * _row_bytes(window_row, cache_type)
    return slots * (per_slot + facts.state_bytes)


def layer_cache_bytes(facts: ModelFacts, layer: LayerFacts, context: int, slots: int, cache_type: str = "f16") -> int:
    """The same, of one layer."""
    cells, window_cells = _cells(facts, context)
    return slots * ((window_cells if layer.windowed else cells) * _row_bytes(layer.row, cache_type) + layer.state)


def _cells(facts: ModelFacts, context: int) -> tuple[int, int]:
    """Cells of a slot, in layers that see everything and in those that see a window."""
    cells = padded(context)
    return cells, min(cells, padded(facts.window + batch_tokens(facts, context)))


def compute_bytes(facts: ModelFacts, context: int, slots: int) -> int:
    """Buffers for the computation of one batch, and for the results.

    Logits are counted for a whole batch, as an engine that also answers embeddings allocates them. Other engines take
    less, and an encoder has none. Only the attention mask grows with the context.
    """
    width = facts.embedding_length
    batch = batch_tokens(facts, context)
    widest = max(facts.compute_width or 17 * width, 0 if facts.encoder else facts.vocabulary + 6 * width)
    masks = 2 if facts.window else 1
    mask = padded(context) * batch * _MASK_BYTES * masks
    results = slots * (facts.vocabulary + width) * _FLOAT_BYTES
    return batch * widest * _FLOAT_BYTES + mask + results


def padded(context: int) -> int:
    """KV cells that llama.cpp allocates for a slot of `context` tokens."""
    return -(-max(1, context) // CONTEXT_STEP) * CONTEXT_STEP


def _row_bytes(f16_bytes: int, cache_type: str) -> int:
    return cache_row_bytes(cache_type, f16_bytes // 2)


DEFAULT_CONTEXT = 32_768
"""Most tokens per slot that are planned unasked. More is rarely used, and costs memory and speed."""

COMFORTABLE_CONTEXT = 16_384
"""The number of slots is reduced until each has this much, and a cache type is chosen with which one slot has it."""

MINIMUM_CONTEXT = 2_048
"""Least tokens per slot that are planned unasked. Less is of no use for chat."""


class DoesNotFit(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model cannot be launched. The numbers are of the smallest launch that the options permit.

    Attributes:
        need_bytes: its memory.
        have_bytes: the memory that there is.
        parts: of `need_bytes`.
        context: tokens per slot.
        slots: requests at once.
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
    """Plan a launch of `facts`, and of `draft` beside it, within `free_bytes`. See `choose_size` and `cache_types`.

    Raises:
        KeyError: the options name an unknown cache type.
    """
    first, *others = cache_types(facts, options)
    found = _plan_with(first, facts, free_bytes, options, draft)
    for cache_type in others:
        if isinstance(found, LaunchPlan) and found.context >= wanted_context(facts, options):
            break
        found = _plan_with(cache_type, facts, free_bytes, options, draft)
    return found


def cache_types(facts: ModelFacts, options: LaunchOptions) -> tuple[str, ...]:
    """The cache types that may be chosen, in the order in which they are tried until the wanted context fits."""
    if options.cache_type != AUTO_CACHE:
        return (options.cache_type,)
    return _AUTO_CACHES if facts.quantises else _AUTO_CACHES[:1]


def wanted_context(facts: ModelFacts, options: LaunchOptions) -> int:
    """Tokens per slot for which the cache's precision may be given up."""
    most = context_bounds(facts, options)[1]
    return min(COMFORTABLE_CONTEXT, most) if options.context is None else most


def _plan_with(
    cache_type: str, facts: ModelFacts, free_bytes: int, options: LaunchOptions, draft: ModelFacts | None
) -> LaunchPlan | DoesNotFit:
    def memory(context: int, slots: int) -> Memory:
        # A draft has its own f16 cache of the same tokens.
        total = launch_memory(facts, context, slots, cache_type)
        return total if draft is None else total + launch_memory(draft, context, slots)

    chosen = choose_size(facts, options, lambda context, slots: memory(context, slots).total <= free_bytes)
    if chosen is not None:
        context, slots = chosen
        return LaunchPlan(
            model=facts.name,
            context=context,
            slots=slots,
            memory_bytes=memory(context, slots).total,
            cache_type=cache_type,
        )
    context, slots = context_bounds(facts, options)[0], options.slots_to_try[-1]
    parts = memory(context, slots)
    return DoesNotFit(
        need_bytes=parts.total,
        have_bytes=free_bytes,
        parts=parts,
        context=context,
        slots=slots,
        message=_message(facts, parts, free_bytes, context, slots),
        hint=fit_hint(facts, parts, free_bytes, options),
    )


def choose_size(facts: ModelFacts, options: LaunchOptions, fits: Callable[[int, int], bool]) -> tuple[int, int] | None:
    """Choose (context, slots) for a launch, of those that `fits` accepts; None where not even the smallest fits.

    What the options fix is kept. The rest is chosen: as much context per slot as fits, up to the trained context and
    DEFAULT_CONTEXT; DEFAULT_SLOTS slots, fewer where each would have less than COMFORTABLE_CONTEXT.
    """
    lowest, highest = context_bounds(facts, options)
    wanted = options.slots_to_try
    for slots in wanted:
        if not fits(lowest, slots):
            continue
        low, high = padded(lowest) // CONTEXT_STEP, padded(highest) // CONTEXT_STEP
        while low < high:
            middle = (low + high + 1) // 2
            if fits(middle * CONTEXT_STEP, slots):
                low = middle
            else:
                high = middle - 1
        context = min(low * CONTEXT_STEP, highest)
        if context >= min(COMFORTABLE_CONTEXT, highest) or slots == wanted[-1]:
            return context, slots
    return None


def context_bounds(facts: ModelFacts, options: LaunchOptions) -> tuple[int, int]:
    """Least and most tokens per slot that may be planned. llama.cpp gives no slot more than the trained context."""
    if options.context is not None:
        context = min(options.context, facts.context_train or options.context)
        return context, context
    trained = max(1, facts.context_train)
    return min(MINIMUM_CONTEXT, trained), min(DEFAULT_CONTEXT, trained)


def fit_hint(facts: ModelFacts, parts: Memory, free_bytes: int, options: LaunchOptions) -> str:
    """What to do about a model that does not fit `free_bytes`."""
    least, _ = context_bounds(facts, LaunchOptions())
    if launch_memory(facts, least, 1, cache_types(facts, options)[-1]).total <= free_bytes:
        if options.context is not None or (options.slots or 1) > 1:
            return "Ask for less with --ctx-size and --parallel, or leave them out: then what fits is chosen."
        return "Leave out the draft model: --no-draft."
    if parts.weights > free_bytes:
        return "Take a smaller model or a smaller quantisation, or join a mesh with more memory."
    return "Take a smaller model, or free memory on this machine."


def _message(facts: ModelFacts, parts: Memory, have: int, context: int, slots: int) -> str:
    needs = f"need {fit_sums(parts, have, size_text(context, slots))}"
    return f"{facts.name} does not fit: {needs}."


def fit_sums(parts: Memory, have: int, where: str) -> str:
    """The sums of a launch that does not fit: `55.0 GB, have 51.5 GB: weights 40.1 + KV 12.0 + compute 2.9, for`."""
    unit, name = (10**9, "GB") if parts.total >= 10**9 else (10**6, "MB")

    def shown(value: int) -> str:
        return f"{value / unit:.1f}"

    sums = f"weights {shown(parts.weights)} + KV {shown(parts.cache)} + compute {shown(parts.compute + parts.other)}"
    return f"{shown(parts.total)} {name}, have {shown(have)} {name}: {sums}, for {where}"


def size_text(context: int, slots: int) -> str:
    """The size of a launch, for people."""
    return f"{context} tokens in each of {slots} slots" if slots > 1 else f"{context} tokens in one slot"
