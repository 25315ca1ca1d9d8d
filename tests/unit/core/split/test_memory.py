"""Devices that give less memory than they offer, and main memory in the place of other machines."""

import msgspec
from tests.support.core_values import GB
from tests.support.split_mesh import BIG, BIG_FACTS, Machine, SplitMesh

from mesh_llm.core.types.events import (
    EngineExited,
    PartRefused,
    SpeedMeasured,
)
from mesh_llm.core.types.ids import Term
from mesh_llm.core.types.model import LaunchOptions, ModelStatus, Rates, Speed


def two(**first: object) -> SplitMesh:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0, **first)  # pyright: ignore[reportArgumentType]
    mesh.add(2, memory=7.0)
    return mesh


def refused(mesh: SplitMesh, machine: Machine) -> None:
    """The engine of a host ends while it loads, because this machine's device gave too little memory."""
    launch = next(iter(machine.node.launches))
    machine.running = None
    mesh.happens(
        machine,
        EngineExited(model=BIG, term=Term(launch.term), code=1, never_ready=True, out_of_memory=True),
    )


def part_refused(mesh: SplitMesh, machine: Machine) -> None:
    """The device of a worker gives too little memory for its part, and the host's engine ends."""
    host = mesh.machines[mesh.host() or 0]
    launch = next(iter(host.node.launches))
    assert machine.lending is not None
    planned = machine.lending.memory_bytes
    host.running = None
    mesh.happens(host, EngineExited(model=BIG, term=Term(launch.term), code=1, never_ready=True))
    mesh.happens(machine, PartRefused(model=BIG, memory_bytes=planned))


def test_a_host_whose_device_gives_too_little_takes_fewer_layers_at_once() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=9.0)
    mesh.add(2, memory=8.0)
    mesh.passes(5.0)
    host = mesh.machines[1]
    layers = [mesh.shares()[1]]
    refused(mesh, host)
    layers.append(mesh.shares()[1])
    refused(mesh, host)
    layers.append(mesh.shares()[1])
    assert layers == sorted(layers, reverse=True)
    assert layers[0] > layers[-1]
    codes = [notice.code for notice in host.notices]
    assert codes.count("model_stepped_down") == 2
    assert "model_restarting" not in codes


def test_a_worker_whose_device_gives_too_little_gets_fewer_layers_and_is_left_out_at_last() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0)
    mesh.add(2, memory=7.0)
    mesh.add(3, memory=6.0, disk=(BIG_FACTS,))
    mesh.passes(5.0)
    worker, before = mesh.machines[2], mesh.shares()[2]
    offers = [worker.node.split.group.state.memory_bytes if worker.node.split.group.state else 0]
    for _ in range(20):
        if worker.lending is None:
            break
        part_refused(mesh, worker)
        mesh.passes(1.0)
        state = worker.node.split.group.state
        assert state is not None
        offers.append(state.memory_bytes)
        assert mesh.shares().get(2, 0) <= before
    assert worker.lending is None, "it is done without"
    assert offers == sorted(offers, reverse=True)
    assert set(mesh.shares()) == {1, 3}
    told = [notice.text for notice in worker.notices if notice.code == "model_stepped_down"]
    assert len(told) == len(offers) - 1
    assert "so this node offers it" in told[0]
    assert "model_failed" not in [notice.code for notice in mesh.machines[1].notices]


def test_a_worker_that_hears_of_the_same_refusal_again_offers_no_less() -> None:
    mesh = two()
    mesh.passes(5.0)
    worker = mesh.machines[2]
    assert worker.lending is not None
    planned = worker.lending.memory_bytes
    for _ in range(3):
        mesh.happens(worker, PartRefused(model=BIG, memory_bytes=planned))
    state = worker.node.split.group.state
    assert state is not None
    assert state.memory_bytes == int(planned * 0.85)
    assert [notice.code for notice in worker.notices].count("model_stepped_down") == 1


def test_a_group_that_gets_too_small_by_refusals_waits_and_says_what_is_missing() -> None:
    mesh = two()
    mesh.passes(5.0)
    host = mesh.machines[1]
    for _ in range(6):
        if host.running is None:
            break
        refused(mesh, host)
        mesh.passes(1.0)
    assert host.running is None
    assert "waiting for more memory" in host.reason
    assert "model_failed" not in [notice.code for notice in host.notices]


def test_a_gpu_that_is_too_small_serves_with_main_memory_until_a_group_can_be_formed() -> None:
    mesh = SplitMesh()
    alone = mesh.add(1, wants="big", memory=8.0, host=32.0)
    mesh.passes(5.0)
    assert mesh.leaders() == {}
    assert alone.running is not None
    assert alone.running.offload is not None
    assert [one.status for one in alone.node.serving] == [ModelStatus.WARM]
    assert "model_waiting" not in {notice.code for notice in alone.notices}
    mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert mesh.host() == 1
    assert alone.running.split is not None
    mesh.kill(2)
    mesh.passes(10.0)
    assert mesh.leaders() == {}
    assert alone.running.split is None
    assert alone.running.offload is not None


def test_another_host_takes_over_from_a_node_that_served_with_main_memory() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=7.0, host=32.0)
    mesh.passes(5.0)
    assert first.running is not None
    mesh.add(2, memory=8.0)
    mesh.passes(5.0)
    assert mesh.host() == 2
    assert first.running is None
    assert first.lending is not None
    assert first.node.free_host_bytes == 32 * GB


def test_layers_that_the_user_fixed_need_no_group() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=8.0, host=32.0, options=LaunchOptions(gpu_layers=3))
    mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert mesh.leaders() == {}
    assert first.running is not None
    assert first.running.offload is not None
    assert first.running.offload.gpu_layers == 3


GPU = Speed(full=Rates(f16=400 * GB, q8=400 * GB, q4=400 * GB), full_step_ns=3000)
SLOW_GPU = GPU.slowed(50.0)
PROCESSOR = Speed(cores=8, cached=GPU.full, one=GPU.slowed(40.0).full, full=GPU.slowed(10.0).full, full_step_ns=5000)
READ = msgspec.structs.replace(BIG_FACTS, active_bytes=BIG_FACTS.size_bytes, weight_bits=4.5)


def test_a_group_that_would_be_slower_than_gpu_and_processor_is_not_formed() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=8.0, host=32.0, disk=(READ,))
    second = mesh.add(2, memory=7.0, disk=(READ,))
    mesh.happens(first, SpeedMeasured(speed=GPU, host_speed=PROCESSOR))
    mesh.happens(second, SpeedMeasured(speed=SLOW_GPU))
    mesh.passes(10.0)
    assert mesh.leaders() == {}
    assert first.running is not None
    assert first.running.offload is not None
    assert second.lending is None


def test_it_goes_over_to_a_group_that_is_clearly_faster_and_stays_there() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=8.0, host=32.0, disk=(READ,))
    second = mesh.add(2, memory=7.0, disk=(READ,))
    mesh.happens(first, SpeedMeasured(speed=GPU, host_speed=PROCESSOR))
    mesh.happens(second, SpeedMeasured(speed=SLOW_GPU))
    mesh.passes(10.0)
    assert mesh.leaders() == {}
    mesh.happens(second, SpeedMeasured(speed=GPU))
    mesh.passes(10.0)
    assert mesh.host() == 1
    assert first.running is not None
    assert first.running.split is not None
    # What runs is not loaded anew for a prediction.
    mesh.happens(second, SpeedMeasured(speed=SLOW_GPU))
    mesh.passes(10.0)
    assert mesh.host() == 1


def test_another_host_of_a_faster_group_gets_this_nodes_memory() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=7.0, host=32.0, disk=(READ,))
    second = mesh.add(2, memory=8.0, disk=(READ,))
    mesh.happens(first, SpeedMeasured(speed=GPU, host_speed=PROCESSOR))
    mesh.happens(second, SpeedMeasured(speed=SLOW_GPU))
    mesh.passes(10.0)
    assert first.running is not None
    mesh.happens(second, SpeedMeasured(speed=GPU))
    mesh.passes(10.0)
    assert mesh.host() == 2
    assert first.running is None
    assert first.lending is not None
