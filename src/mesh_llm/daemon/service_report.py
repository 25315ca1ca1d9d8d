"""Reports the node's life to the service manager that started it: its start, what it does, and its end."""

import asyncio
from collections.abc import Awaitable, Callable

from mesh_llm.console.status import Status
from mesh_llm.core.config import Timings
from mesh_llm.daemon.published_state import ChangeSignal, Progress, ProgressListener, Stage
from mesh_llm.service_manager.notify import Notifier

_PINGS = 3
"""In the time after which the manager ends a silent node."""
_LONGEST_PAUSE = 60.0
_PAUSE = 1.0
"""Seconds between two status lines at least."""
_END_SECONDS = Timings().stop_grace + 15.0
"""What a stop takes besides the answers: engines end, and peers hear of it."""


class ServiceReport:
    """Passes the progress of a start on, and reports it too. One for all lives of a node."""

    def __init__(self, notifier: Notifier, on_progress: ProgressListener) -> None:
        self._notifier = notifier
        self._listener = on_progress
        self._up = False
        self._stopping = False

    def on_progress(self, progress: Progress) -> None:
        """Take a step of the start, or a notice."""
        if isinstance(progress, Stage) and not self._up and not self._stopping:
            self._notifier.starting(f"starting: {progress.name}: {progress.text}")
        self._listener(progress)

    def stopping(self, drain: float) -> None:
        """The node ends; answers under way may take so many seconds."""
        self._stopping = True
        self._notifier.stopping(drain + _END_SECONDS)

    async def while_reloading(self, reload: Callable[[], Awaitable[None]]) -> None:
        """Read the settings again. `systemctl reload` ends with it."""
        if self._up:
            self._notifier.reloading()
        try:
            await reload()
        finally:
            if self._up:
                self._notifier.ready()

    async def run(self, changes: ChangeSignal, status: Callable[[], Status]) -> None:
        """Report that the node is up, and from then on that its event loop runs and what it does; until cancelled.

        It is up when API and console answer. A model may need much longer, and is loaded after that.
        """
        self._up = True
        if not self._notifier.listening:
            return
        self._notifier.ready()
        period = self._notifier.watchdog / _PINGS if self._notifier.watchdog else _LONGEST_PAUSE
        while True:
            self._notifier.alive("" if self._stopping else described(status()))
            await asyncio.sleep(min(_PAUSE, period))
            await changes.wait(period)


def described(status: Status) -> str:
    """What a node does, in one line."""
    here = [model for model in status.models if model.here]
    warm = [model.name for model in here if model.status == "warm"]
    parts = [f"serves {', '.join(warm)}"] if warm else []
    parts += [f"{model.name} is {model.status}" for model in here if model.status != "warm"]
    if status.yield_reason:
        parts.append(f"yields: {status.yield_reason}")
    if not parts:
        parts.append("a client of the mesh" if status.role == "client" else "no model loaded")
    if status.peers:
        parts.append(f"{len(status.peers) + 1} nodes in the mesh")
    if status.problems:
        parts.append(f"{len(status.problems)} problem(s): see mesh-llm status")
    return "; ".join(parts)
