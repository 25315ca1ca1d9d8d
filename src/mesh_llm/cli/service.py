"""`mesh-llm service`: install the node as a service of systemd or launchd, show it, and remove it."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import click

from mesh_llm.cli.options import SECTIONS, json_option
from mesh_llm.cli.output import EXIT_NOT_RUNNING, print_json, printable, sign
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.nodes import running_nodes
from mesh_llm.service_manager import installation
from mesh_llm.service_manager.control import ServiceStatus
from mesh_llm.service_manager.installation import Installed
from mesh_llm.service_manager.unit import STATE, USER

_system_option = click.option(
    "--system", is_flag=True, help="A service of the machine, with a user of its own; needs root."
)

_SECRET = {"tokens": "--join-file FILE", "api_keys": "--api-key-file FILE"}
"""By the name of an option whose value other users must not read: what to use instead."""


@click.group()
def service() -> None:
    """Run the node as a service: of yours, or of the machine (--system)."""


@service.command(context_settings={"ignore_unknown_options": True})
@_system_option
@click.option("--no-start", is_flag=True, help="Do not start it now.")
@json_option
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
def install(options: tuple[str, ...], *, system: bool, no_start: bool, as_json: bool) -> None:
    """Install the service, or bring the installed one up to date, and start it.

    OPTIONS are those of mesh-llm serve, after two dashes. Without any, those of the installed service stay.

    \b
      mesh-llm service install -- --model tiny
      sudo mesh-llm service install --system -- --join-file /etc/mesh-llm/invite
    """
    _check(options)
    manager = installation.manager(system=system)
    busy = _node_in_the_way(system=system, service_runs=manager.status().active)
    done = installation.install(manager, options, start=not no_start and not busy)
    if as_json:
        print_json(done)
        return
    click.echo(printable("\n".join([*_installed_lines(done), *([busy] if busy else [])])))


def _node_in_the_way(*, system: bool, service_runs: bool) -> str:
    """A sentence if a node that is no service has the home that this one needs; else empty."""
    if system or service_runs:
        return ""
    nodes = [node for node in running_nodes(Home.default()) if not node.home.is_guest]
    if not nodes:
        return ""
    pid = nodes[0].holder.pid
    return f"Not started: a node runs in its home already (pid {pid}). End it: mesh-llm stop"


def _check(options: Sequence[str]) -> None:
    """Refuse now what would keep the service from starting, or show a secret to other users. Raises MeshError."""
    from mesh_llm.cli.serve import serve

    with serve.make_context("mesh-llm serve", list(options), ignore_unknown_options=False) as context:
        given: dict[str, object] = {name: value for name, value in context.params.items() if value}
    for name, instead in _SECRET.items():
        if any(not str(value).startswith("@") for value in _values(given.get(name, ()))):
            raise MeshError(
                code="options",
                message=f"Other users can read the options of a service, so {_flag(name)} does not belong there.",
                hint=f"Write it into a file that only the service's user can read, and use {instead}",
            )
    for word in (word for value in given.values() for word in _values(value)):
        if _is_relative(word):
            raise MeshError(
                code="options",
                message=f"The service is not started in this directory, so it would not find {word}.",
                hint=f"Write the whole path: {Path(str(word).removeprefix('@')).absolute()}",
            )


def _values(value: object) -> tuple[object, ...]:
    """The values of an option: those of a repeatable one, or the one."""
    return cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)


def _flag(name: str) -> str:
    return next(option.opts[0] for section in SECTIONS.values() for option in section if option.name == name)


def _is_relative(word: object) -> bool:
    """Whether an option's value is a path that depends on the directory in which a command is typed."""
    if isinstance(word, Path):
        return not word.is_absolute() and not str(word).startswith("~")
    text = str(word).removeprefix("@")
    # A model is named by its path, or by a name that may be a file here by chance.
    meant = text.startswith(("./", "../")) or (text.endswith(".gguf") and Path(text).exists())
    return isinstance(word, str) and meant and not Path(text).is_absolute()


def _installed_lines(done: Installed) -> list[str]:
    lines = [f"Made the user {done.user}; its home is {STATE}."] if done.user else []
    if done.new:
        lines.append(f"Installed {done.file}")
    elif done.changes:
        lines += [f"Changed {done.file}:", *(f"  {line[0]} {line[1:]}" for line in done.changes)]
    else:
        lines.append(f"{done.file} is up to date.")
    if done.restart:
        lines.append(
            f"The running node uses this from its next start. To restart it, after its answers: {done.restart}"
        )
    elif done.running:
        lines.append("It runs. See: mesh-llm service status")
    elif done.start:
        lines.append(f"To start it: {done.start}")
    else:
        lines.append("It is starting. See: mesh-llm service status")
    return [*lines, done.at_boot]


@service.command()
@_system_option
@json_option
def status(*, system: bool, as_json: bool) -> None:
    """Show whether the service is installed, runs, and starts the right program. Exit code 3: it does not run."""
    chosen = [installation.manager(system=True)] if system else installation.managers()
    found = [one for one in map(installation.examine, chosen) if one.installed]
    if as_json:
        print_json({"services": found})
    elif found:
        click.echo(printable("\n".join(line for one in found for line in _status_lines(one))))
    else:
        click.echo(f"No service is installed. Install one: mesh-llm service install{' --system' if system else ''}")
    if not any(one.active for one in found):
        raise SystemExit(EXIT_NOT_RUNNING)


def _status_lines(one: ServiceStatus) -> list[str]:
    since = f", pid {one.pid}" if one.pid else ""
    again = f", restarted {one.restarts} times" if one.restarts else ""
    lines = [
        f"service   of {'the machine' if one.scope == 'system' else 'this user'}: {one.state}{since}{again}",
        *([f"node      {one.text}"] if one.text else []),
        f"file      {one.file}",
        f"starts    {one.program}",
    ]
    for problem in one.problems:
        lines += [f"problem   {problem.text}", f"          {sign('→', '->')} {problem.hint}"]
    return lines


@service.command()
@_system_option
def remove(*, system: bool) -> None:
    """Stop the service, after its answers, and remove it. Models, key and settings stay."""
    manager = installation.manager(system=system)
    if not installation.remove(manager):
        click.echo(f"No service is installed{' for the machine' if system else ''}.")
        return
    click.echo(f"Removed {manager.path}")
    if system:
        click.echo(f"Its state is still in {STATE}. To delete it: sudo rm -r {STATE}; sudo userdel {USER}")
