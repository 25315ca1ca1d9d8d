"""Apple silicon: one memory for processor and GPU, of which Metal takes about three quarters at most."""

import platform
import sys

import psutil

from mesh_llm.engine.source import DeviceInfo, DeviceKind

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
