"""This process: the CPUs that it may use, its garbage collector, and its end."""

import gc
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """CPUs to plan with: the least of the online CPUs, the affinity mask, and the CPU quotas, rounded up; at least one.

    The quotas are those of all control groups above this process (`cpu.max` in version 2, `cpu.cfs_quota_us` in 1).
    """
    online = os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in cpu_quotas(proc, cgroups)]
    return max(1, min(online, _affinity(online), *quotas))


def cpu_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """`usable_cpus` if that is fewer than the machine has, else None."""
    usable = usable_cpus(proc, cgroups)
    return usable if usable < (os.cpu_count() or 1) else None


def cpu_quotas(proc: Path = PROC, cgroups: Path = CGROUPS) -> list[float]:
    """CPU seconds per second that each of this process's control groups may use, without unlimited groups."""
    found: list[float] = []
    for version, group in groups_of("cpu", proc, cgroups):
        if version == 2:
            quota, _, period = _text(group / "cpu.max").partition(" ")
        else:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        # `max` in version 2 and -1 in version 1 stand for no limit.
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            found.append(int(quota) / int(period))
    return found


def groups_of(controller: str, proc: Path, cgroups: Path) -> Iterator[tuple[int, Path]]:
    """Version (1 or 2) and directory of each control group of this process, from the innermost outwards.

    Yields nothing if the system has no control groups.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            yield from ((2, group) for group in _upwards(cgroups, path))
        elif controller in controllers.split(","):
            # Mounted under its own name, or under the names of all controllers of the hierarchy.
            named = cgroups / controller
            root = named if named.is_dir() else cgroups / controllers
            yield from ((1, group) for group in _upwards(root, path))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    # In a container the path can be the host's and not exist here. Then the root is the container's own group.
    group = root / path.strip("/")
    yield group
    while group != root and root in group.parents:
        group = group.parent
        yield group


def _affinity(online: int) -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        # The system has no affinity, or does not report it.
        return online


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def freeze_heap() -> None:
    """Collect garbage once, then exclude all live objects from later collections (`gc.freeze`).

    Call it at the end of the start: a full collection over a daemon's modules takes some tens of milliseconds, during
    which no token is forwarded.
    """
    gc.collect()
    gc.freeze()


def exit_process(status: int) -> NoReturn:
    """Flush the output and end the process without the interpreter's clean-up, which iroh's threads may abort."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(status)
