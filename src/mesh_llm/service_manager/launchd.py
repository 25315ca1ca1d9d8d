"""The property list of launchd that runs a node on macOS, and the commands that install it.

Written from launchd.plist(5) and launchctl(1), and run only with a stand-in for `launchctl`: no Mac was at hand.
"""

import os
import plistlib
import re
from pathlib import Path
from typing import Any

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import user_home
from mesh_llm.service_manager.control import Control, ServiceStatus
from mesh_llm.service_manager.unit import Chosen

LABEL = "mesh-llm"
_HOME, _MODELS = "MESH_LLM_HOME", "MESH_LLM_MODELS"
_STOP_SECONDS = 60
_RESTART_SECONDS = 10


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """What a user's launch agent depends on; the fields as in Unit."""

    program: tuple[str, ...]
    chosen: Chosen = Chosen()
    output: str = ""
    """File of what the node prints; launchd keeps no journal."""

    def text(self) -> str:
        """The file."""
        variables = {_HOME: self.chosen.home, _MODELS: self.chosen.models}
        content: dict[str, Any] = {
            "Label": LABEL,
            "ProgramArguments": [*self.program, "serve", *self.chosen.options],
            "EnvironmentVariables": {name: value for name, value in variables.items() if value},
            "RunAtLoad": True,
            # Not after `mesh-llm stop`.
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": _RESTART_SECONDS,
            "ExitTimeOut": _STOP_SECONDS,
            # Else launchd slows down its processor and its disk.
            "ProcessType": "Interactive",
            "StandardOutPath": self.output,
            "StandardErrorPath": self.output,
        }
        return plistlib.dumps(content, sort_keys=False).decode()


class Launchd:
    """Launch agents of this user."""

    system = False

    def __init__(self, control: Control | None = None, home: Path | None = None) -> None:
        self._control = control or Control("launchctl")
        self.path = (home or user_home()) / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self._domain = f"gui/{os.getuid()}"

    def chosen(self) -> Chosen:
        """What the user chose for the installed file."""
        content = self._content()
        words = [str(word) for word in content.get("ProgramArguments", [])]
        variables = content.get("EnvironmentVariables", {})
        return Chosen(
            options=tuple(words[words.index("serve") + 1 :]) if "serve" in words else (),
            home=str(variables.get(_HOME, "")),
            models=str(variables.get(_MODELS, "")),
        )

    def program(self) -> str:
        """The program in the installed file; empty if there is none."""
        arguments = self._content().get("ProgramArguments", [""])
        return str(arguments[0]) if arguments else ""

    def apply(self) -> None:
        """Use a new or changed file: the agent is loaded again. Raises MeshError."""
        self._control.try_run("bootout", f"{self._domain}/{LABEL}")
        self._control.run("bootstrap", self._domain, str(self.path))
        self._control.run("enable", f"{self._domain}/{LABEL}")

    def start(self) -> bool:
        """Start it, unless it runs. Returns whether it is up. Raises MeshError."""
        self._control.run("kickstart", f"{self._domain}/{LABEL}")
        return True

    def remove(self) -> None:
        """Stop it, and delete the file."""
        self._control.try_run("bootout", f"{self._domain}/{LABEL}")
        self.path.unlink(missing_ok=True)

    def status(self) -> ServiceStatus:
        """What launchd says of it."""
        installed = self.path.is_file()
        shown = self._control.try_run("print", f"{self._domain}/{LABEL}") if installed else ""
        pid = re.search(r"^\s*pid = (\d+)", shown, re.MULTILINE)
        state = re.search(r"^\s*state = (.+)$", shown, re.MULTILINE)
        return ServiceStatus(
            scope="user",
            file=str(self.path),
            installed=installed,
            enabled=installed,
            active=pid is not None,
            state=state[1] if state else "not loaded",
            pid=int(pid[1]) if pid else 0,
            program=self.program(),
        )

    @property
    def restart_command(self) -> str:
        """What a user types to restart it."""
        return f"launchctl kickstart -k {self._domain}/{LABEL}"

    @property
    def start_command(self) -> str:
        """What a user types to start it."""
        return f"launchctl kickstart {self._domain}/{LABEL}"

    def at_boot(self) -> str:
        """When it runs, as a sentence."""
        return "It starts when you log in, and ends when you log out."

    def _content(self) -> dict[str, Any]:
        try:
            return plistlib.loads(self.path.read_bytes())
        except (OSError, plistlib.InvalidFileException, ValueError):
            return {}


def no_system_service() -> MeshError:
    """The refusal of `--system` on macOS."""
    return MeshError(
        code="service_unsupported",
        message="On macOS mesh-llm installs a service of the user only, not of the machine.",
        hint="Leave --system out. The node then starts when you log in.",
    )
