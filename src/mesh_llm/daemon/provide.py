"""Sees to it that the models to be served are on this machine: fetches them, or chooses one where nothing was said."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.errors import MeshError
from mesh_llm.core.fit import DoesNotFit, plan_solo
from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import ModelKind
from mesh_llm.core.units import size
from mesh_llm.daemon.fetching import fetch, on_thread
from mesh_llm.daemon.machine import Machine
from mesh_llm.daemon.progress import OnProgress, Stage, Told
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.shelf import DEFAULT_MODEL
from mesh_llm.models.catalog import CatalogEntry, entry_of, recommend
from mesh_llm.models.library import LocalModel, model_directories, scan
from mesh_llm.models.repository import RemoteModel
from mesh_llm.models.resolve import looks_like_path
from mesh_llm.models.source_ref import is_source, parse_source
from mesh_llm.models.stores import known_stores
from mesh_llm.models.want import HUB_UNAVAILABLE, Remote, fetched_earlier, interpret

Ask = Callable[[str], bool]
"""Puts a question to the user and waits for the answer; False where nobody can be asked."""


def nobody(_: str) -> bool:
    """Nobody can be asked."""
    return False


async def provide(
    settings: Settings, machine: Machine, on_progress: OnProgress, ask: Ask = nobody, *, joins: bool
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
    on_progress: OnProgress
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
