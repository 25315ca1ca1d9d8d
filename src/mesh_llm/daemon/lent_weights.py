"""What weights a worker of a split model offers to its host: of its own file, or kept from what hosts sent before."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.units import size
from mesh_llm.daemon.split_progress import Tell
from mesh_llm.daemon.weights import WeightShelf
from mesh_llm.models.kept_shelf import KeptShelf
from mesh_llm.models.kept_tensors import KeptTensors
from mesh_llm.models.library import LocalModel
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.split.ports import Arriving, Keep, Weights

_SLACK_BYTES = 64 << 20

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LentPart:
    """This node's part of a model. `size_bytes`: its weights, roughly."""

    model: ModelName
    layers: int
    size_bytes: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.layers} layers of {self.model}"


class LentWeights:
    """Of this node, one model at a time. `kept` None: nothing is kept."""

    def __init__(self, weights: WeightShelf, kept: KeptShelf | None, tell: Tell) -> None:
        self._weights = weights
        self._kept = kept
        self._tell = tell
        self._opening = asyncio.Lock()
        self._scope = TaskScope("kept")
        self._told: object = None

    def prepare(self, model: LocalModel | None, facts: ModelFacts | None) -> None:
        """Begin to read what there is: a host will ask soon."""
        if model is not None:
            self._weights.prepare(model.path)
        elif facts is not None:
            self._scope.spawn(self._open(facts), "open")

    async def of(
        self, model: LocalModel | None, facts: ModelFacts, part: LentPart, host: str
    ) -> tuple[Weights | None, Keep | None]:
        """What can be offered, and where what the host sends is kept; said to the user before it begins.

        Args:
            model: the file here, if there is one.
            facts: of the model.
            part: what is computed here.
            host: who sends what is missing, for people.
        """
        if model is not None:
            return await self._weights.index(model.path), None
        kept = await self._open(facts)
        missing = max(0, part.size_bytes - kept.size_bytes) if kept is not None else part.size_bytes
        keeps = kept is not None and (not missing or await self._room(facts, missing))
        if (part, host, keeps) != self._told:
            self._told = (part, host, keeps)
            where = f"kept in {kept.path.parent} for the next time" if keeps and kept is not None else "not kept here"
            have = f"{size(kept.size_bytes)} of it here" if kept is not None and kept.size_bytes else "none of it here"
            self._tell(f"{part}: {size(part.size_bytes)}, {have}; what {host} sends is {where}", True)
        if kept is None or self._kept is None or not keeps:
            return kept, None
        return kept, _Room(kept, part.size_bytes, self._kept.has_room)

    async def close(self) -> None:
        """Read no more."""
        await self._scope.close()
        await self.note()

    async def note(self) -> None:
        """Nothing is written any more: what is kept is right as it is."""
        if self._kept is not None:
            try:
                await asyncio.to_thread(self._kept.note)
            except OSError as error:
                _log.warning("kept weights not noted", reason=str(error))

    async def _open(self, facts: ModelFacts) -> KeptTensors | None:
        """None where nothing can be kept. Reads what is there if it may have changed."""
        if self._kept is None:
            return None
        async with self._opening:
            try:
                await asyncio.to_thread(self._kept.sweep)
                return await asyncio.to_thread(self._kept.open, facts.name, facts.fingerprint)
            except OSError as error:
                _log.warning("weights cannot be kept", model=facts.name, reason=str(error))
                return None

    async def _room(self, facts: ModelFacts, missing: int) -> bool:
        if self._kept is None:
            return False
        try:
            return await asyncio.to_thread(self._kept.make_room, missing, [facts.fingerprint])
        except OSError:
            return False


class _Room:
    """Satisfies split.ports.Keep: what was promised to be kept, and not much more, whatever the host sends.

    What counts is all that is kept of the model, not only what came in this session: a host may open many.
    """

    def __init__(self, kept: KeptTensors, part_bytes: int, has_room: Callable[[int], bool]) -> None:
        self._kept = kept
        # Layers are not quite equal, and their number was only estimated in bytes.
        self._most = part_bytes + part_bytes // 4 + _SLACK_BYTES
        self._has_room = has_room

    def begin(self, size: int) -> Arriving | None:
        if self._kept.file_bytes + size > self._most or not self._has_room(size):
            return None
        return self._kept.begin()

    def forget(self, digest: bytes) -> None:
        self._kept.forget(digest)
