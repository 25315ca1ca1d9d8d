"""This process: the CPUs that it may use, how soon it gets them, its garbage collector, and its end."""

import ctypes
import gc
import math
import os
import platform
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


class _Scheduling(ctypes.Structure):
    """`struct sched_attr` of Linux (linux/sched/types.h), as of its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


_SYSTEM_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""sched_setattr and sched_getattr, by machine."""

_RESET_ON_FORK = 1
_SLICE_NANOSECONDS = 100_000
"""The shortest that Linux knows."""


def wake_promptly() -> bool:
    """Let this thread interrupt programs that compute, when it wakes; whether the system can.

    A program that computes may have a core for some milliseconds (3 on Linux) before one that wakes gets it. A thread
    that only passes messages on asks for shorter turns (sched_setattr(2), from Linux 6.12 on): then it is next, and has
    no larger part of the cores than before. What it starts has turns of the usual length.
    """
    calls = _SYSTEM_CALLS.get(platform.machine())
    if not sys.platform.startswith("linux") or calls is None:
        return False
    if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK != os.SCHED_OTHER:
        # Whoever started it wants something else.
        return False
    change, read = calls
    size = ctypes.sizeof(_Scheduling)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    wanted = _Scheduling(size=size, flags=_RESET_ON_FORK, nice=nice, runtime=_SLICE_NANOSECONDS)
    found = _Scheduling()
    system = ctypes.CDLL(None).syscall
    if system(change, 0, ctypes.byref(wanted), 0) or system(read, 0, ctypes.byref(found), size, 0):
        return False
    # Before 6.12 the length is ignored, and read as 0.
    return found.runtime == _SLICE_NANOSECONDS


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
