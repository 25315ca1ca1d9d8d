"""The models to serve at the start: missing ones are fetched, and one is chosen if the user names none.

A node that joins a mesh fetches its missing models after it has joined, because other nodes may have them.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.events import AnyEvent, LoadRequested, ModelsChanged
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelKind
from mesh_llm.daemon.model_fetcher import FetchOrigin, ModelFetcher, ProgressLines, fetch, on_thread
from mesh_llm.daemon.model_registry import DEFAULT_MODEL, Machine, register_fetched, rescan
from mesh_llm.daemon.published_state import NoticeShown, ProgressListener, PublishedState, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.disk import disk_error
from mesh_llm.models.hub.catalog import CatalogEntry, entry_of, recommend
from mesh_llm.models.hub.source_ref import RemoteModel, is_source, parse_source
from mesh_llm.models.library.library import LocalModel
from mesh_llm.models.library.resolve import HUB_UNAVAILABLE, Remote, fetched_earlier, interpret, looks_like_path

Ask = Callable[[str], bool]
"""Asks the user a question, and waits for the answer. False if nobody can be asked."""


def nobody(_: str) -> bool:
    """Nobody can be asked."""
    return False


async def provide_models(
    settings: Settings, machine: Machine, on_progress: ProgressListener, ask: Ask = nobody, *, joins: bool
) -> Settings:
    """The settings with `models` on this machine: missing ones have been fetched. If `joins`, they are in `later`.

    Raises:
        MeshError: a model does not exist, cannot be fetched, or does not fit.
    """
    if settings.client:
        return settings
    settings = msgspec.structs.replace(settings, models=(*settings.models, *settings.later), later=())
    provider = _StartupModels(settings, machine, on_progress, ask)
    if settings.models and joins:
        here = [spec for spec in settings.models if await provider.is_here(spec)]
        later = tuple(spec for spec in settings.models if spec not in here)
        return msgspec.structs.replace(settings, models=tuple(here), later=later)
    if settings.models:
        models = [await provider.named(spec, first=not position) for position, spec in enumerate(settings.models)]
        return msgspec.structs.replace(settings, models=tuple(models))
    return settings if joins else msgspec.structs.replace(settings, models=(await provider.default(),))


@dataclass(frozen=True)
class _StartupModels:
    settings: Settings
    machine: Machine
    on_progress: ProgressListener
    ask: Ask

    async def named(self, spec: str, *, first: bool) -> str:
        """The name or path of a `--model`, fetched if it is missing. All but the first may be on other nodes only."""
        registry = self.machine.registry
        try:
            found = interpret(spec, registry.library, self.machine.cache, os.environ.get("HF_ENDPOINT", ""))
        except MeshError as error:
            if first or error.code != "model_not_found":
                raise
            return spec
        if isinstance(found, Remote):
            return await self.fetch(found)
        return spec if looks_like_path(spec) and not is_source(spec) else found.name

    async def is_here(self, spec: str) -> bool:
        """Whether a `--model` is on this machine. A path to no file is an error."""
        registry = self.machine.registry
        endpoint = os.environ.get("HF_ENDPOINT", "")
        try:
            found = await asyncio.to_thread(interpret, spec, registry.library, self.machine.cache, endpoint)
        except MeshError as error:
            if error.code != "model_not_found" or (looks_like_path(spec) and not is_source(spec)):
                raise
            return False
        return not isinstance(found, Remote)

    async def fetch(self, remote: Remote) -> str:
        """Fetch a model. Returns its name in the library, or its path."""
        name = remote.entry.name if remote.entry is not None else str(remote.ref)

        def report(text: str, done: bool) -> None:
            self.on_progress(Stage(name="fetch", text=f"{name}: {text}", done=done))

        report("asking the hub", False)
        try:
            fetched = await fetch(remote.ref, report, lambda model: self._check(remote.entry, model))
        except MeshError as error:
            library = self.machine.registry.library
            earlier = fetched_earlier(remote.ref, library) if error.code in HUB_UNAVAILABLE else None
            if earlier is None:
                raise
            self._say(f"{error.message} Serving {earlier.name}, which was fetched earlier.", NoticeLevel.WARNING)
            return earlier.name
        await rescan(self.settings, self.machine)
        known = self.machine.registry.library.find(fetched.model.name)
        if known is not None and known.path.samefile(fetched.paths[0]):
            return known.name
        return str(fetched.paths[0])

    def _check(self, entry: CatalogEntry | None, model: RemoteModel) -> None:
        """Refuse a model that this machine cannot run, before the first byte is fetched."""
        capacity = self.machine.capacity
        if self.machine.can_split:
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
        """The model if none is named: the catalogue's best if the user agrees, else the best on disk, else `tiny`."""
        entry = recommend(self.machine.capacity.memory_bytes)
        library = self.machine.registry.library
        if entry is not None and entry.stem and library.find(entry.stem) is not None:
            self._say(f"Serving {entry.stem}: the best of the catalogue for this machine, and it is on disk.")
            return entry.stem
        if entry is not None and await self._agreed(entry):
            try:
                return await self.fetch(Remote(entry.ref, entry))
            except MeshError as error:
                self._say(f"{entry.name} cannot be fetched: {error.message} {error.hint}", NoticeLevel.WARNING)
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
        """The best chat model that fits, by the catalogue's rank and then by size."""
        memory, options = self.machine.capacity.memory_bytes, self.settings.launch

        def rank(model: LocalModel) -> tuple[int, int]:
            ref = parse_source(model.facts.source) if model.facts.source else None
            entry = entry_of(ref.repository, ref.file) if ref is not None else None
            return (entry.rank if entry is not None else 0, model.facts.size_bytes)

        fitting = [
            model
            for model in self.machine.registry.library.models.values()
            if model.facts.kind is ModelKind.CHAT
            and not model.builtin
            and not isinstance(plan_solo(model.facts, memory, options), DoesNotFit)
        ]
        best = max(fitting, key=rank, default=None)
        return best.name if best is not None else None

    def _say(self, text: str, level: NoticeLevel = NoticeLevel.INFO) -> None:
        self.on_progress(NoticeShown(level=level, code="model_default", text=text))


_ACQUAINTANCE_SECONDS = 10.0


class StartupDownload:
    """Fetches and serves `settings.later`: models that were missing when this node joined."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        fetcher: ModelFetcher,
        post: Callable[[AnyEvent], None],
        published: PublishedState,
        on_progress: ProgressListener,
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._fetcher = fetcher
        self._post = post
        self._published = published
        self._on_progress = on_progress

    async def run(self, acquainted: Callable[[], bool]) -> None:
        """Fetch once other members are known (`acquainted`), or after a few seconds without any."""
        if not self._settings.later:
            return
        end = asyncio.get_running_loop().time() + _ACQUAINTANCE_SECONDS
        while not acquainted() and (left := end - asyncio.get_running_loop().time()) > 0:
            await self._published.changes.wait(min(left, 1.0))
        for spec in self._settings.later:
            try:
                await self._fetch_and_serve(spec)
            except (MeshError, OSError) as failure:
                error = disk_error(failure) if isinstance(failure, OSError) else failure
                text = f"{spec} cannot be served here: {error.message} {error.hint}".strip()
                self._notify(NoticeLevel.ERROR, "model_fetch_failed", text, spec)

    async def _fetch_and_serve(self, spec: str) -> None:
        registry = self._machine.registry
        model = await asyncio.to_thread(self._fetcher.interpret, spec)
        if not isinstance(model, LocalModel):

            def on_origin(origin: FetchOrigin) -> None:
                text = f"Fetching {origin.name} ({size(origin.total_bytes)}) from {origin.origin_name} to serve it."
                self._notify(NoticeLevel.INFO, "model_fetching", text, spec)

            lines = ProgressLines(lambda text, done: self._show(spec, text, done=done))
            fetched = await self._fetcher.fetch(model, lines, on_origin)
            self._show(spec, "fetched and checked", done=True)
            found = await register_fetched(self._settings, self._machine, self._post, fetched.name)
            model = found or registry.resolve(str(fetched.path))
        await registry.find_drafts([model])
        self._post(ModelsChanged(on_disk=registry.facts(), drafts=registry.drafts))
        self._post(LoadRequested(model=model.name))

    def _notify(self, level: NoticeLevel, code: str, text: str, spec: str) -> None:
        self._published.notices.add(Notice(level=level, code=code, text=text, about=spec))

    def _show(self, spec: str, text: str, *, done: bool) -> None:
        self._on_progress(Stage(name="fetch", text=f"{spec}: {text}", done=done))
