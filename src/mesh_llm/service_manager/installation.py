"""Installs a node as a service, says what an installed one lacks, and removes it."""

import difflib
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import expand, home_root, write_atomic
from mesh_llm.service_manager.control import Problem, ServiceStatus
from mesh_llm.service_manager.launchd import Agent, Launchd, no_system_service
from mesh_llm.service_manager.systemd import (
    Systemd,
    check_program,
    gpu_groups,
    provide_user,
    stable_program,
)
from mesh_llm.service_manager.unit import MARK, USER, Chosen, Unit

Manager: TypeAlias = Systemd | Launchd

_MODPROBE = Path("/usr/bin/nvidia-modprobe")
_FILE_MODE = 0o644


def manager(*, system: bool) -> Manager:
    """The service manager of this system. Raises MeshError(service_unsupported)."""
    if sys.platform == "darwin":
        if system:
            raise no_system_service()
        return Launchd()
    if os.name != "posix":
        raise MeshError(
            code="service_unsupported",
            message="mesh-llm installs services of systemd and launchd only.",
            hint="Start `mesh-llm serve` by what starts programs here.",
        )
    return Systemd(system=system)


def managers() -> list[Manager]:
    """All that may have a service of mesh-llm here: this user's first, then the machine's."""
    if os.name != "posix":
        return []
    return [Launchd()] if sys.platform == "darwin" else [Systemd(system=False), Systemd(system=True)]


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """What `install` did.

    Attributes:
        file: the unit, or the property list.
        changes: its changed lines, each with + or - before it; all of a new file is one change.
        new: there was no file.
        user: the system user that was made; empty: none.
        restart: the command that makes a running service use the new file; empty: none is needed.
        start: the command that starts it; empty: it runs, or starts at present.
        running: it is up.
        at_boot: when it runs, as a sentence.
    """

    file: str
    changes: tuple[str, ...] = ()
    new: bool = False
    user: str = ""
    restart: str = ""
    start: str = ""
    running: bool = False
    at_boot: str = ""


def choice(service: Manager, options: Sequence[str]) -> Chosen:
    """What is chosen now: options and variables. What is not given stays as it is in the installed file."""
    before = service.chosen()
    models, home = os.environ.get("MESH_LLM_MODELS", ""), os.environ.get("MESH_LLM_HOME", "")
    return Chosen(
        options=tuple(options) or before.options,
        home=str(home_root().absolute()) if home and not service.system else before.home,
        models=str(expand(models).absolute()) if models else before.models,
    )


def wanted(service: Manager, chosen: Chosen) -> Unit | Agent:
    """What the file of a service should say, on this machine as it is now."""
    program = stable_program()
    if isinstance(service, Launchd):
        home = Path(chosen.home) if chosen.home else home_root().absolute()
        return Agent(program=program, chosen=chosen, output=str(home / "logs" / "service.log"))
    return Unit(
        system=service.system,
        program=program,
        chosen=chosen,
        groups=gpu_groups() if service.system else (),
        modprobe=str(_MODPROBE) if _MODPROBE.exists() else "",
    )


def install(service: Manager, options: Sequence[str], *, start: bool = True) -> Installed:
    """Write the service's file, have it start by itself, and start it. Doing it again changes what differs.

    Args:
        service: where to install it.
        options: of `mesh-llm serve`; see `choice`.
        start: start it now, if it does not run.

    Raises:
        MeshError: `service_rights`, `service_program`, `service_foreign`, `service_manager`.
    """
    unit = wanted(service, choice(service, options))
    made = ""
    if service.system:
        if os.geteuid() != 0:
            raise MeshError(
                code="service_rights",
                message="Only root can install a service of the machine.",
                hint=f"sudo {unit.program[0]} service install --system   Or leave --system out: a service of yours.",
            )
        check_program(unit.program)
    before = _written(service)
    text = unit.text()
    if isinstance(unit, Agent):
        Path(unit.output).parent.mkdir(parents=True, exist_ok=True)
    if service.system and provide_user():
        made = USER
    if text != before:
        _write(service.path, text)
    service.apply()
    changes = _changes(before, text)
    state = service.status()
    running = state.active
    if start and not running:
        running = service.start()
    return Installed(
        file=str(service.path),
        changes=changes,
        new=not before,
        user=made,
        restart=service.restart_command if state.active and changes else "",
        start="" if running or start else service.start_command,
        running=running,
        at_boot=service.at_boot(),
    )


def remove(service: Manager) -> bool:
    """Stop a service and delete its file; its state stays. Returns whether there was one.

    Raises:
        MeshError: `service_rights`, `service_foreign`, `service_manager`.
    """
    if not _written(service):
        return False
    if service.system and os.geteuid() != 0:
        raise MeshError(
            code="service_rights",
            message="Only root can remove a service of the machine.",
            hint=f"sudo {stable_program()[0]} service remove --system",
        )
    service.remove()
    return True


def examine(service: Manager) -> ServiceStatus:
    """The state of a service, with its problems."""
    status = service.status()
    if not status.installed:
        return status
    again = "sudo mesh-llm service install --system" if service.system else "mesh-llm service install"
    problems: list[Problem] = []
    program = Path(status.program)
    if not status.program or not program.is_file():
        problems.append(
            Problem(
                text=f"The service starts {status.program or 'nothing'}, which is not there any more.",
                hint=f"Where mesh-llm is now, type: {again}",
            )
        )
    elif not os.access(program, os.X_OK):
        problems.append(Problem(text=f"The service starts {program}, which cannot be run.", hint=f"chmod +x {program}"))
    elif program.absolute() != Path(stable_program()[0]).absolute():
        problems.append(
            Problem(
                text=f"The service starts another mesh-llm than this one: {program}.",
                hint=f"To have it start this one: {again}",
            )
        )
    elif _changes(_read(service.path), wanted(service, service.chosen()).text()):
        problems.append(
            Problem(
                text=f"{status.file} is not what this version of mesh-llm would write for this machine.",
                hint=f"See and apply the difference: {again}",
            )
        )
    if not status.enabled:
        problems.append(Problem(text="The service does not start by itself: it is disabled.", hint=again))
    if status.state.startswith("failed"):
        scope = "" if service.system else "--user "
        hint = f"See why: journalctl {scope}--unit mesh-llm -n 50   Then: {service.start_command}"
        problems.append(Problem(text=f"The service has failed: {status.state}.", hint=hint))
    return msgspec.structs.replace(status, problems=tuple(problems))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _written(service: Manager) -> str:
    """The file of a service; empty if there is none. Raises MeshError(service_foreign) for somebody else's."""
    text = _read(service.path)
    if text and isinstance(service, Systemd) and not text.startswith(MARK):
        raise MeshError(
            code="service_foreign",
            message=f"{service.path} was not written by mesh-llm, so it stays as it is.",
            hint="Move it away, then type the command again.",
        )
    return text


def _write(path: Path, text: str) -> None:
    try:
        write_atomic(path, text.encode(), _FILE_MODE)
    except OSError as error:
        denied = error.errno in {errno.EACCES, errno.EPERM}
        raise MeshError(
            code="service_rights",
            message=f"{path} cannot be written: {error.strerror or error}.",
            hint="Give this user the right to that directory." if denied else "Make room, or mount it for writing.",
        ) from error


def _changes(before: str, after: str) -> tuple[str, ...]:
    """The lines that differ, but for comments."""
    old, new = (_settings(text) for text in (before, after))
    lines = difflib.unified_diff(old, new, n=0, lineterm="")
    return tuple(line for line in lines if line[:1] in {"+", "-"} and line[:3] not in {"+++", "---"})


def _settings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
