"""What one launch of a model takes: weights, KV cache, compute buffers, and the process around them.

The formulas are llama.cpp's own allocations, read from its source (llama-kv-cache.cpp, llama-kv-cache-iswa.cpp,
llama-memory-recurrent.cpp) and checked against what the pinned engine prints as `KV buffer size`, `RS buffer size` and
`compute buffer size` (tests/integration/test_models_memory.py): the cache is exact, compute buffers are at most
a little over. They hold for separate caches per slot (`kv_unified` off), flash attention on, and the default batch.
"""

import msgspec

from mesh_llm.core.ggml_types import cache_row_bytes
from mesh_llm.core.model import ModelFacts

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
