"""`python -m tests.chaos.soak [--minutes 60]`: load at half capacity and no faults; what nodes hold must stay flat."""

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
from statistics import mean

from tests.chaos.load import Load
from tests.chaos.mesh import MODELS, ChaosMesh, own_mounts
from tests.chaos.questions import End, questions
from tests.chaos.report import SOAK_BEGIN, SOAK_FINISH, write
from tests.chaos.run import undisturbed
from tests.chaos.watch import Holding, holding

CLIENTS = 5
"""As many as half of the ten slots; each rests for as long as its last answer took."""
_SAMPLES = 60
_LEAST_PERIOD = 5.0
_WARM_UP = 0.15
"""Part of the time for which caches and pools may fill."""

_LIMITS = {"processes": 0.5, "ports": 0.5, "threads": 2.0, "descriptors": 6.0, "tasks": 6.0}
_RSS_PART, _RSS_MB = 0.05, 6.0
_JOURNAL_PART, _JOURNAL_BYTES = 0.3, 4096.0


@dataclass
class Course:
    """One node's holdings over time; `at` in seconds since the load began."""

    at: list[float] = field(default_factory=list[float])
    held: list[Holding] = field(default_factory=list[Holding])

    def thirds(self) -> tuple[list[Holding], list[Holding]]:
        """After the warm-up: the first third of the samples, and the last."""
        settled = self.held[int(len(self.held) * _WARM_UP) :]
        size = max(1, len(settled) // 3)
        return settled[:size], settled[-size:]

    def journal_rates(self) -> tuple[float, float]:
        """Bytes a minute in these thirds."""
        first = int(len(self.held) * _WARM_UP)
        size = max(1, (len(self.held) - first) // 3)
        return self._rate(first, first + size), self._rate(len(self.held) - 1 - size, len(self.held) - 1)

    def _rate(self, begin: int, end: int) -> float:
        seconds = self.at[end] - self.at[begin]
        return 60.0 * (self.held[end].journal - self.held[begin].journal) / seconds if seconds > 0 else 0.0


def problems(name: str, course: Course) -> list[str]:
    """What grew, a sentence each."""
    first, last = course.thirds()
    found: list[str] = []
    for what, limit in _LIMITS.items():
        before, after = (mean(one.as_dict()[what] for one in third) for third in (first, last))
        if after - before > limit:
            found.append(f"{name}: {what} grew from {before:.1f} to {after:.1f}")
    found += memory_problem(name, course)
    before, after = course.journal_rates()
    if after > before * (1 + _JOURNAL_PART) + _JOURNAL_BYTES:
        found.append(f"{name}: the journal grew by {before:.0f}, later by {after:.0f} bytes a minute")
    return found


def memory_problem(name: str, course: Course) -> list[str]:
    """A sentence where a node's memory grew, else nothing."""
    before, after = (mean(one.rss_mb for one in third) for third in course.thirds())
    grew = after > before * (1 + _RSS_PART) + _RSS_MB
    return [f"{name}: memory grew from {before:.1f} to {after:.1f} MB"] if grew else []


async def soak(seconds: float, directory: Path) -> tuple[list[Course], Counter[End], list[str]]:
    """Run it: the courses by node, the ends of all requests, and what is wrong."""
    mesh = ChaosMesh(directory, journals=True)
    try:
        await mesh.start()
        asked = questions(MODELS, 200, 2, 1)
        load = Load(mesh.nodes, asked, await undisturbed(mesh.nodes, asked), clients=CLIENTS, pause=None, seed=1)
        load.start()
        courses = [Course() for _ in mesh.nodes]
        began = time.monotonic()
        period = max(_LEAST_PERIOD, seconds / _SAMPLES)
        while time.monotonic() - began < seconds and load.failure is None:
            await asyncio.sleep(period)
            for number, node in enumerate(mesh.nodes):
                courses[number].at.append(time.monotonic() - began)
                courses[number].held.append(await holding(node, mesh.journal(number)))
        await load.stop()
        if load.failure is not None:
            raise load.failure
        ends = Counter(one.end or End.HUNG for one in load.asked)
        wrong = [f"{one.question}: {one.end}: {one.why}" for one in load.asked if one.end is not End.WHOLE]
        return courses, ends, wrong
    finally:
        await mesh.close()


def table(courses: Sequence[Course], ends: Counter[End], seconds: float, day: str, found: Sequence[str]) -> str:
    """Markdown, without the markers."""
    return "\n".join(_lines(courses, ends, seconds, day, found))


def _lines(
    courses: Sequence[Course], ends: Counter[End], seconds: float, day: str, found: Sequence[str]
) -> Iterator[str]:
    yield (
        f"`make soak` on {day}, {os.cpu_count()} cores: {seconds / 60:.0f} minutes, {ends.total()} requests, "
        f"{ends[End.WHOLE]} whole and right. Means of the first and the last third, after a warm-up:"
    )
    yield ""
    yield "| Node | Memory, MB | Descriptors | Tasks | Threads | Journal, bytes a minute |"
    yield "|---|---|---|---|---|---|"
    for number, course in enumerate(courses):
        first, last = course.thirds()
        cells = [f"node{number}"]
        for what in ("rss_mb", "descriptors", "tasks", "threads"):
            before, after = (mean(one.as_dict()[what] for one in third) for third in (first, last))
            cells.append(f"{before:.1f} → {after:.1f}")
        cells.append(" → ".join(f"{rate:.0f}" for rate in course.journal_rates()))
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield "Nothing grew." if not found else "What was wrong:"
    yield from (f"- {problem[:300]}" for problem in found[:20])


def main() -> int:
    """Run by command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--write", type=Path, help="put the table into this file, between its markers")
    chosen = parser.parse_args()
    seconds = chosen.minutes * 60
    own_mounts()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        courses, ends, wrong = asyncio.run(soak(seconds, Path(scratch)))
    found = wrong + [text for number, course in enumerate(courses) for text in problems(f"node{number}", course)]
    text = table(courses, ends, seconds, datetime.datetime.now(datetime.UTC).date().isoformat(), found)
    print(text)
    if chosen.write is not None:
        write(chosen.write, text, SOAK_BEGIN, SOAK_FINISH)
    return 1 if found else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
