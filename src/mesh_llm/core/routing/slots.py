"""Which slot of an engine gets a request, so that all that are busy are computed in one pass.

llama.cpp has a cache for each slot, and computes slots in one pass only if their numbers follow each other
(`llama_kv_cache::init_batch` divides the batch by `split_equal(…, sequential)`; with one cache for all, `kv_unified`,
it does not). A free slot between two busy ones costs a second pass for each token: all weights are read again, and the
tokens of a split model go around twice. Left alone, llama-server takes the slot that was used least recently, wherever
it is.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

WORTH_BYTES = 2048
"""Of a prompt's beginning in a slot's cache, some 500 tokens: reading them again would cost more than a second pass for
each token of an answer, which takes as long as about three tokens of a prompt."""


def passes(busy: AbstractSet[int]) -> int:
    """How many passes a token of all busy slots takes: runs of numbers that follow each other."""
    return sum(slot - 1 not in busy for slot in busy)


def choose_slot(used: Sequence[int], busy: AbstractSet[int], cached: Mapping[int, int]) -> int | None:
    """The slot for a request.

    Args:
        used: of each slot, a number that is higher the later it was used.
        busy: slots that work on a request.
        cached: of slots, how many bytes of the request's prompt are in their caches.

    Returns the free slot that has most of a prompt, where that is worth it; else one that makes the fewest passes, and
    of those the one that was used least recently. None if none is free.
    """
    free = [slot for slot in range(len(used)) if slot not in busy]
    known = [slot for slot in free if cached.get(slot, 0) >= WORTH_BYTES]
    if known:
        return max(known, key=lambda slot: cached[slot])
    return min(free, key=lambda slot: (passes(busy | {slot}), used[slot]), default=None)
