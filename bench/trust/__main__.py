"""Canaries: how surely a host that serves other weights is found, and how rarely an honest one is accused.

    python -m bench.trust [--models tiny,sharp,soft] [--questions 240] [--tokens 24] [--hosts 10000] [--canaries 400]
    python -m bench.trust --pools DIR         keep the engines' answers there; a run that was interrupted goes on

Real engines answer the same questions with the same file in all configurations that this machine has, and with other
files. Then hosts are simulated that give these answers, each to other questions in another order. An honest host has
the announced file and any configuration; it is compared with an honest one of any other. A liar has another file.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from bench.common import RESULTS, machine, table
from bench.trust.hosts import Found, Gains, compared, ratio, simulate
from bench.trust.models import make
from bench.trust.pools import HONEST, LIARS, PLAIN, Configuration, Engines, Pool, Store, collect, questions
from tests.support.http import TruncatedError

from mesh_llm.core.trust.canaries import noise_of
from mesh_llm.engine.supervisor import Supervisor

PAIRS = (
    *(("f16", "q8_0"), ("f16", "q6_K"), ("f16", "q4_K"), ("f16", "other")),
    *(("q8_0", "q6_K"), ("q8_0", "q4_K"), ("q8_0", "other")),
    *(("q4_K", "q3_K"), ("q4_K", "other")),
)
"""What is announced, and what is served."""
_LIE_SHARES = (0.5, 0.1)
_LIAR_CANARIES = 400
_CRASHES = 20
_SHARE = 0.01
_PROMPT_WEIGHT = 0.1
"""Of a token that is read, against one that is written."""

COARSER = {"f16": "q8_0", "q8_0": "q6_K", "q4_K": "q3_K"}
"""The copy that is asked as well, by the announced one."""


@dataclass
class Honest:
    """An honest configuration, compared with all others of the same file.

    Attributes:
        cache: element type of the references' KV caches.
        median, most, largest: of differences; most: of 99 %.
        lean: the largest leaning; None: no coarser copy was asked.
        ratio: the largest mean likelihood ratio of a test.
        tests: that ended well.
    """

    model: str
    announced: str
    host: str
    cache: str
    answers: int
    median: float
    most: float
    largest: float
    lean: float | None
    ratio: float
    accused: int
    hosts: int
    tests: int


@dataclass
class Liar:
    """A host that serves something else, in a part of its answers.

    Attributes:
        cache: element type of the KV cache that it announces.
        reference: the same of the copies that it is compared with.
        alone: found within 20 canaries without a coarser copy.
        within: the same with one.
    """

    model: str
    announced: str
    cache: str
    served: str
    host: str
    reference: str
    lies: float
    median: float
    lean: float | None
    alone: float
    within: float
    mean: float
    slowest: int | None
    accused: int
    hosts: int


def wanted(arguments: argparse.Namespace) -> list[tuple[str, Configuration]]:
    """All files and configurations that engines are to run."""
    announced = list(dict.fromkeys(one for one, _ in PAIRS))
    found = [(kind, how) for kind in announced for how in HONEST]
    # A liar may have any machine, too, and the cache that it announces.
    liars = [kind for kind in dict.fromkeys(two for _, two in PAIRS) if kind not in announced]
    found += [(kind, how) for kind in liars for how in HONEST if how in LIARS]
    # The slow ones come last.
    found.sort(key=lambda one: (one[1].vulkan, one[1].split))
    found = [one for one in found if one[1].name not in arguments.without]
    return [one for one in found if not arguments.only or one[1].name in arguments.only]


async def measure(arguments: argparse.Namespace, store: Store) -> None:
    """Add real answers of all models to what is there."""
    with tempfile.TemporaryDirectory(prefix="bench-trust-") as made:
        supervisor = Supervisor(Path(made) / "logs")
        try:
            engines = Engines(Path(made), supervisor)
            for model in arguments.models:
                asked = dict(enumerate(questions(model, arguments.questions)))
                work = [one for one in wanted(arguments) if engines.has(one[1])]
                work = [one for one in work if asked.keys() - store.load(model, _key(*one))]
                files = make(Path(made), model, tuple(kind for kind, _ in work if kind != "other")) if work else {}
                for number, (kind, how) in enumerate(work, 1):
                    print(f"{model} {number}/{len(work)}: {kind}, {how.name}", end=" ", file=sys.stderr, flush=True)
                    await _ask(engines, store, model, kind, files[kind], how, asked, arguments.tokens)
        finally:
            await supervisor.close()


async def _ask(
    engines: Engines,
    store: Store,
    model: str,
    kind: str,
    path: Path,
    how: Configuration,
    asked: Mapping[int, str],
    tokens: int,
) -> None:
    """Have one file's engine answer what is missing. Mesa's device crashes now and then: then it is started again."""
    began, pool, crashes = time.monotonic(), store.load(model, _key(kind, how)), 0
    while missing := {one: text for one, text in asked.items() if one not in pool}:
        try:
            async with aclosing(collect(engines, model, path, how, missing, tokens)) as collected:
                async for some in collected:
                    pool |= some
                    store.save(model, _key(kind, how), pool)
                    print(".", end="", file=sys.stderr, flush=True)
        except (TruncatedError, ConnectionError):
            crashes += 1
            if not how.vulkan or crashes > _CRASHES:
                raise
            print("crashed", end="", file=sys.stderr, flush=True)
    print(f" {len(pool)} answers, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _key(kind: str, how: Configuration) -> str:
    return f"{kind}, {how.name}"


def references(pool: Mapping[str, Pool], kind: str, cache: str) -> dict[Configuration, Pool]:
    """Copies of a file with such a KV cache, by how they compute. A reference guesses nothing with a draft."""
    found = {how: pool.get(_key(kind, how), {}) for how in HONEST if how.cache == cache and not how.draft}
    return {how: answers for how, answers in found.items() if answers}


def honest(model: str, pool: Mapping[str, Pool], arguments: argparse.Namespace) -> list[Honest]:
    """All honest configurations of a model, each against the two references at which it looks worst."""
    rows: list[Honest] = []
    for kind in dict.fromkeys(one for one, _ in PAIRS):
        for host in HONEST:
            answers = pool.get(_key(kind, host), {})
            # Where there is a copy with the announced cache, it is the reference.
            for cache in dict.fromkeys((host.cache, PLAIN.cache)):
                copies = references(pool, kind, cache)
                copies.pop(host, None)
                if not answers or not copies:
                    continue
                noise = noise_of(kind, cache, host.cache)
                found = [_gains(pool, kind, how, one, answers, noise, host.cache) for how, one in copies.items()]
                found.sort(key=lambda one: ratio(one[0][:, :2]), reverse=True)
                ends = [simulate(one[:, :2], arguments.hosts, arguments.canaries, len(rows)) for one, _, _ in found[:2]]
                differences = sorted(each for _, some, _ in found for each in some)
                leanings = [each for _, _, some in found for each in some]
                rows.append(
                    Honest(
                        model, kind, host.name, cache, len(answers), median(differences),
                        differences[int(0.99 * (len(differences) - 1))], differences[-1],
                        max(leanings, default=None), ratio(found[0][0][:, :2]),
                        max(one.accused for one in ends), arguments.hosts, ends[0].tests,
                    )
                )  # fmt: skip
    return rows


def _gains(
    pool: Mapping[str, Pool], kind: str, how: Configuration, reference: Pool, answers: Pool, noise: float, cache: str
) -> tuple[Gains, list[float], list[float]]:
    """Evidence of a host's answers; also of the test with a coarser copy, where there is one with the same cache."""
    coarser = pool.get(_key(COARSER[kind], how)) if how.cache == cache else None
    return compared(reference, answers, noise, coarser or None, cache)


def liars(model: str, pool: Mapping[str, Pool], arguments: argparse.Namespace) -> list[Liar]:
    """All pairs of an announced and a served file, each against the reference that it fools best.

    A host announces the cache that it has, or a rougher one. The reference has the announced one; or none such is
    there, and its cache is of f16.
    """
    rows: list[Liar] = []
    for announced, kind in PAIRS:
        for host in LIARS:
            answers = pool.get(_key(kind, host), {})
            cases = [(1.0, host.cache, host.cache)] if answers else []
            if answers and host is PLAIN:
                cases += [(share, PLAIN.cache, PLAIN.cache) for share in _LIE_SHARES]
                cases += [(1.0, cache, there) for cache in ("q8_0", "q4_0") for there in (cache, PLAIN.cache)]
            for lies, cache, there in cases:
                found: list[tuple[list[float], list[float], Found, Found]] = []
                for how, reference in references(pool, announced, there).items():
                    # The coarser copy beside it has to be there, too.
                    if not pool.get(_key(COARSER[announced], how)) or (lies < 1.0 and how is not PLAIN):
                        continue
                    noise = noise_of(announced, there, cache)
                    gains, apart, leanings = _gains(pool, announced, how, reference, answers, noise, cache)
                    truth = _gains(pool, announced, how, reference, pool[_key(announced, PLAIN)], noise, cache)[0]
                    simulated = [
                        simulate(some, arguments.hosts, _LIAR_CANARIES, len(rows), lies=lies, truth=honestly)
                        for some, honestly in ((gains[:, :2], truth[:, :2]), (gains[:, -1:], truth[:, -1:]))
                    ]
                    found.append((apart, leanings, simulated[0], simulated[1]))
                if not found:
                    continue
                apart, leanings, worst, _ = min(found, key=lambda one: one[2].within)
                rows.append(
                    Liar(
                        model, announced, cache, kind, host.name, there, lies, median(apart or [0.0]),
                        median(leanings) if leanings else None, min(one[3].within for one in found),
                        worst.within, worst.mean, worst.slowest, worst.accused, worst.hosts,
                    )
                )  # fmt: skip
    return rows


def shown(rows: list[Honest], others: list[Liar], canaries: int) -> str:
    """For people."""
    honest_table = table(
        ("model", "file", "host", "reference", "answers", "difference", "99 %", "largest", "leaning", "mean ratio",
         "accused", "of", "tests"),
        [
            (one.model, one.announced, one.host, one.cache, one.answers, f"{one.median:.4f}", f"{one.most:.4f}",
             f"{one.largest:.4f}", one.lean, f"{one.ratio:.3f}", one.accused, one.hosts, one.tests)
            for one in rows
        ],
    )  # fmt: skip
    liar_table = table(
        ("model", "announced", "cache", "served", "host", "reference", "lies", "difference", "leaning", "alone",
         "within 20", "mean", "99 % after", "found"),
        [
            (one.model, one.announced, one.cache, one.served, one.host, one.reference, f"{one.lies:.0%}",
             f"{one.median:.4f}", one.lean, f"{one.alone:.2%}", f"{one.within:.2%}", f"{one.mean:.1f}", one.slowest,
             f"{one.accused / one.hosts:.2%}")
            for one in others
        ],
    )  # fmt: skip
    return f"Honest hosts, {canaries} canaries each:\n{honest_table}\n\nLiars:\n{liar_table}"


def cost(written: list[float], arguments: argparse.Namespace, others: list[Liar]) -> str:
    """What a canary costs, and what work of clients it takes until a liar is found. `written`: tokens of answers."""
    whole = [one.mean for one in others if one.lies == 1.0 and one.cache == one.reference and one.accused]
    asked = fmean(len(one.split()) for one in questions("soft", arguments.questions))
    due = (fmean(written) + _PROMPT_WEIGHT * asked) / _SHARE
    return (
        f"A canary is {fmean(written):.0f} tokens written and about {asked:.0f} read. At {_SHARE:.0%} of the load, one "
        f"is due after {due:,.0f} tokens of clients; a liar is found after {fmean(whole) * due:,.0f}."
    )


def main() -> int:
    """Run and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", default=["tiny", "sharp", "soft"], type=lambda words: words.split(","))
    options.add_argument("--questions", type=int, default=240)
    options.add_argument("--tokens", type=int, default=24)
    options.add_argument("--hosts", type=int, default=10_000)
    options.add_argument("--canaries", type=int, default=400, help="of each honest host")
    names = ", ".join(how.name for how in HONEST)
    options.add_argument(
        "--without", default=[], type=lambda words: words.split(","), help=f"configurations to leave out, of: {names}"
    )
    options.add_argument("--only", default=[], type=lambda words: words.split(","), help="configurations to run now")
    options.add_argument("--no-table", action="store_true", help="only ask the engines, and keep their answers")
    options.add_argument("--quick", action="store_true", help="without Vulkan and RPC, and with less of all else")
    options.add_argument("--pools", type=Path, default=RESULTS / "trust", help="where answers are kept")
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.models, arguments.questions, arguments.canaries = ["tiny"], 40, 100
        arguments.without = [*(how.name for how in HONEST if how.vulkan or how.split or "threads" in how.changes)]
    store = Store(arguments.pools, arguments.tokens)
    asyncio.run(measure(arguments, store))
    if arguments.no_table:
        return 0
    rows: list[Honest] = []
    others: list[Liar] = []
    written: list[float] = []
    arguments.only = []
    for model in arguments.models:
        pool = {_key(*one): store.load(model, _key(*one)) for one in wanted(arguments)}
        written += [len(answer.tokens) for answer in pool[_key("q8_0", PLAIN)].values()]
        rows += honest(model, pool, arguments)
        others += liars(model, pool, arguments)
        print(f"{model}: compared", file=sys.stderr, flush=True)
    print(shown(rows, others, arguments.canaries))
    print(cost(written, arguments, others))
    if arguments.json:
        found = {
            "machine": machine(),
            "honest": [asdict(one) for one in rows],
            "liars": [asdict(one) for one in others],
        }
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
