"""Whether stand-ins show what real engines do: the same prompt, read by both.

    python -m bench.split.check [--tokens 2048] [--machines 2] [--rounds 3]

First one real machine is measured, then a split over real engines. Stand-ins get the measured pace of the one machine,
and the split is measured again over them. Messages of the host's tunnels for the prompt must be as many; exit status 1
if not. Their bytes differ as far as the tunnel compresses results, since a stand-in's do not compress; that llama.cpp's
messages are equally long is a test's (tests/integration/test_split_stand_in.py). The time should agree too, where the
real engines do not take cores from each other.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.common import machine, table
from bench.split.ways import WHOLE, Runs, load_text, opened, parser

_COUNTED = ("requests", "round_trips", "graphs", "pushed", "relayed")
_BYTES = ("bytes_sent", "bytes_received")
_ANSWER = 32


def split(runs: Runs) -> dict[str, Any]:
    """The messages for a prompt, and its tokens a second."""
    host, tokens = runs.lab.host, runs.arguments.tokens
    with runs.engine("ours", runs.arguments.machines[0], tokens + _ANSWER, 1):
        host.say("prompt", tokens=tokens, seed=1)
        before = host.say("stats")
        answers = [host.say("prompt", tokens=tokens, seed=2 + number) for number in range(runs.arguments.rounds)]
        after = host.say("stats")
    rounds = runs.arguments.rounds
    found = {name: (after[name] - before[name]) / rounds for name in (*_COUNTED, *_BYTES)}
    return found | {"rate": tokens / median(one["prompt_ms"] for one in answers) * 1e3 * runs.slow}


def real(arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], float, float]:
    """The same of real engines, and the two rates of one machine."""
    with opened(arguments, scratch) as runs:
        runs.distance(float(arguments.delays))
        host, tokens = runs.lab.host, arguments.tokens
        with runs.engine("solo", 1, tokens + _ANSWER, 1):
            host.say("ask", tokens=_ANSWER)
            answers = [host.say("ask", tokens=_ANSWER)["ms_per_token"] for _ in range(arguments.rounds)]
            prompts = [host.say("prompt", tokens=tokens, seed=one)["prompt_ms"] for one in range(arguments.rounds)]
        return split(runs), tokens / median(prompts) * 1e3, 1e3 / median(answers)


def main() -> int:
    """Run and print."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    options.set_defaults(machines=[2], micro_batch=WHOLE)
    arguments = options.parse_args()
    arguments.model = arguments.model or "long"
    arguments.stand_in, print_load = False, load_text()
    with tempfile.TemporaryDirectory(prefix="bench-split-") as scratch:
        computed, prompt, answer = real(arguments, Path(scratch) / "real")
        arguments.stand_in, arguments.prompt_rate, arguments.answer_rate = True, prompt, answer
        with opened(arguments, Path(scratch) / "shown") as runs:
            runs.distance(float(arguments.delays))
            shown = split(runs)
    print(f"{print_load}; one machine: {prompt:.0f} tokens/s of a prompt, {answer:.1f} of an answer")
    print(table(("", "real", "stand-in", "ratio"), [
        (name, computed[name], shown[name], shown[name] / computed[name] if computed[name] else None)
        for name in computed
    ]))  # fmt: skip
    print(f"x one machine: {computed['rate'] / prompt:.2f} real, {shown['rate'] / prompt:.2f} with stand-ins")
    if arguments.json:
        found = {"machine": machine(), "prompt_rate": prompt, "answer_rate": answer}
        arguments.json.write_text(json.dumps({**found, "real": computed, "stand_in": shown}, indent=1))
    same = all(computed[name] == shown[name] for name in _COUNTED)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
