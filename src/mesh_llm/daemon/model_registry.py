"""This machine: its engine, the memory for models, and the models that it can launch."""

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.split.eligibility import Obstacle
from mesh_llm.core.types.announcement import MAX_WANTED
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, ModelsChanged, RpcChanged
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, LaunchOptions, ModelFacts
from mesh_llm.daemon.published_state import NoticeShown, ProgressListener, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.engine.confinement.policy import NOT_CONFINED, described, why_refused
from mesh_llm.engine.devices import GIGABYTE, Measured, measure
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources.choice import LimitedSource, choose, find_sources, thread_limit
from mesh_llm.engine.sources.embedded.plugin import RPC
from mesh_llm.engine.sources.embedded.source import NAME as EMBEDDED
from mesh_llm.engine.spec import CPU_DEVICE, EngineInfo, EnginePart, PartState
from mesh_llm.models.hub.catalog import draft_pairs
from mesh_llm.models.library.draft import BUILTIN_PAIRS, find_draft, require_draft
from mesh_llm.models.library.files import known_stores
from mesh_llm.models.library.library import FactsCache, Library, LocalModel, model_directories, scan
from mesh_llm.models.library.resolve import Remote, interpret, looks_like_path, resolve
from mesh_llm.models.library.watch import watch
from mesh_llm.runtime.home import Home, expand

DEFAULT_MODEL = "tiny"


class ModelRegistry:
    """Finds a model's file by its served name: in the library, or among the files that the user named by path."""

    def __init__(self, library: Library, cache: FactsCache, *, projectors: bool = True) -> None:
        """`projectors` False: vision projectors beside the models are not used."""
        self._projectors = projectors
        self._dropped_projectors: set[Path] = set()
        self._library = self._usable(library)
        self._cache = cache
        self._named: dict[ModelName, LocalModel] = {}
        self.drafts: dict[str, str] = {}

    @property
    def library(self) -> Library:
        """The models on disk, with the projectors that are used."""
        return self._library

    @library.setter
    def library(self, library: Library) -> None:
        self._library = self._usable(library)

    def drop_projector(self, name: ModelName) -> None:
        """Serve this model without its projector from now on: its engine did not start with it."""
        model = self.find(name)
        if model is None or model.projector is None:
            return
        self._dropped_projectors.add(model.projector)
        self._library = self._usable(self._library)
        if name in self._named:
            self._named[name] = _without_projector(self._named[name])

    def _usable(self, library: Library) -> Library:
        """The library without the projectors that are not used."""

        def fits(model: LocalModel) -> bool:
            return model.projector is None or (self._projectors and model.projector not in self._dropped_projectors)

        models = {name: model if fits(model) else _without_projector(model) for name, model in library.models.items()}
        return replace(library, models=models)

    def resolve(self, spec: str) -> LocalModel:
        """The model that a user names, by name or path. A file outside the library is remembered.

        Raises:
            MeshError: see models.library.resolve.
        """
        if not looks_like_path(spec) and (named := self._named.get(ModelName(spec))) is not None:
            return named
        model = resolve(spec, self.library, self._cache)
        known = self.library.find(model.name)
        if known is None or known.path != model.path:
            self._named[model.name] = model
        return model

    def interpret(self, spec: str) -> LocalModel | Remote:
        """The model that a user names: on this machine, in the catalogue, or on the hub. Nothing is remembered.

        Raises:
            MeshError: see models.library.resolve.
        """
        if not looks_like_path(spec) and (named := self._named.get(ModelName(spec))) is not None:
            return named
        return interpret(spec, self.library, self._cache, os.environ.get("HF_ENDPOINT", ""))

    def find(self, name: ModelName) -> LocalModel | None:
        """The model with this served name."""
        return self._named.get(name) or self.library.find(name)

    def facts(self) -> tuple[ModelFacts, ...]:
        """All models, with drafts: the core counts their memory too."""
        models = {**self.library.drafts, **self.library.models, **self._named}
        return tuple(models[name].facts for name in sorted(models))

    def wanted(self, specs: tuple[str, ...]) -> tuple[ModelName, ...]:
        """Served names of models that are here.

        Raises:
            MeshError: see models.library.resolve.
        """
        return tuple(dict.fromkeys(self.resolve(spec).name for spec in specs))

    def with_draft(self, options: LaunchOptions, model: LocalModel | None) -> LaunchOptions:
        """The options with the draft's path instead of its name, checked to be a draft for `model`. Blocks.

        Raises:
            MeshError: see models.library.resolve and models.library.draft.
        """
        if options.draft is None or not options.use_draft:
            return options
        draft = self.resolve(options.draft)
        if model is not None:
            require_draft(model, draft)
        return msgspec.structs.replace(options, draft=str(draft.path))

    def draft_of(self, options: LaunchOptions) -> LocalModel | None:
        """The draft that `with_draft` put into the options."""
        if options.draft is None or not options.use_draft:
            return None
        return self.resolve(options.draft)

    async def find_drafts(self, models: Iterable[LocalModel] | None = None) -> None:
        """Find the drafts of these models, or of all, and keep them in `drafts`, by name.

        A thread reads the headers. `drafts` changes on the loop only, so that two searches at once lose nothing.
        """
        chosen = [*self.library.models.values(), *self._named.values()] if models is None else list(models)
        found = await asyncio.to_thread(drafts_among, chosen, self.library)
        names = {model.name for model in chosen}
        kept = {} if models is None else {name: own for name, own in self.drafts.items() if name not in names}
        self.drafts = kept | found


def _without_projector(model: LocalModel) -> LocalModel:
    return replace(model, projector=None, facts=msgspec.structs.replace(model.facts, companion_bytes=0))


def drafts_among(models: Iterable[LocalModel], library: Library) -> dict[str, str]:
    """The drafts of the models that have one, by name. Reads headers; blocks."""
    pairs = BUILTIN_PAIRS | draft_pairs()
    found = ((model.name, find_draft(model, library, pairs).draft) for model in models)
    return {str(name): str(draft.name) for name, draft in found if draft is not None}


_UNCONFINED = (
    "Memory is lent for split models by an RPC server that is not confined (--lend-unconfined): "
    "members with the scope `split` can attack this user's account."
)


_NO_RPC = RpcChanged(rpc_version="")


@dataclass(kw_only=True, eq=False)
class Machine:
    """What `probe_machine` found. `source` is None on a node that runs no engine.

    What the engine can use may change while the node runs: a plugin is built, a GPU's driver dies. `use` takes that, so
    readers ask again each time.

    `devices`, `capacity`: as in `Measured`. `lending`: how the RPC server is confined that lends memory to split
    models, or why nothing is lent; `rpc`: the same for the core. `parts`: of the engine, what is built on this machine.
    `sees_gpu`: whether the engine lists a GPU, used or not.
    """

    source: EngineSource | None
    devices: tuple[str, ...]
    capacity: Capacity
    registry: ModelRegistry
    cache: FactsCache
    lending: str = ""
    rpc: RpcChanged = _NO_RPC
    parts: tuple[EnginePart, ...] = ()
    sees_gpu: bool = False

    def use(self, info: EngineInfo, measured: Measured | None = None) -> None:
        """Take what the engine can do now; `measured`: with other devices than before."""
        self.parts, self.lending, self.rpc, self.sees_gpu = info.parts, lending_of(info), rpc_of(info), info.has_gpu
        if measured is not None:
            self.devices, self.capacity = measured.devices, measured.capacity

    @property
    def can_split(self) -> bool:
        """Whether the engine can split models, or will be able to once its plugin is built."""
        return bool(self.capacity.rpc_version) or self.rpc.obstacle == Obstacle.BUILDING

    def no_split_hint(self) -> str:
        """Why a model that is too big for this machine cannot be split either, where something can be done about it."""
        failed = (part for part in self.parts if part.name == RPC and part.state is PartState.FAILED)
        return "".join(f" It cannot be split over machines either: {part.text} {part.hint}" for part in failed)

    @property
    def accelerators(self) -> int:
        """Devices other than the processor that models use."""
        return 0 if self.devices == (CPU_DEVICE,) else len(self.capacity.devices)


async def probe_machine(settings: Settings, home: Home, on_progress: ProgressListener) -> Machine:
    """Find the engine, the devices and the models, and report them.

    Raises:
        MeshError: no usable engine, no such device.
    """
    cache = FactsCache(home.cache / "models.json")
    if settings.client:
        return Machine(
            source=None, devices=(), capacity=Capacity(), registry=ModelRegistry(Library(), cache), cache=cache
        )
    on_progress(Stage(name="engine", text="looking for llama.cpp", done=False))
    source, info = await choose(find_sources(settings.bin_dir, home.cache, unconfined=settings.lend_unconfined))
    on_progress(Stage(name="engine", text=f"llama.cpp, {info.label}", done=True))
    measured = await asyncio.to_thread(measure_for, settings, info, waits=_comes(settings, info))
    if settings.use < 1.0:
        source = LimitedSource(source, thread_limit(settings.use))
    names = ", ".join(measured.capacity.devices)
    memory = f"{measured.capacity.memory_bytes / GIGABYTE:.1f} GB for models"
    on_progress(Stage(name="devices", text=f"{names}: {memory}", done=True))
    if info.not_lent or info.confinement == NOT_CONFINED:
        on_progress(NoticeShown(level=NoticeLevel.WARNING, code="rpc_unconfined", text=info.not_lent or _UNCONFINED))
    for problem in measured.problems:
        on_progress(NoticeShown(level=NoticeLevel.WARNING, code="device_problem", text=problem))
    # About the embedded engine's GPU more is said, once that is decided.
    for unused in measured.unused if source.name != EMBEDDED else ():
        on_progress(NoticeShown(level=NoticeLevel.WARNING, code="device_unused", text=unused))
    for missing in (one for one in settings.models_dirs if not expand(one).is_dir()):
        text = f"--models-dir {missing} is not there: it is looked at again while the node runs. Check its path."
        on_progress(NoticeShown(level=NoticeLevel.WARNING, code="no_models_dir", text=text))
    library = await asyncio.to_thread(scan, model_directories(settings.models_dirs), cache, stores=known_stores())
    count = len(library.models)
    on_progress(Stage(name="models", text=f"{count} on disk" if count else "none on disk", done=True))
    return Machine(
        source=source,
        devices=measured.devices,
        capacity=measured.capacity,
        registry=ModelRegistry(library, cache, projectors=settings.launch.use_projector),
        cache=cache,
        rpc=rpc_of(info),
        lending=lending_of(info),
        parts=info.parts,
        sees_gpu=info.has_gpu,
    )


def measure_for(settings: Settings, info: EngineInfo, *, waits: bool) -> Measured:
    """What models may take on this machine, with the user's options. Blocks for milliseconds.

    Raises MeshError `device_not_found`; but if the node `waits` for a device that the user named, and that is not here,
    the processor serves.
    """
    offered = None if settings.max_memory_bytes is None else settings.max_memory_bytes / GIGABYTE
    device = ",".join(settings.devices) or None
    try:
        return measure(info, max_vram=offered, device=device, fraction=settings.use)
    except MeshError as error:
        if error.code != "device_not_found" or not waits:
            raise
    return measure(info, max_vram=offered, device="cpu", fraction=settings.use)


def _comes(settings: Settings, info: EngineInfo) -> bool:
    """Whether a device that the user named may come with a plugin that is built first (`--gpu KIND`)."""
    built = {part.name for part in info.parts if part.state is PartState.READY}
    return info.source == EMBEDDED and settings.gpu not in {"auto", "none", *built}


def rpc_of(info: EngineInfo) -> RpcChanged:
    """What the core must know of an engine's RPC."""
    part = next((one for one in info.parts if one.name == RPC), None)
    if info.rpc_version:
        obstacle, detail = "", ""
    elif info.not_lent:
        obstacle, detail = Obstacle.UNCONFINED, why_refused(info.not_lent)
    elif part is not None and part.state in {PartState.MISSING, PartState.BUILDING}:
        obstacle, detail = Obstacle.BUILDING, ""
    else:
        obstacle, detail = Obstacle.PLUGIN, part.text if part is not None else ""
    return RpcChanged(rpc_version=info.rpc_version, obstacle=obstacle, detail=detail)


def lending_of(info: EngineInfo) -> str:
    """How an engine's RPC server is confined, or why nothing is lent; empty without RPC."""
    return info.not_lent or (described(info.confinement) if info.confinement else "")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The models to serve at the start, by served name and in order, and how to launch them."""

    wanted: tuple[ModelName, ...]
    options: LaunchOptions


def choose_models(settings: Settings, machine: Machine, *, joins: bool) -> Choice:
    """Resolve `--model` and its options. A node that joins a mesh, and a client, may want none.

    Raises:
        MeshError: a model or draft is not there, or does not fit.
    """
    if settings.client:
        return Choice(wanted=(), options=settings.launch)
    specs = settings.models or (() if joins else (DEFAULT_MODEL,))
    wanted = machine.registry.wanted(specs)
    first = machine.registry.find(wanted[0]) if wanted else None
    options = machine.registry.with_draft(settings.launch, first)
    if first is not None:
        machine.registry.drafts = drafts_among([first], machine.registry.library)
        draft = machine.registry.draft_of(options)
        facts = draft.facts if draft is not None else None
        plan = plan_solo(first.facts, machine.capacity.memory_bytes, options, facts)
        # A model that is too big for this machine waits for other nodes, if the engine can split it.
        if isinstance(plan, DoesNotFit) and not machine.can_split:
            hint = f"{plan.hint}{machine.no_split_hint()}"
            raise MeshError(code="does_not_fit", message=plan.message, hint=hint, status=409)
    # Other nodes may have what this one has not. Files by their path are this machine's own.
    missing = [ModelName(one.name) for one in settings.unavailable if not looks_like_path(one.spec)] if wanted else []
    return Choice(wanted=tuple(dict.fromkeys((*wanted, *missing)))[:MAX_WANTED], options=options)


async def rescan(settings: Settings, machine: Machine) -> None:
    """Scan the disk again."""
    directories = model_directories(settings.models_dirs)
    machine.registry.library = await asyncio.to_thread(scan, directories, machine.cache, stores=known_stores())


async def register_fetched(
    settings: Settings, machine: Machine, post: Callable[[AnyEvent], None], name: str
) -> LocalModel | None:
    """Scan the disk after a download, and report the models to the core. Returns the one of this name."""
    await rescan(settings, machine)
    registry = machine.registry
    found = registry.library.find(name)
    if found is not None:
        await registry.find_drafts([found])
    post(ModelsChanged(on_disk=registry.facts(), drafts=registry.drafts))
    return found


async def watch_library(directories: tuple[Path, ...], machine: Machine, post: Callable[[AnyEvent], None]) -> None:
    """Report to the core when models appear on the disk, disappear, or get a draft; until cancelled.

    `directories`: the user's further ones.
    """
    registry = machine.registry
    async for library in watch(model_directories(directories), machine.cache, stores=known_stores()):
        known_library, known_drafts = registry.library, registry.drafts
        registry.library = library
        if library != known_library:
            post(ModelsChanged(on_disk=registry.facts(), drafts=registry.drafts))
        await registry.find_drafts()
        if registry.drafts != known_drafts:
            post(ModelsChanged(on_disk=registry.facts(), drafts=registry.drafts))
