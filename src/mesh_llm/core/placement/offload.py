"""A launch on a node with a GPU: all on it where that fits, else the part that does, and the rest in main memory.

What is moved, as llama.cpp can do it (llama-model.cpp `load_tensors`; common.h `llm_add_n_cpu_ffn_overrides`):

1. Of a mixture of experts the experts of the first layers: a token reads few of them.
2. Whole layers, from the first on, with their caches. The output layer counts as the last one, and stays on the GPU.

What is read with a prompt's tokens (the token embedding) is in main memory in any case. Prompts are computed on the GPU
in all layers: weights that are in main memory are copied there, one tensor at a time (ggml-backend.cpp, `op_offload`).
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec

from mesh_llm.core.placement.fit import (
    DoesNotFit,
    Memory,
    cache_types,
    choose_size,
    compute_bytes,
    context_bounds,
    fit_hint,
    fit_sums,
    launch_memory,
    layer_cache_bytes,
    mtp_memory,
    plan_solo,
    size_text,
    wanted_context,
)
from mesh_llm.core.types.errors import size
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, LayerFacts, ModelFacts, Offload

USEFUL_CONTEXT = 8_192
"""Unless the user fixed it, a model is wholly on the GPU only with this much context for each slot."""

_MARGIN = 1.04
"""For layers that are counted as equal because their own sizes are not known."""

_NOTHING = Memory(weights=0, cache=0, compute=0, other=0)


class Pools(msgspec.Struct, frozen=True, kw_only=True):
    """Free memory of a node.

    Attributes:
        device: bytes of its devices: video memory, or main memory on a node without a GPU.
        host: bytes of main memory beside a GPU; 0 without one.
        cards: GPUs that share `device`.
    """

    device: int
    host: int = 0
    cards: int = 1

    @classmethod
    def of(cls, capacity: Capacity, device_taken: int = 0, host_taken: int = 0) -> "Pools":
        """What is left of a capacity."""
        return cls(
            device=max(0, capacity.memory_bytes - device_taken),
            host=max(0, capacity.host_bytes - host_taken),
            cards=max(1, len(capacity.devices)),
        )


class OffloadMemory(NamedTuple):
    """Bytes of a launch on the GPU, and in main memory."""

    device: Memory
    host: Memory


def plan_launch(
    facts: ModelFacts, pools: Pools, options: LaunchOptions, draft: ModelFacts | None = None
) -> LaunchPlan | DoesNotFit:
    """Plan a launch of `facts`, and of `draft` beside it. `LaunchPlan.offload` is set where main memory is needed, too.

    Raises:
        KeyError: the options name an unknown cache type.
    """
    by_hand = options.gpu_layers is not None or options.cpu_moe is not None
    alone = plan_solo(facts, pools.device, options, draft)
    if not pools.host:
        return alone
    if isinstance(alone, LaunchPlan) and not by_hand:
        least = min(USEFUL_CONTEXT, context_bounds(facts, options)[1])
        if options.context is not None or alone.context >= least:
            return alone
    divided = _divide(facts, pools, options, draft)
    return alone if isinstance(divided, DoesNotFit) and isinstance(alone, LaunchPlan) and not by_hand else divided


def offload_memory(
    facts: ModelFacts, plan: LaunchPlan, cards: int = 1, draft: ModelFacts | None = None
) -> OffloadMemory:
    """The sums of a plan. Without `Offload` all is counted for the devices."""
    if plan.offload is None:
        whole = launch_memory(facts, plan.context, plan.slots, plan.cache_type)
        beside = launch_memory(draft, plan.context, plan.slots) if draft is not None else _NOTHING
        return OffloadMemory(whole + beside, _NOTHING)
    sums = _Sums(facts, plan.context, plan.slots, plan.cache_type, cards, draft)
    return sums.of(plan.offload.gpu_layers, plan.offload.cpu_moe)


def layers_of(facts: ModelFacts) -> Sequence[LayerFacts]:
    """Each layer. Where the file's header is not here, all are counted as equal, without experts."""
    if facts.layer_facts or not facts.layers:
        return facts.layer_facts
    count = facts.layers
    even = LayerFacts(
        weights=int(max(0, facts.size_bytes - facts.output_bytes) / count * _MARGIN),
        row=-(-facts.kv_bytes_per_token // count),
        state=-(-facts.state_bytes // count),
    )
    return (even,) * count


def input_bytes(facts: ModelFacts) -> int:
    """What is in main memory in any case."""
    return facts.input_bytes if facts.layer_facts else facts.output_bytes


def output_bytes(facts: ModelFacts) -> int:
    """What goes to the GPU with the last layer: the output layer, and what else is no layer.

    A token embedding that is the output layer, too, is loaded twice.
    """
    if not facts.layer_facts:
        return facts.output_bytes
    tied = facts.head_bytes == facts.output_bytes and not facts.encoder
    layers = sum(layer.weights for layer in facts.layer_facts)
    return max(0, facts.size_bytes - layers - facts.input_bytes) + (facts.head_bytes if tied else 0)


class _Sums:
    """The memory of one size of a launch, for any division."""

    def __init__(
        self, facts: ModelFacts, context: int, slots: int, cache_type: str, cards: int, draft: ModelFacts | None
    ) -> None:
        layers = layers_of(facts)
        self.layers = len(layers)
        self._facts = facts
        self._weights = _prefix([layer.weights for layer in layers])
        self._experts = _prefix([layer.experts for layer in layers])
        self._cache = _prefix([layer_cache_bytes(facts, one, context, slots, cache_type) for one in layers])
        self._compute = compute_bytes(facts, context, slots)
        self._small = compute_bytes(
            msgspec.structs.replace(facts, compute_width=facts.embedding_length), context, slots
        )
        self._copied = facts.largest_bytes or max((layer.weights for layer in layers), default=0)
        self._cards = cards
        self._card = max((layer.weights for layer in layers), default=0) + self._compute
        whole = launch_memory(facts, context, slots, cache_type)
        self._process = whole.other
        self._draft = mtp_memory(facts, context, slots)
        if draft is not None:
            self._draft += launch_memory(draft, context, slots)

    @property
    def mixture(self) -> bool:
        """Whether there are experts to move."""
        return self._experts[-1] > 0

    def of(self, gpu_layers: int, cpu_moe: int) -> OffloadMemory:
        """The memory with so many layers on the GPU, and the experts of so many in main memory."""
        facts, first = self._facts, self.layers - gpu_layers
        whole_weights, whole_cache = self._weights[-1], self._cache[-1]
        if not gpu_layers:
            host = Memory(
                weights=facts.size_bytes + facts.companion_bytes,
                cache=whole_cache,
                compute=self._compute,
                other=self._process,
            )
            return OffloadMemory(_NOTHING, host + self._draft)
        moved = max(0, self._experts[max(first, min(cpu_moe, self.layers))] - self._experts[first])
        on_host = self._weights[first] + moved
        # Each further card has buffers of its own, and the division among cards is by whole layers.
        more = (self._cards - 1) * self._card
        device = Memory(
            weights=whole_weights - on_host + output_bytes(facts) + facts.companion_bytes,
            cache=whole_cache - self._cache[first],
            compute=self._compute + more + (self._copied if on_host else 0),
            other=0,
        )
        host = Memory(
            weights=input_bytes(facts) + on_host,
            cache=self._cache[first],
            compute=self._compute if on_host else min(self._compute, self._small),
            other=self._process,
        )
        return OffloadMemory(device + self._draft, host)


def _prefix(values: Sequence[int]) -> list[int]:
    """Sums of the first 0, 1, 2, ... values."""
    return [0, *accumulate(values)]


def _divide(
    facts: ModelFacts, pools: Pools, options: LaunchOptions, draft: ModelFacts | None
) -> LaunchPlan | DoesNotFit:
    """The best division of one slot with the wanted context; with less context only where that fits nowhere."""
    slots = options.slots or 1

    def divided(context: int, cache_type: str) -> LaunchPlan | None:
        found = _best(_Sums(facts, context, slots, cache_type, pools.cards, draft), pools, options)
        if found is None:
            return None
        offload, device_bytes = found
        return LaunchPlan(
            model=facts.name,
            context=context,
            slots=slots,
            memory_bytes=device_bytes,
            cache_type=cache_type,
            offload=offload,
        )

    types = cache_types(facts, options)
    plan = next(filter(None, (divided(wanted_context(facts, options), one) for one in types)), None)
    if plan is None:
        fixed = msgspec.structs.replace(options, slots=slots)
        chosen = choose_size(facts, fixed, lambda context, _: divided(context, types[-1]) is not None)
        plan = None if chosen is None else divided(chosen[0], types[-1])
    return _shortfall(facts, pools, options, draft) if plan is None else plan


def _best(sums: _Sums, pools: Pools, options: LaunchOptions) -> tuple[Offload, int] | None:
    """The first division that fits both memories, with its bytes of the device's."""
    for gpu_layers, cpu_moe in _divisions(sums, options):
        device, host = sums.of(gpu_layers, cpu_moe)
        if device.total <= pools.device:
            fits = host.total <= pools.host
            offload = Offload(gpu_layers=gpu_layers, cpu_moe=cpu_moe, host_bytes=host.total)
            # Later divisions take more of main memory.
            return (offload, device.total) if fits else None
    return None


def _divisions(sums: _Sums, options: LaunchOptions) -> Iterator[tuple[int, int]]:
    """(layers on the GPU, layers whose experts are in main memory), the fastest first."""
    count = sums.layers
    by_hand = None if options.cpu_moe is None else min(options.cpu_moe, count) if sums.mixture else 0
    if options.gpu_layers is not None:
        layers = min(options.gpu_layers, count)
        if by_hand is not None or not sums.mixture:
            yield layers, by_hand or 0
        else:
            yield layers, 0
            yield from ((layers, moved) for moved in range(count - layers + 1, count + 1))
        return
    if by_hand is not None:
        yield from ((layers, by_hand) for layers in range(count, -1, -1))
        return
    moved = count if sums.mixture else 0
    yield from ((count, number) for number in range(moved + 1))
    yield from ((layers, moved) for layers in range(count - 1, -1, -1))


def _shortfall(facts: ModelFacts, pools: Pools, options: LaunchOptions, draft: ModelFacts | None) -> DoesNotFit:
    """What the smallest permitted launch lacks."""
    context, slots = context_bounds(facts, options)[0], options.slots or 1
    sums = _Sums(facts, context, slots, cache_types(facts, options)[-1], pools.cards, draft)
    divisions = list(_divisions(sums, options))
    gpu_layers, cpu_moe = next((one for one in divisions if sums.of(*one).device.total <= pools.device), divisions[-1])
    device, host = sums.of(gpu_layers, cpu_moe)
    where = size_text(context, slots)
    if device.total > pools.device:
        parts, have = device, pools.device
        text = f"need {fit_sums(device, have, where)}, on the GPU"
    else:
        parts, have = host, pools.host
        beside = f" beside {size(device.total)} on the GPU" if gpu_layers else ""
        text = f"{Offload(gpu_layers=gpu_layers, cpu_moe=cpu_moe).text(sums.layers)}, main memory{beside}: need "
        text += fit_sums(host, have, where)
    by_hand = options.gpu_layers is not None or options.cpu_moe is not None
    return DoesNotFit(
        need_bytes=parts.total,
        have_bytes=have,
        parts=parts,
        context=context,
        slots=slots,
        message=f"{facts.name} does not fit: {text}.",
        hint="Leave out --gpu-layers and --cpu-moe: then what fits is chosen."
        if by_hand
        else fit_hint(facts, parts, pools.device + pools.host, options),
    )
