"""Fetches a model: from other nodes of the mesh that have it, and the rest from the hub. What arrives is kept.

If the hub answers, its SHA-256 decides what is accepted from other nodes. If not, what they announce decides, and the
model is put beside the user's own models. The hub's part runs on a thread, so that the loop goes on.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.models.gguf.facts import split_part_name
from mesh_llm.models.hub.source_ref import RemoteModel, SourceRef, is_source, parse_source
from mesh_llm.models.library.library import LocalModel
from mesh_llm.models.library.resolve import HUB_UNAVAILABLE, Remote, fetched_earlier, interpret, looks_like_path
from mesh_llm.models.p2p.downloader import NoSeedersError
from mesh_llm.runtime.transfer.progress import Meter, OnProgress, Progress

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")
_SECONDS_BETWEEN_REPORTS = 0.2

Report = Callable[[str, bool], None]
"""Called on the loop with a line of progress, and whether the fetch has ended."""


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A model that was fetched from the hub, and its files here."""

    model: RemoteModel
    paths: tuple[Path, ...]


def fetch_fault(what: str) -> MeshError:
    """The error of a fetch that ended by a fault of this program. The log has the details."""
    return MeshError(
        code="internal",
        message=f"{what} ended by a fault in mesh-llm.",
        hint="See what happened: mesh-llm logs. Then try again: what has arrived is kept.",
        status=500,
    )


class ProgressLines:
    """An OnProgress that reports lines: a few each second, and each new phase at once."""

    def __init__(self, report: Report, origin: str = "") -> None:
        """`origin`: added to each line."""
        self._report = report
        self._suffix = f", from {origin}" if origin else ""
        self._meter = Meter()
        self._last = 0.0
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        """Report, unless a line was reported just now."""
        text, now = self._meter.text(progress), time.monotonic()
        if progress.phase != self._phase or now - self._last >= _SECONDS_BETWEEN_REPORTS:
            self._last, self._phase = now, progress.phase
            self._report(text + self._suffix, False)


async def on_thread(work: Callable[[], _T], cancel: threading.Event | None = None) -> _T:
    """Run blocking work on a thread. If the caller is cancelled, it sets `cancel` and does not wait for the thread."""
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
    """The facts of a model that is not here: from the catalogue, else from the headers of its files on the hub.

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


async def fetch(ref: SourceRef, report: Report, check: Callable[[RemoteModel], None]) -> HubFiles:
    """Find a model on the hub, and fetch it into the Hugging Face cache.

    Args:
        ref: where it is.
        report: called with lines of progress.
        check: called with the model before anything is fetched, on another thread; it may raise MeshError.

    Raises:
        MeshError: see models.hub.
    """
    meter = Meter()
    fetched = await fetch_watched(ref, lambda progress: report(meter.text(progress), False), check)
    report("fetched and checked", True)
    return fetched


async def fetch_watched(ref: SourceRef, watch: OnProgress, check: Callable[[RemoteModel], None]) -> HubFiles:
    """`fetch` with progress in numbers: `watch` is called on the loop, a few times each second."""
    cancel = threading.Event()
    loop = asyncio.get_running_loop()
    last, phase = 0.0, ""

    def report(progress: Progress) -> None:
        nonlocal last, phase
        now = time.monotonic()
        if not cancel.is_set() and (progress.phase != phase or now - last >= _SECONDS_BETWEEN_REPORTS):
            last, phase = now, progress.phase
            loop.call_soon_threadsafe(watch, progress)

    def work() -> HubFiles:
        # Slow to import, and needed only here.
        from mesh_llm.models.hub.client import HubClient
        from mesh_llm.models.hub.fetch import Hub

        hub = Hub(HubClient())
        model = hub.find(ref)
        check(model)
        return HubFiles(model, hub.fetch(model, report, cancel, ref.revision))

    return await on_thread(work, cancel)


@dataclass(frozen=True, slots=True)
class MeshModel:
    """A model that other nodes of the mesh share."""

    facts: ModelFacts


MissingModel = Remote | MeshModel


@dataclass(frozen=True, slots=True)
class FetchOrigin:
    """What is being fetched, and from where. `origin`: `hub` or `mesh`; `origin_name`: the same for people."""

    name: str
    total_bytes: int
    origin: str
    origin_name: str


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model that was fetched."""

    name: str
    path: Path


OnOrigin = Callable[[FetchOrigin], None]


class PeerFiles(Protocol):
    """What it needs of `ModelSharing`."""

    def shared(self) -> list[ModelFacts]:
        """The models that other nodes share."""
        ...

    def who_has(self, name: ModelName, fingerprint: str) -> list[NodeId]:
        """The nodes that share this file."""
        ...

    def names(self, nodes: Sequence[NodeId]) -> str:
        """The nodes' names, for people."""
        ...

    async def take(
        self, name: ModelName, fingerprint: str, on_progress: OnProgress, *, published: RemoteModel | None = None
    ) -> tuple[Path, ...]:
        """Fetch a model from the nodes that have it."""
        ...


class ModelFetcher:
    """Finds and fetches models for the user."""

    def __init__(self, machine: Machine, peers: PeerFiles) -> None:
        self._machine = machine
        self._peers = peers

    def interpret(self, spec: str) -> LocalModel | MissingModel:
        """The model that the user names: here, on other nodes, or on the hub. Blocks: it reads headers.

        Raises:
            MeshError: `model_*` or `source_invalid`.
        """
        shared = self._peers.shared()
        try:
            found = interpret(
                spec, self._machine.registry.library, self._machine.cache, os.environ.get("HF_ENDPOINT", "")
            )
        except MeshError as error:
            if error.code != "model_not_found" or is_source(spec) or looks_like_path(spec):
                raise
            return MeshModel(self._among(spec, shared, error))
        if isinstance(found, Remote) and not is_source(spec):
            # The mesh has the catalogue's model, or a model of this name: the hub is not needed.
            for facts in shared:
                if facts.name.casefold() == spec.casefold() or _is_source_of(facts, found.ref):
                    return MeshModel(facts)
        return found

    def may_be_shared(self, missing: MissingModel) -> bool:
        """Whether another node may have it. A source without a file name may be any shared model."""
        if isinstance(missing, MeshModel):
            return True
        shared, ref = self._peers.shared(), missing.ref
        if not ref.file:
            return bool(shared)
        name = split_part_name(ref.file.rpartition("/")[2].removesuffix(".gguf"))[0]
        return any(facts.name == name or _is_source_of(facts, ref) for facts in shared)

    async def fetch(
        self, missing: MissingModel, watch: OnProgress, on_origin: OnOrigin, *, hub: bool = True
    ) -> FetchedModel:
        """Fetch a model. What arrives is kept, also after an error.

        Args:
            missing: what `interpret` found.
            watch: called with the progress.
            on_origin: called with the origin, and again when it changes.
            hub: False: fetch no content from the hub, but ask it for digests.

        Raises:
            MeshError: see models.hub; `model_unavailable`, `no_neighbour`.
        """
        if isinstance(missing, MeshModel):
            return await self._from_mesh(missing.facts, watch, on_origin, hub=hub)
        shared = self._peers.shared()
        if not shared and hub:
            return await self._from_hub(missing.ref, watch, on_origin)
        try:
            model = await find(missing.ref)
        except MeshError as error:
            facts = next((one for one in shared if _is_source_of(one, missing.ref)), None)
            if facts is not None and error.code in HUB_UNAVAILABLE:
                return await self._from_mesh(facts, watch, on_origin, hub=hub)
            return self._fetched_earlier(missing.ref, error)
        for facts in shared:
            if facts.name == model.name and all(file.sha256 for file in model.files):
                try:
                    return await self._take(facts, watch, on_origin, model)
                except NoSeedersError as error:
                    if not hub:
                        raise _unavailable(facts.name, error) from error
                    break
        if not hub:
            raise no_provider(model.name)
        return await self._from_hub(missing.ref, watch, on_origin)

    async def _from_mesh(self, facts: ModelFacts, watch: OnProgress, on_origin: OnOrigin, *, hub: bool) -> FetchedModel:
        try:
            return await self._take(facts, watch, on_origin)
        except NoSeedersError as error:
            if not facts.source or not hub:
                raise _unavailable(facts.name, error) from error
        return await self._from_hub(parse_source(facts.source), watch, on_origin)

    async def _take(
        self, facts: ModelFacts, watch: OnProgress, on_origin: OnOrigin, published: RemoteModel | None = None
    ) -> FetchedModel:
        nodes = self._peers.who_has(facts.name, facts.fingerprint)
        total = published.size_bytes if published is not None else facts.size_bytes + facts.companion_bytes
        on_origin(FetchOrigin(facts.name, total, "mesh", self._peers.names(nodes)))
        paths = await self._peers.take(facts.name, facts.fingerprint, watch, published=published)
        return FetchedModel(facts.name, paths[0])

    async def _from_hub(self, ref: SourceRef, watch: OnProgress, on_origin: OnOrigin) -> FetchedModel:
        loop = asyncio.get_running_loop()

        def found(model: RemoteModel) -> None:
            loop.call_soon_threadsafe(on_origin, FetchOrigin(model.name, model.size_bytes, "hub", "the hub"))

        try:
            fetched = await fetch_watched(ref, watch, found)
        except MeshError as error:
            return self._fetched_earlier(ref, error)
        return FetchedModel(fetched.model.name, fetched.paths[0])

    def _fetched_earlier(self, ref: SourceRef, error: MeshError) -> FetchedModel:
        """A copy that was fetched earlier, if the hub is unavailable. Otherwise raises `error`."""
        earlier = fetched_earlier(ref, self._machine.registry.library) if error.code in HUB_UNAVAILABLE else None
        if earlier is None:
            raise error
        _log.warning("the hub cannot be asked; an earlier copy is used", model=earlier.name, reason=error.message)
        return FetchedModel(earlier.name, earlier.path)

    def _among(self, spec: str, shared: list[ModelFacts], not_found: MeshError) -> ModelFacts:
        found = match(spec, {facts.name: () for facts in shared})
        if isinstance(found, NotFound):
            raise not_found
        if isinstance(found, Ambiguous):
            raise MeshError(
                code="model_ambiguous",
                message=f"{spec} is the beginning of several models of the mesh: {', '.join(found.choices)}.",
                hint="Give one of these names.",
                status=400,
            )
        return next(facts for facts in shared if facts.name == found)


def no_provider(name: str) -> MeshError:
    """The error if no node of the mesh shares a model."""
    return MeshError(
        code="no_neighbour",
        message=f"No other node of the mesh has {name}.",
        hint="Ask the hub for it as well.",
        status=404,
    )


def _unavailable(name: str, error: NoSeedersError) -> MeshError:
    return MeshError(
        code="model_unavailable",
        message=f"No node that has {name} gives all of it: {error.reason}.",
        hint="Try again: what has arrived is kept.",
        status=503,
    )


def _is_source_of(facts: ModelFacts, ref: SourceRef) -> bool:
    """Whether an announced model came from this source."""
    if not facts.source or not ref.file:
        return False
    try:
        known = parse_source(facts.source)
    except MeshError:
        return False
    same = (known.repository, known.file) == (ref.repository, ref.file)
    return same and ref.revision in {"main", known.revision}
