"""The table of a run in docs/clients.md."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.conform.places import CLIENT, ENGINE, NODE

BEGIN, END = "<!-- conform -->\n", "<!-- end of conform -->\n"
_ORDER = (NODE, CLIENT, ENGINE)


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


def tables(results: Sequence[Result]) -> str:
    """What was passed where, and each difference and failure with its reason, in Markdown."""
    lines = [
        "| Client | Version | Through a node | Through a client node | The engine alone |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        shown = [_passed(result, place) for place in _ORDER]
        lines.append(f"| {result.suite} | {result.versions} | {' | '.join(shown)} |")
    lines += ["", "| Client | Case | Node | Client node | Engine | Reason |", "|---|---|---|---|---|---|"]
    for result in results:
        cases = dict.fromkeys(outcome.case for place in _ORDER for outcome in result.outcomes.get(place, []))
        for case in cases:
            found = [result.of(place).get(case) for place in _ORDER]
            if all(outcome is not None and outcome.passed for outcome in found):
                continue
            reason = next((outcome.reason for outcome in found if outcome is not None and outcome.reason), "")
            marks = " | ".join("yes" if outcome is not None and outcome.passed else "no" for outcome in found)
            lines.append(f"| {result.suite} | {case} | {marks} | {_cell(reason)} |")
    return "\n".join(lines) + "\n"


def write(page: Path, results: Sequence[Result]) -> None:
    """Put the tables into the page, in the place of those of the last run."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the tables")
    page.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{after}", encoding="utf-8")


def _passed(result: Result, place: str) -> str:
    outcomes = result.outcomes.get(place, [])
    return f"{sum(outcome.passed for outcome in outcomes)} of {len(outcomes)}" if outcomes else "-"


def _cell(reason: str) -> str:
    return reason.replace("|", "/").replace("`", "'").replace("http://", "")[:120]
