"""What an idle node among ten costs: `python -m bench.mesh.idle [--nodes 10] [--seconds 120] [--against DIR]`.

Whole nodes without a model, in one mesh on this machine; nobody asks them anything. After they have settled, CPU time
(user and system) of each daemon over the seconds, in percent of one core. With `--against`, every second node runs the
mesh-llm whose sources are in that directory: both see the same mesh at the same time. On a busy machine each wake costs
more, because caches are cold.
"""

import argparse
import asyncio
import json
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import psutil
from bench.common import machine, table
from tests.support.node import NodeProcess
from tests.support.pool import until

SETTLE_SECONDS = 45.0
"""Past the first half minute, in which nodes measure themselves and each path."""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, without its children."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def measure(count: int, seconds: float, against: Path | None) -> dict[str, list[float]]:
    """Percent of a core for each node: those of this checkout, and of `against`. The first node is not counted."""
    nodes: dict[str, list[NodeProcess]] = {"this": [], "against": []}
    async with AsyncExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = await NodeProcess.start(base / "node-0")
        stack.push_async_callback(first.close)
        invite = await first.invite()
        for number in range(1, count):
            other = against is not None and number % 2 == 0
            env = {"PYTHONPATH": str(against)} if other else {}
            node = await NodeProcess.start(base / f"node-{number}", join=[invite], env=env)
            stack.push_async_callback(node.close)
            nodes["against" if other else "this"].append(node)
        await until(first, lambda status: len(status["peers"]) == count - 1, "a mesh of all nodes", 60.0)
        await asyncio.sleep(SETTLE_SECONDS)
        pids = {kind: [node.process.pid for node in several] for kind, several in nodes.items()}
        began = time.monotonic()
        before = {pid: cpu_seconds(pid) for several in pids.values() for pid in several}
        await asyncio.sleep(seconds)
        spent = {pid: cpu_seconds(pid) - before[pid] for pid in before}
        passed = time.monotonic() - began
    return {kind: [100 * spent[pid] / passed for pid in several] for kind, several in pids.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--against", type=Path, help="sources of another mesh-llm, to compare with: its `src`")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    before = machine()
    found = asyncio.run(measure(options.nodes, options.seconds, options.against))
    rows = [[kind, len(each), median(each), min(each), max(each)] for kind, each in found.items() if each]
    print(table(["nodes", "count", "median, % of a core", "least", "most"], rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": before, "percent": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
