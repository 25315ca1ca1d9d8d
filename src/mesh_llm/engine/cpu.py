"""How many CPU threads a model deserves.

The processor's memory: what models may take of it without hurting the machine. Sizes are bytes.
"""

import os
import platform
import re
from dataclasses import replace
from pathlib import Path

import psutil

from mesh_llm.core.types.model import BYTES_PER_THREAD
from mesh_llm.engine.sources.base import DeviceInfo, DeviceKind
from mesh_llm.engine.spec import CPU_DEVICE, EngineSpec
from mesh_llm.runtime.process import CGROUPS, PROC, cpu_limit, groups_of, usable_cpus

_FIRST_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")


def threads_for(model: Path, cores: int | None = None) -> int | None:
    """CPU threads for a model; None where the engine's own choice, all cores of the machine, is right.

    llama.cpp takes all cores for any model, and its threads spin while they wait for each other: on a machine that does
    other things too, a model of a few megabytes is slower by orders of magnitude with two threads than with one. It
    knows neither affinity masks nor CPU quotas: where one limits this process, that limit is returned.

    Args:
        model: the file, the first part where there are several.
        cores: CPUs to plan with instead of those that this process may use.
    """
    try:
        size = sum(part.stat().st_size for part in _parts(model))
    except OSError:
        return cpu_limit() if cores is None else None
    return threads_for_size(size, cores)


def threads_for_size(size: int, cores: int | None = None) -> int | None:
    """The same, for a model of so many bytes."""
    wanted = 1 + size // BYTES_PER_THREAD
    if wanted < (cores or usable_cpus()):
        return wanted
    return cpu_limit() if cores is None else None


def _parts(model: Path) -> list[Path]:
    # The first of several parts may hold nothing but metadata.
    match = _FIRST_PART.search(model.name)
    if match is None:
        return [model]
    stem, count = model.name[: match.start()], match[1]
    return [model.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def with_threads(spec: EngineSpec) -> EngineSpec:
    """The spec with threads chosen, where the user left the choice."""
    return spec if spec.threads is not None else replace(spec, threads=threads_for(spec.model))


_MIB = 1024 * 1024
_LEAST_RESERVE = 512 * _MIB
_MOST_RESERVE = 8192 * _MIB
_RESERVED_SHARE = 0.10
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: limit, use, and the field of `memory.stat` with cache that can be dropped."""


def reserve(total: int) -> int:
    """What is left to everything else on the machine: a tenth, at least 512 MiB, at most 8 GiB."""
    return min(max(int(total * _RESERVED_SHARE), _LEAST_RESERVE), _MOST_RESERVE)


def cpu_device(proc: Path = PROC, cgroups: Path = CGROUPS) -> DeviceInfo:
    """The CPU with the memory that this process can really have: the machine's, or its container's."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in cgroup_limits(proc, cgroups):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return DeviceInfo(id=CPU_DEVICE, name=_processor(proc), kind=DeviceKind.CPU, memory_total=total, memory_free=free)


def cgroup_limits(proc: Path, cgroups: Path) -> list[tuple[int, int]]:
    """Limit and use of every control group that this process is in (Linux, versions 1 and 2); none elsewhere.

    Page cache that can be dropped does not count as used, as in the kernel's own `available`.
    """
    found: list[tuple[int, int]] = []
    for version, group in groups_of("memory", proc, cgroups):
        limit_file, used_file, cache_field = _MEMORY_FILES[version]
        limit = _number(group / limit_file)
        used = _number(group / used_file)
        if limit is not None and used is not None:
            found.append((limit, max(0, used - _field(group / "memory.stat", cache_field))))
    return found


def oom_kills(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Processes that the system killed for want of memory so far (Linux); 0 where it does not say.

    Counted in this process's own control groups of version 2, or on the whole machine, whichever is more.
    """
    counts = [_field(proc / "vmstat", "oom_kill")]
    counts += [
        _field(group / "memory.events", "oom_kill")
        for version, group in groups_of("memory", proc, cgroups)
        if version == 2
    ]
    return max(counts)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    # `max` in version 2; a number near 2**63 in version 1, which any minimum ignores.
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(maxsplit=1) for line in lines if " " in line)
    value = fields.get(name, "0")
    return int(value) if value.isdigit() else 0


def _processor(proc: Path) -> str:
    try:
        for line in (proc / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or f"CPU with {os.cpu_count()} cores"
