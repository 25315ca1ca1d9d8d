"""What a plan says, and how the speeds in it follow from what was measured."""

import msgspec
import pytest
from tests.support.core_values import GB, facts, node_id

from mesh_llm.core.performance.plan import PlanInput, PlanRequest, PlanSplit, make_plan
from mesh_llm.core.performance.prediction import (
    CROSSING_SECONDS,
    ENGINE_SECONDS,
    TUNNEL_SECONDS,
    WORKER_SECONDS,
    Link,
    offload_seconds,
    per_second,
    ring_seconds,
    solo_seconds,
    split_seconds,
)
from mesh_llm.core.split.eligibility import Barred, Obstacle
from mesh_llm.core.split.layout import MOST_PIPELINED_TOKENS
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import (
    AUTO_CACHE,
    STEPS_PER_LAYER,
    LaunchOptions,
    LayerFacts,
    ModelFacts,
    Offload,
    Rates,
    Speed,
    SplitLayout,
    SplitShare,
)


def sized(gigabytes: float) -> ModelFacts:
    size = int(gigabytes * GB)
    return msgspec.structs.replace(
        facts("big", gigabytes), active_bytes=size, head_bytes=size // 20, weight_bits=4.5, embedding_length=4096
    )


BIG = sized(10.0)
FAST = Speed(
    cores=8,
    cached=Rates(f16=30 * GB, q8=20 * GB, q4=10 * GB),
    one=Rates(f16=9 * GB, q8=8 * GB, q4=4 * GB),
    full=Rates(f16=40 * GB, q8=40 * GB, q4=20 * GB),
    step_ns=500,
    full_step_ns=5000,
)


def machine(
    number: int, gigabytes: float, *, rpc: str = "8.0.0", speed: Speed | None = FAST, file: bool = True
) -> PlanInput:
    return PlanInput(
        node=node_id(number),
        name=f"n{number}",
        memory_bytes=int(gigabytes * GB),
        rpc_version=rpc,
        has_file=file,
        speed=speed,
    )


def links(count: int, one_way: float = 0.005) -> dict[tuple[NodeId, NodeId], Link]:
    numbers = range(1, count + 1)
    link = Link(one_way_seconds=one_way, bytes_per_second=100e6)
    return {(node_id(a), node_id(b)): link for a in numbers for b in numbers if a < b}


def test_a_model_that_fits_here_runs_here() -> None:
    plan = make_plan(PlanRequest(facts=BIG), [machine(1, 20.0), machine(2, 20.0)], links(2))
    assert (plan.runs, [node.name for node in plan.nodes]) == ("here", ["n1"])
    assert plan.predicted_tps == pytest.approx(2.0, rel=0.05)
    # How it would be with --split is told as well.
    assert plan.split is not None
    assert len(plan.split.nodes) == 2
    assert plan.split.predicted_tps is not None
    assert plan.split.predicted_tps < (plan.predicted_tps or 0.0)


def test_or_elsewhere_where_it_only_fits_there() -> None:
    plan = make_plan(PlanRequest(facts=BIG), [machine(1, 4.0), machine(2, 20.0)], links(2))
    assert (plan.runs, [node.name for node in plan.nodes]) == ("elsewhere", ["n2"])


def test_or_split_where_it_fits_nobody_alone() -> None:
    plan = make_plan(PlanRequest(facts=BIG), [machine(1, 6.0), machine(2, 7.0)], links(2))
    assert plan.runs == "split"
    assert [node.name for node in plan.nodes] == ["n2", "n1"]
    assert sum(node.layers for node in plan.nodes) == BIG.layers
    assert sum(node.ratio for node in plan.nodes) == pytest.approx(1.0, abs=0.001)
    assert "n2, n1" in plan.message
    assert plan.split is not None
    assert plan.split.ring_ms == pytest.approx(10.0)
    assert plan.split.micro_batch == 0
    processors = [msgspec.structs.replace(machine(n, 7.0), on_processor=True) for n in (1, 2)]
    small = make_plan(PlanRequest(facts=BIG), processors, links(2))
    assert small.split is not None
    assert small.split.micro_batch == MOST_PIPELINED_TOKENS


def test_a_plan_foretells_several_engines_and_what_all_requests_get_together() -> None:
    rates = msgspec.structs.replace(FAST, batch=Rates(f16=160 * GB, q8=120 * GB, q4=60 * GB))
    machines = [msgspec.structs.replace(machine(n, 60.0, speed=rates), on_processor=True) for n in (1, 2)]
    many = LaunchOptions(slots=16, context=1024)

    def planned(groups: int | None) -> PlanSplit:
        split = make_plan(PlanRequest(facts=BIG, options=many, groups=groups), machines, links(2)).split
        assert split is not None
        assert split.groups_why
        return split

    one, auto = planned(1), planned(None)
    assert (one.groups, auto.groups) == (1, 2)
    assert one.together_tps is not None
    assert auto.together_tps is not None
    assert one.predicted_tps is not None
    assert auto.together_tps > 1.2 * one.together_tps > 1.2 * one.predicted_tps
    # A further engine's buffers count on both.
    assert all(b.memory_bytes > a.memory_bytes for a, b in zip(one.nodes, auto.nodes, strict=True))


def test_a_split_over_slow_links_is_planned_with_rounded_activations() -> None:
    slow = {ends: Link(one_way_seconds=0.005, bytes_per_second=1e5) for ends in links(2)}
    machines = [machine(n, 7.0) for n in (1, 2)]

    def planned(wire: str, ways: dict[tuple[NodeId, NodeId], Link]) -> PlanSplit:
        found = make_plan(PlanRequest(facts=BIG, wire=wire), machines, ways).split
        assert found is not None
        return found

    assert planned("auto", links(2)).wire == "f32"
    # How fast these machines read prompts is not known.
    assert planned("auto", slow).wire == "f32 for prompts, f16 for tokens"
    speeds = [planned(wire, slow).predicted_tps or 0.0 for wire in ("f32", "f16", "q8")]
    assert speeds[0] < speeds[1] < speeds[2]
    assert planned("auto", slow).predicted_tps == speeds[1]


def test_what_does_not_fit_says_what_is_missing() -> None:
    plan = make_plan(PlanRequest(facts=BIG), [machine(1, 4.0), machine(2, 3.0)], links(2))
    assert (plan.runs, plan.predicted_tps) == ("no", None)
    assert plan.message == (
        "big does not fit: it needs 10.9 GB on 2 nodes (10.3 on one, and 0.6 for the second's own buffers); "
        "n1 4.0, n2 3.0 = 7.0 GB."
    )
    assert plan.hint == "Add a machine, or take a smaller model."
    assert plan.need_bytes > plan.have_bytes == 7 * GB


def test_who_gets_no_layer_of_a_split_by_wish_is_said() -> None:
    machines = [machine(1, 80.0), machine(2, 0.4), machine(3, 20.0)]
    plan = make_plan(PlanRequest(facts=BIG, asked=True), machines, links(3))
    notes = [one.note for one in plan.machines]
    assert (notes[0], notes[2]) == ("", "")
    assert notes[1].startswith("computes nothing of it: one layer needs ")
    assert notes[1].endswith(" there, and it offers 400.0 MB")


def test_who_cannot_take_part_is_left_out_and_said() -> None:
    odd = [machine(1, 6.0), machine(2, 7.0, rpc="7.0.0"), machine(3, 2.0, file=False), machine(4, 7.0, rpc="")]
    plan = make_plan(PlanRequest(facts=BIG), odd, links(4))
    assert plan.runs == "no"
    assert [one.has_file for one in plan.machines] == [True, True, False, True]
    assert [one.takes_part for one in plan.machines] == [True, False, True, False]
    assert plan.machines[1].note.startswith("speaks another RPC version (7.0.0, and n1 8.0.0): ")
    assert plan.machines[3].note == "has no RPC plugin: on n4: mesh-llm doctor"


def test_who_may_not_share_is_not_counted() -> None:
    nodes = [machine(1, 6.0), msgspec.structs.replace(machine(2, 7.0), barred=Barred(Obstacle.SCOPE, "serve"))]
    plan = make_plan(PlanRequest(facts=BIG), nodes, links(2))
    assert (plan.runs, plan.have_bytes, plan.split) == ("no", 6 * GB, None)
    command = "mesh-llm invite grant n2 --scope split"
    assert plan.hint == f"n2 offers 7.0 GB but may not lend it, because its invite has scope serve: {command}."
    assert command in plan.machines[1].note
    # The same seen from there: nobody who may share asks.
    own = [nodes[1], nodes[0]]
    plan = make_plan(PlanRequest(facts=BIG), own, links(2))
    assert plan.runs == "no"
    assert (
        f"This node offers 7.0 GB but may not lend it, because its invite has scope serve: on n1: {command}"
        in plan.hint
    )


def test_who_has_not_got_the_file_helps_and_never_hosts() -> None:
    plan = make_plan(PlanRequest(facts=BIG), [machine(1, 6.0), machine(2, 7.0, file=False)], links(2))
    assert (plan.runs, [node.name for node in plan.nodes]) == ("split", ["n1", "n2"])
    keeps = msgspec.structs.replace(machine(1, 6.0), gives=False)
    assert make_plan(PlanRequest(facts=BIG), [keeps, machine(2, 7.0, file=False)], links(2)).runs == "no"
    nobody = make_plan(PlanRequest(facts=BIG), [machine(1, 6.0, file=False), machine(2, 7.0, file=False)], links(2))
    assert nobody.runs == "no"


def test_nobody_too_far_away() -> None:
    near = make_plan(PlanRequest(facts=BIG), [machine(1, 6.0), machine(2, 7.0)], links(2, 0.039))
    far = make_plan(PlanRequest(facts=BIG), [machine(1, 6.0), machine(2, 7.0)], links(2, 0.041))
    assert (near.runs, far.runs) == ("split", "no")
    strict = msgspec.structs.replace(machine(2, 5.0), max_rtt_ms=1.0)
    limited = make_plan(PlanRequest(facts=BIG), [machine(1, 6.0), strict], links(2, 0.01))
    assert limited.runs == "no"
    assert "is too far away (20 ms from n1): start n2 with --max-rtt 30." in limited.hint


def test_more_context_takes_more() -> None:
    long = PlanRequest(facts=BIG, options=LaunchOptions(context=32_000, slots=1))
    short = make_plan(PlanRequest(facts=BIG, options=LaunchOptions(context=2048, slots=1)), [machine(1, 11.5)], {})
    assert short.runs == "here"
    assert make_plan(long, [machine(1, 11.5)], {}).need_bytes > short.need_bytes


def test_what_was_not_measured_is_not_made_up() -> None:
    plan = make_plan(PlanRequest(facts=BIG), [machine(1, 6.0, speed=None), machine(2, 7.0)], links(2))
    assert (plan.runs, plan.predicted_tps) == ("split", None)
    assert plan.machines[0].gigabytes_per_second is None
    assert make_plan(PlanRequest(facts=BIG), [machine(1, 20.0, speed=Speed())], {}).predicted_tps is None
    assert solo_seconds(facts("big", 1.0), FAST) is None, "without knowing what a token reads"


def layout(*layers: int) -> SplitLayout:
    shares = tuple(SplitShare(node=node_id(n), layers=count) for n, count in enumerate(layers, start=1))
    return SplitLayout(term=1, shares=shares)


def test_a_plan_says_what_its_speeds_come_from() -> None:
    here = msgspec.structs.replace(machine(1, 20.0), alone=FAST.slowed(2.0), basis="model")
    there = msgspec.structs.replace(machine(2, 20.0), measured_tps=3.25)
    plan = make_plan(PlanRequest(facts=BIG), [here, there, machine(3, 20.0)], links(3))
    assert [one.basis for one in plan.machines] == ["model", "model", "told"]
    assert plan.predicted_tps == pytest.approx(1.0, rel=0.05)
    assert plan.basis == "model"
    assert plan.machines[1].predicted_tps == 3.25
    # A split is told by what the machines do at present, whatever this model did undivided.
    lagging = make_plan(PlanRequest(facts=BIG, split_lag=1.5), [here, there, machine(3, 20.0)], links(3))
    assert plan.split is not None
    assert lagging.split is not None
    assert (plan.split.basis, lagging.split.basis) == ("told", "machine")
    assert (lagging.split.predicted_tps or 0.0) < (plan.split.predicted_tps or 0.0)


def test_a_plan_says_how_fast_prompts_are_read_where_that_was_measured() -> None:
    batches = msgspec.structs.replace(FAST, batch=Rates(f16=900 * GB, q8=800 * GB, q4=380 * GB))
    nodes = [machine(1, 20.0, speed=batches), machine(2, 20.0), machine(3, 20.0, speed=batches)]
    plan = make_plan(PlanRequest(facts=BIG), nodes, links(3))
    # 9.5 GB of layers: 40 tokens a second.
    assert plan.prompt_tps == pytest.approx(40.0, rel=0.02)
    assert plan.first_token_s == pytest.approx(plan.prompt_tokens / 40.0, rel=0.02)
    assert [one.prompt_tps is None for one in plan.machines] == [False, True, False]
    assert plan.split is not None
    assert plan.split.prompt_tps is None, "a machine whose batches were not measured takes part"
    both = make_plan(PlanRequest(facts=BIG, asked=True), [nodes[0], nodes[2]], links(3))
    late = make_plan(PlanRequest(facts=BIG, asked=True, split_prompt_lag=1.5), [nodes[0], nodes[2]], links(3))
    # 2,048 tokens are four micro-batches: at best five turns of half a machine's time instead of eight.
    assert both.prompt_tps == pytest.approx(40.0 * 8 / 5, rel=0.05)
    assert (late.first_token_s or 0.0) == pytest.approx(1.5 * (both.first_token_s or 0.0), rel=0.05)


def test_a_token_goes_around_once() -> None:
    speeds = {node_id(n): FAST for n in (1, 2, 3)}
    ways = links(3, 0.02)
    alone = solo_seconds(BIG, FAST)
    around = split_seconds(BIG, layout(6, 5, 5), speeds, ways)
    assert alone is not None
    assert around is not None
    activations = 3 * 4096 * 4 / 100e6
    assert around.network == pytest.approx(3 * 0.02 + activations, rel=0.001)
    assert around.machines == pytest.approx(alone + TUNNEL_SECONDS + 2 * WORKER_SECONDS, rel=0.001)
    # A lag of the machines is none of the network.
    assert around.total(2.0) == pytest.approx(2 * around.machines + around.network)
    assert ring_seconds(layout(6, 5, 5), ways) == pytest.approx(0.06)
    assert ring_seconds(layout(6, 5, 5), links(2)) is None
    assert per_second(None) is None


def test_small_weights_come_from_the_cache_and_take_one_thread() -> None:
    tiny = msgspec.structs.replace(sized(0.004), weight_bits=8.5)
    seconds = solo_seconds(tiny, FAST)
    assert seconds is not None
    reading = tiny.active_bytes / (20 * GB)
    steps = tiny.layers * STEPS_PER_LAYER * 500e-9
    assert seconds == pytest.approx(reading + steps + ENGINE_SECONDS, rel=0.01)


def test_threads_by_size_but_not_more_than_memory_gives() -> None:
    rates = [FAST.seconds(16.0, int(size), int(size), 0) for size in (0.1 * GB, 0.2 * GB, 10 * GB)]
    speeds = [size / seconds / GB for size, seconds in zip((0.1 * GB, 0.2 * GB, 10 * GB), rates, strict=True)]
    assert speeds[0] < speeds[1] <= 40.5
    assert speeds[2] == pytest.approx(40.0)
    # An accelerator has no threads to choose.
    gpu = Speed(full=Rates(f16=900 * GB, q8=900 * GB, q4=900 * GB))
    assert gpu.seconds(4.5, 4 * GB, 4 * GB, 30) == pytest.approx(4 / 900)


def test_a_model_that_nobody_has_is_planned_as_if_it_were_fetched_here() -> None:
    nodes = [machine(1, 12, file=False), machine(2, 12, file=False)]
    assert make_plan(PlanRequest(facts=BIG), nodes, links(2)).runs == "no"
    answer = make_plan(PlanRequest(facts=BIG, fetch="big-model"), nodes, links(2))
    assert (answer.runs, answer.on_disk) == ("here", False)
    assert "mesh-llm download big-model" in answer.hint
    assert [one.has_file for one in answer.machines] == [False, False]
    small = [machine(1, 7, file=False), machine(2, 7, file=False)]
    answer = make_plan(PlanRequest(facts=BIG, fetch="big-model"), small, links(2))
    assert (answer.runs, "download" in answer.hint) == ("split", True)


# A GPU reads ten times as fast as the processor beside it.
GPU = Speed(full=Rates(f16=400 * GB, q8=400 * GB, q4=200 * GB), full_step_ns=3000)
LAYER = LayerFacts(weights=GB // 2, row=1024)
HEAD = GB // 4
WIDE = msgspec.structs.replace(
    BIG,
    layers=20,
    layer_facts=(LAYER,) * 20,
    size_bytes=20 * LAYER.weights + 2 * HEAD,
    active_bytes=20 * LAYER.weights + HEAD,
    head_bytes=HEAD,
    input_bytes=HEAD,
    output_bytes=2 * HEAD,
    kv_bytes_per_token=20 * LAYER.row,
)


def with_gpu(number: int, gigabytes: float, host: float, *, host_speed: Speed | None = FAST) -> PlanInput:
    own = machine(number, gigabytes, speed=GPU)
    return msgspec.structs.replace(own, host_bytes=int(host * GB), host_speed=host_speed)


def test_each_reads_its_own_weights_on_gpu_and_processor() -> None:
    half = offload_seconds(WIDE, Offload(gpu_layers=10), GPU, FAST)
    own = 10 * LAYER.weights
    expected = ENGINE_SECONDS + CROSSING_SECONDS + (own + HEAD) / (200 * GB) + own / (20 * GB)
    expected += 10 * STEPS_PER_LAYER * (3e-6 + 5e-6)
    assert half == pytest.approx(expected)
    assert offload_seconds(WIDE, Offload(gpu_layers=0), GPU, FAST) == solo_seconds(WIDE, FAST)
    assert offload_seconds(WIDE, Offload(gpu_layers=10), None, FAST) is None
    assert offload_seconds(WIDE, Offload(gpu_layers=10), GPU, Speed()) is None


def test_of_experts_in_memory_only_those_that_are_used_are_read() -> None:
    layer = LayerFacts(weights=GB // 2, experts=GB * 2 // 5, row=1024)
    mixture = msgspec.structs.replace(
        WIDE,
        layer_facts=(layer,) * 20,
        # One in eight is used.
        active_bytes=20 * (layer.weights - layer.experts + layer.experts // 8) + HEAD,
    )
    seconds = [offload_seconds(mixture, Offload(gpu_layers=20, cpu_moe=count), GPU, FAST) for count in (0, 1, 20)]
    assert None not in seconds
    none, one, every = (value or 0.0 for value in seconds)
    assert none == pytest.approx(solo_seconds(mixture, GPU))
    added = layer.experts / 8 * (1 / (20 * GB) - 1 / (200 * GB)) + 2 * CROSSING_SECONDS
    assert one - none == pytest.approx(added, rel=0.01)
    assert every - none == pytest.approx(20 * added + 6 * STEPS_PER_LAYER * 5e-6, rel=0.01)
    whole_layers = offload_seconds(mixture, Offload(gpu_layers=0, cpu_moe=20), GPU, FAST)
    assert every < (whole_layers or 0.0)


def test_a_model_larger_than_video_memory_says_where_its_parts_are_and_how_fast_it_is() -> None:
    plan = make_plan(PlanRequest(facts=WIDE), [with_gpu(1, 8.0, 32.0)], {})
    assert plan.runs == "here"
    assert plan.offload is not None
    assert 0 < plan.offload.gpu_layers < 20
    assert plan.message == (
        f"big fits n1 alone, beyond its GPU: {plan.offload.gpu_layers} of 20 layers on the GPU: "
        f"about {plan.predicted_tps:.1f} tokens/s."
    )
    for memory in (plan.offload.gpu, plan.offload.memory):
        assert memory.weights + memory.cache + memory.compute == memory.total_bytes <= memory.have_bytes
    assert plan.offload.gpu.total_bytes == plan.need_bytes
    (one,) = plan.machines
    assert (one.fits, one.offload, one.predicted_tps) == (True, plan.offload.text, plan.predicted_tps)
    more = make_plan(PlanRequest(facts=WIDE), [with_gpu(1, 10.0, 32.0)], {})
    assert (more.predicted_tps or 0.0) > (plan.predicted_tps or 0.0)


def test_it_is_split_instead_only_where_that_is_clearly_faster() -> None:
    here, near = with_gpu(1, 8.0, 32.0), with_gpu(2, 8.0, 0.0)
    fast = make_plan(PlanRequest(facts=WIDE), [here, near], links(2, 0.001))
    assert fast.runs == "split"
    little = with_gpu(1, 10.0, 32.0)
    slow = make_plan(PlanRequest(facts=WIDE), [little, near], links(2, 0.035))
    assert slow.runs == "here"
    assert slow.offload is not None
    assert slow.split is not None
    # Where it is not known, video memory computes it.
    unknown = make_plan(PlanRequest(facts=WIDE), [with_gpu(1, 10.0, 32.0, host_speed=None), near], links(2, 0.035))
    assert unknown.runs == "split"
    by_hand = PlanRequest(facts=WIDE, options=LaunchOptions(gpu_layers=5))
    assert make_plan(by_hand, [here, near], links(2, 0.001)).runs == "here"


def test_another_nodes_processor_is_not_asked_for_its_help_unasked() -> None:
    plan = make_plan(PlanRequest(facts=WIDE), [machine(1, 2.0), with_gpu(2, 8.0, 32.0)], {})
    assert plan.runs == "no"
    assert plan.machines[1].fits
    assert plan.machines[1].offload


def test_a_cache_type_that_is_left_open_is_told() -> None:
    options = LaunchOptions(cache_type=AUTO_CACHE, context=16_384)
    small = msgspec.structs.replace(BIG, quantises=True, context_train=32_768, kv_bytes_per_token=100_000)
    plan = make_plan(PlanRequest(facts=small, options=options), [machine(1, 11.6)], {})
    assert (plan.runs, plan.cache_type) == ("here", "q8_0")
