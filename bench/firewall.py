"""What the checks before an rpc-server cost: CPU time for each token, and for the largest graph, of recorded traffic.

    python -m bench firewall [--quick]

Replays recordings of `tests/data/rpc` through the firewall alone, with no socket and no engine, and then the requests
of their last token again and again. To compare two versions, run it in both, in turn.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from bench.common import table
from tests.support.rpc_corpus import Recording, Step, new_firewall, recordings, show

from mesh_llm.wire.ggml_rpc.protocol import Command

_GRAPHS = (Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE)


def last_token(steps: tuple[Step, ...]) -> tuple[int, int]:
    """First step, and the one after the last, of the last token whose graph was computed again; (0, 0) for none."""
    again = [at for at, step in enumerate(steps) if step.command == Command.GRAPH_RECOMPUTE]
    if not again:
        return 0, 0
    begin = again[-1]
    while begin and steps[begin - 1].command not in _GRAPHS:
        begin -= 1
    return begin, again[-1] + 1


def measure(recording: Recording, rounds: int, tokens: int) -> tuple[float, int, float, int] | None:
    """Microseconds a token, its requests, milliseconds of the largest graph and its bytes; None without a token."""
    begin, end = last_token(recording.steps)
    if not end:
        return None
    firewall = new_firewall(recording)
    graphs: list[tuple[int, float]] = []
    for step in recording.steps[:end]:
        started = time.process_time_ns()
        show(firewall, step)
        if step.command == Command.GRAPH_COMPUTE:
            graphs.append((len(step.payload), (time.process_time_ns() - started) / 1e6))
    token = recording.steps[begin:end]
    costs: list[float] = []
    for _ in range(rounds):
        started = time.process_time_ns()
        for _ in range(tokens):
            for step in token:
                show(firewall, step)
        costs.append((time.process_time_ns() - started) / tokens / 1e3)
    size, milliseconds = max(graphs)
    return statistics.median(costs), len(token), milliseconds, size


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--architecture", action="append", help="default: llama, qwen3moe and mamba2")
    options = parser.parse_args()
    rows: list[tuple[str, float, int, float, int]] = []
    for architecture in options.architecture or ["llama", "qwen3moe", "mamba2"]:
        for recording in recordings(architecture):
            found = measure(recording, options.rounds, 300)
            if found is not None:
                rows.append((str(recording), *found))
    print(table(("RECORDING", "us A TOKEN", "REQUESTS", "ms A GRAPH", "BYTES"), rows))
    if options.json is not None:
        options.json.write_text(
            json.dumps([{"recording": row[0], "token_us": row[1]} for row in rows], indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
