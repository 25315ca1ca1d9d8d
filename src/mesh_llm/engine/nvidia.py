"""NVIDIA GPUs as the driver lists them (NVML). Used where the engine does not tell, and to tell what it cannot use."""

import importlib
from typing import Any

from mesh_llm.engine.source import DeviceInfo, DeviceKind


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
