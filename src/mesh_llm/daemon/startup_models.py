"""Gets a model that a user asks a running node for: from neighbours that have it, the rest from the hub.

Where the hub answers, its word on the content's SHA-256 decides what is taken from neighbours; where it does not, what
they announce, and the whole is put beside the user's own models.

A joiner's own models that are not on its disk: fetched once it has joined, from neighbours first, and served.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.events import AnyEvent, LoadRequested, ModelsChanged
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts
from mesh_llm.daemon.model_fetcher import Telling, fetch_watched, find, rescan
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.daemon.notices import Bell, NoticeBook, OnStage, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.disk import disk_error
from mesh_llm.models.gguf.facts import split_part_name
from mesh_llm.models.hub.progress import OnProgress
from mesh_llm.models.hub.source_ref import RemoteModel, SourceRef, is_source, parse_source
from mesh_llm.models.library.library import LocalModel
from mesh_llm.models.library.resolve import HUB_UNAVAILABLE, Remote, fetched_earlier, interpret, looks_like_path
from mesh_llm.models.p2p.downloader import NoSeedersError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A model that other nodes of the mesh give away."""

    facts: ModelFacts


Wanted = Remote | Elsewhere


@dataclass(frozen=True, slots=True)
class Way:
    """What is being fetched, its size and its origin: `hub` or `mesh`. `origin_name`: the same for people."""

    name: str
    total_bytes: int
    origin: str
    origin_name: str


@dataclass(frozen=True, slots=True)
class Obtained:
    """What is here now."""

    name: str
    path: Path


OnWay = Callable[[Way], None]


class Givers(Protocol):
    """What it needs of `Neighbours`; see there."""

    def shared(self) -> list[ModelFacts]:
        """Models that others give away."""
        ...

    def who_has(self, name: ModelName, fingerprint: str) -> list[NodeId]:
        """Nodes that give this very file away."""
        ...

    def names(self, nodes: Sequence[NodeId]) -> str:
        """For people."""
        ...

    async def take(
        self, name: ModelName, fingerprint: str, on_progress: OnProgress, *, published: RemoteModel | None = None
    ) -> tuple[Path, ...]:
        """Take a model from those who have it."""
        ...


class Obtainer:
    """One for each daemon."""

    def __init__(self, machine: Machine, neighbours: Givers) -> None:
        self._machine = machine
        self._neighbours = neighbours

    def interpret(self, spec: str) -> LocalModel | Wanted:
        """What a user means: here, with others of the mesh, or on the hub. Blocks: reads headers.

        Raises:
            MeshError: `model_*` or `source_invalid`.
        """
        shelf = self._machine.shelf
        shared = self._neighbours.shared()
        try:
            found = interpret(spec, shelf.library, self._machine.cache, os.environ.get("HF_ENDPOINT", ""))
        except MeshError as error:
            if error.code != "model_not_found" or is_source(spec) or looks_like_path(spec):
                raise
            return Elsewhere(self._among(spec, shared, error))
        if isinstance(found, Remote) and not is_source(spec):
            # Where the mesh has what the catalogue means, or a model of just that name, nobody else need be asked.
            for facts in shared:
                if facts.name.casefold() == spec.casefold() or _is_source_of(facts, found.ref):
                    return Elsewhere(facts)
        return found

    def may_be_given(self, wanted: Wanted) -> bool:
        """Whether some other node may have it; only a source that leaves its file open has to be asked for."""
        if isinstance(wanted, Elsewhere):
            return True
        shared, ref = self._neighbours.shared(), wanted.ref
        if not ref.file:
            return bool(shared)
        name = split_part_name(ref.file.rpartition("/")[2].removesuffix(".gguf"))[0]
        return any(facts.name == name or _is_source_of(facts, ref) for facts in shared)

    async def obtain(self, wanted: Wanted, watch: OnProgress, on_way: OnWay, *, hub: bool = True) -> Obtained:
        """Get it. What arrives is kept, whatever happens.

        Args:
            wanted: what `interpret` found.
            watch: told how far it is.
            on_way: told from where it comes, also when that changes.
            hub: False where the hub is to give nothing; it may be asked what the content must be.

        Raises:
            MeshError: see models.hub; `model_unavailable`, `no_neighbour`.
        """
        if isinstance(wanted, Elsewhere):
            return await self._from_mesh(wanted.facts, watch, on_way, hub=hub)
        shared = self._neighbours.shared()
        if not shared and hub:
            return await self._from_hub(wanted.ref, watch, on_way)
        try:
            model = await find(wanted.ref)
        except MeshError as error:
            facts = next((one for one in shared if _is_source_of(one, wanted.ref)), None)
            if facts is not None and error.code in HUB_UNAVAILABLE:
                return await self._from_mesh(facts, watch, on_way, hub=hub)
            return self._earlier(wanted.ref, error)
        for facts in shared:
            if facts.name == model.name and all(file.sha256 for file in model.files):
                try:
                    return await self._take(facts, watch, on_way, model)
                except NoSeedersError as error:
                    if not hub:
                        raise _unavailable(facts.name, error) from error
                    break
        if not hub:
            raise no_neighbour(model.name)
        return await self._from_hub(wanted.ref, watch, on_way)

    async def _from_mesh(self, facts: ModelFacts, watch: OnProgress, on_way: OnWay, *, hub: bool) -> Obtained:
        try:
            return await self._take(facts, watch, on_way)
        except NoSeedersError as error:
            if not facts.source or not hub:
                raise _unavailable(facts.name, error) from error
        return await self._from_hub(parse_source(facts.source), watch, on_way)

    async def _take(
        self, facts: ModelFacts, watch: OnProgress, on_way: OnWay, published: RemoteModel | None = None
    ) -> Obtained:
        nodes = self._neighbours.who_has(facts.name, facts.fingerprint)
        total = published.size_bytes if published is not None else facts.size_bytes + facts.companion_bytes
        on_way(Way(facts.name, total, "mesh", self._neighbours.names(nodes)))
        paths = await self._neighbours.take(facts.name, facts.fingerprint, watch, published=published)
        return Obtained(facts.name, paths[0])

    async def _from_hub(self, ref: SourceRef, watch: OnProgress, on_way: OnWay) -> Obtained:
        loop = asyncio.get_running_loop()

        def found(model: RemoteModel) -> None:
            loop.call_soon_threadsafe(on_way, Way(model.name, model.size_bytes, "hub", "the hub"))

        try:
            fetched = await fetch_watched(ref, watch, found)
        except MeshError as error:
            return self._earlier(ref, error)
        return Obtained(fetched.model.name, fetched.paths[0])

    def _earlier(self, ref: SourceRef, error: MeshError) -> Obtained:
        """What was fetched earlier, where the hub cannot be asked. Raises `error` where that does not help."""
        earlier = fetched_earlier(ref, self._machine.shelf.library) if error.code in HUB_UNAVAILABLE else None
        if earlier is None:
            raise error
        _log.warning("the hub cannot be asked; an earlier copy is used", model=earlier.name, reason=error.message)
        return Obtained(earlier.name, earlier.path)

    def _among(self, spec: str, shared: list[ModelFacts], missing: MeshError) -> ModelFacts:
        found = match(spec, {facts.name: () for facts in shared})
        if isinstance(found, NotFound):
            raise missing
        if isinstance(found, Ambiguous):
            raise MeshError(
                code="model_ambiguous",
                message=f"{spec} is the beginning of several models of the mesh: {', '.join(found.choices)}.",
                hint="Give one of these names.",
                status=400,
            )
        return next(facts for facts in shared if facts.name == found)


def no_neighbour(name: str) -> MeshError:
    """Nobody in the mesh gives it."""
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
    """Whether a model that somebody announces came from there."""
    if not facts.source or not ref.file:
        return False
    try:
        known = parse_source(facts.source)
    except MeshError:
        return False
    same = (known.repository, known.file) == (ref.repository, ref.file)
    return same and ref.revision in {"main", known.revision}


_SECONDS_FOR_OTHERS = 10.0


class Bringing:
    """Used once, when the node has joined, or has seen that nobody answers yet."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        obtainer: Obtainer,
        post: Callable[[AnyEvent], None],
        on_progress: OnStage,
        notices: NoticeBook,
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._obtainer = obtainer
        self._post = post
        self._on_progress = on_progress
        self._notices = notices

    async def run(self, bell: Bell, anybody: Callable[[], bool]) -> None:
        """Fetch and serve `settings.later`, after others were heard of (`anybody`), or not within a few seconds."""
        if not self._settings.later:
            return
        end = asyncio.get_running_loop().time() + _SECONDS_FOR_OTHERS
        while not anybody() and (left := end - asyncio.get_running_loop().time()) > 0:
            await bell.wait(min(left, 1.0))
        for spec in self._settings.later:
            try:
                await self._bring(spec)
            except (MeshError, OSError) as failure:
                error = disk_error(failure) if isinstance(failure, OSError) else failure
                text = f"{spec} cannot be served here: {error.message} {error.hint}".strip()
                self._notices.add(Notice(level=NoticeLevel.ERROR, code="model_fetch_failed", text=text, about=spec))

    async def _bring(self, spec: str) -> None:
        shelf = self._machine.shelf
        found = await asyncio.to_thread(self._obtainer.interpret, spec)
        if isinstance(found, LocalModel):
            model = found
        else:
            obtained = await self._obtainer.obtain(found, self._tell(spec), self._on_way(spec))
            self._stage(spec, "fetched and checked", done=True)
            await rescan(self._settings, self._machine)
            model = shelf.library.find(obtained.name) or shelf.resolve(str(obtained.path))
        await shelf.find_drafts([model])
        self._post(ModelsChanged(on_disk=shelf.facts(), drafts=shelf.drafts))
        self._post(LoadRequested(model=model.name))

    def _tell(self, spec: str) -> Telling:
        return Telling(lambda text, done: self._stage(spec, text, done=done))

    def _on_way(self, spec: str) -> OnWay:
        def on_way(way: Way) -> None:
            text = f"Fetching {way.name} ({size(way.total_bytes)}) from {way.origin_name} to serve it."
            self._notices.add(Notice(level=NoticeLevel.INFO, code="model_fetching", text=text, about=spec))

        return on_way

    def _stage(self, spec: str, text: str, *, done: bool) -> None:
        self._on_progress(Stage(name="fetch", text=f"{spec}: {text}", done=done))
