"""Fewer clients than slots, with answers of unequal lengths: slots that llama-server chooses, and slots that are named.

    python -m bench.split.part_load [--slots 8] [--clients 2,3,4,6] [--ways solo,ours] [--rounds 3]

Each client asks several times, one after the other, so that slots become free in no order. Both choices run in turn on
the same engine, with the same prompts and lengths. Tokens a second are those of all answers, from the first request to
the last answer. *Round trips*: of a split engine to its worker, of which each pass takes one.
"""

import sys
from argparse import Namespace
from statistics import median

from bench.common import table
from bench.split.requests import CLIENT_PROMPT
from bench.split.ways import WAYS, Measured, Runs, medians, middle, numbers, parser, run, say

_TURNS = 4
_CHOICES = ("chosen by llama-server", "named")


def measure(runs: Runs, way: str, machines: int, delay: float, seed: int) -> list[Measured]:
    """Each number of clients with both choices."""
    arguments, host = runs.arguments, runs.lab.host
    results: list[Measured] = []
    with runs.engine(way, machines, CLIENT_PROMPT + arguments.answer + 8, arguments.slots):
        host.say("in_turns", named=False, streams=max(arguments.clients), turns=1, most=8, seed=1)
        for clients in arguments.clients:
            for named in (False, True) if seed % 2 else (True, False):
                asked = {"streams": clients, "turns": _TURNS, "most": arguments.answer, "seed": 1000 * seed}
                answer = host.say("in_turns", named=named, **asked)
                values = {name: answer[name] for name in ("together", "round_trips")}
                values["together"] *= runs.slow
                chosen = f"{WAYS[way]}, slots {_CHOICES[named]}"
                results.append(Measured(chosen, machines, delay, clients, values, answer["texts"], 0.0))
                say(results[-1], "clients", "together")
    return results


def text(results: list[Measured]) -> str:
    """For people."""
    grouped = medians(results)
    rows: list[tuple[str | float | int | None, ...]] = []
    for (way, machines, delay, size), rounds in sorted(grouped.items(), key=lambda item: (item[0][3], item[0][0])):
        other = grouped[way.replace(_CHOICES[1], _CHOICES[0]), machines, delay, size]
        ratio = median(
            one.values["together"] / left.values["together"] for one, left in zip(rounds, other, strict=True)
        )
        same = all(one.texts == left.texts for one, left in zip(rounds, other, strict=True))
        rows.append((
            size, machines, f"{delay:g}", way, middle(rounds, "together"), ratio, middle(rounds, "round_trips"),
            "yes" if same else "NO",
        ))  # fmt: skip
    return table(("clients", "machines", "one-way ms", "way", "tokens/s", "x left alone", "round trips", "same"), rows)


def main() -> int:
    """Run and print."""
    options = parser(__doc__)
    options.set_defaults(ways=["solo", "ours"], machines=[2])
    options.add_argument("--clients", type=numbers, default=[2, 3, 4, 6])
    options.add_argument("--slots", type=int, default=8)
    options.add_argument(
        "--answer", type=int, default=48, help="tokens of the longest answer; the shortest has a quarter"
    )
    arguments: Namespace = options.parse_args()
    return run(arguments, measure, text)


if __name__ == "__main__":
    sys.exit(main())
