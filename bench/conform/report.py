"""The table of a run in docs/clients.md."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.conform.places import CLIENT, ENGINE, NODE

BEGIN, END = "<!-- conform -->\n", "<!-- end of conform -->\n"
_ORDER = (NODE, CLIENT, ENGINE)
_HEADS = (
    ("| Client | Version | Through a node | Through a client node | The engine alone |", "|---|---|---|---|---|"),
    ("| Client | Case | Node | Client node | Engine | Reason |", "|---|---|---|---|---|---|"),
)


@dataclass(frozen=True)
class Outcome:
    """What came of one case in one place; `reason`: why it failed."""

    case: str
    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """All outcomes of a suite, by place."""

    suite: str
    versions: str
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict[str, list[Outcome]])

    def of(self, place: str) -> dict[str, Outcome]:
        """Outcomes in a place, by case."""
        return {outcome.case: outcome for outcome in self.outcomes.get(place, [])}

    @property
    def worse(self) -> list[Outcome]:
        """Cases that pass on the engine alone and fail through mesh-llm: there should be none."""
        alone = self.of(ENGINE)
        return [
            outcome
            for place in (NODE, CLIENT)
            for outcome in self.of(place).values()
            if not outcome.passed and outcome.case in alone and alone[outcome.case].passed
        ]


def tables(results: Sequence[Result], earlier: str = "") -> str:
    """What was passed where, and each difference and failure with its reason, in Markdown.

    Of `earlier` tables the rows of other clients stay, before the new ones.
    """
    passed, differences = _rows(earlier, {result.suite for result in results})
    for result in results:
        shown = [_passed(result, place) for place in _ORDER]
        passed.append(f"| {result.suite} | {result.versions} | {' | '.join(shown)} |")
        cases = dict.fromkeys(outcome.case for place in _ORDER for outcome in result.outcomes.get(place, []))
        for case in cases:
            found = {place: result.of(place).get(case) for place in _ORDER if place in result.outcomes}
            if all(outcome is not None and outcome.passed for outcome in found.values()):
                continue
            reason = next((one.reason for one in found.values() if one is not None and one.reason), "")
            marks = " | ".join(_mark(found[place]) if place in found else "-" for place in _ORDER)
            differences.append(f"| {result.suite} | {case} | {marks} | {_cell(reason)} |")
    return "\n".join([*_HEADS[0], *passed, "", *_HEADS[1], *differences]) + "\n"


def _rows(earlier: str, replaced: Collection[str]) -> tuple[list[str], list[str]]:
    """The rows of two earlier tables, without those of some clients and without the heads."""
    parts = earlier.strip().split("\n\n") if earlier.strip() else ["", ""]
    passed, differences = (
        [row for row in part.splitlines()[2:] if row.split("|")[1].strip() not in replaced] for part in parts
    )
    return passed, differences


def write(page: Path, results: Sequence[Result]) -> None:
    """Put the rows into the page's tables, in the place of those of the last run of these clients."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    earlier, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the tables")
    page.write_text(f"{before}{BEGIN}\n{tables(results, earlier)}\n{END}{after}", encoding="utf-8")


def _passed(result: Result, place: str) -> str:
    outcomes = result.outcomes.get(place, [])
    return f"{sum(outcome.passed for outcome in outcomes)} of {len(outcomes)}" if outcomes else "-"


def _mark(outcome: Outcome | None) -> str:
    return "yes" if outcome is not None and outcome.passed else "no"


def _cell(reason: str) -> str:
    return reason.replace("|", "/").replace("`", "'").replace("http://", "")[:120]
