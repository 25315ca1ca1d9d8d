"""How fast a prompt is read: on one machine, over llama.cpp's own RPC, and split by mesh-llm.

    python -m bench.split.prompts [--tokens 512,2048,8192] [--machines 3] [--delays 0,10] [--rounds 3]
    python -m bench.split.prompts --stand-in [--tokens 4096] [--machines 2,3,4,8] [--delays 1] [--megabits 1000]

Tokens a second while it is read, seconds to the first token of the answer as its client sees them, and the bytes on all
links, for a prompt and for a token of an answer. *predicted* is what `mesh-llm plan` says before the first prompt; a
node then learns. Ratios are to one machine in the same round. With `--stand-in`, all engines take a set time instead of
computing (bench.split.stand_in); then times are those without slow motion. *busy* is the part of the time that this
machine's cores were busy: near 1, the lab is the limit and not what is measured.
"""

import sys

from bench.common import table
from bench.split.ways import WAYS, WHOLE, Cores, Measured, Runs, against, medians, middle, numbers, parser, run, say

_ANSWER = 32
_WARM_UP = 528
"""Tokens: for llama.cpp's KV cache, which grows by 256, three graphs."""


def measure(runs: Runs, way: str, machines: int, delay: float, seed: int) -> list[Measured]:
    """All prompts once, with an engine of its own."""
    arguments, host, cores = runs.arguments, runs.lab.host, Cores()
    results: list[Measured] = []
    # Before the engine takes the cores; what is not known is 0.
    predicted = {tokens: runs.predicted(way, machines, tokens) or 0.0 for tokens in arguments.tokens}
    with runs.engine(way, machines, max(*arguments.tokens, _WARM_UP + WHOLE) + _ANSWER, 1):
        # What is learned of the traffic is learned before: a conversation's later prompts count.
        host.say("prompt", tokens=_WARM_UP + runs.micro_batch(way, machines), seed=seed + 100)
        before = runs.lab.wire_bytes
        host.say("ask", tokens=_ANSWER)
        a_token = (runs.lab.wire_bytes - before) / _ANSWER
        for tokens in arguments.tokens:
            before = runs.lab.wire_bytes
            cores.busy()
            answer = host.say("prompt", tokens=tokens, seed=seed)
            values = {
                "rate": tokens / (answer["prompt_ms"] * 1e-3 / runs.slow),
                "first_s": answer["first_s"] / runs.slow,
                "bytes": float(runs.lab.wire_bytes - before),
                "bytes_per_token": a_token,
                "predicted": predicted[tokens],
            }
            results.append(Measured(way, machines, delay, tokens, values, [answer["text"]], cores.busy()))
            say(results[-1], "tokens", "rate")
    return results


def text(results: list[Measured]) -> str:
    """For people."""
    columns = (
        "prompt", "machines", "one-way ms", "way", "tokens/s", "x one", "predicted", "first token s", "MB",
        "bytes/token", "busy", "same",
    )  # fmt: skip
    rows: list[tuple[str | float | int | None, ...]] = []
    grouped = medians(results)
    said = {(one.size, number): one.texts for one, number in _numbered(grouped) if one.way == "solo"}
    for (way, machines, delay, size), rounds in sorted(grouped.items(), key=lambda item: (item[0][3], item[0][2])):
        solo = grouped.get(("solo", 1, delay, size))
        same = all(said.get((size, number), one.texts) == one.texts for number, one in enumerate(rounds))
        rows.append((
            size, machines, f"{delay:g}", WAYS[way], middle(rounds, "rate"), against(rounds, solo, "rate"),
            middle(rounds, "predicted") or None, middle(rounds, "first_s"), middle(rounds, "bytes") / 1e6,
            round(middle(rounds, "bytes_per_token")),
            max(one.busy for one in rounds), "yes" if same else "NO",
        ))  # fmt: skip
    return table(columns, rows)


def _numbered(grouped: dict[tuple[str, int, float, int], list[Measured]]) -> list[tuple[Measured, int]]:
    return [(one, number) for rounds in grouped.values() for number, one in enumerate(rounds)]


def main() -> int:
    """Run and print."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=numbers, default=[512, 2048, 8192], help="of the prompts")
    arguments = options.parse_args()
    return run(arguments, measure, text)


if __name__ == "__main__":
    sys.exit(main())
