"""What a node holds: processes, memory, descriptors, ports, threads, the loop's tasks, the journal's bytes."""

import asyncio
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tests.support.node import NodeProcess

_REST_SECONDS, _REST_STEP = 75.0, 5.0
_TASKS = re.compile(r"^mesh_llm_tasks (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Holding:
    """At one moment. `rss_mb`: of the daemon itself; `journal`: bytes, 0 without one."""

    processes: int
    rss_mb: float
    descriptors: int
    ports: int
    threads: int
    tasks: int
    journal: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


async def holding(node: NodeProcess, journal: Path | None = None) -> Holding:
    """Measure a running node."""
    family = node.process.family()
    daemon = psutil.Process(node.process.pid)
    metrics = (await node.api.get("/metrics")).expect().text
    tasks = _TASKS.search(metrics)
    with daemon.oneshot():
        return Holding(
            processes=len(family),
            rss_mb=round(daemon.memory_info().rss / 1e6, 1),
            descriptors=daemon.num_fds(),
            ports=sum(1 for one in daemon.net_connections("inet") if one.status in {"LISTEN", "NONE"}),
            threads=daemon.num_threads(),
            tasks=int(tasks[1]) if tasks is not None else 0,
            journal=_size(journal),
        )


async def at_rest(node: NodeProcess, before: Holding) -> Holding:
    """Measure when what a node keeps for a while (idle connections to others) has had time to go."""
    until = time.monotonic() + _REST_SECONDS
    while True:
        found = await holding(node)
        if not grown(before, found) or time.monotonic() >= until:
            return found
        await asyncio.sleep(_REST_STEP)


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0


def grown(
    before: Holding, after: Holding, *, rss_mb: float = 40.0, descriptors: int = 12, tasks: int = 12
) -> list[str]:
    """What a node holds more of than can be chance; empty where nothing leaked."""
    limits = {"processes": 0, "ports": 0, "threads": 4, "rss_mb": rss_mb, "descriptors": descriptors, "tasks": tasks}
    then, now = before.as_dict(), after.as_dict()
    return [
        f"{name} grew from {then[name]:g} to {now[name]:g}"
        for name, limit in limits.items()
        if now[name] - then[name] > limit
    ]
