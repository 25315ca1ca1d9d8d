"""The models to serve at the start: missing ones are fetched, and one is chosen if the user names none.

A node that joins a mesh fetches its missing models after it has joined, because other nodes may have them.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.types.announcement import MAX_TEXT
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.events import AnyEvent, LoadRequested, ModelsChanged, ModelUnavailable
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelKind
from mesh_llm.daemon.model_fetcher import FetchOrigin, ModelFetcher, ProgressLines, fetch, on_thread
from mesh_llm.daemon.model_registry import DEFAULT_MODEL, Machine, register_fetched, rescan
from mesh_llm.daemon.published_state import NoticeShown, ProgressListener, PublishedState, Stage
from mesh_llm.daemon.settings import Settings, UnavailableModel
from mesh_llm.models.disk import disk_error
from mesh_llm.models.hub.catalog import CatalogEntry, entry_of, recommend
from mesh_llm.models.hub.source_ref import RemoteModel, is_source, parse_source
from mesh_llm.models.library.files import presentable
from mesh_llm.models.library.library import LocalModel
from mesh_llm.models.library.resolve import HUB_UNAVAILABLE, Remote, fetched_earlier, interpret, looks_like_path

Ask = Callable[[str], bool | None]
"""Asks the user a question, and waits for the answer. None if nobody can be asked."""


def nobody(_: str) -> None:
    """Nobody can be asked."""


async def provide_models(
    settings: Settings, machine: Machine, on_progress: ProgressListener, ask: Ask = nobody, *, joins: bool
) -> Settings:
    """The settings with `models` on this machine: missing ones have been fetched. If `joins`, they are in `later`.

    Those that do not exist, cannot be fetched, or do not fit are in `unavailable`.

    Raises:
        MeshError: none of the models can be had.
    """
    if settings.client:
        return settings
    missed = (*settings.later, *(one.spec for one in settings.unavailable))
    settings = msgspec.structs.replace(settings, models=(*settings.models, *missed), later=(), unavailable=())
    provider = _StartupModels(settings, machine, on_progress, ask)
    if settings.models:
        return await _provide_named(provider, settings, joins=joins)
    return settings if joins else msgspec.structs.replace(settings, models=(await provider.default(),))


async def _provide_named(provider: "_StartupModels", settings: Settings, *, joins: bool) -> Settings:
    """Sort the user's models by what can be had. One that cannot be does not keep the others from being served."""
    here: list[str] = []
    later: list[str] = []
    errors: dict[str, MeshError] = {}
    for spec in settings.models:
        try:
            if joins and not await provider.is_here(spec):
                later.append(spec)
                continue
            found = spec if joins else await provider.named(spec)
            if not here:
                # The first is served here. The others may be meant for other nodes.
                provider.require_fit(found)
            here.append(found)
        except MeshError as error:
            errors[spec] = error
    if errors and not (here or later):
        raise next(iter(errors.values()))
    unavailable = tuple(_unavailable(spec, error) for spec, error in errors.items())
    return msgspec.structs.replace(settings, models=tuple(here), later=tuple(later), unavailable=unavailable)


_LASTING = frozenset({"does_not_fit", "model_ambiguous"})
"""Codes of errors that do not go away by themselves."""


def _name_of(spec: str) -> str:
    """What requests call a model that is not here."""
    name = presentable(spec)
    if looks_like_path(spec) and not is_source(spec):
        name = name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    return "".join(letter for letter in name if letter.isprintable())[:MAX_TEXT] or "?"


def _unavailable(spec: str, error: MeshError) -> UnavailableModel:
    return UnavailableModel(
        spec=spec,
        name=_name_of(spec),
        reason=f"{error.message} {error.hint}".strip(),
        lasting=error.code in _LASTING,
    )


@dataclass(frozen=True)
class _StartupModels:
    settings: Settings
    machine: Machine
    on_progress: ProgressListener
    ask: Ask

    async def named(self, spec: str) -> str:
        """The name or path of a `--model`, fetched if it is missing."""
        registry = self.machine.registry
        found = interpret(spec, registry.library, self.machine.cache, os.environ.get("HF_ENDPOINT", ""))
        if isinstance(found, Remote):
            return await self.fetch(found)
        return spec if looks_like_path(spec) and not is_source(spec) else found.name

    def require_fit(self, spec: str) -> None:
        """Refuse a model on this machine that is too big for it and that cannot be split."""
        if self.machine.can_split:
            return
        facts = self.machine.registry.resolve(spec).facts
        plan = plan_solo(facts, self.machine.capacity.memory_bytes, self.settings.launch)
        if isinstance(plan, DoesNotFit):
            hint = f"{plan.hint}{self.machine.no_split_hint()}"
            raise MeshError(code="does_not_fit", message=plan.message, hint=hint, status=409)

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
        return bool(await on_thread(lambda: self.ask(question)))

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


_FIRST_RETRY, _LAST_RETRY = 30.0, 1800.0
_LIBRARY_CHECK = 2.0


class StartupDownload:
    """Fetches and serves models that were missing when this node joined, and tries again those that cannot be had."""

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
        """Fetch once other members are known (`acquainted`), or after a few seconds without any. Then keep trying."""
        for one in self._settings.unavailable:
            self._post(ModelUnavailable(model=ModelName(one.name), reason=one.reason))
        pending = [one.spec for one in self._settings.unavailable if not one.lasting]
        if self._settings.later:
            end = asyncio.get_running_loop().time() + _ACQUAINTANCE_SECONDS
            while not acquainted() and (left := end - asyncio.get_running_loop().time()) > 0:
                await self._published.changes.wait(min(left, 1.0))
            pending += await self._try(self._settings.later)
        pause = _FIRST_RETRY
        while pending:
            await self._pause(pause)
            pending = await self._try(pending)
            pause = min(2 * pause, _LAST_RETRY)

    async def _try(self, specs: Sequence[str]) -> list[str]:
        """Try to serve each; returns those that are worth another try."""
        left: list[str] = []
        for spec in specs:
            try:
                await self._fetch_and_serve(spec)
            except (MeshError, OSError) as failure:
                error = disk_error(failure) if isinstance(failure, OSError) else failure
                one = _unavailable(spec, error)
                self._post(ModelUnavailable(model=ModelName(one.name), reason=one.reason))
                left += [] if one.lasting else [spec]
        return left

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until other models are on the disk."""
        loop, known = asyncio.get_running_loop(), self._machine.registry.library
        end = loop.time() + seconds
        while self._machine.registry.library is known and (left := end - loop.time()) > 0:
            await self._published.changes.wait(min(left, _LIBRARY_CHECK))

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
        elif looks_like_path(spec):
            # Outside of the library, it is remembered.
            model = registry.resolve(spec)
        await registry.find_drafts([model])
        self._post(ModelsChanged(on_disk=registry.facts(), drafts=registry.drafts))
        self._post(ModelUnavailable(model=ModelName(_name_of(spec))))
        self._post(LoadRequested(model=model.name))

    def _notify(self, level: NoticeLevel, code: str, text: str, spec: str) -> None:
        self._published.notices.add(Notice(level=level, code=code, text=text, about=spec))

    def _show(self, spec: str, text: str, *, done: bool) -> None:
        self._on_progress(Stage(name="fetch", text=f"{spec}: {text}", done=done))
