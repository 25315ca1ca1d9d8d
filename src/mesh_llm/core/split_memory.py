"""What each node of a split model holds, as llama.cpp lays it out: whole layers, and what the host keeps to itself.

The host keeps the output layer and the token embedding, the results, and a draft; each node takes its layers' weights
and cache, and buffers for the widest layer. Weights and cache are counted as equal per layer, with a margin for the
models in which they are not.
"""

from collections.abc import Sequence

import msgspec

from mesh_llm.core.fit_memory import BATCH_TOKENS, PROCESS_BYTES, Memory, cache_bytes, launch_memory, padded
from mesh_llm.core.model import ModelFacts

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
