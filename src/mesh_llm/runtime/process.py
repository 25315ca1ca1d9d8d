"""How many processors this process may use: those it may run on, and the time that its control groups grant.

The garbage collector's part in latency: what start-up made stays for good, and need not be looked at again.

How a process with threads of other libraries ends: at once, its output written.
"""

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
    """CPUs to plan with: the least of those online, the affinity mask's, and the CPU quota rounded up; at least one.

    The quota is that of every control group above this process (`cpu.max` in version 2, `cpu.cfs_quota_us` in 1).
    """
    online = os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in cpu_quotas(proc, cgroups)]
    return max(1, min(online, _affinity(online), *quotas))


def cpu_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """`usable_cpus` where that is fewer than the machine has; None where nothing limits this process."""
    usable = usable_cpus(proc, cgroups)
    return usable if usable < (os.cpu_count() or 1) else None


def cpu_quotas(proc: Path = PROC, cgroups: Path = CGROUPS) -> list[float]:
    """The CPU time per second that each of this process's control groups may have; unlimited groups are left out."""
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
    """Version (1 or 2) and directory of every control group that this process is in, from the innermost outwards.

    Yields nothing where the system has no control groups.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            yield from ((2, group) for group in _upwards(cgroups, path))
        elif controller in controllers.split(","):
            # Mounted under its own name, or under the names of all that share the hierarchy.
            named = cgroups / controller
            root = named if named.is_dir() else cgroups / controllers
            yield from ((1, group) for group in _upwards(root, path))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    # In a container the path can be the host's and lead nowhere; the root then is the container's own group.
    group = root / path.strip("/")
    yield group
    while group != root and root in group.parents:
        group = group.parent
        yield group


def _affinity(online: int) -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        # There is no affinity on this system, or it cannot be asked for.
        return online


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def settle() -> None:
    """Collect once, then leave all that is there out of later collections (`gc.freeze`).

    To be called when everything has been imported and built. A full collection over the modules of a daemon takes some
    tens of milliseconds, in which no token moves.
    """
    gc.collect()
    gc.freeze()


def leave(status: int) -> NoReturn:
    """End the process without the interpreter's own clean-up: after an iroh endpoint, that may abort."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(status)
