"""`mesh-llm simulate`: runs a mesh of many nodes in virtual time, or replays a journal."""

from pathlib import Path
from typing import Any

import click

from mesh_llm.cli.options import Number, json_option
from mesh_llm.cli.output import EXIT_FAILED, print_json, printable
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.errors import duration as span
from mesh_llm.daemon.journal import replay
from mesh_llm.simulation.invariants import Report
from mesh_llm.simulation.run import run
from mesh_llm.simulation.scenario import Scenario

_MOST_NODES = 20_000
_COUNT = Number(0, _MOST_NODES)
_TIME = Number(0, 86_400)


@click.command()
@click.option(
    "--nodes", type=click.IntRange(2, _MOST_NODES), default=100, show_default=True, metavar="N", help="Active nodes."
)
@click.option(
    "--clients", type=click.IntRange(0, 100_000), default=0, show_default=True, metavar="N", help="Passive nodes."
)
@click.option(
    "--models",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    metavar="N",
    help="Models that the nodes serve in turn; 0 for membership only.",
)
@click.option(
    "--duration",
    type=Number(1, 86_400),
    default=60.0,
    show_default=True,
    metavar="S",
    help="Length of the run, in virtual time.",
)
@click.option(
    "--join-over", type=_TIME, default=5.0, show_default=True, metavar="S", help="All nodes start within this time."
)
@click.option(
    "--loss",
    type=Number(0, 0.9),
    default=0.0,
    show_default=True,
    metavar="PART",
    help="Part of the messages that is lost.",
)
@click.option(
    "--duplicate",
    type=Number(0, 0.9),
    default=0.0,
    show_default=True,
    metavar="PART",
    help="Part of the messages that arrives twice.",
)
@click.option(
    "--delay-ms", type=Number(0, 10_000), default=2.0, show_default=True, metavar="MS", help="Mean delay, one way."
)
@click.option(
    "--skew",
    "skew_seconds",
    type=_TIME,
    default=0.0,
    show_default=True,
    metavar="S",
    help="Largest difference between clocks.",
)
@click.option("--crash-at", type=_TIME, metavar="S", help="Kill nodes at this time.")
@click.option(
    "--crash",
    type=_COUNT,
    default=0.1,
    show_default=True,
    metavar="N",
    help="How many to kill: a part below 1, or a number.",
)
@click.option("--restart-after", type=_TIME, metavar="S", help="Start the killed nodes again after this long.")
@click.option("--freeze-at", type=_TIME, metavar="S", help="Freeze nodes at this time, as a closed laptop does.")
@click.option("--freeze", type=_COUNT, default=1.0, show_default=True, metavar="N", help="How many to freeze.")
@click.option(
    "--thaw-after",
    type=_TIME,
    default=30.0,
    show_default=True,
    metavar="S",
    help="Thaw the frozen nodes after this long.",
)
@click.option("--cut-at", type=_TIME, metavar="S", help="Cut the mesh in two at this time.")
@click.option(
    "--cut", type=_COUNT, default=0.5, show_default=True, metavar="N", help="How many nodes are on the smaller side."
)
@click.option(
    "--heal-after", type=_TIME, default=30.0, show_default=True, metavar="S", help="End the cut after this long."
)
@click.option("--leave-at", type=_TIME, metavar="S", help="Nodes leave the mesh properly at this time.")
@click.option("--leave", type=_COUNT, default=1.0, show_default=True, metavar="N", help="How many leave.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=1,
    show_default=True,
    metavar="N",
    help="Seed of all randomness.",
)
@click.option("--encode", is_flag=True, help="Encode and decode every message, and count bytes. Slower.")
@click.option(
    "--replay",
    "journal",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Replay this journal instead, and compare the decisions.",
)
@json_option
def simulate(journal: Path | None, *, as_json: bool, **values: Any) -> None:
    """Run the decisions of many nodes in virtual time, with faults, and measure; or replay a journal.

    \b
      mesh-llm simulate --nodes 500 --crash-at 20 --crash 0.1
      mesh-llm simulate --nodes 200 --loss 0.05 --cut-at 15 --duration 90
      mesh-llm simulate --replay journal.jsonl

    The same options give the same run. The exit code is 1 if an invariant was broken.
    """
    if journal is not None:
        _replay(journal, as_json=as_json)
        return
    report = run(_scenario(values))
    if as_json:
        print_json(report)
    else:
        click.echo("\n".join(_lines(report)))
    if report.problems:
        raise SystemExit(EXIT_FAILED)


def _scenario(values: dict[str, Any]) -> Scenario:
    scenario = Scenario(**values)
    late = [
        f"--{name.replace('_', '-')} {at:g}"
        for name, at in (
            ("crash_at", scenario.crash_at),
            ("freeze_at", scenario.freeze_at),
            ("cut_at", scenario.cut_at),
            ("leave_at", scenario.leave_at),
        )
        if at is not None and at >= scenario.duration
    ]
    if late:
        raise MeshError(
            code="options",
            message=f"{', '.join(late)} is after the end of the run, at {scenario.duration:g} s.",
            hint="Use a longer --duration.",
        )
    return scenario


_MEASURES = (
    ("joined", "after the last start: every node trusts every other"),
    ("crash_noticed_half", "half of the nodes route to none of the killed"),
    ("crash_noticed", "no node routes to any of the killed"),
    ("crash_settled", "every node considers all the killed dead"),
    ("restart_used", "every node routes to the restarted again"),
    ("freeze_noticed", "no node routes to the frozen"),
    ("thaw_used", "every node routes to the thawed again"),
    ("heal_settled", "after the cut: every node trusts every other"),
    ("leave_settled", "no node considers those that left members"),
    ("clients_settled", "no client's table holds any of the killed"),
)


def _lines(report: Report) -> list[str]:
    scenario = report.scenario
    lines = [
        (
            f"{scenario.nodes} nodes, {scenario.clients} clients,"
            f" {span(scenario.duration)} of virtual time, seed {scenario.seed}"
        )
    ]
    for field, text in _MEASURES:
        seconds = getattr(report, field)
        if seconds is not None:
            lines.append(f"  {seconds:8.2f} s  {text}")
    lines.append(f"  {report.messages_per_node_second:8.2f}    messages per node and second")
    if scenario.encode:
        lines.append(
            f"  {report.bytes_per_node_second:8.0f}    bytes per node and second; largest {report.largest_message}"
        )
    lines.append(f"  {report.false_deaths:8d}    live nodes considered dead")
    lines.append(f"  {report.false_suspicions:8d}    live nodes that had to refute a suspicion")
    return [*lines, *(f"PROBLEM: {problem}" for problem in report.problems)]


def _replay(journal: Path, *, as_json: bool) -> None:
    outcome = replay(journal)
    if as_json:
        print_json(outcome)
    elif outcome.difference is None:
        click.echo(f"{outcome.events} events: the same decisions.")
    else:
        there = outcome.difference
        recorded = ", ".join(there.recorded) or "nothing"
        now = ", ".join(type(effect).__name__ for effect in there.replayed) or "nothing"
        where = f"Line {there.line}, at {there.now:.3f} s, {type(there.event).__name__}"
        click.echo(printable(f"{where}: recorded {recorded}; now {now}."))
    if outcome.difference is not None:
        raise SystemExit(EXIT_FAILED)
