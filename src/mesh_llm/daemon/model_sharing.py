"""Model files between the nodes of a mesh: what this node seeds, and what it downloads from others.

`MeshDownloads` carries out FetchModel: it fetches what the mesh needs here, from other nodes first, then from the hub.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import structlog

from mesh_llm.core.placement.controller import file_sources
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.effects import FetchModel
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.events import AnyEvent, FetchEnded
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts
from mesh_llm.core.types.ports import BulkStream
from mesh_llm.daemon.model_fetcher import ProgressLines, fetch_fault, fetch_watched
from mesh_llm.daemon.model_registry import Machine, ModelRegistry, register_fetched
from mesh_llm.daemon.published_state import ProgressListener, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.disk import disk_error
from mesh_llm.models.hub.cache import hub_cache_directory, models_directory
from mesh_llm.models.hub.source_ref import RemoteModel, parse_source
from mesh_llm.models.p2p.assembler import ChooseDestination, in_directory, in_hub_cache
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.models.p2p.downloader import ModelDownload, NoSeedersError, Received
from mesh_llm.models.p2p.seeder import RateLimit, SeededModel, Seeder
from mesh_llm.models.p2p.swarm import SeederError
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.runtime.transfer.progress import OnProgress
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.streams import ModelParameters

_log = structlog.get_logger(__name__)

_STREAMS_PER_PEER = 4
_DISTRUST_SECONDS = 3600.0


class ModelSharing:
    """Seeds this node's models, and downloads models from seeders. Make it before the mesh starts."""

    def __init__(
        self,
        net: MeshNet,
        registry: ModelRegistry,
        digests: ChunkDigestStore,
        members: Callable[[], Sequence[Member]],
        name_of: Callable[[NodeId], str],
        limit: RateLimit | None,
        may_have: Callable[[NodeId], bool] = lambda _: True,
    ) -> None:
        """`limit`: of the bytes that are sent; None: this node seeds nothing. `may_have`: whether a node gets files."""
        self._net = net
        self._registry = registry
        self._digests = digests
        self._members = members
        self._name_of = name_of
        self._may_have = may_have
        self._seeder = Seeder(self._seeded, digests, limit) if limit is not None else None
        self._distrusted: dict[NodeId, float] = {}
        self.doubted: Callable[[], Collection[tuple[ModelName, NodeId]]] = tuple
        """Models on nodes that canaries found to answer otherwise than the file: it is not taken from them."""
        if self._seeder is not None:
            net.streams.register(StreamType.MODEL, self._serve, scope=Scope.SERVE, per_peer=_STREAMS_PER_PEER)

    def who_has(self, name: ModelName, fingerprint: str) -> list[NodeId]:
        """The nodes that share this file, the nearest first, without those that sent wrong data in the last hour."""
        now = time.monotonic()
        self._distrusted = {node: until for node, until in self._distrusted.items() if until > now}
        sources = file_sources(self._members(), name, fingerprint, self.doubted())
        found = [member.announcement.node for member in sources]
        return [node for node in found if node not in self._distrusted]

    def shared(self) -> list[ModelFacts]:
        """The models that other nodes share, by name. If their files differ, the one that most nodes have."""
        doubted = self.doubted()
        held: dict[tuple[ModelName, str], list[ModelFacts]] = {}
        for member in self._members():
            if member.announcement.shares:
                for facts in member.announcement.on_disk:
                    if facts.fingerprint and (facts.name, member.announcement.node) not in doubted:
                        held.setdefault((facts.name, facts.fingerprint), []).append(facts)
        best: dict[ModelName, ModelFacts] = {}
        for (name, _), copies in sorted(held.items(), key=lambda item: (-len(item[1]), item[0])):
            # Prefer a copy with a known source.
            best.setdefault(name, max(copies, key=lambda facts: bool(facts.source)))
        return [best[name] for name in sorted(best)]

    def names(self, nodes: Sequence[NodeId]) -> str:
        """The nodes' names, for people."""
        return ", ".join(self._name_of(node) for node in nodes)

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
        """Download a model from the nodes that share it. What arrives is kept, even if it is not all.

        Args:
            name: as it is announced.
            fingerprint: as it is announced.
            on_progress: called with the progress.
            published: the hub's record. Then only its content is accepted, and stored in the Hugging Face cache.
                Without it, the model goes to the user's own models, because nothing proves its publisher.
            most_bytes: a larger model is refused.
            received: counts the bytes of each seeder.

        Raises:
            NoSeedersError: no node has it, or the seeders did not send all of it.
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
            store=self._digests,
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
            _log.info(
                "bytes of a model came from other nodes", model=name, received_bytes=received.total, shares=shares
            )

    async def close(self) -> None:
        """Stop seeding."""
        if self._seeder is not None:
            await self._seeder.close()

    async def _serve(self, stream: PeerStream, peer: Peer, parameters: bytes) -> None:
        assert self._seeder is not None  # noqa: S101 - registered only with a seeder
        refusal = "" if self._may_have(peer.node) else "it sends no files to nodes that came by a public listing"
        await self._seeder.serve(stream, peer.node, parameters, refusal)

    async def _open(self, node: NodeId, parameters: bytes) -> BulkStream:
        return await self._net.open(node, StreamType.MODEL, parameters, Scope.SERVE)

    def _seeded(self, name: str, fingerprint: str) -> SeededModel | None:
        model = self._registry.find(ModelName(name))
        if model is None or model.facts.fingerprint != fingerprint:
            return None
        return SeededModel(model.paths, model.projector)

    def _failed(self, node: NodeId, failure: SeederError) -> None:
        _log.info("a seeder is not asked again", node=node[:10], reason=failure.reason, liar=failure.liar)
        if failure.liar:
            self._distrusted[node] = time.monotonic() + _DISTRUST_SECONDS


def _place(name: str, published: RemoteModel | None) -> ChooseDestination:
    if published is not None and all(file.sha256 for file in published.files):
        place = in_hub_cache(parse_source(published.source), hub_cache_directory())
        if place is not None:
            return place
    return in_directory(name, models_directory())


_MOST_ROUNDS = 20
_PAUSE_SECONDS = 5.0


class MeshDownloads:
    """Fetches what the core asks for. A source comes from another node, and can name files of the hub only."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        sharing: ModelSharing,
        post: Callable[[AnyEvent], None],
        on_progress: ProgressListener,
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._sharing = sharing
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
        """Report the end to the core, except at the end of the node."""
        if task.cancelled():
            return
        fault = task.exception() is not None
        self._post(FetchEnded(model=model, problem=_text(fetch_fault("The fetch")) if fault else task.result()))

    async def _fetch(self, effect: FetchModel) -> str:
        """Fetch, and register the model. Returns the problem; empty if there is none."""
        try:
            await self._download(effect)
            await register_fetched(self._settings, self._machine, self._post, effect.model)
        except MeshError as error:
            return _text(error)
        except OSError as error:
            return _text(disk_error(error))
        return ""

    async def _download(self, effect: FetchModel) -> None:
        """Download from other nodes while that makes progress, then the rest from the hub."""
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
            report(f"the seeders stopped ({reason}); trying again", False)
            await asyncio.sleep(_PAUSE_SECONDS)
        if not effect.source:
            raise MeshError(
                code="model_unavailable",
                message=f"No node that has {effect.model} sends it: {reason}.",
                hint="No other source is known. Copy its file into ~/.models, or start a node that has it.",
                status=503,
            )
        report(f"asking the hub ({reason})", False)
        await fetch_watched(parse_source(effect.source), ProgressLines(report, "the hub"), self._check)
        report("fetched from the hub and checked", True)

    async def _take(self, effect: FetchModel, received: Received) -> tuple[Path, ...]:
        nodes = self._sharing.who_has(effect.model, effect.fingerprint)
        report = self._reporter(effect)
        lines = ProgressLines(report, self._sharing.names(nodes))
        memory = self._machine.capacity.memory_bytes
        paths = await self._sharing.take(effect.model, effect.fingerprint, lines, most_bytes=memory, received=received)
        gave = [node for node, count in received.by_seeder.items() if count]
        report(f"fetched from {self._sharing.names(gave) or 'other nodes'} and checked", True)
        return paths

    def _reporter(self, effect: FetchModel) -> Callable[[str, bool], None]:
        def report(text: str, done: bool) -> None:
            self._on_progress(Stage(name="fetch", text=f"{effect.model}: {text}", done=done))

        return report

    def _check(self, model: RemoteModel) -> None:
        """Refuse a model that is too big. Other nodes announced its size; the hub knows it."""
        memory = self._machine.capacity.memory_bytes
        if model.size_bytes > memory:
            message = f"It has {size(model.size_bytes)}; there are {size(memory)} for models."
            raise MeshError(code="does_not_fit", message=message, status=409)


def _text(error: MeshError) -> str:
    return f"{error.message} {error.hint}".strip()
