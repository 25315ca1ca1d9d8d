"""Models on demand on real nodes: what a cold request costs beside its load, and many swaps of two models.

    python tools/isolate.py -- .venv/bin/python -m bench.on_demand.swaps [--swaps 500] [--json FILE]

Two models share a node that has room for one of them. Each is asked in turn. A second node has neither, and asks the
first. The cost of a cold request is its time, less the engine's load as the node reports it, less a warm request's.
"""

import argparse
import asyncio
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from bench.common import ROOT, machine
from tests.support.gguf_models import cached_model
from tests.support.node import NodeProcess
from tests.support.pool import alive, chat, content, named, until

_MODELS = ("first", "second")
_SIZES = ("--ctx-size", "512", "--parallel", "1", "--no-fetch")
_READY = re.compile(r"(\w+) is ready after ([0-9.]+) s")


async def asked(node: NodeProcess, model: str) -> tuple[str, float]:
    """An answer, and how long it took in seconds. AssertionError where there is none."""
    began = time.perf_counter()
    text = content(await chat(node, model))
    return text, time.perf_counter() - began


def loads(node: NodeProcess, model: str) -> list[float]:
    """Seconds of each load of a model so far, as the node reported them."""
    return [float(found[2]) for found in _READY.finditer(node.log()) if found[1] == model]


def held(node: NodeProcess) -> dict[str, int]:
    """What the node's process holds now."""
    process = psutil.Process(node.process.pid)
    return {
        "rss_mb": process.memory_info().rss // 10**6,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
    }


async def cold(node: NodeProcess, host: NodeProcess, order: Iterator[str], rounds: int) -> list[float]:
    """Seconds of cold requests beside the load and a warm answer. The models take turns, so each is cold."""
    costs: list[float] = []
    for model in itertools.islice(order, rounds):
        # What was used a moment ago keeps its place for a moment: that is no cost of the load.
        await asyncio.sleep(2.5)
        _, whole = await asked(node, model)
        _, warm = await asked(node, model)
        costs.append(whole - warm - loads(host, model)[-1])
    return costs


async def swap(node: NodeProcess, count: int) -> dict[str, Any]:
    """Ask the two models in turn, and compare every answer with the first of its model."""
    expected = {model: (await asked(node, model))[0] for model in _MODELS}
    before = held(node)
    began, times, wrong = time.perf_counter(), list[float](), 0
    for number in range(count):
        model = _MODELS[number % 2]
        text, seconds = await asked(node, model)
        wrong += text != expected[model]
        times.append(seconds)
        if number % 50 == 49:
            print(f"  {number + 1} swaps, {held(node)}", flush=True)
    return {
        "swaps": count,
        "wrong": wrong,
        "lost": 0,
        "seconds": round(time.perf_counter() - began, 1),
        "median_s": round(statistics.median(times), 3),
        "longest_s": round(max(times), 3),
        "before": before,
        "after": held(node),
    }


async def measure(swaps: int, rounds: int) -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        cache = ROOT / ".pytest_cache" / "d" / "models"
        cache.mkdir(parents=True, exist_ok=True)
        small = cached_model(cache, "small")
        for name in _MODELS:
            named(small, name, place / "disk")
        little = (*_SIZES, "--max-vram", "0.15", "--min-lifetime", "0")
        host = await NodeProcess.start(place / "a", models=["first"], models_dir=place / "disk", arguments=little)
        other: NodeProcess | None = None
        try:
            other = await NodeProcess.start(
                place / "b", models=["tiny"], arguments=(*_SIZES, "--max-vram", "0.15", "--pin", "tiny"),
                join=[await host.invite()],
            )  # fmt: skip
            await until(other, alive(1), "seeing the first")
            # The first one is loaded from the start.
            order = itertools.cycle(reversed(_MODELS))
            there = await cold(other, host, order, rounds)
            print(f"cold, on another node: {', '.join(f'{one:.2f}' for one in there)} s beside the load", flush=True)
            # While another node asks for a model, that model would keep its place for a turn.
            await other.stop()
            await until(host, alive(0), "being alone")
            here = await cold(host, host, order, rounds)
            print(f"cold, here: {', '.join(f'{one:.2f}' for one in here)} s beside the load", flush=True)
            swapped = await swap(host, swaps) if swaps else {"swaps": 0, "wrong": 0}
        finally:
            if other is not None:
                await other.close()
            await host.close()
    return {
        "cold_here_s": [round(one, 3) for one in here],
        "cold_elsewhere_s": [round(one, 3) for one in there],
        "swaps": swapped,
        "machine": machine(),
    }


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = asyncio.run(measure(options.swaps, options.rounds))
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if result["swaps"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
