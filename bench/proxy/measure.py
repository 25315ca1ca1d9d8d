"""The same load to each in turn, round after round, so that a busy moment of the machine hits all alike."""

import json
import subprocess
import sys
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.proxy.processes import LITELLM_KEY, System

Row = dict[str, float]


@dataclass(frozen=True)
class Load:
    """One kind of load. `rate`: events a second and stream; 0: as fast as they are taken."""

    streams: int
    requests: int
    events: int
    rate: float = 0.0

    def plan(self, system: System, body: dict[str, Any], headers: dict[str, str]) -> str:
        """What the load process is told."""
        body = {**body, "events": self.events, "rate": self.rate}
        told = {
            "port": system.port,
            "streams": self.streams,
            "requests": self.requests,
            "key": LITELLM_KEY,
            "headers": headers,
        }
        return json.dumps({**told, "body": body})


def run_load(load: Load, system: System, body: dict[str, Any], headers: dict[str, str] | None = None) -> Row:
    """Run a load against a system once."""
    before = system.cpu_seconds()
    argv = [sys.executable, "-m", "bench.proxy.load", load.plan(system, body, headers or {})]
    told = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300).stdout)
    cpu = system.cpu_seconds() - before
    events = max(1, told["events"])
    return {
        "first_ms": median(told["first_ms"]) if told["first_ms"] else float("nan"),
        "events_per_s": told["events"] / told["seconds"],
        "cpu_us_per_event": cpu / events * 1e6,
        "cpu_us_per_request": cpu / (load.streams * load.requests) * 1e6,
        "cpu_s": cpu,
        "memory_mb": system.memory_bytes() / 1e6,
        "events": told["events"],
        "lost": told["lost"],
    }


def in_turn(load: Load, ways: list[System], body: dict[str, Any], rounds: int) -> dict[str, Row]:
    """The medians over `rounds` rounds, in each of which every system has its turn."""
    seen: dict[str, list[Row]] = {system.name: [] for system in ways}
    for _ in range(rounds):
        for system in ways:
            seen[system.name].append(run_load(load, system, body))
    return {name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in seen.items()}
