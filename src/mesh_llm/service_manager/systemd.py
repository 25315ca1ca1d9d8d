"""systemd: where units lie, and the commands that install one, start it, and show its state."""

import grp
import os
import pwd
import shutil
import sys
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import user_home
from mesh_llm.service_manager.control import Control, ServiceStatus
from mesh_llm.service_manager.unit import (
    GPU_GROUPS,
    NAME,
    STATE,
    UNIT,
    USER,
    Chosen,
    installed_choice,
    installed_program,
)

_SHOWN = ("ActiveState", "SubState", "StatusText", "MainPID", "NRestarts", "UnitFileState", "Result")
_START_SECONDS = 20.0
_LINGER = Path("/var/lib/systemd/linger")
_HIDDEN = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - looked at, not written to
"""The unit's PrivateTmp gives the service a pair of its own."""


class Systemd:
    """The units of the machine (`system`), or of this user."""

    def __init__(self, *, system: bool, control: Control | None = None, root: Path = Path("/")) -> None:
        """`root`: where /etc is."""
        self.system = system
        self._options = () if system else ("--user",)
        self._control = control or Control("systemctl", *self._options)
        self._root = root
        if system:
            self.path = root / "etc/systemd/system" / UNIT
        else:
            named = os.environ.get("XDG_CONFIG_HOME", "")
            configuration = Path(named) if named.startswith("/") else user_home() / ".config"
            self.path = configuration / "systemd" / "user" / UNIT

    def chosen(self) -> Chosen:
        """What the user chose for the installed unit."""
        return installed_choice(self._text())

    def program(self) -> str:
        """The program of the installed unit; empty if there is none."""
        return installed_program(self._text())

    def apply(self) -> None:
        """Use a new or changed file: it is read, and the service starts by itself from now on. Raises MeshError."""
        self._control.run("daemon-reload")
        self._control.run("enable", UNIT)

    def start(self) -> bool:
        """Start it, unless it runs. Returns whether it is up: a start may take long. Raises MeshError if it fails."""
        try:
            self._control.run("start", UNIT, seconds=_START_SECONDS)
        except MeshError as error:
            if error.code != "service_slow":
                raise
            return False
        return True

    def remove(self) -> None:
        """Stop it, which lets answers end, and delete the file. Raises MeshError."""
        self._control.run("disable", "--now", UNIT)
        self.path.unlink(missing_ok=True)
        self._control.run("daemon-reload")
        self._control.try_run("reset-failed", UNIT)

    def status(self) -> ServiceStatus:
        """What systemd says of it."""
        shown = self._control.try_run("show", UNIT, *(f"--property={name}" for name in _SHOWN))
        values: dict[str, str] = {}
        for line in shown.splitlines():
            name, _, value = line.partition("=")
            values[name] = value
        state = " ".join(filter(None, (values.get("ActiveState"), f"({values.get('SubState', '')})")))
        failed = values.get("Result", "success")
        return ServiceStatus(
            scope="system" if self.system else "user",
            file=str(self.path),
            installed=self.path.is_file(),
            enabled=values.get("UnitFileState") == "enabled",
            active=values.get("ActiveState") in {"active", "reloading"},
            state=(state if failed in {"", "success"} else f"{state}: {failed}") if values else "unknown",
            text=values.get("StatusText", ""),
            pid=_number(values.get("MainPID", "")),
            restarts=_number(values.get("NRestarts", "")),
            program=self.program(),
        )

    @property
    def restart_command(self) -> str:
        """What a user types to restart it."""
        return self._command("restart")

    @property
    def start_command(self) -> str:
        """What a user types to start it."""
        return self._command("start")

    def _command(self, verb: str) -> str:
        return " ".join(["sudo systemctl" if self.system else "systemctl --user", verb, NAME])

    def at_boot(self) -> str:
        """When it runs, as a sentence."""
        if self.system:
            return "It starts with the machine."
        user = pwd.getpwuid(os.geteuid()).pw_name
        if (self._root / _LINGER.relative_to("/") / user).exists():
            return "It starts with the machine (lingering is on for you)."
        return f"It runs while you are logged in. To start it with the machine: sudo loginctl enable-linger {user}"

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


def gpu_groups() -> tuple[str, ...]:
    """Those of GPU_GROUPS that exist here: systemd starts nothing with a group that does not."""
    known = {group.gr_name for group in grp.getgrall()}
    return tuple(name for name in GPU_GROUPS if name in known)


def provide_user(control: Control | None = None) -> bool:
    """Make the user of a system service, unless it exists. Returns whether it was made. Raises MeshError."""
    try:
        pwd.getpwnam(USER)
    except KeyError:
        shell = next((path for path in ("/usr/sbin/nologin", "/sbin/nologin") if Path(path).exists()), "/bin/false")
        words = ("--system", "--user-group", "--home-dir", STATE, "--no-create-home", "--shell", shell, USER)
        (control or Control("useradd")).run(*words)
        return True
    return False


def stable_program() -> tuple[str, ...]:
    """The command of this mesh-llm by a path that updates keep: what the user types, not where that leads."""
    installed = Path(sys.prefix) / "bin" / "mesh-llm"
    typed = Path(sys.argv[0]) if Path(sys.argv[0]).name == "mesh-llm" else installed
    found = shutil.which("mesh-llm")
    for candidate in (Path(found) if found else None, typed, installed):
        if candidate is None or not candidate.is_file():
            continue
        if candidate.resolve() in {installed.resolve(), typed.resolve()}:
            return (os.path.abspath(candidate),)  # noqa: PTH100 - resolve would follow the link
    return (sys.executable, "-m", "mesh_llm")


def check_program(program: tuple[str, ...]) -> None:
    """Refuse a program that the user of a system service cannot start.

    Raises:
        MeshError: `service_program`.
    """
    reason = _why_not_startable(program)
    if reason:
        raise MeshError(
            code="service_program",
            message=f"The service cannot start {program[0]}: {reason}.",
            hint="Install mesh-llm where every user can run it: sudo python3 -m venv /opt/mesh-llm, "
            "sudo /opt/mesh-llm/bin/pip install mesh-llm, "
            "sudo /opt/mesh-llm/bin/mesh-llm service install --system",
        )


def _why_not_startable(program: tuple[str, ...]) -> str:
    for needed in (Path(program[0]), Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix)):
        hidden = next((place for place in _HIDDEN if any(way.is_relative_to(place) for way in _ways(needed))), None)
        if hidden is not None:
            return f"it does not see what lies in {hidden}"
        closed = _closed(needed)
        if closed is not None:
            return f"only its owner may enter {closed}"
    return ""


def _closed(path: Path) -> Path | None:
    """The first directory on the way to a path, along its links too, that other users may not enter."""
    for way in _ways(path):
        for directory in reversed(way.parents):
            if not directory.stat().st_mode & 0o001:
                return directory
    return None


def _ways(path: Path) -> tuple[Path, Path]:
    return path.absolute(), path.resolve()


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
