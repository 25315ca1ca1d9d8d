"""Tells the core when models come to this machine's disk, go, or get one that can guess ahead for them.

This node's part in sharing models' files: what it gives to others of the mesh, and how it takes theirs.

Carries out FetchModel: what the mesh calls for and is not here, from neighbours first, else from the hub.

Where a daemon's models come from and go to: neighbours, what the mesh calls for, what the user brings, the disk.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from mesh_llm.core.placement.controller import file_sources
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.effects import FetchModel
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.events import AnyEvent, FetchEnded, ModelsChanged
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts
from mesh_llm.core.types.ports import BulkStream
from mesh_llm.daemon.model_fetcher import Telling, fetch_watched, internal_fault, rescan
from mesh_llm.daemon.model_registry import Machine, Shelf
from mesh_llm.daemon.notices import OnStage, Stage
from mesh_llm.daemon.published_state import Outlook
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.startup_models import Bringing, Obtainer
from mesh_llm.models.disk import disk_error
from mesh_llm.models.hub.cache import hub_cache_directory, models_directory
from mesh_llm.models.hub.progress import OnProgress
from mesh_llm.models.hub.source_ref import RemoteModel, parse_source
from mesh_llm.models.library.files import known_stores
from mesh_llm.models.library.library import model_directories
from mesh_llm.models.library.watch import watch
from mesh_llm.models.p2p.assembler import ChooseDestination, in_directory, in_hub_cache
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.models.p2p.downloader import ModelDownload, NoSeedersError, Received
from mesh_llm.models.p2p.seeder import RateLimit, SeededModel, Seeder
from mesh_llm.models.p2p.swarm import SeederError
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.streams import ModelParameters


async def watch_library(directories: Iterable[Path], machine: Machine, post: Callable[[AnyEvent], None]) -> None:
    """Watch until cancelled. `directories`: the user's further ones."""
    shelf = machine.shelf
    async for library in watch(model_directories(tuple(directories)), machine.cache, stores=known_stores()):
        known = (shelf.library, shelf.drafts)
        shelf.library = library
        if library != known[0]:
            post(ModelsChanged(on_disk=shelf.facts(), drafts=shelf.drafts))
        await shelf.find_drafts()
        if shelf.drafts != known[1]:
            post(ModelsChanged(on_disk=shelf.facts(), drafts=shelf.drafts))


_log = structlog.get_logger(__name__)

_STREAMS_PER_PEER = 4
_DISTRUST_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class GivingAway:
    """What the user said of giving files away. `pace`: how fast."""

    give: bool = True
    pace: RateLimit


class Neighbours:
    """Made before the mesh is started; closed before its endpoint is."""

    def __init__(
        self,
        net: MeshNet,
        shelf: Shelf,
        lists: Path,
        members: Callable[[], Sequence[Member]],
        name: Callable[[NodeId], str],
        giving: GivingAway,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lists` keeps what files contain; `name`: of a node, for people."""
        self._net = net
        self._shelf = shelf
        self._members = members
        self._name = name
        self._clock = clock
        self._store = ChunkDigestStore(lists)
        self._giver = Seeder(self._given, self._store, giving.pace)
        self._distrusted: dict[NodeId, float] = {}
        if giving.give:
            net.streams.register(StreamType.MODEL, self._serve, scope=Scope.SERVE, per_peer=_STREAMS_PER_PEER)

    def who_has(self, name: ModelName, fingerprint: str) -> list[NodeId]:
        """Nodes that give this very file away, the nearest first; not those that lied of late."""
        now = self._clock()
        self._distrusted = {node: until for node, until in self._distrusted.items() if until > now}
        found = [member.announcement.node for member in file_sources(self._members(), name, fingerprint)]
        return [node for node in found if node not in self._distrusted]

    def shared(self) -> list[ModelFacts]:
        """Models that others give away, each once, by name; of those that differ, what most of them have."""
        held: dict[tuple[ModelName, str], list[ModelFacts]] = {}
        for member in self._members():
            if member.announcement.shares:
                for facts in member.announcement.on_disk:
                    if facts.fingerprint:
                        held.setdefault((facts.name, facts.fingerprint), []).append(facts)
        best: dict[ModelName, ModelFacts] = {}
        for (name, _), copies in sorted(held.items(), key=lambda item: (-len(item[1]), item[0])):
            # Of equal ones, one that says where it came from.
            best.setdefault(name, max(copies, key=lambda facts: bool(facts.source)))
        return [best[name] for name in sorted(best)]

    def names(self, nodes: Sequence[NodeId]) -> str:
        """For people."""
        return ", ".join(self._name(node) for node in nodes)

    async def take(
        self,
        name: ModelName,
        fingerprint: str,
        on_progress: OnProgress,
        *,
        published: RemoteModel | None = None,
        most_bytes: int | None = None,
        received: Received | None = None,
    ) -> tuple[Path, ...]:
        """Take a model from those who have it. What arrives is kept, also where it is not all.

        Args:
            name: as it is announced.
            fingerprint: the same.
            on_progress: told how far it is.
            published: what the hub says of it, where it was asked: then nothing else is taken, and it goes into the
                Hugging Face cache. Else it goes to the user's own models: nobody vouches for the publisher's name.
            most_bytes: larger ones are refused.
            received: is told what came, and from whom.

        Raises:
            NeighboursError: nobody has it, or they could not give all of it.
            MeshError: `disk_full`, `disk_failed`, `model_strange`.
        """
        nodes = self.who_has(name, fingerprint)
        if not nodes:
            raise NoSeedersError("no other node has it")
        received = received or Received()
        taking = ModelDownload(
            asked=ModelParameters(name, fingerprint),
            place=_place(name, published),
            open_model=self._open,
            store=self._store,
            on_progress=on_progress,
            failed=self._failed,
            sha256=tuple(bytes.fromhex(file.sha256) for file in published.files) if published is not None else (),
            most_bytes=most_bytes,
            received=received,
        )
        try:
            return await taking.run(nodes)
        except OSError as error:
            raise MeshError(
                code="disk_failed",
                message=f"{name} cannot be written: {error.strerror or error}.",
                hint="Check the disk and its permissions; what has arrived is kept.",
                status=507,
            ) from error
        finally:
            shares = {node[:10]: size for node, size in received.by_seeder.items()}
            _log.info("bytes of a model came from neighbours", model=name, received_bytes=received.total, shares=shares)

    async def close(self) -> None:
        """Give nothing more."""
        await self._giver.close()

    async def _serve(self, stream: IrohStream, peer: Peer, parameters: bytes) -> None:
        await self._giver.serve(stream, peer.node, parameters)

    async def _open(self, node: NodeId, parameters: bytes) -> BulkStream:
        return await self._net.open(node, StreamType.MODEL, parameters, Scope.SERVE)

    def _given(self, name: str, fingerprint: str) -> SeededModel | None:
        model = self._shelf.find(ModelName(name))
        if model is None or model.facts.fingerprint != fingerprint:
            return None
        return SeededModel(model.paths, model.projector)

    def _failed(self, node: NodeId, failure: SeederError) -> None:
        _log.info("a neighbour gives nothing more", node=node[:10], reason=failure.reason, liar=failure.liar)
        if failure.liar:
            self._distrusted[node] = self._clock() + _DISTRUST_SECONDS


def _place(name: str, published: RemoteModel | None) -> ChooseDestination:
    if published is not None and all(file.sha256 for file in published.files):
        place = in_hub_cache(parse_source(published.source), hub_cache_directory())
        if place is not None:
            return place
    return in_directory(name, models_directory())


_MOST_ROUNDS = 20
_PAUSE_SECONDS = 5.0


class MeshFetches:
    """Fetches what the core asks for. A source is another node's word: it can name the hub's files only."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        neighbours: Neighbours,
        post: Callable[[AnyEvent], None],
        on_progress: OnStage,
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._neighbours = neighbours
        self._post = post
        self._on_progress = on_progress
        self._scope = TaskScope("mesh-fetches")

    def start(self, effect: FetchModel) -> None:
        """Begin; ModelsChanged and FetchEnded follow."""
        task = self._scope.spawn(self._fetch(effect), effect.model)
        task.add_done_callback(lambda ended: self._ended(effect.model, ended))

    async def close(self) -> None:
        """Stop fetching; what has arrived is kept."""
        await self._scope.close()

    def _ended(self, model: ModelName, task: asyncio.Task[str]) -> None:
        """The core hears of every end but that of the node."""
        if task.cancelled():
            return
        fault = task.exception() is not None
        self._post(FetchEnded(model=model, problem=_text(internal_fault("The fetch")) if fault else task.result()))

    async def _fetch(self, effect: FetchModel) -> str:
        """Fetch, and make known what came; why it could not, or an empty text."""
        try:
            await self._obtain(effect)
            await rescan(self._settings, self._machine)
            shelf = self._machine.shelf
            found = shelf.library.find(effect.model)
            if found is not None:
                await shelf.find_drafts([found])
            self._post(ModelsChanged(on_disk=shelf.facts(), drafts=shelf.drafts))
        except MeshError as error:
            return _text(error)
        except OSError as error:
            return _text(disk_error(error))
        return ""

    async def _obtain(self, effect: FetchModel) -> None:
        """From neighbours as long as that gets on, then from the hub, which goes on where they ended."""
        report = self._reporter(effect)
        reason = ""
        for _ in range(_MOST_ROUNDS):
            received = Received()
            try:
                await self._take(effect, received)
            except NoSeedersError as error:
                reason = error.reason
            else:
                return
            if effect.source or not received.total:
                break
            report(f"its neighbours stopped giving it ({reason}); trying again", False)
            await asyncio.sleep(_PAUSE_SECONDS)
        if not effect.source:
            raise MeshError(
                code="model_unavailable",
                message=f"No node that has {effect.model} gives it: {reason}.",
                hint="Nobody knows another source; copy its file into ~/.models, or start a node that has it.",
                status=503,
            )
        report(f"asking the hub ({reason})", False)
        await fetch_watched(parse_source(effect.source), Telling(report, "the hub"), self._check)
        report("fetched from the hub and checked", True)

    async def _take(self, effect: FetchModel, received: Received) -> tuple[Path, ...]:
        nodes = self._neighbours.who_has(effect.model, effect.fingerprint)
        report = self._reporter(effect)
        telling = Telling(report, self._neighbours.names(nodes))
        memory = self._machine.capacity.memory_bytes
        paths = await self._neighbours.take(
            effect.model, effect.fingerprint, telling, most_bytes=memory, received=received
        )
        gave = [node for node, count in received.by_seeder.items() if count]
        report(f"fetched from {self._neighbours.names(gave) or 'its neighbours'} and checked", True)
        return paths

    def _reporter(self, effect: FetchModel) -> Callable[[str, bool], None]:
        def report(text: str, done: bool) -> None:
            self._on_progress(Stage(name="fetch", text=f"{effect.model}: {text}", done=done))

        return report

    def _check(self, model: RemoteModel) -> None:
        """Others told its size; the hub knows it."""
        memory = self._machine.capacity.memory_bytes
        if model.size_bytes > memory:
            message = f"It has {size(model.size_bytes)}; there are {size(memory)} for models."
            raise MeshError(code="does_not_fit", message=message, status=409)


def _text(error: MeshError) -> str:
    return f"{error.message} {error.hint}".strip()


class ModelRooms:
    """Made before the mesh is started; closed before its endpoint is."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        net: MeshNet,
        home: Home,
        members: Callable[[], Sequence[Member]],
        name: Callable[[NodeId], str],
        post: Callable[[AnyEvent], None],
        on_progress: OnStage,
        pace: RateLimit,
    ) -> None:
        """`members`: the other nodes at present; `name`: of a node, for people; `pace`: of what is given to others."""
        self._settings = settings
        self._machine = machine
        self._members = members
        self._post = post
        self._on_progress = on_progress
        giving = GivingAway(give=settings.seed and machine.source is not None, pace=pace)
        self._neighbours = Neighbours(net, machine.shelf, home.cache / "chunks", members, name, giving)
        self._fetches = MeshFetches(settings, machine, self._neighbours, post, on_progress)
        self.obtainer = Obtainer(machine, self._neighbours)

    def fetch(self, effect: FetchModel) -> None:
        """The core's FetchModel."""
        self._fetches.start(effect)

    def begin(self, scope: TaskScope, outlook: Outlook) -> None:
        """Watch the disk, and fetch what the user brings, as tasks of `scope`."""
        if self._machine.source is None:
            return
        scope.supervise(lambda: watch_library(self._settings.models_dirs, self._machine, self._post), "models")
        bringing = Bringing(
            self._settings, self._machine, self.obtainer, self._post, self._on_progress, outlook.notices
        )
        scope.spawn(bringing.run(outlook.bell, lambda: bool(self._members())), "bringing")

    async def close(self) -> None:
        """Fetch and give nothing more; what has arrived is kept."""
        await self._fetches.close()
        await self._neighbours.close()
