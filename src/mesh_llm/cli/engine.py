"""`mesh-llm doctor` checks this machine. `mesh-llm engine` lists llama.cpp engines, and builds what the wheel lacks."""

import asyncio
import os
import sys
from pathlib import Path

import click

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, animated, print_json, printable, sign, styled
from mesh_llm.console.status import Status
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.daemon.doctor import Finding, Verdict, check_peers, examine, nodes_here
from mesh_llm.engine.accelerators import installation as accelerators
from mesh_llm.engine.accelerators.build import Step
from mesh_llm.engine.accelerators.index import UNHASHED, VARIABLE, Index, Wheel, configured
from mesh_llm.engine.accelerators.installation import AUTO, CHOICES, NONE
from mesh_llm.engine.confinement.policy import described
from mesh_llm.engine.sources.choice import EngineReport, EnginesReport, engines_report, find_sources
from mesh_llm.engine.sources.embedded import plugin, slot_library
from mesh_llm.engine.sources.embedded.loading import KINDS
from mesh_llm.engine.spec import EngineInfo
from mesh_llm.models.library.library import builtin_path
from mesh_llm.runtime.home import Home

_TOLD_PERCENT = 10
"""Where the output is no terminal: at most one line for so much."""

_MARKS = {Verdict.OK: ("ok", "32"), Verdict.WARNING: ("warn", "33"), Verdict.PROBLEM: ("FAIL", "31")}


_bin_dir = click.option(
    "--bin-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also check the llama.cpp binaries in this directory.",
)


@click.command()
@_bin_dir
@json_option
def doctor(bin_dir: Path | None, *, as_json: bool) -> None:
    """Check engine, devices, ports, disk and network. The exit code is 1 if a problem keeps a node from serving."""
    home: Home | MeshError
    try:
        home = Home.default()
    except MeshError as error:
        home = error
    engines = asyncio.run(_engines(home, bin_dir))
    findings = examine(home, engines)
    findings += [] if isinstance(home, MeshError) else _of_the_node(home)
    if as_json:
        print_json({"findings": findings})
    else:
        for finding in findings:
            click.echo(_line(finding))
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise SystemExit(EXIT_FAILED)


async def _engines(home: Home | MeshError, bin_dir: Path | None) -> list[EngineInfo]:
    # Without a home, nothing was built in it either.
    cache = Path(os.devnull) if isinstance(home, MeshError) else home.cache
    return [await source.info() for source in find_sources(bin_dir, cache)]


def _of_the_node(home: Home) -> list[Finding]:
    """Problems that the running nodes report, if any run, and how they reach their peers."""
    found: list[Finding] = []
    for node in nodes_here(home):
        try:
            status = DaemonClient(node.home).get("/api/status", Status)
        except MeshError:
            continue
        select = f" --port {node.holder.api_port}" if node.home.is_guest else ""
        hint = f"More is in its log: mesh-llm logs{select}"
        found += [
            Finding(topic="node", verdict=Verdict.WARNING, text=problem.text, hint=hint) for problem in status.problems
        ]
        found += [
            Finding(
                topic="models", verdict=Verdict.WARNING, text=f"{model.name} is not served: {model.reason}", hint=hint
            )
            for model in status.models
            if model.status == "failed"
        ]
        found += check_peers(status.peers)
    return found


def _line(finding: Finding) -> str:
    mark, colour = _MARKS[finding.verdict]
    shown = f"\x1b[{colour}m{mark:<4}\x1b[0m" if styled(sys.stdout) else f"{mark:<4}"
    line = f"{shown}  {finding.topic:<8} {printable(finding.text)}"
    return f"{line}\n                {sign('→', '->')} {printable(finding.hint)}" if finding.hint else line


@click.group()
def engine() -> None:
    """List llama.cpp engines; install and remove plugins for GPUs and for split models."""


@engine.command("list")
@_bin_dir
@json_option
def list_engines(bin_dir: Path | None, *, as_json: bool) -> None:
    """List engines with their versions, builds, RPC protocol and devices."""
    report = asyncio.run(engines_report(find_sources(bin_dir, Home.default().cache)))
    if as_json:
        print_json(report)
    else:
        click.echo(printable("\n".join(_lines(report))))


def _lines(report: EnginesReport) -> list[str]:
    if not report.engines:
        return ["No engine was found. Name the directory of your llama.cpp: --bin-dir DIR"]
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
    for part in one.parts:
        log = f" (log: {part.log})" if part.log else ""
        lines.append(f"  plugin  {part.name} {part.state}: {part.text}{log}")
    for device in one.devices:
        memory = f", {size(device.memory_free)} free of {size(device.memory_total)}" if device.memory_total else ""
        lines.append(f"  device  {device.id}: {device.name} ({device.kind}{memory})")
    return lines + [f"  problem {problem}" for problem in one.problems]


@engine.command()
@click.option(
    "--gpu",
    type=click.Choice(CHOICES),
    default=AUTO,
    show_default=True,
    help="The plugin for GPUs. auto: the best for the cards that are here. none: the RPC plugin only.",
)
@click.option("--force", is_flag=True, help="Build again what is installed, and try again what failed its test.")
@click.option(
    "--archive",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Use this source archive instead of downloading it.",
)
@click.option(
    "--index",
    metavar="URL",
    help="Take a prebuilt engine for the GPU from this index of wheels, and build nothing. none: ask no index. By "
    f"default {VARIABLE}, or else the index of the engine's publisher, is asked first.",
)
@click.option("--sha256", default="", metavar="HEX", help="The prebuilt wheel must have this digest.")
def install(gpu: str, archive: Path | None, index: str | None, sha256: str, *, force: bool) -> None:
    """Install what the embedded engine lacks: the RPC plugin, which splits models, and what this machine's GPU needs.

    For the GPU, an index of wheels is asked for a prebuilt engine of the same release. Otherwise the engine's source is
    downloaded, verified, compiled and tested. What was interrupted goes on where it stopped.
    """
    asked = configured(index, sha256)
    cache = Home.default().cache
    show = _Shown()
    try:
        # With a GPU's kind, --force is about that.
        plugin.install(cache, show.step, archive=archive, force=force and gpu in (AUTO, NONE))
        slot_library.install(cache, show.step, archive=archive, force=force and gpu in (AUTO, NONE))
        if gpu == NONE:
            return
        _install_accelerator(cache, gpu, show, archive, asked, force=force)
    except KeyboardInterrupt:
        show.end()
        click.echo("Interrupted. `mesh-llm engine install` goes on where it stopped.", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _install_accelerator(
    cache: Path, gpu: str, show: "_Shown", archive: Path | None, index: Index | None, *, force: bool
) -> None:
    agree = _agree if sys.stdin.isatty() and sys.stdout.isatty() else None
    try:
        wanted = accelerators.offer(cache, gpu, force=force, index=index, agree=agree)
    except MeshError as error:
        if error.code == "no_gpu" and gpu == AUTO:
            click.echo("No GPU was found: models run on the processor.")
            return
        raise
    if wanted.better is not None:
        click.echo(printable(f"{wanted.better.message} {wanted.better.hint}"))
    if wanted.refused is not None:
        hint = wanted.refused.hint if wanted.refused.code == UNHASHED else ""
        click.echo(printable(f"{wanted.refused.message} It is built here instead. {hint}".rstrip()))
    if wanted.ready:
        part = accelerators.install(cache, wanted, lambda _: None, force=force)
        click.echo(printable(f"The {wanted.kind} plugin is installed ({part.tested or part.how})."))
        return
    click.echo(printable(wanted.text))
    model = builtin_path("tiny")
    accelerators.install(cache, wanted, show.accelerator, model=model, archive=archive, force=force)


def _agree(wheel: Wheel) -> bool:
    """Ask whether to install a prebuilt engine that nothing vouches for but the connection."""
    click.echo(printable(f"The index {wheel.index} gives no SHA-256 for {wheel.filename} ({size(wheel.size)})."))
    return click.confirm(f"Do you trust {printable(wheel.host)}, and install it anyway?", default=False)


class _Shown:
    """Prints an installation's steps: a line for each, and one line for the progress of a compilation."""

    def __init__(self) -> None:
        self._number = 0
        self._open = False
        self._percent = -_TOLD_PERCENT

    def step(self, name: str, text: str) -> None:
        """Print a step."""
        self.end()
        self._number += 1
        click.echo(printable(f"{name}: {text}" if not animated(sys.stdout) else f"[{self._number}] {text}"))

    def accelerator(self, step: Step) -> None:
        """Print a step, or how far it is."""
        if step.percent is None:
            self.step(step.name, step.text)
        elif animated(sys.stdout):
            self._open = True
            click.echo(f"\r\x1b[K    {printable(step.text)}", nl=False)
        elif step.percent >= self._percent + _TOLD_PERCENT:
            self._percent = step.percent
            click.echo(printable(f"{step.name}: {step.text}"))

    def end(self) -> None:
        """End the line of the progress."""
        if self._open:
            click.echo()
        self._open = False


@engine.command()
@click.argument("part", type=click.Choice((*KINDS, plugin.RPC, slot_library.SLOTS)))
def remove(part: str) -> None:
    """Delete a plugin that was built here, its log, and what is left of its builds."""
    if accelerators.remove(Home.default().cache, part):
        click.echo(f"The {part} plugin is removed. Nodes that run notice that.")
    else:
        click.echo(f"There is no {part} plugin that was built here.")
