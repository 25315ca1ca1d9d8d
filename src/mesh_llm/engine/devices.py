"""What the machine has for models: its processor and GPUs, their memory, and how much of that a node offers.

Each kind of hardware has a section with a function that returns DeviceInfo; `examine_machine` calls them all. They are
asked where the engine does not report its devices' memory, and to name GPUs that the engine cannot use.
"""

import importlib
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.model import BYTES_PER_THREAD, Capacity
from mesh_llm.engine.spec import CPU_DEVICE, DeviceInfo, DeviceKind, EngineInfo, EngineSpec
from mesh_llm.runtime.process import CGROUPS, PROC, cpu_limit, groups_of, usable_cpus

_MIB = 1024 * 1024

GIGABYTE = 1_000_000_000
"""The GB of `--max-vram`, and of everything that is shown to people."""

_LITTLE_FREE = 0.15
"""A GPU with a smaller part of its memory free is said to be full."""
_ROCM_IDS = ("ROCm", "HIP")
_MORE_THAN_OWN = 1.1

UNUSED_HINT = "Run `mesh-llm engine install`, or give your own llama.cpp for it with --bin-dir."
"""What to do about a GPU that the engine cannot use."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the operating system lists, whatever the engine can use."""

    cpu: DeviceInfo
    nvidia: tuple[DeviceInfo, ...] = ()
    amd: tuple[DeviceInfo, ...] = ()
    intel: tuple[DeviceInfo, ...] = ()
    apple: tuple[DeviceInfo, ...] = ()

    @property
    def accelerators(self) -> tuple[DeviceInfo, ...]:
        """All GPUs, those with memory of their own first."""
        found = (*self.nvidia, *self.amd, *self.intel, *self.apple)
        return tuple(sorted(found, key=lambda one: one.kind is DeviceKind.INTEGRATED_GPU))


def examine_machine() -> Machine:
    """Ask the operating system. Blocks for milliseconds. A GPU that is not there is no error."""
    return Machine(
        cpu=cpu_device(),
        nvidia=nvidia_devices(),
        amd=amd_devices(),
        intel=intel_devices(),
        apple=apple_devices(),
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The result of `measure`.

    Attributes:
        capacity: what the node offers.
        devices: for `EngineSpec.devices`; empty if the engine may choose.
        unused: GPUs that are here and cannot be used, each with a sentence that says what to do.
        problems: of what is used, each with a sentence: a GPU that is full, cards that are hidden.
    """

    capacity: Capacity
    devices: tuple[str, ...]
    unused: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def measure(
    engine: EngineInfo,
    *,
    max_vram: float | None = None,
    device: str | None = None,
    fraction: float = 1.0,
    machine: Callable[[], Machine] = examine_machine,
) -> Measured:
    """How much models may take on this machine with this engine.

    Args:
        engine: as of `EngineSource.info`.
        max_vram: most memory of devices to offer, GB (10^9 bytes); None for all that is free, less a reserve. It does
            not limit main memory beside a GPU.
        device: `--device`: ids or parts of names, comma-separated; `cpu` for the processor alone; None for the best.
        fraction: most of the total memory to offer, 0 to 1 (`--use`).
        machine: asks the operating system.

    Raises:
        MeshError: `device_not_found`, `max_vram_invalid`.
    """
    if max_vram is not None and max_vram <= 0:
        raise MeshError(
            code="max_vram_invalid",
            message=f"--max-vram {max_vram:g} offers nothing.",
            hint="Give gigabytes, as in --max-vram 6.",
            status=400,
        )
    here = machine()
    known = [_with_memory(one, here) for one in engine.devices] or [here.cpu]
    picked = _pick(known, device) if device else _best(known)
    # The processor computes what does not fit a GPU, named or not.
    chosen = [one for one in picked if one.kind is not DeviceKind.CPU] or picked
    total = sum(one.memory_total for one in chosen)
    offered = sum(_offered(one) for one in chosen)
    if max_vram is not None:
        offered = min(offered, int(max_vram * GIGABYTE))
    if fraction < 1.0:
        offered = min(offered, int(fraction * total))
    host = 0
    if any(one.kind is not DeviceKind.CPU for one in chosen):
        offered, host = _beside(here, chosen, offered, fraction)
    capacity = Capacity(
        memory_bytes=offered,
        memory_total_bytes=total,
        devices=tuple(one.name for one in chosen),
        engine=engine.label,
        rpc_version=engine.rpc_version,
        host_bytes=host,
    )
    forced = device is not None or all(one.kind is DeviceKind.CPU for one in chosen)
    ids = tuple(one.id for one in chosen) if forced else ()
    unused = () if device else unused_gpus(here, known)
    return Measured(
        capacity=capacity,
        devices=ids,
        unused=tuple(f"{one.name} is here, and this engine cannot use it. {UNUSED_HINT}" for one in unused),
        problems=(*filter(None, map(fullness, chosen)), *(() if device else hidden_cards(here))),
    )


def _with_memory(one: DeviceInfo, here: Machine) -> DeviceInfo:
    """The engine's device, with the system's figures where the engine has none or wrong ones."""
    if one.kind in (DeviceKind.CPU, DeviceKind.SOFTWARE):
        # ggml reports all of the machine's memory as free.
        return replace(one, memory_total=here.cpu.memory_total, memory_free=here.cpu.memory_free)
    if here.apple and one.holds_models:
        limit = metal_memory(here.cpu.memory_total)
        total = min(one.memory_total or limit, limit)
        return replace(one, memory_total=total, memory_free=min(one.memory_free or total, here.cpu.memory_free, total))
    if one.memory_total:
        own = max((other.memory_total for other in here.amd), default=0)
        if one.id.startswith(_ROCM_IDS) and one.holds_models and own and one.memory_total > own * _MORE_THAN_OWN:
            # A ROCm build counts main memory that a processor's graphics may use, and calls them a GPU.
            return replace(one, kind=DeviceKind.INTEGRATED_GPU)
        return one
    same = next((other for other in here.accelerators if other.id == one.id or other.name == one.name), None)
    return one if same is None else replace(one, memory_total=same.memory_total, memory_free=same.memory_free)


def _best(known: Sequence[DeviceInfo]) -> list[DeviceInfo]:
    dedicated = [one for one in known if one.kind is DeviceKind.GPU and one.memory_total]
    integrated = [one for one in known if one.kind is DeviceKind.INTEGRATED_GPU and one.memory_total]
    return dedicated or integrated or [one for one in known if one.kind is DeviceKind.CPU][:1]


def _pick(known: Sequence[DeviceInfo], wanted: str) -> list[DeviceInfo]:
    offered = [one for one in known if one.kind is not DeviceKind.ACCELERATOR]
    chosen: list[DeviceInfo] = []
    for word in (part.strip().lower() for part in wanted.split(",")):
        exact = [one for one in offered if one.id.lower() == word]
        cpu = [one for one in offered if one.kind is DeviceKind.CPU] if word in ("cpu", "none") else []
        found = exact or cpu or [one for one in offered if word and word in one.name.lower()]
        if not found:
            raise MeshError(
                code="device_not_found",
                message=f"There is no device `{word}`.",
                hint=f"There are: {'; '.join(f'{one.id} ({one.name})' for one in offered)}.",
                status=400,
            )
        chosen += [one for one in found if one not in chosen]
    return chosen


def _offered(one: DeviceInfo) -> int:
    """What is free, less a reserve: on GPUs a twentieth, at least 256 MiB, at most 1 GiB."""
    if one.kind in (DeviceKind.CPU, DeviceKind.SOFTWARE):
        return max(0, one.memory_free - reserve(one.memory_total))
    kept = min(max(one.memory_total // 20, 256 * _MIB), 1024 * _MIB)
    return max(0, one.memory_free - kept)


def fullness(one: DeviceInfo) -> str:
    """A sentence about a GPU whose memory other programs take; empty if enough is free, or that is not known."""
    if one.kind is not DeviceKind.GPU or not one.memory_total or one.memory_free >= one.memory_total * _LITTLE_FREE:
        return ""
    return (
        f"{one.name} is nearly full: {size(one.memory_free)} of {size(one.memory_total)} are free, so little of a "
        "model goes there. End what uses it, or choose another device with --device."
    )


def _beside(here: Machine, chosen: Sequence[DeviceInfo], offered: int, fraction: float) -> tuple[int, int]:
    """What GPUs offer, and the main memory beside them. Memory that they share is counted once, and never twice."""
    main = min(_offered(here.cpu), int(fraction * here.cpu.memory_total))
    if here.apple:
        return offered, max(0, main - offered)
    if all(one.kind in (DeviceKind.INTEGRATED_GPU, DeviceKind.SOFTWARE) for one in chosen):
        offered = min(offered, main)
        return offered, main - offered
    return offered, main


def unused_gpus(here: Machine, known: Sequence[DeviceInfo]) -> tuple[DeviceInfo, ...]:
    """The system's GPUs, if none of the engine's devices (`known`) is a GPU. Those that the user hides do not count."""
    if any(one.holds_models for one in known):
        return ()
    makers = {"NVIDIA": here.nvidia, "AMD": here.amd}
    hidden = [one for maker, cards in makers.items() if hides_all(maker) for one in cards]
    return tuple(one for one in here.accelerators if one not in hidden)


# The processor: its memory, and the threads that a model gets

_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: limit, use, and the field of `memory.stat` with cache that can be dropped."""
_FIRST_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")


def reserve(total: int) -> int:
    """Bytes that are left to other programs on the machine: a tenth, at least 512 MiB, at most 8 GiB."""
    return min(max(total // 10, 512 * _MIB), 8192 * _MIB)


def cpu_device(proc: Path = PROC, cgroups: Path = CGROUPS) -> DeviceInfo:
    """The CPU with the memory that this process can have: the machine's, or its container's."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in cgroup_limits(proc, cgroups):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return DeviceInfo(id=CPU_DEVICE, name=_cpu_name(proc), kind=DeviceKind.CPU, memory_total=total, memory_free=free)


def cgroup_limits(proc: Path, cgroups: Path) -> list[tuple[int, int]]:
    """Limit and use of every control group of this process (Linux, versions 1 and 2); none elsewhere.

    Page cache that can be dropped does not count as used, as in the kernel's own `available`.
    """
    found: list[tuple[int, int]] = []
    for version, group in groups_of("memory", proc, cgroups):
        limit_file, used_file, cache_field = _MEMORY_FILES[version]
        # `max` in version 2 is no limit; a number near 2**63 in version 1 is above any other.
        limit, used = _text(group / limit_file), _text(group / used_file)
        if limit.isdigit() and used.isdigit():
            found.append((int(limit), max(0, int(used) - _field(group / "memory.stat", cache_field))))
    return found


def oom_kills(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """How many processes the system has killed because memory ran out (Linux); 0 if unknown.

    Counted in this process's own control groups of version 2, or on the whole machine, whichever is more.
    """
    counts = [_field(proc / "vmstat", "oom_kill")]
    counts += [
        _field(group / "memory.events", "oom_kill")
        for version, group in groups_of("memory", proc, cgroups)
        if version == 2
    ]
    return max(counts)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _field(path: Path, name: str) -> int:
    fields = dict(line.split(maxsplit=1) for line in _text(path).splitlines() if " " in line)
    value = fields.get(name, "0")
    return int(value) if value.isdigit() else 0


def _cpu_name(proc: Path) -> str:
    for line in _text(proc / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or f"CPU with {os.cpu_count()} cores"


def threads_for(model: Path, cores: int | None = None) -> int | None:
    """CPU threads for a model; None if the engine's own choice is right, which is all cores of the machine.

    llama.cpp uses all cores for any model, and its threads spin while they wait for each other: on a busy machine a
    model of a few megabytes is slower by orders of magnitude with two threads than with one. It knows neither affinity
    masks nor CPU quotas: if one limits this process, that limit is returned.

    Args:
        model: the file, the first part if there are several.
        cores: CPUs to plan with; None for those that this process may use.
    """
    try:
        size = sum(part.stat().st_size for part in _parts(model))
    except OSError:
        return cpu_limit() if cores is None else None
    return threads_for_size(size, cores)


def threads_for_size(size: int, cores: int | None = None) -> int | None:
    """The same, for a model of `size` bytes."""
    wanted = 1 + size // BYTES_PER_THREAD
    if wanted < (cores or usable_cpus()):
        return wanted
    return cpu_limit() if cores is None else None


def with_threads(spec: EngineSpec) -> EngineSpec:
    """The spec with threads chosen, unless the user has chosen."""
    return spec if spec.threads is not None else replace(spec, threads=threads_for(spec.model))


def _parts(model: Path) -> list[Path]:
    """All files of a model: the first of several may hold only metadata."""
    match = _FIRST_PART.search(model.name)
    if match is None:
        return [model]
    stem, count = model.name[: match.start()], match[1]
    return [model.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


# NVIDIA, as the driver lists it (NVML)


def nvidia_devices() -> tuple[DeviceInfo, ...]:
    """All NVIDIA GPUs, in the driver's order, with the ids that a CUDA build gives them; none without a driver."""
    pynvml: Any = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_nvidia_device(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _nvidia_device(pynvml: Any, index: int) -> DeviceInfo:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return DeviceInfo(
        id=f"CUDA{index}",
        name=name.decode() if isinstance(name, bytes) else str(name),
        kind=DeviceKind.GPU,
        memory_total=int(memory.total),
        memory_free=int(memory.free),
    )


# AMD and Intel, as the kernel lists them (Linux; amdgpu: Documentation/gpu/amdgpu/driver-misc.rst)

_AMD_VENDOR, _INTEL_VENDOR = "0x1002", "0x8086"
_INTEL_DRIVERS = ("i915", "xe")
_INTEGRATED_PLACE = "0000:00:02.0"
"""Where on the PCI bus every Intel processor has its graphics; cards are elsewhere."""
_LEAST_AMD_MEMORY = 1024 * _MIB
"""Below this it is a processor's graphics, which work in main memory."""
_DRM = Path("/sys/class/drm")
_PCI_NAMES = (Path("/usr/share/misc/pci.ids"), Path("/usr/share/hwdata/pci.ids"))


def amd_devices(sysfs: Path = _DRM, names: Sequence[Path] = _PCI_NAMES) -> tuple[DeviceInfo, ...]:
    """All AMD GPUs in the kernel's order, with the ids that a ROCm build gives to those with memory of their own."""
    found: list[DeviceInfo] = []
    numbers = 0
    for device in _pci_devices(sysfs, _AMD_VENDOR):
        total, used = _text(device / "mem_info_vram_total"), _text(device / "mem_info_vram_used")
        if not total.isdigit() or not used.isdigit():
            continue
        integrated = int(total) < _LEAST_AMD_MEMORY
        found.append(
            DeviceInfo(
                id="" if integrated else f"ROCm{numbers}",
                name=card_name("AMD", device, names),
                kind=DeviceKind.INTEGRATED_GPU if integrated else DeviceKind.GPU,
                memory_total=int(total),
                memory_free=max(0, int(total) - int(used)),
            )
        )
        numbers += not integrated
    return tuple(found)


def intel_devices(sysfs: Path = _DRM, names: Sequence[Path] = _PCI_NAMES) -> tuple[DeviceInfo, ...]:
    """All Intel GPUs with a driver that computes, in the kernel's order. The kernel does not tell their memory."""
    return tuple(
        DeviceInfo(
            id="",
            name=card_name("Intel", device, names),
            kind=DeviceKind.INTEGRATED_GPU if device.resolve().name == _INTEGRATED_PLACE else DeviceKind.GPU,
        )
        for device in _pci_devices(sysfs, _INTEL_VENDOR)
        if (device / "driver").resolve().name in _INTEL_DRIVERS
    )


def _pci_devices(sysfs: Path, vendor: str) -> list[Path]:
    """The devices of a vendor's cards. Names with a dash are their outputs."""
    cards = sorted(sysfs.glob("card[0-9]*"), key=lambda path: (len(path.name), path.name))
    return [card / "device" for card in cards if "-" not in card.name and _text(card / "device" / "vendor") == vendor]


def card_name(maker: str, device: Path, names: Sequence[Path] = _PCI_NAMES) -> str:
    """What people call a card: as the kernel says, as the system's list of PCI devices says, or its number."""
    number, vendor = _text(device / "device"), _text(device / "vendor")
    if product := _text(device / "product_name"):
        return product
    for path in names:
        try:
            listed = _listed_name(path, vendor.removeprefix("0x"), number.removeprefix("0x"))
        except OSError:
            continue
        if listed:
            # As in `Navi 31 [Radeon RX 7900 XT/7900 XTX]`.
            return f"{maker} {listed.partition('[')[2].removesuffix(']') or listed}"
    return f"{maker} GPU {number}".strip()


def _listed_name(path: Path, vendor: str, device: str) -> str:
    """A device's name in the file `pci.ids`: vendors begin a line, their devices follow after a tab."""
    inside = False
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line[:1] not in "\t#\n":
                if inside:
                    return ""
                inside = line.startswith(vendor)
            elif inside and line.startswith(f"\t{device}"):
                return line.split(maxsplit=1)[1].strip()
    return ""


# Cards that the user hides from programs

_HIDING = {
    "NVIDIA": ("CUDA_VISIBLE_DEVICES",),
    "AMD": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "Vulkan": ("GGML_VK_VISIBLE_DEVICES",),
}
_NOTHING = {"", "-1", "none", "nodevfiles"}


def hides_all(maker: str, environment: Mapping[str, str] = os.environ) -> str:
    """The setting with which the user hides all GPUs of a maker (`NVIDIA`, `AMD`), as `NAME=value`; empty if none."""
    for name in _HIDING.get(maker, ()):
        value = environment.get(name)
        if value is not None and value.split(",", maxsplit=1)[0].strip().lower() in _NOTHING:
            return f"{name}={value}"
    return ""


def hidden_cards(here: Machine, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """For each setting that hides GPUs which are here, a sentence."""
    found: list[str] = []
    for maker, cards in (("NVIDIA", here.nvidia), ("AMD", here.amd), ("Vulkan", here.accelerators)):
        for name in _HIDING[maker] if cards else ():
            value = environment.get(name)
            if value is None:
                continue
            shown = [one for one in value.split(",") if one.strip().lower() not in _NOTHING]
            if len(shown) < len(cards):
                what = f"{'all' if not shown else len(cards) - len(shown)} of {len(cards)}"
                kind = "GPUs" if maker == "Vulkan" else f"{maker} GPUs"
                found.append(f"{name}={value} hides {what} {kind} from the engine. Unset it to use them.")
    return tuple(found)


# Apple silicon: processor and GPU have one memory, and Metal takes at most about three quarters of it

METAL_FRACTION = 0.75
"""Metal's `recommendedMaxWorkingSetSize`, if its limit was not raised."""


def metal_memory(total: int) -> int:
    """Bytes of unified memory that models may take on the GPU."""
    return int(total * METAL_FRACTION)


def apple_devices() -> tuple[DeviceInfo, ...]:
    """The GPU of an Apple silicon machine; none elsewhere."""
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return ()
    memory = psutil.virtual_memory()
    limit = metal_memory(memory.total)
    return (
        DeviceInfo(
            id="Metal",
            name="Apple GPU",
            kind=DeviceKind.GPU,
            memory_total=limit,
            memory_free=min(limit, memory.available),
        ),
    )
