"""`mesh-llm simulate`: what a mesh of many nodes would do, in virtual time; and a journal's decisions once more."""

from pathlib import Path
from typing import Any

import click
import msgspec

from mesh_llm.cli.option_types import Number
from mesh_llm.cli.output import EXIT_FAILED, printable
from mesh_llm.cli.table import duration as span
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.journal import replay
from mesh_llm.simulation.invariants import Report
from mesh_llm.simulation.run import run
from mesh_llm.simulation.scenario import Scenario

_MOST_NODES = 20_000
_SHARE = Number(0, _MOST_NODES)
_TIME = Number(0, 86_400)


@click.command()
@click.option("--nodes", type=click.IntRange(2, _MOST_NODES), default=100, show_default=True, help="Active nodes.")
@click.option("--clients", type=click.IntRange(0, 100_000), default=0, show_default=True, help="Passive nodes.")
@click.option(
    "--models",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    help="Models served by the nodes in turn; 0: membership alone.",
)
@click.option(
    "--duration",
    type=Number(1, 86_400),
    default=60.0,
    show_default=True,
    metavar="S",
    help="Virtual seconds.",
)
@click.option(
    "--join-over", type=_TIME, default=5.0, show_default=True, metavar="S", help="All start within this time."
)
@click.option("--loss", type=Number(0, 0.9), default=0.0, show_default=True, help="Share of lost messages.")
@click.option(
    "--duplicate",
    type=Number(0, 0.9),
    default=0.0,
    show_default=True,
    help="Share of messages that come twice.",
)
@click.option("--delay-ms", type=Number(0, 10_000), default=2.0, show_default=True, help="One way, mean.")
@click.option(
    "--skew", "skew_seconds", type=_TIME, default=0.0, show_default=True, metavar="S", help="How far clocks differ."
)
@click.option("--crash-at", type=_TIME, metavar="S", help="Kill nodes then.")
@click.option("--crash", type=_SHARE, default=0.1, show_default=True, help="How many: a share, or a number from 1 on.")
@click.option("--restart-after", type=_TIME, metavar="S", help="They start again so long after.")
@click.option("--freeze-at", type=_TIME, metavar="S", help="Stop nodes then, as a closed laptop.")
@click.option("--freeze", type=_SHARE, default=1.0, show_default=True, help="How many.")
@click.option(
    "--thaw-after", type=_TIME, default=30.0, show_default=True, metavar="S", help="They go on so long after."
)
@click.option("--cut-at", type=_TIME, metavar="S", help="Cut the mesh in two then.")
@click.option("--cut", type=_SHARE, default=0.5, show_default=True, help="Share of nodes on the smaller side.")
@click.option(
    "--heal-after", type=_TIME, default=30.0, show_default=True, metavar="S", help="The cut ends so long after."
)
@click.option("--leave-at", type=_TIME, metavar="S", help="Nodes leave in good order then.")
@click.option("--leave", type=_SHARE, default=1.0, show_default=True, help="How many.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1, show_default=True, help="Of everything random.")
@click.option("--encode", is_flag=True, help="Turn every message into bytes and back, and count them; slower.")
@click.option(
    "--replay",
    "journal",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Instead: decide a journal's events once more, and compare.",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def simulate(journal: Path | None, *, as_json: bool, **values: Any) -> None:
    """Run many nodes' own decisions in virtual time, with faults, and measure; or replay a journal.

    \b
      mesh-llm simulate --nodes 500 --crash-at 20 --crash 0.1
      mesh-llm simulate --nodes 200 --loss 0.05 --cut-at 15 --duration 90
      mesh-llm simulate --replay journal.jsonl

    The same options give the same run. Exit code 1 when something happened that should not have.
    """
    if journal is not None:
        _replay(journal, as_json=as_json)
        return
    report = run(_scenario(values))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
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
            message=f"{', '.join(late)} would come after the end at {scenario.duration:g} s.",
            hint="Give a longer --duration.",
        )
    return scenario


_MEASURES = (
    ("joined", "all know and trust all, after the last start"),
    ("crash_noticed_half", "the median node routes to none of the killed"),
    ("crash_noticed", "no node routes to any of the killed"),
    ("crash_settled", "every node holds all the killed for dead"),
    ("restart_used", "all use the restarted again"),
    ("freeze_noticed", "no node routes to the stopped"),
    ("thaw_used", "all use them again"),
    ("heal_settled", "after the cut, all trust all again"),
    ("leave_settled", "nobody counts the leavers as members"),
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
    lines.append(f"  {report.false_deaths:8d}    live nodes held for dead")
    lines.append(f"  {report.false_suspicions:8d}    live nodes that had to refute a suspicion")
    return [*lines, *(f"PROBLEM: {problem}" for problem in report.problems)]


def _replay(journal: Path, *, as_json: bool) -> None:
    outcome = replay(journal)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(outcome)).decode())
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
