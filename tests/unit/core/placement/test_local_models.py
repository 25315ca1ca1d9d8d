import msgspec
import pytest
from tests.support.core_values import GB, MESH, facts, node_id, of_kind

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.types.effects import AnyEffect, Notice, StartEngine
from mesh_llm.core.types.events import DropRequested, EngineExited
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, ModelKind

LARGE = msgspec.structs.replace(facts("large", 8.0), context_train=32_768, kv_bytes_per_token=65_536)
LITTLE = msgspec.structs.replace(facts("little", 1.0, ModelKind.DRAFT), context_train=32_768)


def planned(gigabytes: float, options: LaunchOptions | None = None) -> LaunchPlan:
    models = LocalModels(
        NodeConfig(node=node_id(1), mesh=MESH, wanted=(LARGE.name,), options=options or LaunchOptions())
    )
    models.capacity = Capacity(memory_bytes=int(gigabytes * GB))
    models.know([LARGE, LITTLE], {"large": "little"})
    order = models.check(ModelName("large"), None)
    assert not isinstance(order, LoadRefused)
    return order.plan


def test_a_draft_that_was_found_is_planned_and_its_memory_counts() -> None:
    alone = planned(64, LaunchOptions(use_draft=False))
    both = planned(64)
    assert (alone.draft, both.draft) == (None, "little")
    assert both.memory_bytes >= alone.memory_bytes + LITTLE.size_bytes
    assert (both.slots, both.context) == (alone.slots, alone.context)


@pytest.mark.parametrize("gigabytes", [9.6, 10.0])
def test_a_draft_gives_way_where_memory_is_short(gigabytes: float) -> None:
    assert planned(gigabytes) == planned(gigabytes, LaunchOptions(use_draft=False))


def test_a_draft_of_the_users_choice_comes_instead() -> None:
    assert planned(64, LaunchOptions(draft="/elsewhere/other.gguf")).draft is None


GPU = Capacity(memory_bytes=7 * GB, host_bytes=64 * GB, devices=("A card",))


def with_gpu(capacity: Capacity = GPU, options: LaunchOptions | None = None) -> LocalModels:
    models = LocalModels(
        NodeConfig(node=node_id(1), mesh=MESH, wanted=(LARGE.name,), options=options or LaunchOptions())
    )
    models.capacity = capacity
    models.know([LARGE], {})
    return models


def started(effects: list[AnyEffect]) -> LaunchPlan:
    (start,) = of_kind(effects, StartEngine)
    return start.plan


def short(term: int) -> EngineExited:
    return EngineExited(model=LARGE.name, term=Term(term), code=1, never_ready=True, out_of_memory=True)


def test_a_model_larger_than_video_memory_takes_of_both_memories() -> None:
    models = with_gpu()
    plan = started(models.load(LARGE.name, None, 0.0))
    assert plan.offload is not None
    assert 0 < plan.offload.gpu_layers < LARGE.layers
    assert models.free_bytes == 7 * GB - plan.memory_bytes
    assert models.free_host_bytes == 64 * GB - plan.host_bytes


def test_a_failed_allocation_steps_down_until_the_processor_does_it_all() -> None:
    models = with_gpu()
    plan = started(models.load(LARGE.name, None, 0.0))
    assert plan.offload is not None
    layers = [plan.offload.gpu_layers]
    term = 1
    while layers[-1]:
        effects = models.exited(short(term), float(term))
        plan = started(effects)
        assert plan.offload is not None
        (notice,) = of_kind(effects, Notice)
        assert notice.code == "model_stepped_down"
        assert plan.offload.text(LARGE.layers) in notice.text
        layers.append(plan.offload.gpu_layers)
        term += 1
    assert layers == sorted(layers, reverse=True)
    assert len(layers) > 3
    # The processor has nothing smaller: from there it is an engine that dies.
    last = models.exited(short(term), 100.0)
    assert [one.code for one in of_kind(last, Notice)] == ["model_restarting"]


def test_what_a_device_refused_is_remembered_while_it_offers_the_same() -> None:
    models = with_gpu()
    first = started(models.load(LARGE.name, None, 0.0))
    second = started(models.exited(short(1), 1.0))
    models.drop(DropRequested(model=LARGE.name, drain_seconds=0.0), 2.0)
    models.exited(EngineExited(model=LARGE.name, term=Term(2), code=0), 3.0)
    assert started(models.load(LARGE.name, None, 4.0)) == second
    models.drop(DropRequested(model=LARGE.name, drain_seconds=0.0), 5.0)
    models.exited(EngineExited(model=LARGE.name, term=Term(3), code=0), 6.0)
    models.capacity = msgspec.structs.replace(GPU, memory_bytes=7 * GB + 1)
    assert started(models.load(LARGE.name, None, 7.0)).memory_bytes >= first.memory_bytes


def test_on_a_processor_alone_a_failed_allocation_costs_context() -> None:
    models = with_gpu(Capacity(memory_bytes=11 * GB, devices=("CPU",)))
    first = started(models.load(LARGE.name, None, 0.0))
    second = started(models.exited(short(1), 1.0))
    assert (second.slots, second.context) < (first.slots, first.context)


def test_what_the_user_fixed_is_not_stepped_down() -> None:
    models = with_gpu(options=LaunchOptions(gpu_layers=4))
    started(models.load(LARGE.name, None, 0.0))
    last = models.exited(short(1), 1.0)
    assert [one.code for one in of_kind(last, Notice)] == ["model_restarting"]
