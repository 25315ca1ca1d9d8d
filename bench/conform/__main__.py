"""Try clients of pinned versions against the engine alone, a node, and a client node: `python -m bench conform`.

`--write` puts the tables into docs/clients.md; rows of clients that were not run stay. Exit status 1 where a case
fails through mesh-llm that passes on the engine alone. `--suite NAME --prepare` installs what is too large to be
installed unasked: agents, and generators of load.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.common import ROOT
from bench.conform import report, suites
from bench.conform.places import ENGINE, Place, agent_places, places
from bench.conform.report import Outcome, Result
from bench.conform.suites import Suite

PAGE = ROOT / "docs" / "clients.md"
_SUITE_SECONDS = 600


def prepare(chosen: Sequence[Suite] = tuple(suite for suite in suites.ALL if not suite.large)) -> None:
    """Install the libraries of suites; says which cannot be tried here."""
    for suite in chosen:
        try:
            suites.prepare(suite)
        except (suites.MissingProgramError, subprocess.CalledProcessError) as failure:
            print(f"{suite.name}: not tried: {failure}", file=sys.stderr, flush=True)


async def run(suite: Suite, place: Place) -> list[Outcome]:
    """All cases of a suite in one place."""
    argv, directory = suites.command(suite)
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=directory,
        env=suites.environment(place.environment),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_SUITE_SECONDS):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        output, errors = await process.communicate()
        errors += f"it took more than {_SUITE_SECONDS} s".encode()
    outcomes = read(output)
    if process.returncode or not outcomes:
        lines = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        outcomes.append(Outcome("the program itself", passed=False, reason=lines[-1][:300]))
    return outcomes


def read(output: bytes) -> list[Outcome]:
    """The outcomes that a suite's program printed, a line of JSON each."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.startswith("{")]
    return [Outcome(told["case"], told["passed"], told["reason"]) for told in map(json.loads, lines)]


async def run_all(chosen: Sequence[Suite]) -> list[Result]:
    """Every suite in every place."""
    results = {suite: Result(suite.name, suites.versions(suite)) for suite in chosen}
    for group, tried in ((places, [s for s in chosen if not s.agent]), (agent_places, [s for s in chosen if s.agent])):
        if not tried:
            continue
        with tempfile.TemporaryDirectory(prefix="conform-") as directory:
            async with group(Path(directory)) as there:
                await _run_in(there, {suite: results[suite] for suite in tried})
    return list(results.values())


async def _run_in(there: Sequence[Place], results: Mapping[Suite, Result]) -> None:
    for suite, result in results.items():
        for place in there:
            if place.name == ENGINE and not suite.engine:
                continue
            outcomes = result.outcomes[place.name] = await run(suite, place)
            passed = sum(outcome.passed for outcome in outcomes)
            print(f"{suite.name}, {place.name}: {passed} of {len(outcomes)}", flush=True)
            for outcome in outcomes:
                if not outcome.passed:
                    print(f"  {outcome.case}: {outcome.reason}", flush=True)


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.conform", description=__doc__)
    parser.add_argument("--suite", action="append", metavar="NAME", help="only those whose name begins so; repeatable")
    parser.add_argument("--prepare", action="store_true", help="only install them, with the network")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/clients.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes")
    options = parser.parse_args()
    named = tuple(options.suite or ())
    chosen = [suite for suite in suites.ALL if (suite.name.startswith(named) if named else not suite.large)]
    if not chosen:
        parser.error(f"there are: {', '.join(suite.name for suite in suites.ALL)}")
    if options.prepare:
        prepare(chosen)
        return 0
    results = asyncio.run(run_all(chosen))
    print(report.tables(results))
    if options.write:
        report.write(PAGE, results)
    if options.json is not None:
        told = {
            result.suite: {place: [vars(one) for one in outcomes] for place, outcomes in result.outcomes.items()}
            for result in results
        }
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    worse = [(result.suite, outcome) for result in results for outcome in result.worse]
    for suite, outcome in worse:
        print(f"{suite}: {outcome.case} passes on the engine alone: {outcome.reason}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
