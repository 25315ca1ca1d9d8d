"""AMD GPUs as the kernel lists them (Linux, amdgpu: Documentation/gpu/amdgpu/driver-misc.rst)."""

from pathlib import Path

from mesh_llm.engine.source import DeviceInfo, DeviceKind

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
