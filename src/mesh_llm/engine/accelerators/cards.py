"""The GPUs of this machine as the kernel and the drivers list them, whether or not an engine can use them.

NVIDIA's driver is asked itself (NVML). For all others the kernel's own list is read: /sys/class/drm, and for AMD
/sys/class/kfd, which names the architecture that a compiler needs.
"""

import importlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mesh_llm.engine.devices import card_name

_SYS = Path("/sys")
_DEVICES = Path("/dev")


class Vendor(StrEnum):
    """Who made a card."""

    NVIDIA = "NVIDIA"
    AMD = "AMD"
    INTEL = "Intel"


_VENDORS = {"0x10de": Vendor.NVIDIA, "0x1002": Vendor.AMD, "0x8086": Vendor.INTEL}


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU.

    Attributes:
        vendor: who made it.
        name: for people.
        architecture: what a compiler calls it: `90` for NVIDIA's compute capability 9.0, `gfx1100` for AMD; empty if
            unknown.
        driver: name and version, as in `NVIDIA 580.95`; empty without one.
        cuda: the newest CUDA that an NVIDIA driver runs, as in (13, 0).
    """

    vendor: Vendor
    name: str
    architecture: str = ""
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)


def find_cards(sysfs: Path = _SYS) -> tuple[Card, ...]:
    """All of them, NVIDIA's first. Blocks for milliseconds. A card without a driver is listed as well."""
    nvidia = _asked_nvidia()
    listed = _listed(sysfs)
    if nvidia:
        listed = [card for card in listed if card.vendor is not Vendor.NVIDIA]
    return (*nvidia, *listed)


def render_nodes_closed(devices: Path = _DEVICES) -> tuple[Path, ...]:
    """Device files of GPUs that this user cannot open, as it is without the group `render` or `video`."""
    found: list[Path] = []
    for path in (*sorted(devices.glob("dri/renderD*")), devices / "kfd"):
        try:
            with path.open("r+b", buffering=0):
                pass
        except PermissionError:
            found.append(path)
        except OSError:
            continue
    return tuple(found)


def _asked_nvidia() -> list[Card]:
    pynvml: Any = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        found: list[Card] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(
                Card(
                    vendor=Vendor.NVIDIA,
                    name=_text(pynvml.nvmlDeviceGetName(handle)),
                    architecture=f"{major}{minor}",
                    driver=f"NVIDIA {driver}",
                    cuda=(cuda // 1000, cuda % 1000 // 10),
                )
            )
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
    return found


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _listed(sysfs: Path) -> list[Card]:
    architectures = _amd_architectures(sysfs)
    found: list[Card] = []
    cards = (sysfs / "class" / "drm").glob("card[0-9]*")
    for path in sorted(cards, key=lambda one: (len(one.name), one.name)):
        device = path / "device"
        vendor = _VENDORS.get(_read(device / "vendor"))
        if "-" in path.name or vendor is None:
            continue
        number = _read(device / "device")
        module = device / "driver"
        found.append(
            Card(
                vendor=vendor,
                name=card_name(vendor, device),
                architecture=architectures.get(number, "") if vendor is Vendor.AMD else "",
                driver=module.resolve().name if module.exists() else "",
            )
        )
    return found


def _amd_architectures(sysfs: Path) -> dict[str, str]:
    """Architecture by PCI device number, for all GPUs that ROCm's kernel driver knows."""
    found: dict[str, str] = {}
    for path in (sysfs / "class" / "kfd" / "kfd" / "topology" / "nodes").glob("*/properties"):
        fields = dict(line.split(maxsplit=1) for line in _read(path).splitlines() if " " in line)
        version, device = fields.get("gfx_target_version", "0"), fields.get("device_id", "0")
        if version.isdigit() and device.isdigit() and int(version):
            # 90010 stands for gfx90a: major, minor and stepping have two decimal digits each, and are printed in hex.
            major, minor, stepping = int(version) // 10000, int(version) // 100 % 100, int(version) % 100
            found[f"0x{int(device):04x}"] = f"gfx{major}{minor:x}{stepping:x}"
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
