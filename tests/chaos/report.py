"""The table of faults and outcomes, as `docs/reliability.md` holds it between two markers."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.questions import End
from tests.chaos.run import Outcome

BEGIN, FINISH = "<!-- chaos: begin -->", "<!-- chaos: end -->"
SOAK_BEGIN, SOAK_FINISH = "<!-- soak: begin -->", "<!-- soak: end -->"
OVERLOAD_BEGIN, OVERLOAD_FINISH = "<!-- overload: begin -->", "<!-- overload: end -->"


def table(outcome: Outcome, day: str) -> str:
    """Markdown, without the markers."""
    return "\n".join(_lines(outcome, day))


def write(path: Path, text: str, first: str = BEGIN, last: str = FINISH) -> None:
    """Put the table between two markers of a file, which must have them."""
    before, begin, rest = path.read_text().partition(first)
    _, finish, after = rest.partition(last)
    if not begin or not finish:
        raise ValueError(f"{path} has no place for the table: {first} and {last}")
    path.write_text(f"{before}{first}\n{text}\n{last}{after}")


def _lines(outcome: Outcome, day: str) -> Iterator[str]:
    ends = [one.end for one in outcome.asked]
    yield (
        f"`make chaos` on {day}, {os.cpu_count()} cores ({platform.machine()}, {platform.system()}), seed "
        f"{outcome.plan.seed}: {outcome.took / 60:.1f} minutes, {len(outcome.strikes)} faults, {len(ends)} requests "
        f"by {outcome.plan.clients} clients; {sum(end is End.WHOLE for end in ends)} whole and right, "
        f"{sum(end is End.WRONG for end in ends)} wrong, {sum(end is End.HUNG for end in ends)} hung."
    )
    yield ""
    yield (
        "| Fault | Times | Requests meanwhile | Whole | Error at once | Broken off with an error | "
        "Streams on the struck node | of them carried on | Its own clients | Whole mesh again, at most |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in outcome.verdict.rows.values():
        cells = (
            row.fault,
            row.times,
            row.requests,
            row.ends[End.WHOLE],
            row.ends[End.REFUSED],
            row.ends[End.BROKEN],
            row.hit,
            row.carried_on,
            row.own_clients,
            f"{row.longest:.1f} s",
        )
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"
    calm = outcome.verdict.calm
    yield f"| none | | {calm.total()} | {calm[End.WHOLE]} | {calm[End.REFUSED]} | {calm[End.BROKEN]} | | | | |"
    yield ""
    problems = outcome.problems
    yield f"Violations: {len(problems) or 'none'}." if problems else "Violations: none."
    # What was last seen of a node is long, and holds an invite.
    yield from (f"- {problem.splitlines()[0].partition('; last seen')[0][:300]}" for problem in problems[:20])
