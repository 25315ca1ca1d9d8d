"""Fetches a model while the loop goes on, and tells how far it is. Ended at any moment, it goes on there next time.

Sees to it that the models to be served are on this machine: fetches them, or chooses one where nothing was said.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts, ModelKind
from mesh_llm.daemon.model_registry import DEFAULT_MODEL, Machine
from mesh_llm.daemon.notices import OnStage, Stage, Told
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.hub.catalog import CatalogEntry, entry_of, recommend
from mesh_llm.models.hub.progress import Meter, OnProgress, Progress
from mesh_llm.models.hub.source_ref import RemoteModel, SourceRef, is_source, parse_source
from mesh_llm.models.library.files import known_stores
from mesh_llm.models.library.library import LocalModel, model_directories, scan
from mesh_llm.models.library.resolve import HUB_UNAVAILABLE, Remote, fetched_earlier, interpret, looks_like_path

_T = TypeVar("_T")
_SECONDS_BETWEEN_REPORTS = 0.2

Report = Callable[[str, bool], None]
"""Told a line on how far a fetch is, and whether it has ended; on the loop."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched: the model as the hub has it, and its files here."""

    model: RemoteModel
    paths: tuple[Path, ...]


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
        from mesh_llm.models.hub.client import HubClient
        from mesh_llm.models.hub.fetch import Hub

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
        from mesh_llm.models.hub.client import HubClient
        from mesh_llm.models.hub.fetch import Hub

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
        from mesh_llm.models.hub.client import HubClient
        from mesh_llm.models.hub.fetch import Hub

        hub = Hub(HubClient())
        model = hub.find(ref)
        check(model)
        return Fetched(model, hub.fetch(model, tell, cancel, ref.revision))

    return await on_thread(work, cancel)


Ask = Callable[[str], bool]
"""Puts a question to the user and waits for the answer; False where nobody can be asked."""


def nobody(_: str) -> bool:
    """Nobody can be asked."""
    return False


async def provide(
    settings: Settings, machine: Machine, on_progress: OnStage, ask: Ask = nobody, *, joins: bool
) -> Settings:
    """The settings with `models` as names and paths on this machine: what was not here has been fetched.

    A joiner fetches later: others of the mesh may have it.

    Raises:
        MeshError: a model is nowhere, cannot be fetched, or would not fit.
    """
    if settings.client:
        return settings
    settings = msgspec.structs.replace(settings, models=(*settings.models, *settings.later), later=())
    provider = _Provider(settings, machine, on_progress, ask)
    if settings.models and joins:
        here = [spec for spec in settings.models if await provider.is_here(spec)]
        later = tuple(spec for spec in settings.models if spec not in here)
        return msgspec.structs.replace(settings, models=tuple(here), later=later)
    if settings.models:
        models = [await provider.named(spec, first=not position) for position, spec in enumerate(settings.models)]
        return msgspec.structs.replace(settings, models=tuple(models))
    return settings if joins else msgspec.structs.replace(settings, models=(await provider.default(),))


async def rescan(settings: Settings, machine: Machine) -> None:
    """Look at the disk again: something was fetched."""
    directories = model_directories(settings.models_dirs)
    machine.shelf.library = await asyncio.to_thread(scan, directories, machine.cache, stores=known_stores())


@dataclass(frozen=True)
class _Provider:
    settings: Settings
    machine: Machine
    on_progress: OnStage
    ask: Ask

    async def named(self, spec: str, *, first: bool) -> str:
        """What a `--model` means on this machine. Others than the first may be had by others of the mesh only."""
        shelf = self.machine.shelf
        try:
            found = interpret(spec, shelf.library, self.machine.cache, os.environ.get("HF_ENDPOINT", ""))
        except MeshError as error:
            if first or error.code != "model_not_found":
                raise
            return spec
        if isinstance(found, Remote):
            return await self.fetch(found)
        return spec if looks_like_path(spec) and not is_source(spec) else found.name

    async def is_here(self, spec: str) -> bool:
        """Whether a `--model` need not be fetched. A path that leads nowhere is an error for everybody."""
        shelf = self.machine.shelf
        endpoint = os.environ.get("HF_ENDPOINT", "")
        try:
            found = await asyncio.to_thread(interpret, spec, shelf.library, self.machine.cache, endpoint)
        except MeshError as error:
            if error.code != "model_not_found" or (looks_like_path(spec) and not is_source(spec)):
                raise
            return False
        return not isinstance(found, Remote)

    async def fetch(self, remote: Remote) -> str:
        """Fetch a model, and find it in the library."""
        name = remote.entry.name if remote.entry is not None else str(remote.ref)

        def report(text: str, done: bool) -> None:
            self.on_progress(Stage(name="fetch", text=f"{name}: {text}", done=done))

        report("asking the hub", False)
        try:
            fetched = await fetch(remote.ref, report, lambda model: self._check(remote.entry, model))
        except MeshError as error:
            library = self.machine.shelf.library
            earlier = fetched_earlier(remote.ref, library) if error.code in HUB_UNAVAILABLE else None
            if earlier is None:
                raise
            self._say(f"{error.message} Serving {earlier.name}, which was fetched earlier.", NoticeLevel.WARNING)
            return earlier.name
        await rescan(self.settings, self.machine)
        known = self.machine.shelf.library.find(fetched.model.name)
        if known is not None and known.path.samefile(fetched.paths[0]):
            return known.name
        return str(fetched.paths[0])

    def _check(self, entry: CatalogEntry | None, model: RemoteModel) -> None:
        """Refuse before the first byte what this machine could not run, alone or with others."""
        capacity = self.machine.capacity
        if capacity.rpc_version:
            return
        if entry is not None:
            facts = msgspec.structs.replace(entry.facts(), size_bytes=model.size_bytes)
            plan = plan_solo(facts, capacity.memory_bytes, self.settings.launch)
            if isinstance(plan, DoesNotFit):
                raise MeshError(code="does_not_fit", message=plan.message, hint=plan.hint, status=409)
        if model.size_bytes > capacity.memory_bytes:
            raise MeshError(
                code="does_not_fit",
                message=f"{model.name} does not fit: {size(model.size_bytes)}, have {size(capacity.memory_bytes)}.",
                hint="Take a smaller model or a smaller quantisation. What fits: mesh-llm download",
                status=409,
            )

    async def default(self) -> str:
        """Where nothing was said: the catalogue's best, if the user agrees; else what is on disk; else the tiny one."""
        entry = recommend(self.machine.capacity.memory_bytes)
        library = self.machine.shelf.library
        if entry is not None and entry.stem and library.find(entry.stem) is not None:
            self._say(f"Serving {entry.stem}: the best of the catalogue for this machine, and it is on disk.")
            return entry.stem
        if entry is not None and await self._agreed(entry):
            try:
                return await self.fetch(Remote(entry.ref, entry))
            except MeshError as error:
                self._say(f"{entry.name} cannot be had: {error.message} {error.hint}", NoticeLevel.WARNING)
        better = f" Better for this machine: mesh-llm --model {entry.name}" if entry is not None else ""
        best = self._best_on_disk()
        if best is not None:
            self._say(f"Serving {best}, the best on this machine's disk.{better}")
            return best
        self._say(f"Serving {DEFAULT_MODEL}, which only shows that everything works.{better}")
        return DEFAULT_MODEL

    async def _agreed(self, entry: CatalogEntry) -> bool:
        if self.settings.yes:
            return True
        question = f"The best model for this machine is {entry.title}, {size(entry.size_bytes)}. Fetch and serve it?"
        return await on_thread(lambda: self.ask(question))

    def _best_on_disk(self) -> ModelName | None:
        """By the catalogue's rank, then by size; of those that fit, and that are for chat."""
        memory, options = self.machine.capacity.memory_bytes, self.settings.launch

        def rank(model: LocalModel) -> tuple[int, int]:
            ref = parse_source(model.facts.source) if model.facts.source else None
            entry = entry_of(ref.repository, ref.file) if ref is not None else None
            return (entry.rank if entry is not None else 0, model.facts.size_bytes)

        fitting = [
            model
            for model in self.machine.shelf.library.models.values()
            if model.facts.kind is ModelKind.CHAT
            and not model.builtin
            and not isinstance(plan_solo(model.facts, memory, options), DoesNotFit)
        ]
        best = max(fitting, key=rank, default=None)
        return best.name if best is not None else None

    def _say(self, text: str, level: NoticeLevel = NoticeLevel.INFO) -> None:
        self.on_progress(Told(level=level, code="model_default", text=text))
