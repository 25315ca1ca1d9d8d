"""Guessing tokens ahead against not guessing: on one machine, and split by mesh-llm.

    python -m bench.split.spec [--texts repeated,edited,misleading,novel] [--machines 3] [--delays 0,20] [--rounds 3]
    python -m bench.split.spec --spec draft ...      by a draft model, not by n-grams; or mtp, eagle3
    python -m bench.split.spec --always ...          also where it does not pay, as `--spec KIND` does; else as `auto`

The prompt holds the whole answer, as where an agent repeats a file (`repeated`); or the answer with an edit every 48
tokens (`edited`), or every 12, so that most guesses are wrong (`misleading`); or nothing of it (`novel`). With and
without guesses the same prompts are asked, by engines that have just started and know nothing. Ratios (x) are of the
same round. All must give the same tokens. *least x* is the worst single answer's.
"""

import sys
from dataclasses import replace
from statistics import median
from typing import Any

from bench.common import table
from bench.split.ways import WAYS, Cores, Measured, Runs, medians, middle, parser, run, say
from tests.support.repeating_text import TEXTS, repeating_prompt

GUESSING = ", guessing"
"""After the name of a way that guesses."""


def measure(runs: Runs, way: str, machines: int, delay: float, seed: int) -> list[Measured]:
    """All kinds of text, with and without guesses, which take turns in coming first."""
    arguments = runs.arguments
    results: list[Measured] = []
    for guessing in (False, True) if seed % 2 == 0 else (True, False):
        more = {"spec": arguments.spec, "always": arguments.always, "most": arguments.most} if guessing else {}
        name = way + GUESSING if guessing else way
        with runs.engine(way, machines, 4 * arguments.answer, 1, **more):
            # The first tokens of an engine are slower than all others.
            _write(runs, "novel", 1, 16, 5000 + seed)
            for kind in arguments.texts:
                found = _measured(runs, kind, seed)
                results.append(replace(found, way=name, machines=machines, delay_ms=delay))
                say(results[-1], kind, "rate")
    return results


def _measured(runs: Runs, kind: str, seed: int) -> Measured:
    arguments, host, cores = runs.arguments, runs.lab.host, Cores()
    before, bytes_before = host.say("stats"), runs.lab.wire_bytes
    cores.busy()
    answer = _write(runs, kind, arguments.answers, arguments.answer, 100 * seed)
    after, tokens = host.say("stats"), arguments.answers * arguments.answer
    values = {
        "rate": answer["rate"] * runs.slow,
        "guessed": answer["guessed"] / tokens,
        "right": answer["accepted"] / max(1, answer["guessed"]),
        "bytes": (runs.lab.wire_bytes - bytes_before) / tokens,
        "trips": (after["round_trips"] - before["round_trips"]) / tokens,
        **{name: float(after.get(name, 0) - before.get(name, 0)) for name in ("pushed", "relayed")},
        **{f"rate {number}": rate for number, rate in enumerate(answer["rates"])},
    }
    return Measured("", 0, 0.0, list(TEXTS).index(kind), values, answer["texts"], cores.busy())


def _write(runs: Runs, kind: str, answers: int, tokens: int, seed: int) -> dict[str, Any]:
    model = runs.arguments.model
    prompts = [repeating_prompt(model, kind, tokens, seed + one) for one in range(answers)]
    return runs.lab.host.say("write", prompts=prompts, tokens=tokens)


def text(results: list[Measured]) -> str:
    """For people."""
    columns = (
        "text", "machines", "one-way ms", "way", "tokens/s", "guessing", "x", "least x", "guessed/token", "right",
        "trips/token", "pushed", "relayed", "bytes/token", "busy", "same",
    )  # fmt: skip
    rows: list[tuple[str | float | int | None, ...]] = []
    grouped = medians(results)
    for (way, machines, delay, kind), plain in sorted(grouped.items(), key=lambda item: (item[0][3], item[0][2])):
        guessing = grouped.get((way + GUESSING, machines, delay, kind))
        if guessing is None:
            continue
        rounds = list(zip(guessing, plain, strict=True))
        least = min(
            one.values[name] / alone.values[name]
            for one, alone in rounds
            for name in alone.values
            if name.startswith("rate ")
        )
        same = all(one.texts == alone.texts for one, alone in rounds)
        rows.append((
            list(TEXTS)[kind], machines, f"{delay:g}", WAYS[way], middle(plain, "rate"), middle(guessing, "rate"),
            median(one.values["rate"] / alone.values["rate"] for one, alone in rounds), least,
            middle(guessing, "guessed"), middle(guessing, "right"), middle(guessing, "trips"),
            round(middle(guessing, "pushed")), round(middle(guessing, "relayed")), round(middle(guessing, "bytes")),
            max(one.busy for one in guessing), "yes" if same else "NO",
        ))  # fmt: skip
    return table(columns, rows)


def main() -> int:
    """Run and print."""
    options = parser(__doc__)
    options.set_defaults(ways=["solo", "ours"], delays="0,20")
    options.add_argument("--texts", default=list(TEXTS), type=lambda words: words.split(","))
    options.add_argument("--answer", type=int, default=120, help="tokens of each answer; it loops after some 130")
    options.add_argument("--answers", type=int, default=4, help="of each kind of text, in one round")
    options.add_argument(
        "--spec", default="ngram", choices=["ngram", "draft", "mtp", "eagle3"], help="where guesses come from"
    )
    options.add_argument("--always", action="store_true", help="guess also where it does not pay")
    options.add_argument("--most", type=int, default=0, help="tokens guessed at a time; 0: as a node does")
    arguments = options.parse_args()
    arguments.model = arguments.model or ("long-heads" if arguments.spec == "mtp" else "long")
    return run(arguments, measure, text)


if __name__ == "__main__":
    sys.exit(main())
