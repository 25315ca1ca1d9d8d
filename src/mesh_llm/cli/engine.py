"""`mesh-llm engine`: which llama.cpp runs models here, and building what the wheel lacks."""

import asyncio
import sys
from pathlib import Path

import click
import msgspec

from mesh_llm.cli.errors import printable
from mesh_llm.cli.output import animated
from mesh_llm.cli.units import size
from mesh_llm.engine.confinement.policy import described
from mesh_llm.engine.embedded import plugin
from mesh_llm.engine.report import EngineReport, EnginesReport, engines_report
from mesh_llm.engine.sources import find_sources
from mesh_llm.runtime.home import Home


@click.group()
def engine() -> None:
    """List llama.cpp engines, and install the RPC plugin."""


@engine.command("list")
@click.option("--bin-dir", type=click.Path(path_type=Path), metavar="DIR", help="Look at llama.cpp binaries here.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def list_engines(bin_dir: Path | None, *, as_json: bool) -> None:
    """Show sources, versions, builds, RPC protocol and devices."""
    report = asyncio.run(engines_report(find_sources(bin_dir, Home.default().cache)))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        click.echo(printable("\n".join(_lines(report))))


def _lines(report: EnginesReport) -> list[str]:
    if not report.engines:
        return ["No engine found. Give the directory of your llama.cpp by --bin-dir DIR."]
    lines: list[str] = []
    for one in report.engines:
        lines += _engine_lines(one)
    usable = {device.name for one in report.engines for device in one.devices}
    lines += [
        f"note: the system has {gpu.name} ({size(gpu.memory_total)}), which none of these engines uses"
        for gpu in report.system_gpus
        if gpu.name not in usable
    ]
    return lines


def _engine_lines(one: EngineReport) -> list[str]:
    state = "chosen" if one.chosen else "usable" if one.usable else "unusable"
    lines = [
        f"{one.source} {one.version} ({state})",
        f"  path    {one.path}",
        f"  build   {one.build or '-'}",
        f"  RPC     {f'{one.rpc_version}, {described(one.confinement)}' if one.rpc_version else 'none'}",
    ]
    for device in one.devices:
        memory = f", {size(device.memory_free)} free of {size(device.memory_total)}" if device.memory_total else ""
        lines.append(f"  device  {device.id}: {device.name} ({device.kind}{memory})")
    return lines + [f"  problem {problem}" for problem in one.problems]


@engine.command()
@click.option("--force", is_flag=True, help="Build again even if it is there.")
@click.option(
    "--archive",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="The source archive, if it was brought by hand.",
)
def install(archive: Path | None, *, force: bool) -> None:
    """Build the RPC plugin that the embedded engine needs to split models: download, check, compile, test."""
    step = 0

    def progress(name: str, text: str) -> None:
        nonlocal step
        step += 1
        click.echo(printable(f"{name}: {text}" if not animated(sys.stdout) else f"[{step}] {text}"))

    plugin.install(Home.default().cache, progress, archive=archive, force=force)
