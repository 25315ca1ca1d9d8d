"""The models that this daemon can launch: the library on disk, and files that the user named by path.

What this machine brings: an engine, the memory it may use, and the models on its disk.
"""

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, LaunchOptions, ModelFacts
from mesh_llm.daemon.notices import OnStage, Stage, Told
from mesh_llm.daemon.settings import Settings
from mesh_llm.engine.confinement.policy import NOT_CONFINED, described
from mesh_llm.engine.devices import GIGABYTE, measure
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources.choice import LimitedSource, choose, find_sources, thread_limit
from mesh_llm.engine.spec import CPU_DEVICE
from mesh_llm.models.hub.catalog import draft_pairs
from mesh_llm.models.library.draft import BUILTIN_PAIRS, find_draft, require_draft
from mesh_llm.models.library.files import known_stores
from mesh_llm.models.library.library import FactsCache, Library, LocalModel, model_directories, scan
from mesh_llm.models.library.resolve import Remote, interpret, looks_like_path, resolve
from mesh_llm.runtime.home import Home

DEFAULT_MODEL = "tiny"


class Shelf:
    """Finds a model's file by its served name."""

    def __init__(self, library: Library, cache: FactsCache, *, projectors: bool = True) -> None:
        """`projectors` False: models go without the vision projectors that lie beside them."""
        self._projectors = projectors
        self._unfit: set[Path] = set()
        self._library = self._fitted(library)
        self._cache = cache
        self._named: dict[ModelName, LocalModel] = {}
        self.drafts: dict[str, str] = {}

    @property
    def library(self) -> Library:
        """What is on disk, with the projectors that are to be used."""
        return self._library

    @library.setter
    def library(self, library: Library) -> None:
        self._library = self._fitted(library)

    def without_projector(self, name: ModelName) -> None:
        """The engine did not start with the projector of this model: it goes without from now on."""
        model = self.find(name)
        if model is None or model.projector is None:
            return
        self._unfit.add(model.projector)
        self._library = self._fitted(self._library)
        if name in self._named:
            self._named[name] = _bare(self._named[name])

    def _fitted(self, library: Library) -> Library:
        """The library with projectors taken from the models that are to go without."""

        def fits(model: LocalModel) -> bool:
            return model.projector is None or (self._projectors and model.projector not in self._unfit)

        models = {name: model if fits(model) else _bare(model) for name, model in library.models.items()}
        return replace(library, models=models)

    def resolve(self, spec: str) -> LocalModel:
        """What a user means by a name or a path; a file outside of the library is remembered.

        Raises:
            MeshError: see models.resolve.
        """
        if not looks_like_path(spec) and (named := self._named.get(ModelName(spec))) is not None:
            return named
        model = resolve(spec, self.library, self._cache)
        known = self.library.find(model.name)
        if known is None or known.path != model.path:
            self._named[model.name] = model
        return model

    def interpret(self, spec: str) -> LocalModel | Remote:
        """What a user means, on this machine, in the catalogue, or on the hub; nothing is remembered.

        Raises:
            MeshError: see models.want.
        """
        if not looks_like_path(spec) and (named := self._named.get(ModelName(spec))) is not None:
            return named
        return interpret(spec, self.library, self._cache, os.environ.get("HF_ENDPOINT", ""))

    def find(self, name: ModelName) -> LocalModel | None:
        """The model of this served name."""
        return self._named.get(name) or self.library.find(name)

    def facts(self) -> tuple[ModelFacts, ...]:
        """All models for the core, drafts included: it counts their memory."""
        models = {**self.library.drafts, **self.library.models, **self._named}
        return tuple(models[name].facts for name in sorted(models))

    def wanted(self, specs: tuple[str, ...]) -> tuple[ModelName, ...]:
        """Served names of `--model` options. The first must be here; the others may be had by others of the mesh only.

        Raises:
            MeshError: see models.resolve.
        """
        names: list[ModelName] = []
        for position, spec in enumerate(specs):
            try:
                names.append(self.resolve(spec).name)
            except MeshError as error:
                if position == 0 or error.code != "model_not_found" or looks_like_path(spec):
                    raise
                names.append(ModelName(spec))
        return tuple(dict.fromkeys(names))

    def with_draft(self, options: LaunchOptions, model: LocalModel | None) -> LaunchOptions:
        """The options with the draft's path instead of what the user called it; checked to draft for `model`. Blocks.

        Raises:
            MeshError: see models.resolve and models.draft.
        """
        if options.draft is None or not options.use_draft:
            return options
        draft = self.resolve(options.draft)
        if model is not None:
            require_draft(model, draft)
        return msgspec.structs.replace(options, draft=str(draft.path))

    def draft_of(self, options: LaunchOptions) -> LocalModel | None:
        """The draft that `with_draft` put into options."""
        if options.draft is None or not options.use_draft:
            return None
        return self.resolve(options.draft)

    async def find_drafts(self, models: Iterable[LocalModel] | None = None) -> None:
        """Find who can guess ahead for these models, or for all; kept in `drafts`, by name.

        Headers are read on a thread; `drafts` changes on the loop only, so that two searches at once lose nothing.
        """
        chosen = [*self.library.models.values(), *self._named.values()] if models is None else list(models)
        found = await asyncio.to_thread(drafts_among, chosen, self.library)
        names = {model.name for model in chosen}
        kept = {} if models is None else {name: own for name, own in self.drafts.items() if name not in names}
        self.drafts = kept | found


def _bare(model: LocalModel) -> LocalModel:
    return replace(model, projector=None, facts=msgspec.structs.replace(model.facts, companion_bytes=0))


def drafts_among(models: Iterable[LocalModel], library: Library) -> dict[str, str]:
    """Model to draft, by name, for those that have one. Reads headers; blocks."""
    pairs = BUILTIN_PAIRS | draft_pairs()
    found = ((model.name, find_draft(model, library, pairs).draft) for model in models)
    return {str(name): str(draft.name) for name, draft in found if draft is not None}


_UNCONFINED = (
    "Memory is lent for split models by an RPC server that is not confined (--lend-unconfined): "
    "members with the scope `split` can attack this user's account."
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The outcome of `look`. `source` is None for a node that runs no engine.

    `lending`: how an RPC server is confined that lends memory to split models, or why nothing is lent.
    """

    source: EngineSource | None
    devices: tuple[str, ...]
    capacity: Capacity
    shelf: Shelf
    cache: FactsCache
    lending: str = ""

    @property
    def accelerators(self) -> int:
        """Devices other than the processor that models use."""
        return 0 if self.devices == (CPU_DEVICE,) else len(self.capacity.devices)


async def look(settings: Settings, home: Home, on_progress: OnStage) -> Machine:
    """Find engine, devices and models, and say so.

    Raises:
        MeshError: no usable engine, no such device.
    """
    cache = FactsCache(home.cache / "models.json")
    if settings.client:
        return Machine(source=None, devices=(), capacity=Capacity(), shelf=Shelf(Library(), cache), cache=cache)
    on_progress(Stage(name="engine", text="looking for llama.cpp", done=False))
    source, info = await choose(find_sources(settings.bin_dir, home.cache, unconfined=settings.lend_unconfined))
    on_progress(Stage(name="engine", text=f"llama.cpp, {info.label}", done=True))
    offered = None if settings.max_memory_bytes is None else settings.max_memory_bytes / GIGABYTE
    device = ",".join(settings.devices) or None
    measured = await asyncio.to_thread(measure, info, max_vram=offered, device=device, fraction=settings.use)
    if settings.use < 1.0:
        source = LimitedSource(source, thread_limit(settings.use))
    names = ", ".join(measured.capacity.devices)
    memory = f"{measured.capacity.memory_bytes / GIGABYTE:.1f} GB for models"
    on_progress(Stage(name="devices", text=f"{names}: {memory}", done=True))
    if info.not_lent or info.confinement == NOT_CONFINED:
        on_progress(Told(level=NoticeLevel.WARNING, code="rpc_unconfined", text=info.not_lent or _UNCONFINED))
    for problem in measured.problems:
        on_progress(Told(level=NoticeLevel.WARNING, code="device_unused", text=problem))
    library = await asyncio.to_thread(scan, model_directories(settings.models_dirs), cache, stores=known_stores())
    count = len(library.models)
    on_progress(Stage(name="models", text=f"{count} on disk" if count else "none on disk", done=True))
    return Machine(
        source=source,
        devices=measured.devices,
        capacity=measured.capacity,
        shelf=Shelf(library, cache, projectors=settings.launch.use_projector),
        cache=cache,
        lending=info.not_lent or (described(info.confinement) if info.confinement else ""),
    )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What this node is to serve at its start: served names in order, and how."""

    wanted: tuple[ModelName, ...]
    options: LaunchOptions


def choose_models(settings: Settings, machine: Machine, *, joins: bool) -> Choice:
    """Work out what `--model` and the like mean here. A node that joins others, or serves nothing, may want none.

    Raises:
        MeshError: a model or draft is not there, or does not fit.
    """
    if settings.client:
        return Choice(wanted=(), options=settings.launch)
    specs = settings.models or (() if joins else (DEFAULT_MODEL,))
    wanted = machine.shelf.wanted(specs)
    first = machine.shelf.find(wanted[0]) if wanted else None
    options = machine.shelf.with_draft(settings.launch, first)
    if first is not None:
        machine.shelf.drafts = drafts_among([first], machine.shelf.library)
        draft = machine.shelf.draft_of(options)
        facts = draft.facts if draft is not None else None
        plan = plan_solo(first.facts, machine.capacity.memory_bytes, options, facts)
        # What is too big for this machine alone waits for others, where the engine can share.
        if isinstance(plan, DoesNotFit) and not machine.capacity.rpc_version:
            raise MeshError(code="does_not_fit", message=plan.message, hint=plan.hint, status=409)
    return Choice(wanted=wanted, options=options)
