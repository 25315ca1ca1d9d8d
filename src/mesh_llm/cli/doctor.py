"""`mesh-llm doctor`: what is right, what is not, and what to do about it."""

import asyncio
import os
import sys
from pathlib import Path

import click
import msgspec

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.errors import EXIT_FAILED, printable
from mesh_llm.cli.output import sign, styled
from mesh_llm.core.errors import MeshError
from mesh_llm.core.status import Status
from mesh_llm.daemon.doctor import Finding, Verdict, examine
from mesh_llm.engine.source import EngineInfo
from mesh_llm.engine.sources import find_sources
from mesh_llm.runtime.home import Home

_MARKS = {Verdict.OK: ("ok", "32"), Verdict.WARNING: ("warn", "33"), Verdict.PROBLEM: ("FAIL", "31")}


@click.command()
@click.option("--bin-dir", type=click.Path(path_type=Path), metavar="DIR", help="Look at llama.cpp binaries here.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def doctor(bin_dir: Path | None, *, as_json: bool) -> None:
    """Check engine, devices, ports, disk and network. Exit code 1 where something keeps a node from serving."""
    home: Home | MeshError
    try:
        home = Home.default()
    except MeshError as error:
        home = error
    engines = asyncio.run(_engines(home, bin_dir))
    findings = examine(home, engines)
    findings += [] if isinstance(home, MeshError) else _of_the_node(home)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"findings": findings})).decode())
    else:
        for finding in findings:
            click.echo(_line(finding))
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise SystemExit(EXIT_FAILED)


async def _engines(home: Home | MeshError, bin_dir: Path | None) -> list[EngineInfo]:
    # Without a home there is nothing built in it either.
    cache = Path(os.devnull) if isinstance(home, MeshError) else home.cache
    return [await source.info() for source in find_sources(bin_dir, cache)]


def _of_the_node(home: Home) -> list[Finding]:
    """What the running node says of itself, if there is one."""
    try:
        status = DaemonClient(home).get("/api/status", Status)
    except MeshError:
        return []
    return [
        Finding(topic="node", verdict=Verdict.WARNING, text=problem.text, hint="More is in its log: mesh-llm logs")
        for problem in status.problems
    ]


def _line(finding: Finding) -> str:
    mark, colour = _MARKS[finding.verdict]
    shown = f"\x1b[{colour}m{mark:<4}\x1b[0m" if styled(sys.stdout) else f"{mark:<4}"
    line = f"{shown}  {finding.topic:<8} {printable(finding.text)}"
    return f"{line}\n                {sign('→', '->')} {printable(finding.hint)}" if finding.hint else line
