import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples

from mesh_llm.core.placement.fit import DoesNotFit
from mesh_llm.core.placement.offload import Pools, offload_memory, plan_launch
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import (
    AUTO_CACHE,
    CACHE_TYPES,
    LaunchOptions,
    LaunchPlan,
    LayerFacts,
    ModelFacts,
)


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    sizes = st.integers(1_000_000, 4 * 10**9)
    window = draw(st.sampled_from([0, 1024]))
    layers = [
        LayerFacts(
            weights=weights,
            experts=draw(st.integers(0, weights)) if draw(st.booleans()) else 0,
            row=draw(st.integers(0, 256)) * 32,
            windowed=bool(window) and draw(st.booleans()),
            state=draw(st.sampled_from([0, 10**6])),
        )
        for weights in draw(st.lists(sizes, min_size=1, max_size=12))
    ]
    embedding, head = draw(st.integers(0, 10**9)), draw(st.integers(0, 10**9))
    tied = draw(st.booleans())
    known = draw(st.booleans())
    return ModelFacts(
        name=ModelName("m"),
        size_bytes=sum(one.weights for one in layers) + embedding + (0 if tied else head),
        layers=len(layers),
        context_train=draw(st.sampled_from([512, 4096, 40_960, 131_072])),
        embedding_length=draw(st.integers(64, 8192)),
        vocabulary=draw(st.integers(256, 262_144)),
        kv_bytes_per_token=sum(one.row for one in layers),
        kv_window_bytes_per_token=sum(one.row for one in layers if one.windowed),
        window=window,
        state_bytes=sum(one.state for one in layers),
        compute_width=draw(st.integers(0, 200_000)),
        output_bytes=embedding + (0 if tied else head),
        layer_facts=tuple(layers) if known else (),
        input_bytes=embedding if known else 0,
        head_bytes=(embedding if tied else head) if known else 0,
        largest_bytes=max(one.weights for one in layers) if known else 0,
        quantises=draw(st.booleans()),
    )


options = st.builds(
    LaunchOptions,
    context=st.one_of(st.none(), st.integers(1, 100_000)),
    slots=st.one_of(st.none(), st.integers(1, 16)),
    cache_type=st.sampled_from((AUTO_CACHE, *CACHE_TYPES)),
    gpu_layers=st.one_of(st.none(), st.integers(0, 16)),
    cpu_moe=st.one_of(st.none(), st.integers(0, 16)),
)
memory = st.integers(0, 60 * 10**9)
cards = st.integers(1, 3)


@given(models(), memory, memory, cards, options)
@examples(400)
def test_neither_memory_is_ever_exceeded(
    model: ModelFacts, device: int, host: int, count: int, asked: LaunchOptions
) -> None:
    found = plan_launch(model, Pools(device=device, host=host, cards=count), asked)
    if isinstance(found, DoesNotFit):
        assert found.need_bytes > found.have_bytes
        assert found.need_bytes == found.parts.total
        assert found.message
        assert found.hint
        return
    sums = offload_memory(model, found, count)
    assert found.memory_bytes == sums.device.total <= device
    assert found.host_bytes == sums.host.total <= host
    assert min(msgspec.structs.astuple(sums.device)) >= 0
    assert min(msgspec.structs.astuple(sums.host)) >= 0
    assert found.context == min(asked.context or found.context, model.context_train)
    assert found.slots == (asked.slots or found.slots)
    if found.offload is not None:
        assert 0 <= found.offload.gpu_layers <= model.layers
        assert 0 <= found.offload.cpu_moe <= model.layers
        if asked.gpu_layers is not None:
            assert found.offload.gpu_layers == min(asked.gpu_layers, model.layers)


def rank(found: LaunchPlan | DoesNotFit, layers: int) -> tuple[int, int]:
    """How much is on the GPU: layers, and then experts."""
    if isinstance(found, DoesNotFit):
        return (-1, 0)
    return (layers, 0) if found.offload is None else (found.offload.gpu_layers, -found.offload.cpu_moe)


@given(models(), memory, memory, memory, memory, st.integers(1, 32_768))
@examples(300)
def test_more_memory_never_gives_fewer_layers(
    model: ModelFacts, device: int, host: int, more_device: int, more_host: int, context: int
) -> None:
    fixed = LaunchOptions(context=context, slots=1)
    small = plan_launch(model, Pools(device=device, host=host), fixed)
    large = plan_launch(model, Pools(device=device + more_device, host=host + more_host), fixed)
    assert rank(large, model.layers) >= rank(small, model.layers)


@given(models(), memory, memory, options)
@examples(200)
def test_main_memory_only_ever_helps(model: ModelFacts, device: int, host: int, asked: LaunchOptions) -> None:
    asked = msgspec.structs.replace(asked, gpu_layers=None, cpu_moe=None)
    without = plan_launch(model, Pools(device=device), asked)
    if isinstance(without, LaunchPlan):
        assert isinstance(plan_launch(model, Pools(device=device, host=host), asked), LaunchPlan)
