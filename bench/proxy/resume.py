"""`python -m bench.proxy.resume [--against CHECKOUT]`: what it costs the undisturbed stream that it could be continued.

One stand-in engine, the API before it, and the same load in turn with and without `x-mesh-llm-resume: off`: CPU
of the API per event, and the ratio. `--against` adds the API of another checkout, to compare versions.
"""

import argparse
import json
import os
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.proxy.measure import Load, run_load
from bench.proxy.processes import System, free_port, running

_BODY: dict[str, Any] = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
_LOADS = {"1 stream": Load(1, 2, 10_000), "64 streams": Load(64, 2, 300), "64 streams, 50/s each": Load(64, 1, 150, 50)}


@contextmanager
def _doors(engine: str, against: Path | None) -> Generator[dict[str, tuple[System, dict[str, str]]]]:
    """What is measured: a way to the engine, and the headers of its requests."""
    with ExitStack() as stack:

        def door(name: str, root: Path | None) -> System:
            port = free_port()
            argv = [sys.executable, "-m", "bench.proxy.api_server", str(port), engine]
            if root is not None:
                code = f"import runpy, sys; sys.path[:0] = [{str(root / 'src')!r}, {str(root)!r}]; "
                code += "runpy.run_module('bench.proxy.api_server', run_name='__main__', alter_sys=True)"
                argv = [sys.executable, "-P", "-c", code, str(port), engine]
            return System(name, port, stack.enter_context(running(argv, port)))

        found = {"off": (this := door("this", None), {"x-mesh-llm-resume": "off"}), "on": (this, dict[str, str]())}
        if against is not None:
            found["other"] = (door("other", against), {})
        yield found


def measure(rounds: int, against: Path | None) -> dict[str, dict[str, float]]:
    """Microseconds of CPU per event, the least of all rounds (noise only adds), by load and way; and the ratio."""
    numbers: dict[str, dict[str, float]] = {}
    port = free_port()
    engine = [sys.executable, "-m", "bench.proxy.engine", str(port)]
    with running(engine, port), _doors(f"127.0.0.1:{port}", against) as doors:
        for title, load in _LOADS.items():
            seen: dict[str, list[float]] = {name: [] for name in doors}
            for number in range(rounds + 1):
                order = list(doors.items()) if number % 2 else list(doors.items())[::-1]
                for name, (system, headers) in order:
                    row = run_load(load, system, _BODY, headers)
                    if number:
                        seen[name].append(row["cpu_us_per_event"])
            row = {name: min(values) for name, values in seen.items()}
            base = "other" if against is not None else "off"
            numbers[title] = row | {f"on/{base}": row["on"] / row[base]}
    return numbers


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxy.resume", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    numbers = measure(3 if options.quick else options.rounds, options.against)
    for title, row in numbers.items():
        print(f"{title:24}" + "".join(f"{name:>12}{value:8.3f}" for name, value in row.items()))
    text = json.dumps({"load_average": os.getloadavg()[0], "cpu_us_per_event": numbers})
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
