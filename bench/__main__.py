"""Side-by-side benchmarks: `python -m bench [NAME...] [--quick] [--list]`, or `make bench ARGS="..."`.

What a benchmark has to install is installed first; then each runs as a process of its own where no packet can leave
the machine. Tables on standard output, numbers in bench/results/NAME.json, and in bench/results/run.json the machine,
how busy it was, and how each one ended. Exit status 1 when one failed, after the others had their turn.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.catalogue import ALL, Benchmark, chosen
from bench.common import RESULTS, ROOT, machine

_ISOLATE = ROOT / "tools" / "isolate.py"
_SYSTEM_PACKAGES = ROOT / "tools" / "system_packages.sh"
_EXIT_FAILED, _EXIT_INTERRUPTED = 1, 130


def is_there(benchmark: Benchmark) -> bool:
    """Whether its module can be run."""
    try:
        found = importlib.util.find_spec(benchmark.module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{benchmark.module}.__main__")
    except ModuleNotFoundError:
        return False
    return found is not None


def prepare(benchmark: Benchmark) -> None:
    """Install what it needs, with the network. Raises subprocess.CalledProcessError, OSError."""
    if benchmark.packages:
        # It says by itself what is missing and how to get it; what does without goes on.
        subprocess.run(["bash", str(_SYSTEM_PACKAGES), benchmark.packages], check=False)
    hook = getattr(importlib.import_module(benchmark.module), "prepare", None)
    if callable(hook):
        hook()


def run(benchmark: Benchmark, words: tuple[str, ...], results: Path) -> dict[str, Any]:
    """Run one; how it ended. Its output is this process's own."""
    command = [sys.executable, "-m", benchmark.module, "--json", str(results), *words]
    if not benchmark.isolates_itself:
        command = [sys.executable, str(_ISOLATE), "--", *command]
    load_before, began = os.getloadavg()[0], time.monotonic()
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    return {
        "exit_status": status,
        "seconds": round(time.monotonic() - began, 1),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }


def run_all(benchmarks: list[Benchmark], *, quick: bool) -> dict[str, dict[str, Any]]:
    """Prepare all, then run each in turn: {name: how it ended}."""
    ready: list[Benchmark] = []
    ends: dict[str, dict[str, Any]] = {}
    for benchmark in benchmarks:
        if not is_there(benchmark):
            print(f"{benchmark.name}: not in this checkout", flush=True)
            continue
        try:
            prepare(benchmark)
        except (OSError, subprocess.CalledProcessError) as failure:
            print(f"{benchmark.name}: could not be prepared: {failure}", file=sys.stderr, flush=True)
            ends[benchmark.name] = {"exit_status": _EXIT_FAILED, "reason": str(failure)}
            continue
        ready.append(benchmark)
    for benchmark in ready:
        print(f"\n== {benchmark.name}: {benchmark.about}", flush=True)
        results = RESULTS / f"{benchmark.name}.json"
        # Numbers of an earlier run must not pass for those of one that failed.
        results.unlink(missing_ok=True)
        end = ends[benchmark.name] = run(benchmark, (*benchmark.words, *(benchmark.quick if quick else ())), results)
        if end["exit_status"]:
            print(f"{benchmark.name}: failed with exit status {end['exit_status']}", file=sys.stderr, flush=True)
    return ends


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all by default; see --list")
    parser.add_argument("--quick", action="store_true", help="less of each")
    parser.add_argument("--list", action="store_true", help="list them and end")
    options = parser.parse_args()
    try:
        benchmarks = chosen(options.names)
    except KeyError as unknown:
        parser.error(f"there is no {unknown}; there are: {', '.join(benchmark.name for benchmark in ALL)}")
    if options.list:
        for benchmark in benchmarks:
            print(f"{benchmark.name:20}{benchmark.about}" + ("" if is_there(benchmark) else " (not in this checkout)"))
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    before = machine()
    try:
        ends = run_all(benchmarks, quick=options.quick)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    report = {"machine": before, "quick": options.quick, "benchmarks": ends}
    (RESULTS / "run.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nNumbers are in {RESULTS.relative_to(ROOT)}/")
    return _EXIT_FAILED if any(end["exit_status"] for end in ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
