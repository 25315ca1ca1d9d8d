"""What this machine brings: an engine, the memory it may use, and the models on its disk."""

import asyncio
from dataclasses import dataclass

from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.errors import MeshError
from mesh_llm.core.fit import DoesNotFit, plan_solo
from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import Capacity, LaunchOptions
from mesh_llm.daemon.progress import OnProgress, Stage, Told
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.shelf import DEFAULT_MODEL, Shelf, drafts_among
from mesh_llm.engine.confinement.policy import NOT_CONFINED, described
from mesh_llm.engine.devices import GIGABYTE, measure
from mesh_llm.engine.share import SharedSource, shared_threads
from mesh_llm.engine.source import EngineSource
from mesh_llm.engine.sources import choose, find_sources
from mesh_llm.engine.spec import CPU_DEVICE
from mesh_llm.models.facts_cache import FactsCache
from mesh_llm.models.library import Library, model_directories, scan
from mesh_llm.models.stores import known_stores
from mesh_llm.runtime.home import Home

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


async def look(settings: Settings, home: Home, on_progress: OnProgress) -> Machine:
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
    measured = await asyncio.to_thread(measure, info, max_vram=offered, device=device, share=settings.share)
    if settings.share < 1.0:
        source = SharedSource(source, shared_threads(settings.share))
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
