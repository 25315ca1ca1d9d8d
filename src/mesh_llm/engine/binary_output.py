"""Reads what llama.cpp's programs print about themselves (llama.cpp: common/build-info.cpp.in, common/arg.cpp)."""

import re
from dataclasses import dataclass

from mesh_llm.engine.source import DeviceInfo, DeviceKind

# `version: 1.2.3 (build 4567, commit abc1234)`; before 2026 `version: 4567 (abc1234)`
_VERSION = re.compile(
    r"^version: (?P<version>\S+) \((?:build (?P<build>\d+), commit )?(?P<commit>[0-9a-z]+)\)", re.MULTILINE
)
_BUILT = re.compile(r"^built with (?P<compiler>.+)$", re.MULTILINE)
# `  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23816 MiB free)`
_DEVICE = re.compile(r"^ +(?P<id>[^\s:]+): (?P<name>.+) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)$", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")

_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class BinaryVersion:
    """What `--version` says: the build number where there is one, else the version; and the rest for people."""

    version: str = ""
    build: str = ""


def parse_version(text: str) -> BinaryVersion:
    """Read `--version`; empty fields where it says something else."""
    found, built = _VERSION.search(text), _BUILT.search(text)
    if not found:
        return BinaryVersion()
    number = found["build"] or found["version"]
    parts = [f"commit {found['commit']}", built["compiler"] if built else ""]
    return BinaryVersion(version=f"b{number}", build=", ".join(part for part in parts if part))


def parse_devices(text: str) -> tuple[DeviceInfo, ...]:
    """Read `--list-devices`: accelerators only, llama.cpp leaves the CPU out."""
    return tuple(
        DeviceInfo(
            id=match["id"],
            name=match["name"].strip(),
            kind=_kind(match["id"]),
            memory_total=int(match["total"]) * _MIB,
            memory_free=int(match["free"]) * _MIB,
        )
        for match in _DEVICE.finditer(text)
    )


def _kind(device: str) -> DeviceKind:
    # The list has BLAS and AMX too, which compute for the CPU and hold nothing.
    return DeviceKind.ACCELERATOR if device.rstrip("0123456789").upper() in {"BLAS", "AMX", "ZDNN"} else DeviceKind.GPU


def parse_flags(text: str) -> frozenset[str]:
    """All options that `--help` names."""
    return frozenset(_FLAG.findall(text))
