"""Many clients at once: on one machine, over llama.cpp's own RPC, and split by mesh-llm.

    python -m bench.split.clients [--clients 1,4,8,16,32] [--machines 3] [--delays 0,10] [--rounds 3]
    python -m bench.split.clients --stand-in [--clients 16] [--machines 2,4] [--delays 1] [--megabits 1000]

Tokens a second of all answers together, and of the slowest one; and the bytes on all links for a token. Each client has
a prompt of 16 tokens of its own, and a slot. *Steady*: while all of them write, without the prompts before and the last
ones' end. Ratios are to one machine, and to one engine over the same split, in the same round. Stand-ins as in
bench.split.prompts.
"""

import sys

from bench.common import table
from bench.split.requests import CLIENT_PROMPT
from bench.split.ways import (
    PROGRAMS,
    WAYS,
    Cores,
    Measured,
    Runs,
    Work,
    against,
    medians,
    middle,
    numbers,
    parser,
    run,
    say,
)

_SLOT = 256
"""Tokens of each slot, at least: a micro-batch is divided by the slots."""


def measure(runs: Runs, way: str, machines: int, delay: float, seed: int) -> list[Measured]:
    """Each number of clients once, with an engine for all of them."""
    arguments, host, cores, work = runs.arguments, runs.lab.host, Cores(), Work()
    results: list[Measured] = []
    context = max(_SLOT, CLIENT_PROMPT + arguments.answer + 8)
    with runs.engine(way, machines, context, max(arguments.clients)):
        for clients in arguments.clients:
            host.say("clients", streams=clients, tokens=4, seed=1000 + seed)
            before = runs.lab.wire_bytes
            cores.busy()
            work.milliseconds()
            answer = host.say("clients", streams=clients, tokens=arguments.answer, seed=1000 * seed)
            # Of stand-ins, which compute nothing, this is what everything else takes.
            spent = {name: taken / (clients * arguments.answer) for name, taken in work.milliseconds().items()}
            values = {
                "together": answer["together"] * runs.slow,
                "steady": answer["steady"] * runs.slow,
                "slowest": answer["slowest"] * runs.slow,
                "bytes_per_token": (runs.lab.wire_bytes - before) / (clients * arguments.answer),
                **spent,
            }
            results.append(Measured(way, machines, delay, clients, values, answer["texts"], cores.busy()))
            say(results[-1], "clients", "together")
    return results


def text(results: list[Measured]) -> str:
    """For people."""
    columns = ("clients", "machines", "one-way ms", "way", "tokens/s", "x one", "x one engine", "steady",
               "x one engine", "slowest tokens/s", "bytes/token",
               "busy", *(f"{name} CPU ms" for name in PROGRAMS), "same")  # fmt: skip
    rows: list[tuple[str | float | int | None, ...]] = []
    grouped = medians(results)
    for (way, machines, delay, size), rounds in sorted(grouped.items(), key=lambda item: (item[0][3], item[0][2])):
        solo = grouped.get(("solo", 1, delay, size), [])
        ours = grouped.get(("ours", machines, delay, size), [])
        same = all(one.texts == alone.texts for one, alone in zip(rounds, solo, strict=False))
        rows.append((
            size, machines, f"{delay:g}", WAYS[way], middle(rounds, "together"), against(rounds, solo, "together"),
            against(rounds, ours, "together"), middle(rounds, "steady"), against(rounds, ours, "steady"),
            middle(rounds, "slowest"), round(middle(rounds, "bytes_per_token")), max(one.busy for one in rounds),
            *(round(middle(rounds, name), 2) for name in PROGRAMS),
            "yes" if same else "NO",
        ))  # fmt: skip
    return table(columns, rows)


def main() -> int:
    """Run and print."""
    options = parser(__doc__)
    options.add_argument("--clients", type=numbers, default=[1, 4, 8, 16, 32])
    options.add_argument("--answer", type=int, default=48, help="tokens of each answer")
    arguments = options.parse_args()
    return run(arguments, measure, text)


if __name__ == "__main__":
    sys.exit(main())
