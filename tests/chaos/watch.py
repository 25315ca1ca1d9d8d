"""What a node holds: processes, memory, descriptors, ports, threads, the loop's tasks, the journal's bytes."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tests.support.node import NodeProcess

_REST_SECONDS, _REST_STEP = 75.0, 5.0
_STILL_SECONDS, _STILL_STEP = 15.0, 1.0
_TASKS = re.compile(r'^mesh_llm_tasks{kind="([^"]*)"} (\d+)', re.MULTILINE)


@dataclass(frozen=True)
class Holding:
    """At one moment. `rss_mb`: of the daemon itself; `journal`: bytes, 0 without one; `kinds`: tasks by kind."""

    processes: int
    rss_mb: float
    descriptors: int
    ports: int
    threads: int
    tasks: int
    journal: int
    kinds: Mapping[str, int] = field(default_factory=dict[str, int])

    def as_dict(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {name: value for name, value in vars(self).items() if name != "kinds"}


async def holding(node: NodeProcess, journal: Path | None = None) -> Holding:
    """Measure a running node."""
    family = node.process.family()
    daemon = psutil.Process(node.process.pid)
    metrics = (await node.api.get("/metrics")).expect().text
    kinds = {kind: int(count) for kind, count in _TASKS.findall(metrics)}
    with daemon.oneshot():
        return Holding(
            processes=len(family),
            rss_mb=round(daemon.memory_info().rss / 1e6, 1),
            descriptors=daemon.num_fds(),
            ports=sum(1 for one in daemon.net_connections("inet") if one.status in {"LISTEN", "NONE"}),
            threads=daemon.num_threads(),
            tasks=sum(kinds.values()),
            journal=_size(journal),
            kinds=kinds,
        )


async def still(node: NodeProcess) -> Holding:
    """Measure when nothing is under way: its tasks are the same ones twice in a row."""
    until = time.monotonic() + _STILL_SECONDS
    before = await holding(node)
    while True:
        await asyncio.sleep(_STILL_STEP)
        found = await holding(node)
        if found.kinds == before.kinds or time.monotonic() >= until:
            return found
        before = found


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
    before: Holding, after: Holding, *, rss_mb: float = 40.0, descriptors: int = 12, tasks: int = 12, kind: int = 6
) -> list[str]:
    """What a node holds more of than can be chance; empty where nothing leaked.

    `tasks`: most more of all; `kind`: of one kind. Of a leak of tasks the kinds are named, most first.
    """
    limits = {"processes": 0, "ports": 0, "threads": 4, "rss_mb": rss_mb, "descriptors": descriptors}
    then, now = before.as_dict(), after.as_dict()
    found = [
        f"{name} grew from {then[name]:g} to {now[name]:g}"
        for name, limit in limits.items()
        if now[name] - then[name] > limit
    ]
    more = Counter(after.kinds)
    more.subtract(before.kinds)
    if after.tasks - before.tasks > tasks or max(more.values(), default=0) > kind:
        named = (f"{one} {before.kinds.get(one, 0)} → {after.kinds[one]}" for one, by in more.most_common() if by > 0)
        found.append(f"tasks grew from {before.tasks} to {after.tasks}: {', '.join(named)}")
    return found
