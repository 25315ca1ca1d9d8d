"""AMD GPUs as the kernel lists them (Linux, amdgpu: Documentation/gpu/amdgpu/driver-misc.rst).

Apple silicon: one memory for processor and GPU, of which Metal takes about three quarters at most.

NVIDIA GPUs as the driver lists them (NVML). Used where the engine does not tell, and to tell what it cannot use.

What this machine offers to models: the engine's devices, with the system's own word where the engine has none.
"""

import importlib
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import Capacity
from mesh_llm.engine.cpu import cpu_device, reserve
from mesh_llm.engine.sources.base import DeviceInfo, DeviceKind, EngineInfo
from mesh_llm.engine.spec import CPU_DEVICE

_VENDOR = "0x1002"
_SMALLEST = 1024 * 1024 * 1024
"""Below this it is a processor's graphics with a carve-out too small for models."""


def amd_devices(sysfs: Path = Path("/sys/class/drm")) -> tuple[DeviceInfo, ...]:
    """All AMD GPUs with memory of their own, in the kernel's order, with the ids that a ROCm build gives them."""
    found: list[DeviceInfo] = []
    for card in sorted(sysfs.glob("card[0-9]*"), key=lambda path: (len(path.name), path.name)):
        device = card / "device"
        if "-" in card.name or _text(device / "vendor") != _VENDOR:
            continue
        total, used = _text(device / "mem_info_vram_total"), _text(device / "mem_info_vram_used")
        if not total.isdigit() or not used.isdigit() or int(total) < _SMALLEST:
            continue
        found.append(
            DeviceInfo(
                id=f"ROCm{len(found)}",
                name=_text(device / "product_name") or f"AMD GPU {_text(device / 'device')}".strip(),
                kind=DeviceKind.GPU,
                memory_total=int(total),
                memory_free=max(0, int(total) - int(used)),
            )
        )
    return tuple(found)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


GPU_SHARE = 0.75
"""What Metal's `recommendedMaxWorkingSetSize` comes to on machines without a raised limit."""


def gpu_memory(total: int) -> int:
    """Bytes of unified memory that models may take on the GPU."""
    return int(total * GPU_SHARE)


def apple_devices() -> tuple[DeviceInfo, ...]:
    """The GPU of an Apple silicon machine; none elsewhere."""
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return ()
    memory = psutil.virtual_memory()
    limit = gpu_memory(memory.total)
    return (
        DeviceInfo(
            id="Metal",
            name="Apple GPU",
            kind=DeviceKind.GPU,
            memory_total=limit,
            memory_free=min(limit, memory.available),
        ),
    )


def nvidia_devices() -> tuple[DeviceInfo, ...]:
    """All NVIDIA GPUs, in the driver's order, with the ids that a CUDA build gives them; none without a driver."""
    pynvml: Any = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_describe(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _describe(pynvml: Any, index: int) -> DeviceInfo:
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


_MIB = 1024 * 1024
_GPU_RESERVE_SHARE = 0.05
_LEAST_GPU_RESERVE = 256 * _MIB
_MOST_GPU_RESERVE = 1024 * _MIB

GIGABYTE = 1_000_000_000
"""The GB of `--max-vram`, and of everything that is shown to people."""

UNUSED_HINT = (
    "Build llama.cpp for it (GGML_CUDA=ON, GGML_HIP=ON or GGML_VULKAN=ON, with GGML_RPC=ON) "
    "and give its directory by --bin-dir."
)
"""What to do about a GPU that the engine cannot use."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the operating system says is there, whatever the engine can use."""

    cpu: DeviceInfo
    nvidia: tuple[DeviceInfo, ...] = ()
    amd: tuple[DeviceInfo, ...] = ()
    apple: tuple[DeviceInfo, ...] = ()

    @property
    def accelerators(self) -> tuple[DeviceInfo, ...]:
        """All GPUs."""
        return (*self.nvidia, *self.amd, *self.apple)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The outcome of `measure`.

    Attributes:
        capacity: what the node offers.
        devices: for `EngineSpec.devices`; empty when the engine may choose.
        problems: GPUs that are here and cannot be used, with what to do.
    """

    capacity: Capacity
    devices: tuple[str, ...]
    problems: tuple[str, ...] = ()


def look_around() -> Machine:
    """Ask the operating system. Takes milliseconds; blocking; a GPU that is not there is no error."""
    return Machine(cpu=cpu_device(), nvidia=nvidia_devices(), amd=amd_devices(), apple=apple_devices())


def measure(
    engine: EngineInfo,
    *,
    max_vram: float | None = None,
    device: str | None = None,
    share: float = 1.0,
    machine: Callable[[], Machine] = look_around,
) -> Measured:
    """What models may take on this machine with this engine.

    Args:
        engine: as of `EngineSource.info`.
        max_vram: most memory to offer, GB (10^9 bytes); None for all that is free, less a reserve.
        share: part of the devices' memory that is offered at most, whatever is free.
        device: `--device`: ids or parts of names, comma-separated; `cpu` for the processor alone; None for the best.
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
    known = [_completed(one, here) for one in engine.devices] or [here.cpu]
    chosen = _pick(known, device) if device else _best(known)
    free = sum(_offered(one) for one in chosen)
    cap = free if max_vram is None else min(free, int(max_vram * GIGABYTE))
    if share < 1.0:
        cap = min(cap, int(share * sum(one.memory_total for one in chosen)))
    capacity = Capacity(
        memory_bytes=cap,
        memory_total_bytes=sum(one.memory_total for one in chosen),
        devices=tuple(one.name for one in chosen),
        engine=engine.label,
        rpc_version=engine.rpc_version,
    )
    cpu_only = all(one.kind is DeviceKind.CPU for one in chosen)
    forced = device is not None or cpu_only
    ids = tuple(one.id for one in chosen) if forced else ()
    idle = () if device else unused_gpus(here, known)
    problems = tuple(f"{one.name} is here, and this engine cannot use it. {UNUSED_HINT}" for one in idle)
    return Measured(capacity=capacity, devices=ids, problems=problems)


def _completed(one: DeviceInfo, here: Machine) -> DeviceInfo:
    if one.kind is DeviceKind.CPU:
        # ggml says that all of the machine's memory is free.
        return replace(one, memory_total=here.cpu.memory_total, memory_free=here.cpu.memory_free)
    if here.apple and one.holds_models:
        limit = gpu_memory(here.cpu.memory_total)
        total = min(one.memory_total or limit, limit)
        return replace(one, memory_total=total, memory_free=min(one.memory_free or total, here.cpu.memory_free, total))
    if one.memory_total:
        return one
    same = next((other for other in here.accelerators if other.id == one.id or other.name == one.name), None)
    return one if same is None else replace(one, memory_total=same.memory_total, memory_free=same.memory_free)


def _best(known: Sequence[DeviceInfo]) -> list[DeviceInfo]:
    dedicated = [one for one in known if one.kind is DeviceKind.GPU and one.memory_total]
    integrated = [one for one in known if one.kind is DeviceKind.INTEGRATED_GPU and one.memory_total]
    return dedicated or integrated or [one for one in known if one.kind is DeviceKind.CPU][:1]


def _pick(known: Sequence[DeviceInfo], wanted: str) -> list[DeviceInfo]:
    offered = [one for one in known if one.holds_models or one.kind is DeviceKind.CPU]
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
    if one.kind is DeviceKind.CPU:
        return max(0, one.memory_free - reserve(one.memory_total))
    kept = min(max(int(one.memory_total * _GPU_RESERVE_SHARE), _LEAST_GPU_RESERVE), _MOST_GPU_RESERVE)
    return max(0, one.memory_free - kept)


def unused_gpus(here: Machine, known: Sequence[DeviceInfo]) -> tuple[DeviceInfo, ...]:
    """The GPUs that the system has, where none of the devices in `known`, the engines', is a GPU."""
    return () if any(one.holds_models for one in known) else here.accelerators


__all__ = ["CPU_DEVICE", "GIGABYTE", "UNUSED_HINT", "Machine", "Measured", "look_around", "measure", "unused_gpus"]
