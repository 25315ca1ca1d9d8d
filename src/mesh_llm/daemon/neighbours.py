"""This node's part in sharing models' files: what it gives to others of the mesh, and how it takes theirs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from mesh_llm.core.errors import MeshError
from mesh_llm.core.holders import holders
from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.ports import BulkStream
from mesh_llm.daemon.shelf import Shelf
from mesh_llm.models.chunk_digests import ChunkDigestStore
from mesh_llm.models.hub_cache import hub_cache_directory
from mesh_llm.models.library import models_directory
from mesh_llm.models.neighbours.giving import Given, Giver
from mesh_llm.models.neighbours.pace import Pace
from mesh_llm.models.neighbours.places import PlaceFile, in_directory, in_hub_cache
from mesh_llm.models.neighbours.seed import SeedError
from mesh_llm.models.neighbours.taking import NeighboursError, Received, Taking
from mesh_llm.models.repository import RemoteModel
from mesh_llm.models.source_ref import parse_source
from mesh_llm.models.transfer import OnProgress
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.net.peer import Peer
from mesh_llm.net.streams import IrohStream
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.frames import StreamType
from mesh_llm.wire.model_stream import ModelAsked

_log = structlog.get_logger(__name__)

_STREAMS_PER_PEER = 4
_DISTRUST_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class GivingAway:
    """What the user said of giving files away. `pace`: how fast."""

    give: bool = True
    pace: Pace


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
        self._giver = Giver(self._given, self._store, giving.pace)
        self._distrusted: dict[NodeId, float] = {}
        if giving.give:
            net.register(StreamType.MODEL, self._serve, scope=Scope.SERVE, per_peer=_STREAMS_PER_PEER)

    def who_has(self, name: ModelName, fingerprint: str) -> list[NodeId]:
        """Nodes that give this very file away, the nearest first; not those that lied of late."""
        now = self._clock()
        self._distrusted = {node: until for node, until in self._distrusted.items() if until > now}
        found = [member.announcement.node for member in holders(self._members(), name, fingerprint)]
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
            raise NeighboursError("no other node has it")
        received = received or Received()
        taking = Taking(
            asked=ModelAsked(name, fingerprint),
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
            shares = {node[:10]: size for node, size in received.by_seed.items()}
            _log.info("bytes of a model came from neighbours", model=name, received_bytes=received.total, shares=shares)

    async def close(self) -> None:
        """Give nothing more."""
        await self._giver.close()

    async def _serve(self, stream: IrohStream, peer: Peer, parameters: bytes) -> None:
        await self._giver.serve(stream, peer.node, parameters)

    async def _open(self, node: NodeId, parameters: bytes) -> BulkStream:
        return await self._net.open(node, StreamType.MODEL, parameters, Scope.SERVE)

    def _given(self, name: str, fingerprint: str) -> Given | None:
        model = self._shelf.find(ModelName(name))
        if model is None or model.facts.fingerprint != fingerprint:
            return None
        return Given(model.paths, model.projector)

    def _failed(self, node: NodeId, failure: SeedError) -> None:
        _log.info("a neighbour gives nothing more", node=node[:10], reason=failure.reason, liar=failure.liar)
        if failure.liar:
            self._distrusted[node] = self._clock() + _DISTRUST_SECONDS


def _place(name: str, published: RemoteModel | None) -> PlaceFile:
    if published is not None and all(file.sha256 for file in published.files):
        place = in_hub_cache(parse_source(published.source), hub_cache_directory())
        if place is not None:
            return place
    return in_directory(name, models_directory())
