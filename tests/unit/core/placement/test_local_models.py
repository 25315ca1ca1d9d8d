import msgspec
import pytest
from tests.support.core_values import GB, MESH, facts, node_id, of_kind

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.types.effects import AnyEffect, Notice, StartEngine, StopEngine
from mesh_llm.core.types.events import CapacityChanged, DropRequested, EngineExited, EngineReady, SettingsChanged
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, ModelKind, ModelStatus
from mesh_llm.core.types.model_settings import ModelSettings, Sampling

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


PROCESSOR = Capacity(memory_bytes=60 * GB, devices=("A processor",), rpc_version="8.0.0")
CARD = Capacity(memory_bytes=24 * GB, host_bytes=50 * GB, devices=("A card",))
SMALL = msgspec.structs.replace(facts("small", 2.0), context_train=8192)


def ready(model: ModelName, term: int) -> EngineReady:
    return EngineReady(model=model, term=Term(term), address="127.0.0.1:1", context=512, slots=2)


def serving_on_the_processor() -> LocalModels:
    models = LocalModels(NodeConfig(node=node_id(1), mesh=MESH, wanted=(LARGE.name, SMALL.name)))
    models.capacity = PROCESSOR
    models.know([LARGE, SMALL], {})
    for one in (LARGE, SMALL):
        models.load(one.name, None, 0.0)
        models.launches.ready(ready(one.name, 1), 1.0)
    return models


def changed(capacity: Capacity = CARD) -> CapacityChanged:
    return CapacityChanged(capacity=capacity, reason="it moves to A card")


def status(models: LocalModels, name: ModelName) -> ModelStatus:
    launch = models.launches.get(name)
    assert launch is not None
    return launch.status


def test_with_other_devices_engines_start_again_between_two_requests() -> None:
    models = serving_on_the_processor()
    assert models.use_devices(changed(), 10.0) == []
    assert models.capacity.rpc_version == "8.0.0"
    # The plans for the processor's memory do not count against the card's.
    assert 0 < models.launches.reserved_bytes() <= 24 * GB
    assert models.due(10.0, {"large": 1}) == [StopEngine(model=SMALL.name, term=Term(1), drain_seconds=30.0)]
    assert status(models, LARGE.name) is ModelStatus.WARM, "it answers, and takes further requests"
    assert models.due(11.0, {}) == [StopEngine(model=LARGE.name, term=Term(1), drain_seconds=30.0)]
    for one in (LARGE, SMALL):
        plan = started(models.exited(EngineExited(model=one.name, term=Term(1), code=0), 12.0))
        assert plan.model == one.name
        models.launches.ready(ready(one.name, 2), 13.0)
        assert status(models, one.name) is ModelStatus.WARM
    assert models.due(14.0, {}) == []
    assert models.launches.reserved_bytes() <= 24 * GB


def test_an_engine_that_is_never_without_requests_starts_again_too() -> None:
    models = serving_on_the_processor()
    models.use_devices(changed(), 10.0)
    busy = {"large": 1, "small": 1}
    assert models.due(609.0, busy) == [], "what is being answered has ten minutes"
    launch = models.launches.get(LARGE.name)
    assert launch is not None
    assert launch.reason == "it moves to A card as soon as no request is at it, at 00:10:10 UTC at the latest"
    assert models.launches.deadline() == 610.0
    assert {stop.model for stop in of_kind(models.due(610.0, busy), StopEngine)} == {LARGE.name, SMALL.name}
    assert models.due(611.0, busy) == [], "once"


def test_an_engine_that_dies_before_its_turn_starts_on_the_new_devices_at_once() -> None:
    models = serving_on_the_processor()
    models.use_devices(changed(PROCESSOR), 10.0)
    effects = models.exited(EngineExited(model=LARGE.name, term=Term(1), code=-6, reason="device lost"), 10.0)
    assert started(effects).model == LARGE.name


def test_an_engine_that_loads_is_stopped_at_once_and_one_that_failed_is_tried_again() -> None:
    models = with_gpu()
    models.load(LARGE.name, None, 0.0)
    models.use_devices(changed(PROCESSOR), 1.0)
    assert len(of_kind(models.due(1.0, {}), StopEngine)) == 1
    plan = started(models.exited(EngineExited(model=LARGE.name, term=Term(1), code=0), 2.0))
    assert plan.offload is None
    for term in (2, 3):
        models.exited(EngineExited(model=LARGE.name, term=Term(term), code=1, never_ready=True), 3.0)
        models.due(10.0, {})
    assert status(models, LARGE.name) is ModelStatus.FAILED
    models.use_devices(changed(CARD), 20.0)
    assert started(models.due(20.0, {})).model == LARGE.name


def test_what_fits_no_more_is_dropped_with_the_reason_and_what_fits_now_is_served() -> None:
    models = serving_on_the_processor()
    models.use_devices(changed(Capacity(memory_bytes=4 * GB, devices=("A small card",))), 10.0)
    assert set(models.refused) == {LARGE.name} or models.group_model == LARGE.name
    assert status(models, LARGE.name) is ModelStatus.STOPPING
    models.exited(EngineExited(model=LARGE.name, term=Term(1), code=0), 11.0)
    models.group_model = None
    models.refused.setdefault(LARGE.name, "it does not fit")
    effects = models.use_devices(changed(CARD), 20.0)
    assert started(effects).model == LARGE.name
    assert models.refused == {}


def with_settings(**own: ModelSettings) -> LocalModels:
    models = LocalModels(
        NodeConfig(node=node_id(1), mesh=MESH, wanted=(LARGE.name,), options=LaunchOptions(slots=2), models=own)
    )
    models.capacity = Capacity(memory_bytes=64 * GB)
    models.know([LARGE], {})
    return models


def serve(models: LocalModels) -> LaunchPlan:
    plan = started(models.load(LARGE.name, None, 0.0))
    models.launches.ready(
        EngineReady(model=LARGE.name, term=Term(1), address="a", context=plan.context, slots=plan.slots), 1.0
    )
    return plan


def test_settings_of_a_model_come_before_those_of_the_node() -> None:
    models = with_settings(Large=ModelSettings(ctx_size=4096, parallel=3, temperature=0.2, pin=True, ttl=60.0))
    (start,) = of_kind(models.load(LARGE.name, None, 0.0), StartEngine)
    assert (start.plan.context, start.plan.slots) == (4096, 3)
    assert start.options.engine.sampling == Sampling(temperature=0.2)
    assert (models.settings_of(LARGE.name).pin, models.settings_of(LARGE.name).ttl) == (True, 60.0)
    assert models.options_for(ModelName("other")) == LaunchOptions(slots=2)


def test_auto_in_the_settings_of_a_model_takes_back_what_the_node_fixed() -> None:
    options = LaunchOptions(gpu_layers=3, cpu_moe=2)
    assert options.adapted(ModelSettings(gpu_layers="auto")) == LaunchOptions(cpu_moe=2)
    assert options.adapted(ModelSettings(cpu_moe=0)).cpu_moe == 0


def test_changed_settings_start_an_engine_again_between_two_requests() -> None:
    models = with_settings()
    serve(models)
    changed = SettingsChanged(options=LaunchOptions(slots=2), models={"large": ModelSettings(ctx_size=2048)})
    assert models.use_settings(changed, 2.0) == []
    assert models.due(2.5, {LARGE.name: 1}) == []
    (stop,) = of_kind(models.due(3.0, {}), StopEngine)
    assert stop.drain_seconds > 0
    plan = started(models.exited(EngineExited(model=LARGE.name, term=Term(1), code=0), 4.0))
    assert (plan.context, plan.slots) == (2048, 2)
    assert models.use_settings(changed, 5.0) == []
    assert models.launches.get(LARGE.name) is not None
    assert models.due(6.0, {}) == []


def test_settings_of_the_front_door_alone_start_no_engine_again() -> None:
    models = with_settings()
    serve(models)
    own = {"large": ModelSettings(pin=True, ttl=5.0, system_prompt="Be brief.", aliases=("gpt-4o",))}
    assert models.use_settings(SettingsChanged(options=LaunchOptions(slots=2), models=own), 2.0) == []
    assert models.due(200.0, {}) == []
    assert models.settings_of(LARGE.name).pin


def test_settings_that_do_not_fit_leave_the_engine_as_it_is() -> None:
    models = with_settings()
    before = serve(models)
    own = {"large": ModelSettings(parallel=256, ctx_size=32_768)}
    (notice,) = of_kind(models.use_settings(SettingsChanged(options=LaunchOptions(), models=own), 2.0), Notice)
    assert notice.code == "settings_unfit"
    assert "goes on with its present settings" in notice.text
    launch = models.launches.get(LARGE.name)
    assert launch is not None
    assert (launch.order.plan, launch.next_order) == (before, None)
    assert models.due(200.0, {}) == []


def test_a_dropped_model_is_not_started_again_by_new_settings() -> None:
    models = with_settings()
    serve(models)
    models.drop(DropRequested(model=LARGE.name, drain_seconds=1.0), 2.0)
    own = {"large": ModelSettings(ctx_size=2048)}
    models.use_settings(SettingsChanged(options=LaunchOptions(slots=2), models=own), 3.0)
    assert of_kind(models.exited(EngineExited(model=LARGE.name, term=Term(1), code=0), 4.0), StartEngine) == []


def test_a_model_that_failed_is_tried_again_with_changed_settings() -> None:
    models = with_settings()
    models.load(LARGE.name, None, 0.0)
    for term in (1, 2):
        models.exited(EngineExited(model=LARGE.name, term=Term(term), code=1, never_ready=True), 1.0)
        models.due(2.0, {})
    launch = models.launches.get(LARGE.name)
    assert launch is not None
    assert launch.status is ModelStatus.FAILED
    own = {"large": ModelSettings(ctx_size=2048, chat_template="chatml")}
    models.use_settings(SettingsChanged(options=LaunchOptions(slots=2), models=own), 3.0)
    (start,) = of_kind(models.due(3.0, {}), StartEngine)
    assert (start.plan.context, start.options.engine.chat_template) == (2048, "chatml")
