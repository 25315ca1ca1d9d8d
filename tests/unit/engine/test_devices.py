import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.devices import Machine, measure, nvidia_devices
from mesh_llm.engine.sources.base import DeviceInfo, DeviceKind, EngineInfo

GIB = 2**30
CPU = DeviceInfo(id="CPU", name="Some CPU", kind=DeviceKind.CPU, memory_total=32 * GIB, memory_free=20 * GIB)
# What ggml says of the CPU: everything is free.
ENGINE_CPU = DeviceInfo(id="CPU", name="Some CPU", kind=DeviceKind.CPU, memory_total=32 * GIB, memory_free=32 * GIB)
GPU = DeviceInfo(id="CUDA0", name="NVIDIA RTX 4090", kind=DeviceKind.GPU, memory_total=24 * GIB, memory_free=22 * GIB)
GPU1 = DeviceInfo(id="CUDA1", name="NVIDIA RTX 3060", kind=DeviceKind.GPU, memory_total=12 * GIB, memory_free=12 * GIB)
BLAS = DeviceInfo(id="BLAS", name="Accelerate", kind=DeviceKind.ACCELERATOR)
HERE = Machine(cpu=CPU)


def engine(*devices: DeviceInfo) -> EngineInfo:
    return EngineInfo(source="embedded", version="1", rpc_version="8.0.0", devices=devices)


def test_cpu_offers_what_is_available_less_a_reserve() -> None:
    measured = measure(engine(ENGINE_CPU, BLAS), machine=lambda: HERE)
    assert measured.capacity.memory_bytes == 20 * GIB - int(3.2 * GIB)
    assert measured.capacity.memory_total_bytes == 32 * GIB
    assert measured.capacity.devices == ("Some CPU",)
    assert measured.capacity.engine == "embedded 1"
    assert measured.capacity.rpc_version == "8.0.0"
    assert measured.devices == ("CPU",)


def test_gpus_go_before_the_cpu() -> None:
    measured = measure(engine(GPU, GPU1, ENGINE_CPU), machine=lambda: HERE)
    assert measured.capacity.devices == ("NVIDIA RTX 4090", "NVIDIA RTX 3060")
    assert measured.capacity.memory_bytes == 34 * GIB - GIB - int(12 * GIB * 0.05)
    assert measured.devices == ()


def test_max_vram_caps_and_never_raises() -> None:
    assert measure(engine(GPU), max_vram=6, machine=lambda: HERE).capacity.memory_bytes == 6_000_000_000
    assert measure(engine(GPU), max_vram=0.004, machine=lambda: HERE).capacity.memory_bytes == 4_000_000
    assert measure(engine(GPU), max_vram=500, machine=lambda: HERE).capacity.memory_bytes == 21 * GIB
    with pytest.raises(MeshError):
        measure(engine(GPU), max_vram=0, machine=lambda: HERE)


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ("CUDA1", ("CUDA1",)),
        ("cuda0", ("CUDA0",)),
        ("cpu", ("CPU",)),
        ("none", ("CPU",)),
        ("4090", ("CUDA0",)),
        ("nvidia", ("CUDA0", "CUDA1")),
        ("CUDA1,CUDA0", ("CUDA1", "CUDA0")),
    ],
)
def test_device_picks(wanted: str, ids: tuple[str, ...]) -> None:
    assert measure(engine(GPU, GPU1, ENGINE_CPU), device=wanted, machine=lambda: HERE).devices == ids


def test_a_device_that_is_not_there_is_answered_with_what_is() -> None:
    with pytest.raises(MeshError) as caught:
        measure(engine(GPU, ENGINE_CPU, BLAS), device="CUDA7", machine=lambda: HERE)
    assert caught.value.code == "device_not_found"
    assert "CUDA0 (NVIDIA RTX 4090)" in caught.value.hint
    assert "BLAS" not in caught.value.hint


def test_the_system_fills_in_what_the_engine_does_not_say() -> None:
    silent = DeviceInfo(id="CUDA0", name="NVIDIA RTX 4090", kind=DeviceKind.GPU)
    measured = measure(engine(silent, ENGINE_CPU), machine=lambda: Machine(cpu=CPU, nvidia=(GPU,)))
    assert measured.capacity.memory_total_bytes == 24 * GIB


def test_apple_takes_three_quarters_and_no_more_than_is_free() -> None:
    metal = DeviceInfo(id="MTL0", name="Apple M3", kind=DeviceKind.GPU, memory_total=30 * GIB, memory_free=30 * GIB)
    here = Machine(cpu=CPU, apple=(metal,))
    measured = measure(engine(metal, ENGINE_CPU), machine=lambda: here)
    assert measured.capacity.memory_total_bytes == 24 * GIB
    assert measured.capacity.memory_bytes == 19 * GIB


def test_an_unused_gpu_is_told() -> None:
    measured = measure(engine(ENGINE_CPU), machine=lambda: Machine(cpu=CPU, nvidia=(GPU,)))
    assert len(measured.problems) == 1
    assert "NVIDIA RTX 4090" in measured.problems[0]
    assert "--bin-dir" in measured.problems[0]
    assert measure(engine(GPU), machine=lambda: Machine(cpu=CPU, nvidia=(GPU,))).problems == ()


def test_integrated_graphics_are_second_choice() -> None:
    igpu = DeviceInfo(
        id="Vulkan1", name="Iris", kind=DeviceKind.INTEGRATED_GPU, memory_total=16 * GIB, memory_free=10 * GIB
    )
    assert measure(engine(igpu, GPU), machine=lambda: HERE).capacity.devices == ("NVIDIA RTX 4090",)
    assert measure(engine(igpu, ENGINE_CPU), machine=lambda: HERE).capacity.devices == ("Iris",)


def test_asking_the_driver_where_there_is_none_is_no_error() -> None:
    assert isinstance(nvidia_devices(), tuple)
