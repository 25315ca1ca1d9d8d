"""`python -m bench.proxy [--quick] [--json FILE] [--model GGUF] [--without litellm]`: one command, a table and JSON.

Direct to the engine, through mesh-llm's API, through the least that a Python relay can be, through nginx, and
through litellm's proxy: the same load in turn, interleaved, medians. First bytes with a stand-in engine that answers at
once, and with a real one; events at 1 to 200 streams, both at a pace (50 a second and stream) and as fast as they go.
nginx comes from the system (tools/system_packages.sh bench), litellm into an environment of its own.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.proxy.litellm_environment import VERSION, litellm_program
from bench.proxy.measure import Load, Row, in_turn
from bench.proxy.processes import free_port, running, systems

_INSIDE = "MESH_LLM_BENCH_INSIDE"
_BODY: dict[str, Any] = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
_ISOLATE = Path(__file__).resolve().parents[2] / "tools" / "isolate.py"


@contextmanager
def _real_engine(model: Path) -> Generator[str]:
    argv = [sys.executable, "-m", "bench.proxy.real_engine", str(model)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit("the real engine did not start")
        try:
            yield address
        finally:
            process.stdin.close()


def _model(given: Path | None, directory: Path) -> Path:
    """The model for the real engine: the given one, the built-in one, or a generated one of about 5 MB."""
    from mesh_llm.models.library.library import builtin_path

    if given is not None:
        return given
    found = builtin_path("tiny")
    if found is None:
        from tests.support.gguf_models import cached_model

        found = cached_model(directory, "small")
    return found


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    rounds, levels = (1, (1, 64)) if options.quick else (5, (1, 16, 64, 200))
    nginx = None if "nginx" in options.without else shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    litellm = None if "litellm" in options.without else litellm_program()
    tables: dict[str, dict[str, Row]] = {}
    port = free_port()
    with running([sys.executable, "-m", "bench.proxy.engine", str(port)], port):  # noqa: SIM117
        with systems(f"127.0.0.1:{port}", nginx, litellm) as ways:
            in_turn(Load(1, 50, 1), ways, _BODY, 1)
            tables["first byte"] = in_turn(Load(1, 200, 1), ways, _BODY, rounds)
            for streams in levels:
                paced = Load(streams, 1, 100, 50.0)
                tables[f"{streams} streams, 50 events/s each"] = in_turn(paced, ways, _BODY, min(rounds, 3))
            for streams in levels:
                flat_out = Load(streams, 1, 4000 // streams)
                tables[f"{streams} streams, as fast as they go"] = in_turn(flat_out, ways, _BODY, min(rounds, 3))
    with tempfile.TemporaryDirectory() as directory:
        model = _model(options.model, Path(directory))
        body = {**_BODY, "max_tokens": 1, "temperature": 0}
        question = "Tell me about the mesh, the nodes in it, and the models that they serve to one another. " * 12
        long = {**body, "messages": [{"role": "user", "content": question}], "cache_prompt": False}
        with _real_engine(model) as address, systems(address, nginx, litellm, closes=True) as ways:
            in_turn(Load(1, 20, 1), ways, body, 1)
            tables[f"first byte, llama.cpp with {model.stem}, a word"] = in_turn(Load(1, 50, 1), ways, body, rounds)
            tables[f"first byte, llama.cpp with {model.stem}, 216 words"] = in_turn(Load(1, 20, 1), ways, long, rounds)
    return {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "litellm": VERSION if litellm else None,
        "load_average": os.getloadavg()[0],
        "tables": tables,
    }


def _print(tables: dict[str, dict[str, Row]]) -> None:
    for title, rows in tables.items():
        print(f"\n{title}")
        first = title.startswith("first byte")
        columns = (
            ["first byte ms", "added ms", "CPU us/request"] if first else ["events/s", "of direct", "CPU us/event"]
        )
        print(f"  {'':12}" + "".join(f"{column:>16}" for column in [*columns, "CPU s", "memory MB", "lost"]))
        for name, row in rows.items():
            direct = rows["direct"]
            if first:
                shown = [row["first_ms"], row["first_ms"] - direct["first_ms"], row["cpu_us_per_request"]]
            else:
                shown = [row["events_per_s"], row["events_per_s"] / direct["events_per_s"], row["cpu_us_per_event"]]
            cells = "".join(f"{value:16.3f}" for value in [*shown, row["cpu_s"]])
            print(f"  {name:12}{cells}{row['memory_mb']:16.1f}{row['lost']:16.0f}")


def main() -> None:
    """Entry point: prepares with the network, measures without."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, fewer streams")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--model", type=Path, help="GGUF for the real engine; by default the built-in tiny")
    parser.add_argument("--without", nargs="*", default=[], choices=["nginx", "litellm"], help="leave these out")
    options = parser.parse_args()
    if not os.environ.get(_INSIDE):
        if "litellm" not in options.without:
            litellm_program()
        os.environ[_INSIDE] = "1"
        os.execv(
            sys.executable,
            [sys.executable, str(_ISOLATE), "--", sys.executable, "-m", "bench.proxy", *sys.argv[1:]],
        )
    numbers = _measure(options)
    _print(numbers["tables"])
    text = json.dumps(numbers)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
