"""Graphs that the firewall accepts, computed under sanitizers: `python -m tests.oracle --minutes 60 --seed 1`.

Needs `make sanitized-rpc`. What a sanitizer, an assertion, a signal or a hang ends is a finding: it is made small, and
saved with its requests and the report. `--replay FILE` does a saved one again. Ends with 1 where something was found.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

from tests.chaos.report import write
from tests.oracle.connection import Connection, Content, Tally
from tests.oracle.finding import Story, described, replay, smaller
from tests.oracle.runner import BUILDS, VARIANTS, Runner, RunnerDiedError, program
from tests.oracle.templates import Templates

from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.wire.ggml_rpc.rules import RULES_BY_NAME

BEGIN, FINISH = "<!-- oracle: begin -->", "<!-- oracle: end -->"
_TURN = 400
"""Connections until the other kernels have their turn."""


class Oracle:
    """One seed gives one sequence of connections, as long as the firewall judges the same."""

    def __init__(self, seed: int, save: Path | None = None) -> None:
        self.tally = Tally()
        self.found: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._content = Content(self._chance)
        self._templates = Templates(self._chance)
        self._save = save

    def run(self, seconds: float, variant: str) -> None:
        """Try graphs for so long."""
        end = time.monotonic() + seconds
        self._templates.turn()
        with Runner(variant) as runner:
            for _ in range(_TURN):
                if time.monotonic() >= end:
                    return
                connection = Connection(self._chance, self._content, runner, self.tally, self._templates)
                try:
                    connection.run()
                except RunnerDiedError as died:
                    self._note(connection, died, variant)

    def _note(self, connection: Connection, died: RunnerDiedError, variant: str) -> None:
        summary = died.summary
        self.found[summary] += 1
        if self.found[summary] > 1:
            return
        print(f"FOUND {summary}", flush=True)
        if self._save is None:
            return
        steps = smaller(variant, connection.steps, connection.threads, summary)
        story = Story(summary, variant, connection.threads, steps)
        self._save.mkdir(parents=True, exist_ok=True)
        name = (
            f"{len(list(self._save.glob('**/*.xz'))) + 1:03}-{''.join(c if c.isalnum() else '-' for c in summary)[:80]}"
        )
        story.save(self._save / f"{name}.msgpack.xz")
        (self._save / f"{name}.md").write_text(described(story, died.report))


def table(tally: Tally, seconds: float, found: int) -> str:
    """The figures as Markdown."""
    tried = Counter(name for name, _ in tally.types)
    lines = [
        "| | |",
        "|---|---:|",
        f"| accepted graphs | {tally.graphs:,} |",
        f"| nodes in accepted graphs | {tally.nodes:,} |",
        f"| accepted graphs with a change that no constructor makes | {tally.twisted:,} |",
        f"| graphs computed again | {tally.recomputed:,} |",
        f"| accepted requests, including graphs | {tally.requests:,} |",
        f"| refused graphs | {tally.refused:,} |",
        f"| connections | {tally.connections:,} |",
        f"| connections that the rpc-server closed | {tally.closed:,} |",
        f"| seconds | {seconds:,.0f} |",
        f"| **reports** | **{found:,}** |",
        "",
        "| operator | graphs proposed | accepted | types of the first operand, of the allowed ones |",
        "|---|---:|---:|---:|",
    ]
    for name in sorted({*RULES_BY_NAME, *(name for name in tally.accepted if tally.accepted[name])}):
        rule = RULES_BY_NAME.get(name)
        kinds = f"{tried[name]} of {len(rule.operands[0].types)}" if rule is not None and rule.operands else ""
        lines.append(f"| {name} | {tally.proposed[name]:,} | {tally.accepted[name]:,} | {kinds} |")
    never = sorted(name for name in tally.proposed if not tally.accepted[name])
    return "\n".join([*lines, "", f"Proposed and never accepted: {', '.join(never) or 'none'}."])


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run")
    parser.add_argument("--save", type=Path, default=BUILDS / "findings", help="where findings are written")
    parser.add_argument("--variant", choices=VARIANTS, help="only these kernels")
    parser.add_argument("--write", type=Path, help="put the table between the two markers of this file")
    parser.add_argument("--replay", type=Path, nargs="+", help="saved findings to do again")
    arguments = parser.parse_args()
    variants: list[str] = [arguments.variant] if arguments.variant else list(VARIANTS)
    if missing := [variant for variant in variants if not program(variant).exists()]:
        print(f"{program(missing[0])} is not there. Run `make sanitized-rpc` first.", file=sys.stderr)
        return 2
    if arguments.replay:
        return _replay(arguments.replay)
    seed: int = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    oracle = Oracle(seed, arguments.save)
    begun, reported, turn = time.monotonic(), 0.0, 0
    while (gone := time.monotonic() - begun) < arguments.minutes * 60:
        # Every fourth turn: the kernels in plain C, which no wheel of ours has on this processor.
        variant = variants[turn % 4 == 3] if len(variants) > 1 else variants[0]
        oracle.run(min(60.0, arguments.minutes * 60 - gone), variant)
        turn += 1
        if gone - reported >= 60:
            reported = gone
            t = oracle.tally
            print(
                f"{gone / 60:5.1f} min: {t.graphs:,} graphs, {t.nodes:,} nodes, {t.recomputed:,} computed again, "
                f"{t.refused:,} refused, {t.closed} closed by the server, {sum(oracle.found.values())} reports of "
                f"{len(oracle.found)} kinds",
                flush=True,
            )
    text = table(oracle.tally, time.monotonic() - begun, sum(oracle.found.values()))
    print(text)
    for reason, count in oracle.tally.reasons.most_common(40):
        print(f"{count:12,}  {reason}")
    for summary, count in oracle.found.most_common():
        print(f"{count:12,}  {summary}")
    if arguments.write:
        command = f"`make fuzz ARGS='--minutes {arguments.minutes:g} --seed {seed}'`"
        write(arguments.write, f"{command}, engine {VERSION}:\n\n{text}", BEGIN, FINISH)
    return 1 if oracle.found else 0


def _replay(paths: list[Path]) -> int:
    bad = 0
    for path in paths:
        story = Story.load(path)
        with Runner(story.variant) as runner:
            done = replay(runner, story.steps, story.threads)
        if done.died is not None:
            bad += 1
            print(f"{path.name}: {done.died.summary}\n{described(story, done.died.report)}")
        else:
            print(f"{path.name}: {f'refused: {done.refused}' if done.refused else 'computed without a report'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
