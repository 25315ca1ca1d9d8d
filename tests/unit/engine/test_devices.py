"""The devices of a machine, what of them is offered, and the threads that a model gets."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.devices import (
    Machine,
    amd_devices,
    cgroup_limits,
    cpu_device,
    hidden_cards,
    intel_devices,
    measure,
    nvidia_devices,
    reserve,
    threads_for,
    with_threads,
)
from mesh_llm.engine.spec import DeviceInfo, DeviceKind, EngineInfo, EngineSpec

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
    assert len(measured.unused) == 1
    assert "NVIDIA RTX 4090" in measured.unused[0]
    assert "--bin-dir" in measured.unused[0]
    assert measure(engine(GPU), machine=lambda: Machine(cpu=CPU, nvidia=(GPU,))).unused == ()


def test_integrated_graphics_are_second_choice() -> None:
    igpu = DeviceInfo(
        id="Vulkan1", name="Iris", kind=DeviceKind.INTEGRATED_GPU, memory_total=16 * GIB, memory_free=10 * GIB
    )
    assert measure(engine(igpu, GPU), machine=lambda: HERE).capacity.devices == ("NVIDIA RTX 4090",)
    assert measure(engine(igpu, ENGINE_CPU), machine=lambda: HERE).capacity.devices == ("Iris",)


def test_asking_the_driver_where_there_is_none_is_no_error() -> None:
    assert isinstance(nvidia_devices(), tuple)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_without_groups(tmp_path: Path) -> None:
    device = cpu_device(proc=tmp_path, cgroups=tmp_path)
    assert device.id == "CPU"
    assert device.name
    assert device.memory_total == psutil.virtual_memory().total


def test_version_2_counts_every_level_and_not_the_page_cache(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "0::/user/app\n")
    write(groups / "user" / "memory.max", f"{2 * GIB}\n")
    write(groups / "user" / "memory.current", f"{GIB}\n")
    write(groups / "user" / "memory.stat", f"anon 5\ninactive_file {GIB // 4}\n")
    write(groups / "user" / "app" / "memory.max", "max\n")
    write(groups / "user" / "app" / "memory.current", "1000\n")
    assert cgroup_limits(proc, groups) == [(2 * GIB, GIB - GIB // 4)]
    device = cpu_device(proc, groups)
    assert device.memory_total == min(2 * GIB, psutil.virtual_memory().total)
    assert device.memory_free <= GIB + GIB // 4


def test_version_1(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    # Inside a container the path is the host's, and its own group is the root.
    write(groups / "memory" / "memory.limit_in_bytes", f"{GIB}\n")
    write(groups / "memory" / "memory.usage_in_bytes", f"{GIB // 2}\n")
    write(groups / "memory" / "memory.stat", f"total_inactive_file {GIB // 4}\n")
    assert cgroup_limits(proc, groups) == [(GIB, GIB // 4)]


def test_a_group_that_is_over_its_limit_offers_nothing(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "0::/\n")
    write(groups / "memory.max", "1000\n")
    write(groups / "memory.current", "5000\n")
    assert cpu_device(proc, groups).memory_free == 0


def test_reserve_is_a_tenth_within_bounds() -> None:
    assert reserve(2 * GIB) == GIB // 2
    assert reserve(20 * GIB) == 2 * GIB
    assert reserve(500 * GIB) == 8 * GIB


def card(sysfs: Path, name: str, **files: str) -> None:
    device = sysfs / name / "device"
    device.mkdir(parents=True)
    for file, text in files.items():
        (device / file).write_text(f"{text}\n")


def test_reads_what_the_driver_says(tmp_path: Path) -> None:
    card(tmp_path, "card0", vendor="0x8086")
    card(
        tmp_path,
        "card1",
        vendor="0x1002",
        device="0x744c",
        mem_info_vram_total=str(24 * GIB),
        mem_info_vram_used=str(GIB),
    )
    card(tmp_path, "card1-DP-1", vendor="0x1002")
    card(
        tmp_path,
        "card10",
        vendor="0x1002",
        product_name="Instinct MI300X",
        mem_info_vram_total=str(192 * GIB),
        mem_info_vram_used="0",
    )
    # Graphics of a processor: a small carve-out of main memory.
    card(tmp_path, "card2", vendor="0x1002", mem_info_vram_total=str(GIB // 2), mem_info_vram_used="0")
    first, integrated, second = amd_devices(tmp_path, [])
    assert (integrated.id, integrated.kind) == ("", DeviceKind.INTEGRATED_GPU)
    assert (first.id, first.name, first.memory_total, first.memory_free) == (
        "ROCm0",
        "AMD GPU 0x744c",
        24 * GIB,
        23 * GIB,
    )
    assert (second.id, second.name, second.memory_free) == ("ROCm1", "Instinct MI300X", 192 * GIB)


def test_no_gpu_is_no_error(tmp_path: Path) -> None:
    assert amd_devices(tmp_path / "nothing") == ()


def test_small_models_get_few_threads(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"x")
    assert threads_for(model, cores=8) == 1
    with model.open("r+b") as file:
        file.truncate(100 * 2**20)
    assert threads_for(model, cores=8) == 4
    assert threads_for(model, cores=4) is None
    assert threads_for(tmp_path / "missing.gguf", cores=8) is None


def test_all_parts_of_a_model_count(tmp_path: Path) -> None:
    first = tmp_path / "big-00001-of-00002.gguf"
    first.write_bytes(b"metadata")
    assert threads_for(first, cores=8) is None
    with (tmp_path / "big-00002-of-00002.gguf").open("wb") as file:
        file.truncate(40 * 2**20)
    assert threads_for(first, cores=8) == 2


def test_the_users_choice_stays(tmp_path: Path) -> None:
    spec = EngineSpec(model=tmp_path / "m.gguf", alias="m", context=1, slots=1, threads=7)
    assert with_threads(spec).threads == 7


def test_main_memory_is_offered_beside_a_gpu_with_its_own_reserve() -> None:
    measured = measure(engine(GPU, ENGINE_CPU), machine=lambda: HERE)
    assert measured.capacity.host_bytes == measure(engine(ENGINE_CPU), machine=lambda: HERE).capacity.memory_bytes > 0
    assert measure(engine(ENGINE_CPU), machine=lambda: HERE).capacity.host_bytes == 0


def test_max_vram_limits_the_gpu_and_use_limits_both() -> None:
    little = measure(engine(GPU, ENGINE_CPU), max_vram=2, machine=lambda: HERE).capacity
    assert little.memory_bytes == 2 * 10**9
    assert little.host_bytes == measure(engine(GPU, ENGINE_CPU), machine=lambda: HERE).capacity.host_bytes
    part = measure(engine(GPU, ENGINE_CPU), fraction=0.1, machine=lambda: HERE).capacity
    assert part.memory_bytes == int(0.1 * GPU.memory_total)
    assert part.host_bytes == int(0.1 * HERE.cpu.memory_total)


def test_memory_that_processor_and_gpu_share_is_counted_once() -> None:
    main = measure(engine(ENGINE_CPU), machine=lambda: HERE).capacity.memory_bytes
    for kind in (DeviceKind.INTEGRATED_GPU, DeviceKind.SOFTWARE):
        for total in (4 * GIB, 200 * GIB):
            one = DeviceInfo(id="Vulkan0", name="Iris", kind=kind, memory_total=total, memory_free=total)
            capacity = measure(engine(one, ENGINE_CPU), device="Vulkan0", machine=lambda: HERE).capacity
            assert capacity.memory_bytes + capacity.host_bytes == main


def test_a_processor_that_is_named_beside_a_gpu_computes_what_does_not_fit_there() -> None:
    both = measure(engine(GPU, ENGINE_CPU), device="CUDA0,cpu", machine=lambda: HERE)
    assert both.devices == ("CUDA0",)
    assert both.capacity == measure(engine(GPU, ENGINE_CPU), device="CUDA0", machine=lambda: HERE).capacity


# What the kernel lists, and what the user hides


def add_card(sysfs: Path, name: str, vendor: str, device: str, place: str, **files: str) -> Path:
    """A card as /sys/class/drm has it: a link to its place on the bus."""
    pci = sysfs / "devices" / place
    for file, text in {"vendor": vendor, "device": device, **files}.items():
        if file != "driver":
            write(pci / file, f"{text}\n")
    if "driver" in files:
        (sysfs / "drivers" / files["driver"]).mkdir(parents=True, exist_ok=True)
        (pci / "driver").symlink_to(sysfs / "drivers" / files["driver"])
    drm = sysfs / "drm" / name
    drm.mkdir(parents=True)
    (drm / "device").symlink_to(pci)
    return sysfs / "drm"


def amd_memory(total: int, used: int = 0) -> dict[str, str]:
    return {"driver": "amdgpu", "mem_info_vram_total": str(total), "mem_info_vram_used": str(used)}


def test_intel_graphics_are_found_and_named(tmp_path: Path) -> None:
    names = tmp_path / "pci.ids"
    names.write_text(
        "# comment\n1002  Advanced Micro Devices\n\t56a0  not this one\n"
        "8086  Intel Corporation\n\t46a6  Alder Lake-P GT2 [Iris Xe Graphics]\n\t56a0  DG2 [Arc A770]\n\t\t8086 1 Sub\n"
        "9004  Adaptec\n\t9a49  nor this\n"
    )
    drm = add_card(tmp_path, "card0", "0x8086", "0x46a6", "0000:00:02.0", driver="i915")
    add_card(tmp_path, "card1", "0x8086", "0x56a0", "0000:03:00.0", driver="xe")
    add_card(tmp_path, "card2", "0x8086", "0x9a49", "0000:04:00.0", driver="i915")
    add_card(tmp_path, "card3", "0x8086", "0x1111", "0000:05:00.0", driver="vfio-pci")
    iris, arc, other = intel_devices(drm, [tmp_path / "missing", names])
    assert (iris.name, iris.kind) == ("Intel Iris Xe Graphics", DeviceKind.INTEGRATED_GPU)
    assert (arc.name, arc.kind) == ("Intel Arc A770", DeviceKind.GPU)
    assert other.name == "Intel GPU 0x9a49"
    assert Machine(cpu=CPU, intel=(iris, arc)).accelerators == (arc, iris), "cards come first"


def test_amd_graphics_in_the_processor_take_no_number_of_a_card(tmp_path: Path) -> None:
    drm = add_card(tmp_path, "card0", "0x1002", "0x1638", "0000:08:00.0", **amd_memory(512 * 2**20))
    add_card(tmp_path, "card1", "0x1002", "0x744c", "0000:03:00.0", **amd_memory(24 * GIB, GIB))
    add_card(tmp_path, "card2", "0x1002", "0x744c", "0000:04:00.0", **amd_memory(24 * GIB))
    integrated, first, second = amd_devices(drm, [])
    assert (integrated.id, integrated.kind) == ("", DeviceKind.INTEGRATED_GPU)
    assert (first.id, first.memory_free, second.id) == ("ROCm0", 23 * GIB, "ROCm1")


def test_graphics_that_share_main_memory_are_counted_once(tmp_path: Path) -> None:
    """Vulkan calls them integrated; a ROCm build calls them a GPU, with more memory than the kernel gives them."""
    drm = add_card(tmp_path, "card0", "0x1002", "0x1638", "0000:08:00.0", **amd_memory(512 * 2**20))
    here = Machine(cpu=CPU, amd=amd_devices(drm, []))
    for name, kind in (("ROCm0", DeviceKind.GPU), ("Vulkan0", DeviceKind.INTEGRATED_GPU)):
        apu = DeviceInfo(id=name, name="AMD Radeon 780M", kind=kind, memory_total=16 * GIB, memory_free=16 * GIB)
        capacity = measure(engine(apu, ENGINE_CPU), machine=lambda: here).capacity
        main = 20 * GIB - reserve(32 * GIB)
        assert capacity.memory_bytes + capacity.host_bytes == main, name
        assert capacity.devices == ("AMD Radeon 780M",)
    # A card of its own has its own memory, and so has what the firmware set aside for graphics.
    own = Machine(cpu=CPU, amd=(replace(GPU, id="ROCm0", memory_total=16 * GIB),))
    card = DeviceInfo(id="ROCm0", name="A card", kind=DeviceKind.GPU, memory_total=16 * GIB, memory_free=15 * GIB)
    capacity = measure(engine(card, ENGINE_CPU), machine=lambda: own).capacity
    assert capacity.memory_bytes + capacity.host_bytes > main + 13 * GIB


def test_a_card_that_is_full_is_told() -> None:
    full = replace(GPU, memory_free=GIB)
    (problem,) = measure(engine(full, ENGINE_CPU), machine=lambda: HERE).problems
    assert problem.startswith("NVIDIA RTX 4090 is nearly full: ")
    assert "--device" in problem
    assert measure(engine(GPU, ENGINE_CPU), machine=lambda: HERE).problems == ()


TWO = Machine(cpu=CPU, nvidia=(GPU, GPU1))


@pytest.mark.parametrize(
    ("machine", "environment", "sentence"),
    [
        (TWO, {"CUDA_VISIBLE_DEVICES": "1"}, "CUDA_VISIBLE_DEVICES=1 hides 1 of 2 NVIDIA GPUs"),
        (TWO, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES= hides all of 2 NVIDIA GPUs"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES=-1 hides all of 2 NVIDIA GPUs"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "0,1"}, ""),
        (TWO, {"HIP_VISIBLE_DEVICES": ""}, ""),
        (TWO, {"GGML_VK_VISIBLE_DEVICES": "0"}, "GGML_VK_VISIBLE_DEVICES=0 hides 1 of 2 GPUs"),
        (Machine(cpu=CPU, amd=(GPU,)), {"HIP_VISIBLE_DEVICES": "-1"}, "HIP_VISIBLE_DEVICES=-1 hides all of 1 AMD GPUs"),
        (Machine(cpu=CPU, amd=(GPU,)), {"ROCR_VISIBLE_DEVICES": ""}, "ROCR_VISIBLE_DEVICES= hides all of 1 AMD GPUs"),
        (HERE, {"CUDA_VISIBLE_DEVICES": ""}, ""),
    ],
)
def test_cards_that_the_user_hides_are_told(machine: Machine, environment: dict[str, str], sentence: str) -> None:
    found = hidden_cards(machine, environment)
    assert len(found) == bool(sentence)
    assert not found or found[0].startswith(f"{sentence} from the engine.")


def test_cards_that_are_all_hidden_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(engine(ENGINE_CPU), machine=lambda: TWO).unused
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    measured = measure(engine(ENGINE_CPU), machine=lambda: TWO)
    assert measured.unused == ()
    assert "hides all of 2" in measured.problems[0]


def test_a_processor_in_disguise_is_never_taken_unasked() -> None:
    pipe = DeviceInfo(id="Vulkan0", name="llvmpipe", kind=DeviceKind.SOFTWARE, memory_total=GIB, memory_free=GIB)
    assert measure(engine(pipe, ENGINE_CPU), machine=lambda: HERE).devices == ("CPU",)
    assert measure(engine(pipe, ENGINE_CPU), device="Vulkan0", machine=lambda: HERE).devices == ("Vulkan0",)
    assert measure(engine(pipe, ENGINE_CPU), machine=lambda: TWO).unused, "it does not stand for the card"
