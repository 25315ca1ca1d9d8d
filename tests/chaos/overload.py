"""`python -m tests.chaos.overload [--minutes 10]`: ten times as many clients as the mesh has places for.

Two nodes serve one model, a third one passes requests on. At two of the three doors clients ask without end: half of
them come back when they are told to, half after a second whatever they are told. At the third door one modest client
asks one question after the other. Every request must end with the undisturbed answer or with a 429 that says when to
come back, the modest client must be refused nothing, memory must stay flat, and afterwards all must be as before, at
once.
"""

import argparse
import asyncio
import datetime
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from tests.chaos.load import Asked, Load
from tests.chaos.questions import End, Question, questions
from tests.chaos.report import OVERLOAD_BEGIN, OVERLOAD_FINISH, write
from tests.chaos.run import undisturbed
from tests.chaos.soak import Course, memory_problem
from tests.chaos.watch import Holding, at_rest, grown, holding
from tests.support.gguf_models import cached_model
from tests.support.node import NodeProcess
from tests.support.pool import named, until, warm

from mesh_llm.runtime.supervision import TaskScope

MODEL = "red"
SLOTS = 2
QUEUE_WAIT = "2"
"""Seconds. With the default, so few clients on so small a model would be no overload."""
PLACES = 2 * (SLOTS + 1 + 40)
"""About what two engines have: slots, one more each, and a queue of this many seconds at 20 answers a second."""
TIMES = 10
IMPATIENT = 1.0
"""Seconds after which those who do not listen ask again."""
AGAIN_WITHIN = 10.0
"""Seconds in which a question must be answered once the flood is over: more than any takes, less than a line's wait."""
_PERIOD, _STEP = 5.0, 0.1
_LEAST_FOR_MEMORY = 300.0
"""Seconds below which memory still rises because caches and pools fill."""
_CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d" / "models"


@dataclass
class Outcome:
    """What came of a run.

    `again`: seconds of the first answer at each door after it. `stood`: for how long, at most, the clients themselves
    did nothing, because they had no processor: nodes cannot be blamed for so many seconds.
    """

    seconds: float
    clients: int
    ends: Counter[End] = field(default_factory=Counter[End])
    waits: list[float] = field(default_factory=list[float])
    modest: list[Asked] = field(default_factory=list[Asked])
    courses: list[Course] = field(default_factory=list[Course])
    again: list[float] = field(default_factory=list[float])
    stood: float = 0.0
    before: list[Holding] = field(default_factory=list[Holding])
    after: list[Holding] = field(default_factory=list[Holding])
    problems: list[str] = field(default_factory=list[str])


class Flood:
    """The many. What came of their requests goes to `outcome`."""

    def __init__(self, load: Load, asked: Sequence[Question], outcome: Outcome) -> None:
        self._load = load
        self._asked = asked
        self._outcome = outcome
        self.over = asyncio.Event()

    async def client(self, number: int, door: int) -> None:
        """Ask until it is over."""
        turn = number
        while not self.over.is_set():
            one = await self._load.ask(self._asked[turn % len(self._asked)], door)
            turn += 1
            wait = self._judge(one)
            if wait:
                try:
                    async with asyncio.timeout(wait if number % 2 else IMPATIENT):
                        await self.over.wait()
                except TimeoutError:
                    continue

    def _judge(self, one: Asked) -> float:
        """Count it; seconds until it may be asked again, 0 for at once."""
        self._outcome.ends[one.end or End.HUNG] += 1
        if one.end is End.WHOLE:
            return 0.0
        told = one.headers.get("retry-after", "")
        if one.end is End.REFUSED and one.status == 429 and told.isdigit() and int(told) >= 1:
            self._outcome.waits.append(float(told))
            return float(told)
        self._outcome.problems.append(_told(one))
        return IMPATIENT


async def overload(seconds: float, directory: Path, clients: int = TIMES * PLACES) -> Outcome:
    """Run it."""
    outcome = Outcome(seconds, clients)
    nodes: list[NodeProcess] = []
    try:
        await _start(directory, nodes)
        asked = questions((MODEL,), 128, 2, 1)
        expected = await undisturbed(nodes, asked)
        outcome.before = [await holding(node) for node in nodes]
        await _flood(nodes, asked, expected, outcome)
        load = Load(nodes, (), expected, clients=0, pause=0.0, seed=0)
        for door in range(len(nodes)):
            first = await load.ask(asked[0], door)
            outcome.again.append(first.ended - first.began)
            if first.end is not End.WHOLE or outcome.again[-1] > AGAIN_WITHIN:
                outcome.problems.append(
                    f"afterwards at node{door}: {first.end} after {outcome.again[-1]:.1f} s: {first.why}"
                )
        outcome.after = [await at_rest(node, before) for node, before in zip(nodes, outcome.before, strict=True)]
    finally:
        for node in nodes:
            await node.close()
    outcome.problems += _problems(outcome)
    return outcome


async def _start(directory: Path, nodes: list[NodeProcess]) -> None:
    _CACHE.mkdir(parents=True, exist_ok=True)
    model = named(cached_model(_CACHE, "small"), MODEL, directory / "models")
    join: list[str] = []
    for number in range(3):
        patience = ("--queue-wait", QUEUE_WAIT)
        sizes = (*patience, "--ctx-size", "1024", "--parallel", str(SLOTS), "--no-draft")
        last = number == 2
        node = await NodeProcess.start(
            directory / f"node{number}",
            models=[] if last else [model],
            join=join,
            client=last,
            arguments=patience if last else sizes,
            models_dir=directory / "none" if last else model.parent,
        )
        nodes.append(node)
        join = join or [await node.invite()]
    await asyncio.gather(*(until(node, warm(MODEL, 2), "seeing both hosts", 120.0) for node in nodes))


async def _flood(
    nodes: Sequence[NodeProcess],
    asked: Sequence[Question],
    expected: dict[tuple[str, str, str, int], str],
    outcome: Outcome,
) -> None:
    load = Load(nodes, (), expected, clients=0, pause=0.0, seed=0, keeps=False)
    flood = Flood(load, asked, outcome)
    failures: list[BaseException] = []
    scope = TaskScope("overload", failures.append)
    running = [
        scope.spawn(flood.client(number, 1 + number % 2), f"client {number}") for number in range(outcome.clients)
    ]
    outcome.courses = [Course() for _ in nodes]
    modest = scope.spawn(_modest(load, asked, flood, outcome), "the modest one")
    scope.spawn(_own_pauses(outcome), "own pauses")
    began = time.monotonic()
    while time.monotonic() - began < outcome.seconds and not failures:
        await asyncio.sleep(_PERIOD)
        for course, node in zip(outcome.courses, nodes, strict=True):
            course.at.append(time.monotonic() - began)
            course.held.append(await holding(node))
    flood.over.set()
    await asyncio.gather(*running, modest)
    await scope.close()
    if failures:
        raise failures[0]


async def _modest(load: Load, asked: Sequence[Question], flood: Flood, outcome: Outcome) -> None:
    turn = 0
    while not flood.over.is_set():
        outcome.modest.append(await load.ask(asked[turn % len(asked)], 0))
        turn += 1


async def _own_pauses(outcome: Outcome) -> None:
    while True:
        began = time.monotonic()
        await asyncio.sleep(_STEP)
        outcome.stood = max(outcome.stood, time.monotonic() - began - _STEP)


def _told(one: Asked) -> str:
    took = f"after {one.ended - one.began:.1f} s"
    return f"{one.question.api} at node{one.door}: {one.end} {took}, status {one.status}: {one.why}"


def _problems(outcome: Outcome) -> list[str]:
    found = [f"the modest client: {_told(one)}" for one in outcome.modest if one.end is not End.WHOLE]
    if not outcome.waits:
        found.append("nobody was refused: this was no overload")
    if outcome.seconds >= _LEAST_FOR_MEMORY:
        for number, course in enumerate(outcome.courses):
            found += memory_problem(f"node{number}", course)
    for number, (before, after) in enumerate(zip(outcome.before, outcome.after, strict=True)):
        found += [f"node{number}: {text}" for text in grown(before, after)]
    return found


def table(outcome: Outcome, day: str) -> str:
    """Markdown, without the markers."""
    return "\n".join(_lines(outcome, day))


def _lines(outcome: Outcome, day: str) -> Iterator[str]:
    took = [one.ended - one.began for one in outcome.modest] or [0.0]
    total = outcome.ends.total()
    yield (
        f"`make overload` on {day}, {os.cpu_count()} cores: {outcome.seconds / 60:.0f} minutes, {outcome.clients} "
        f"clients for {PLACES} places; {total} requests, {outcome.ends[End.WHOLE]} whole and right, "
        f"{len(outcome.waits)} sent away with 429 and a Retry-After of {min(outcome.waits, default=0):.0f} to "
        f"{max(outcome.waits, default=0):.0f} s (median {median(outcome.waits or [0]):.0f}). The modest client asked "
        f"{len(outcome.modest)} times, and waited {median(took):.1f} s (median), {max(took):.1f} s at most. After the "
        f"flood the first answer at each door came after {', '.join(f'{one:.1f}' for one in outcome.again)} s. The "
        f"clients' own longest pause was {outcome.stood:.1f} s."
    )
    yield ""
    yield "| Node | Memory, MB: first third → last third; before, after | Tasks before, at most, after | Descriptors |"
    yield "|---|---|---|---|"
    for number, course in enumerate(outcome.courses):
        first, last = course.thirds()
        before, after = outcome.before[number], outcome.after[number]
        memory = " → ".join(f"{mean(one.rss_mb for one in third):.1f}" for third in (first, last))
        counts = [f"{of(before)}, {max(of(one) for one in course.held)}, {of(after)}" for of in (_tasks, _descriptors)]
        yield f"| node{number} | {memory}; {before.rss_mb}, {after.rss_mb} | {counts[0]} | {counts[1]} |"
    yield ""
    yield "Violations: none." if not outcome.problems else f"Violations: {len(outcome.problems)}."
    yield from (f"- {problem[:300]}" for problem in outcome.problems[:20])


def _tasks(held: Holding) -> int:
    return held.tasks


def _descriptors(held: Holding) -> int:
    return held.descriptors


def main() -> int:
    """Run by command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.overload")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--write", type=Path, help="put the table into this file, between its markers")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overload-") as scratch:
        outcome = asyncio.run(overload(chosen.minutes * 60, Path(scratch)))
    text = table(outcome, datetime.datetime.now(datetime.UTC).date().isoformat())
    print(text)
    if chosen.write is not None:
        write(chosen.write, text, OVERLOAD_BEGIN, OVERLOAD_FINISH)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
