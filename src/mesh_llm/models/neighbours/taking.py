"""Takes a model from the nodes that have it: from all at once, checked chunk by chunk and as a whole, then offered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mesh_llm.core.ids import NodeId
from mesh_llm.models.chunk_digests import ChunkDigestStore
from mesh_llm.models.neighbours.attempt import Attempt, IncompleteError
from mesh_llm.models.neighbours.meeting import Meeting
from mesh_llm.models.neighbours.places import PlaceFile
from mesh_llm.models.neighbours.seed import OpenModel, SeedError
from mesh_llm.models.transfer import OnProgress, Progress
from mesh_llm.wire.model_stream import ModelAsked


class NeighboursError(Exception):
    """No neighbour could give the model, or the rest of it. `reason`: a clause for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(kw_only=True)
class Received:
    """What came over the mesh: bytes in all, chunks that came twice or were wrong included; and from whom."""

    total: int = 0
    by_seed: dict[NodeId, int] = field(default_factory=dict[NodeId, int])


@dataclass(frozen=True, kw_only=True)
class Taking:
    """What is to be taken, and how.

    Attributes:
        asked: the model, as it is announced.
        place: where its files go.
        open_model: opens a stream to a node.
        store: keeps the lists of chunks: what was taken can be given away at once.
        on_progress: told how far it is; on the loop's thread.
        failed: told of each node that gives nothing more, and why.
        sha256: of each part, where the publisher's word is known; else empty.
        most_bytes: larger models are refused; None: no limit.
        silence: seconds without a byte after which a node is given up.
    """

    asked: ModelAsked
    place: PlaceFile
    open_model: OpenModel
    store: ChunkDigestStore
    on_progress: OnProgress
    failed: Callable[[NodeId, SeedError], None]
    sha256: tuple[bytes, ...] = ()
    most_bytes: int | None = None
    silence: float = 20.0
    received: Received = field(default_factory=Received)

    async def run(self, nodes: Sequence[NodeId]) -> tuple[Path, ...]:
        """Take the model from these nodes; returns its parts as they are called here. What arrives is always kept.

        Raises:
            NeighboursError: they could not give all of it.
            MeshError: `disk_full`, `model_strange`.
            OSError: the disk failed.
        """
        async with Meeting(self.asked, nodes, self.open_model, self.sha256, self.silence, self.failed) as meeting:
            while True:
                offer = await meeting.agree(self._preparing)
                if offer is None:
                    raise NeighboursError(meeting.why)
                if self.most_bytes is not None and sum(file.size for file in offer.files) > self.most_bytes:
                    raise NeighboursError("what they offer is larger than what fits here")
                attempt = Attempt(self.asked, offer, meeting, self.place, self.store, self.on_progress)
                try:
                    paths = await attempt.run()
                except IncompleteError:
                    meeting.dismiss(offer)
                    continue
                finally:
                    self._count(attempt)
                if paths is not None:
                    return paths

    def _count(self, attempt: Attempt) -> None:
        self.received.total += attempt.received_bytes
        for node, size in attempt.by_seed.items():
            self.received.by_seed[node] = self.received.by_seed.get(node, 0) + size

    def _preparing(self, done: int, total: int) -> None:
        self.on_progress(Progress(phase="preparing", done_bytes=done, total_bytes=max(done, total)))
