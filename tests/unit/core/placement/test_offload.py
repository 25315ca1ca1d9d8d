from typing import Any

from mesh_llm.core.placement.fit import DoesNotFit, Memory
from mesh_llm.core.placement.offload import OffloadMemory, Pools, offload_memory, plan_launch
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import AUTO_CACHE, LaunchOptions, LaunchPlan, LayerFacts, ModelFacts, Offload

GB = 10**9
LAYERS, EXPERTS, HEAD = 32, 48, 500_000_000


def dense(**changes: Any) -> ModelFacts:
    """A model of 8 billion parameters: 32 layers of 130 MB, an embedding and an output layer of 500 MB each."""
    layer = LayerFacts(130_000_000, 0, 4096)
    values: dict[str, Any] = {
        "name": ModelName("dense"),
        "size_bytes": LAYERS * layer.weights + 2 * HEAD,
        "layers": LAYERS,
        "context_train": 131_072,
        "embedding_length": 4096,
        "vocabulary": 128_256,
        "kv_bytes_per_token": LAYERS * layer.row,
        "compute_width": 3 * 14_336 + 5 * 4096,
        "layer_facts": (layer,) * LAYERS,
        "input_bytes": HEAD,
        "output_bytes": 2 * HEAD,
        "head_bytes": HEAD,
        "largest_bytes": 60_000_000,
        "quantises": True,
    }
    return ModelFacts(**(values | changes))


def mixture() -> ModelFacts:
    """A mixture of experts: 48 layers of 350 MB, of which 320 MB are experts."""
    layer = LayerFacts(350_000_000, 320_000_000, 2048)
    return dense(
        name=ModelName("mixture"),
        size_bytes=EXPERTS * layer.weights + 2 * HEAD,
        layers=EXPERTS,
        kv_bytes_per_token=EXPERTS * layer.row,
        layer_facts=(layer,) * EXPERTS,
        largest_bytes=110_000_000,
    )


def planned(facts: ModelFacts, device: float, host: float, cards: int = 1, **options: Any) -> LaunchPlan:
    pools = Pools(device=int(device), host=int(host), cards=cards)
    found = plan_launch(facts, pools, LaunchOptions(**options))
    assert isinstance(found, LaunchPlan), found
    sums = offload_memory(facts, found, cards)
    assert sums.device.total == found.memory_bytes <= device
    assert sums.host.total == found.host_bytes <= host
    return found


def offload(facts: ModelFacts, device: float, host: float, **options: Any) -> Offload:
    found = planned(facts, device, host, **options).offload
    assert found is not None
    return found


def refused(facts: ModelFacts, device: float, host: float, **options: Any) -> DoesNotFit:
    found = plan_launch(facts, Pools(device=int(device), host=int(host)), LaunchOptions(**options))
    assert isinstance(found, DoesNotFit), found
    return found


def test_what_fits_the_gpu_is_wholly_on_it() -> None:
    assert planned(dense(), 24 * GB, 64 * GB).offload is None
    assert planned(mixture(), 48 * GB, 64 * GB).offload is None


def test_without_main_memory_beside_it_the_device_is_all_there_is() -> None:
    assert isinstance(plan_launch(dense(), Pools(device=3 * GB), LaunchOptions()), DoesNotFit)
    assert planned(dense(), 24 * GB, 0).offload is None


def test_layers_go_to_main_memory_from_the_first_on() -> None:
    found = planned(dense(), 4 * GB, 64 * GB)
    assert found.offload is not None
    assert 0 < found.offload.gpu_layers < LAYERS
    assert found.offload.cpu_moe == 0
    assert (found.context, found.slots) == (16_384, 1)
    more = LaunchPlan(
        model=found.model,
        context=found.context,
        slots=1,
        memory_bytes=0,
        offload=Offload(gpu_layers=found.offload.gpu_layers + 1),
    )
    assert offload_memory(dense(), more).device.total > 4 * GB


def test_experts_go_before_whole_layers() -> None:
    found = offload(mixture(), 8 * GB, 64 * GB)
    assert found.gpu_layers == EXPERTS
    assert 0 < found.cpu_moe < EXPERTS
    less = offload(mixture(), 2.9 * GB, 64 * GB)
    assert less.gpu_layers < EXPERTS
    assert less.cpu_moe == EXPERTS


def test_a_device_that_holds_no_layer_leaves_all_to_the_processor() -> None:
    found = planned(dense(), GB // 4, 64 * GB)
    assert found.offload == Offload(gpu_layers=0, host_bytes=found.host_bytes)
    assert found.memory_bytes == 0


def test_nothing_is_counted_twice_but_a_tied_embedding() -> None:
    facts = dense()
    plan = planned(facts, 4 * GB, 64 * GB)
    sums = offload_memory(facts, plan)
    assert sums.device.weights + sums.host.weights == facts.size_bytes
    assert sums.device.cache + sums.host.cache == plan.context * facts.kv_bytes_per_token
    tied = dense(size_bytes=facts.size_bytes - HEAD, output_bytes=HEAD)
    assert tied.head_bytes == tied.input_bytes == HEAD
    twice = offload_memory(tied, planned(tied, 4 * GB, 64 * GB))
    assert twice.device.weights + twice.host.weights == tied.size_bytes + HEAD


def test_what_the_user_fixed_is_kept() -> None:
    assert offload(dense(), 24 * GB, 64 * GB, gpu_layers=10).gpu_layers == 10
    assert offload(dense(), 24 * GB, 64 * GB, gpu_layers=999).gpu_layers == LAYERS
    assert offload(dense(), 24 * GB, 64 * GB, gpu_layers=0).gpu_layers == 0
    assert offload(mixture(), 48 * GB, 64 * GB, cpu_moe=20).cpu_moe == 20
    both = offload(mixture(), 48 * GB, 64 * GB, cpu_moe=48, gpu_layers=30)
    assert (both.gpu_layers, both.cpu_moe) == (30, 48)
    # A model without experts has none to move.
    assert offload(dense(), 24 * GB, 64 * GB, cpu_moe=20).cpu_moe == 0


def test_too_much_by_hand_is_refused_with_what_to_do() -> None:
    why = refused(dense(), 4 * GB, 64 * GB, gpu_layers=32)
    assert "on the GPU" in why.message
    assert "--gpu-layers" in why.hint


def test_it_is_refused_only_where_it_fits_nowhere_with_the_sums() -> None:
    why = refused(dense(), 2 * GB, 3 * GB)
    assert why.need_bytes > why.have_bytes
    assert "main memory beside" in why.message
    assert "weights" in why.message
    assert why.hint


def test_the_cache_is_quantised_only_where_the_wanted_context_does_not_fit() -> None:
    assert planned(dense(), 24 * GB, 64 * GB, cache_type=AUTO_CACHE).cache_type == "f16"
    assert planned(dense(), 7.5 * GB, 64 * GB, cache_type=AUTO_CACHE, context=16_384).cache_type == "q8_0"
    assert planned(dense(), 6.6 * GB, 64 * GB, cache_type=AUTO_CACHE, context=16_384).cache_type == "q4_0"
    # Without kernels for that on every device it stays as it is, and layers go to main memory.
    plain = dense(quantises=False)
    assert planned(plain, 7.5 * GB, 64 * GB, cache_type=AUTO_CACHE, context=16_384).cache_type == "f16"


def test_a_model_is_not_squeezed_onto_the_gpu_with_a_useless_context() -> None:
    small = planned(dense(), 6.4 * GB, 64 * GB)
    assert small.offload is not None
    assert small.context == 16_384
    # Without main memory that is the best that there is.
    assert planned(dense(), 6.4 * GB, 0).context < 8192


def test_each_further_card_has_buffers_of_its_own() -> None:
    one = offload(dense(), 4 * GB, 64 * GB)
    two = offload(dense(), 4 * GB, 64 * GB, cards=2)
    assert two.gpu_layers < one.gpu_layers


def test_a_model_known_by_its_announcement_alone_is_planned_with_equal_layers() -> None:
    announced = dense(layer_facts=(), input_bytes=0, head_bytes=0, largest_bytes=0)
    found = offload(announced, 4 * GB, 64 * GB)
    assert 0 < found.gpu_layers <= offload(dense(), 4 * GB, 64 * GB).gpu_layers


def test_it_is_told_in_words() -> None:
    assert Offload(gpu_layers=31).text(48) == "31 of 48 layers on the GPU"
    assert Offload(gpu_layers=48, cpu_moe=20).text(48) == "all 48 layers on the GPU, experts of 20 in memory"
    assert Offload(gpu_layers=31, cpu_moe=48).text(48) == "31 of 48 layers on the GPU, experts in memory"
    assert Offload(gpu_layers=31, cpu_moe=10).text(48) == "31 of 48 layers on the GPU"
    assert Offload(gpu_layers=0).text(48) == "all layers on the processor"


def test_a_draft_goes_with_the_layers_on_the_gpu() -> None:
    draft = dense(name=ModelName("draft"), size_bytes=GB, layers=4, layer_facts=(LayerFacts(GB // 8),) * 4)
    pools = Pools(device=6 * GB, host=64 * GB)
    alone, beside = (plan_launch(dense(), pools, LaunchOptions(), one) for one in (None, draft))
    assert isinstance(alone, LaunchPlan)
    assert isinstance(beside, LaunchPlan)
    assert alone.offload is not None
    assert beside.offload is not None
    assert beside.offload.gpu_layers < alone.offload.gpu_layers
    assert offload_memory(dense(), beside, 1, draft).device.total == beside.memory_bytes


def test_a_plan_without_a_division_is_counted_for_the_device() -> None:
    plan = planned(dense(), 24 * GB, 64 * GB)
    assert offload_memory(dense(), plan) == OffloadMemory(
        offload_memory(dense(), plan).device, Memory(weights=0, cache=0, compute=0, other=0)
    )
