"""A model from neighbours against plain bytes: `python -m bench.mesh.models [--quick] [--json FILE]`.

One node takes a model of half a gigabyte from others, verified and written to disk; the same with the same checks over
TCP without TLS; and as many plain bytes on a stream of the same connection, which are thrown away. All in turn. Hosts
are network namespaces (tests.netlab). Needs root.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import ROOT
from tests.netlab.lab import NetLab
from tests.support.gguf_models import cached_model

ROLES = [sys.executable, "-m", "bench.mesh.models_roles"]
_MODELS = ROOT / ".pytest_cache" / "d" / "models"


@dataclass(frozen=True)
class Scene:
    """Where it runs, and how often each way is measured.

    `rate_mbps`: of each link and direction. `apart` False: all on one host, and no network between.
    """

    name: str
    seeds: int
    rounds: int
    delay_ms: float = 0.0
    rate_mbps: float | None = None
    apart: bool = True


def scenes(*, quick: bool) -> list[Scene]:
    """What is measured, in order."""
    rounds = 3 if quick else 5
    return [
        Scene("one host", 1, rounds, apart=False),
        Scene("two hosts", 1, rounds),
        Scene("10 ms one way", 1, 1 if quick else 3, delay_ms=10.0),
        Scene("100 Mbit/s links", 2, 1, rate_mbps=100.0),
    ]


class _Worker:
    """A role's process, which is asked by lines."""

    def __init__(self, lab: NetLab, host: int, *words: str) -> None:
        self._process = lab.popen(host, [*ROLES, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said: dict[str, Any] = self._line("ready")

    def ask(self, task: str) -> dict[str, float]:
        """Have something measured."""
        assert self._process.stdin is not None
        print(task, file=self._process.stdin, flush=True)
        return self._line("result")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _line(self, word: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return json.loads(line.removeprefix(word))
        raise RuntimeError("a process of the benchmark ended")


def measure(scene: Scene, model: Path, scratch: Path) -> dict[str, Any]:
    """All ways of one scene, in turn: {way: numbers}."""
    blocks = model.stat().st_size >> 20
    hosts = scene.seeds + 1 if scene.apart else 1
    with ExitStack() as stack:
        lab = stack.enter_context(NetLab(hosts, delay_ms=scene.delay_ms, rate_mbps=scene.rate_mbps))

        def worker(host: int, *words: str) -> _Worker:
            return stack.enter_context(closing(_Worker(lab, host % hosts, *words)))

        lists = scratch / "lists"
        first = worker(1, "seed", str(model), str(lists))
        others = [
            worker(host, "seed", str(model), str(lists), first.said["token"]) for host in range(2, scene.seeds + 1)
        ]
        seeds = [one.said for one in (first, *others)]
        places = ",".join(lab.addr(host % hosts) for host in range(1, scene.seeds + 1))
        home = str(scratch / scene.name)
        taker = worker(0, "take", str(model), home, first.said["token"], json.dumps(seeds), places)
        ways = {"plain bytes": f"plain {blocks}", "model, plain TCP": "tcp 1"} | {
            f"model, {count} seed{'s' if count > 1 else ''}": f"model {count}" for count in range(1, scene.seeds + 1)
        }
        results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(scene.rounds):
            for way, task in ways.items():
                results[way].append(taker.ask(task))
    return {
        way: {
            "MB_s": statistics.median(one["MB_s"] for one in found),
            "seconds": statistics.median(one["seconds"] for one in found),
            "all_MB_s": [round(one["MB_s"], 1) for one in found],
            "cpu_seconds": statistics.median(one["cpu_seconds"] for one in found),
            "received_MB": max(one.get("received_MB", 0.0) for one in found),
        }
        for way, found in results.items()
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'scene':20}{'way':18}{'MB/s':>8}{'of plain':>10}{'of TCP':>8}{'CPU s':>8}   each round"]
    for scene, ways in results.items():
        plain, tcp = ways["plain bytes"]["MB_s"], ways["model, plain TCP"]["all_MB_s"]
        for way, numbers in ways.items():
            each = ", ".join(f"{one:.0f}" for one in numbers["all_MB_s"])
            rate, cpu = numbers["MB_s"], numbers["cpu_seconds"]
            of_tcp = statistics.median(one / other for one, other in zip(numbers["all_MB_s"], tcp, strict=True))
            lines.append(f"{scene:20}{way:18}{rate:8.1f}{rate / plain:10.2f}{of_tcp:8.2f}{cpu:8.1f}   {each}")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--scene", default="", help="only those whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    _MODELS.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="mesh-llm-bench-") as scratch:
        for scene in scenes(quick=options.quick):
            if not options.scene or options.scene in scene.name:
                results[scene.name] = measure(scene, cached_model(_MODELS, "half-gigabyte"), Path(scratch))
    print(table(results))
    print(json.dumps(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
