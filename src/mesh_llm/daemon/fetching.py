"""Fetches a model while the loop goes on, and tells how far it is. Ended at any moment, it goes on there next time."""

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mesh_llm.core.errors import MeshError
from mesh_llm.core.model import ModelFacts
from mesh_llm.models.meter import Meter
from mesh_llm.models.repository import RemoteModel
from mesh_llm.models.source_ref import SourceRef
from mesh_llm.models.transfer import OnProgress, Progress
from mesh_llm.models.want import Remote

_T = TypeVar("_T")
_SECONDS_BETWEEN_REPORTS = 0.2

Report = Callable[[str, bool], None]
"""Told a line on how far a fetch is, and whether it has ended; on the loop."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched: the model as the hub has it, and its files here."""

    model: RemoteModel
    paths: tuple[Path, ...]


def storage_failure(error: OSError) -> MeshError:
    """What a user can do about a disk or a file that failed while a model was fetched."""
    full = error.errno == errno.ENOSPC
    what = f"{error.filename}: {error.strerror or error}" if error.filename else str(error.strerror or error)
    return MeshError(
        code="disk_full" if full else "disk_failed",
        message=f"The model cannot be stored: {what}.",
        hint="Free space or check the directory's permissions, then try again: what has arrived is kept.",
        status=507,
    )


def internal_fault(what: str) -> MeshError:
    """What is said where a fetch ends by a fault of this program; the log has the details."""
    return MeshError(
        code="internal",
        message=f"{what} ended by a fault in mesh-llm.",
        hint="See what happened: mesh-llm logs. Then try again: what has arrived is kept.",
        status=500,
    )


class Telling:
    """An OnProgress that reports lines, a few a second and each new phase at once. `whence`: said at their end."""

    def __init__(self, report: Report, whence: str = "") -> None:
        self._report = report
        self._whence = f", from {whence}" if whence else ""
        self._meter = Meter()
        self._last = 0.0
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        """Report, if it is time to."""
        text, now = self._meter.text(progress), time.monotonic()
        if progress.phase != self._phase or now - self._last >= _SECONDS_BETWEEN_REPORTS:
            self._last, self._phase = now, progress.phase
            self._report(text + self._whence, False)


async def on_thread(work: Callable[[], _T], cancel: threading.Event | None = None) -> _T:
    """Run what blocks on a thread that nothing waits for: cancelled, `cancel` is set, and the caller goes on."""
    executor = ThreadPoolExecutor(1, "model")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, work)
    finally:
        if cancel is not None:
            cancel.set()
        executor.shutdown(wait=False)


async def find(ref: SourceRef) -> RemoteModel:
    """Ask the hub what `ref` is. Raises MeshError: see models.hub."""

    def work() -> RemoteModel:
        # Slow to import, and needed only here.
        from mesh_llm.models.hub import Hub
        from mesh_llm.models.hub_client import HubClient

        return Hub(HubClient()).find(ref)

    return await on_thread(work)


async def published_facts(remote: Remote) -> ModelFacts:
    """What a model is that was not fetched yet: by the catalogue, else by the headers of its files on the hub.

    Raises:
        MeshError: see models.hub.
    """
    if remote.entry is not None:
        return remote.entry.facts()

    def work() -> ModelFacts:
        # Slow to import, and needed only here.
        from mesh_llm.models.hub import Hub
        from mesh_llm.models.hub_client import HubClient

        hub = Hub(HubClient())
        return hub.facts(hub.find(remote.ref))

    return await on_thread(work)


async def fetch(ref: SourceRef, report: Report, check: Callable[[RemoteModel], None]) -> Fetched:
    """Find a model on the hub, and fetch it into the Hugging Face cache.

    Args:
        ref: where it is.
        report: told how it goes on.
        check: told what was found before anything is fetched; may raise MeshError against it. Runs on another thread.

    Raises:
        MeshError: see models.hub.
    """
    meter = Meter()
    fetched = await fetch_watched(ref, lambda progress: report(meter.text(progress), False), check)
    report("fetched and checked", True)
    return fetched


async def fetch_watched(ref: SourceRef, watch: OnProgress, check: Callable[[RemoteModel], None]) -> Fetched:
    """The same, told in numbers: `watch` is called on the loop, a few times a second."""
    cancel = threading.Event()
    loop = asyncio.get_running_loop()
    last, phase = 0.0, ""

    def tell(progress: Progress) -> None:
        nonlocal last, phase
        now = time.monotonic()
        if not cancel.is_set() and (progress.phase != phase or now - last >= _SECONDS_BETWEEN_REPORTS):
            last, phase = now, progress.phase
            loop.call_soon_threadsafe(watch, progress)

    def work() -> Fetched:
        # Slow to import, and needed only here.
        from mesh_llm.models.hub import Hub
        from mesh_llm.models.hub_client import HubClient

        hub = Hub(HubClient())
        model = hub.find(ref)
        check(model)
        return Fetched(model, hub.fetch(model, tell, cancel, ref.revision))

    return await on_thread(work, cancel)
