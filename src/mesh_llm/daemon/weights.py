"""Digests of the models that this node shares, computed in the background, once for as long as the files stay."""

import asyncio
from pathlib import Path

import structlog

from mesh_llm.models.digest_index import DigestIndex
from mesh_llm.models.digests import DigestStore
from mesh_llm.models.gguf_types import GgufError
from mesh_llm.runtime.supervision import WriteHealth
from mesh_llm.runtime.tasks import TaskScope

_log = structlog.get_logger(__name__)


class WeightShelf:
    """One index for each model that is shared."""

    def __init__(self, directory: Path) -> None:
        """`directory` keeps what was computed."""
        self._store = DigestStore(directory)
        self._reading: dict[Path, asyncio.Task[DigestIndex | None]] = {}
        self._scope = TaskScope("digests")
        self._health = WriteHealth("the digests of models", "They are computed again.")

    def prepare(self, path: Path) -> None:
        """Begin to read a model, if that was not done yet or did not work."""
        task = self._reading.get(path)
        if task is None or (task.done() and _result(task) is None):
            self._reading[path] = self._scope.spawn(self._read(path), path.stem)

    async def index(self, path: Path) -> DigestIndex | None:
        """The model's tensors; None where it cannot be read: then weights are sent, or offered, by nobody."""
        self.prepare(path)
        return await asyncio.shield(self._reading[path])

    async def keep(self) -> None:
        """Write down what sessions taught about the models: the next load asks less."""
        for task in list(self._reading.values()):
            index = _result(task) if task.done() else None
            if index is None:
                continue
            try:
                await asyncio.to_thread(index.save)
            except OSError as error:
                self._health.failed(error)
            else:
                self._health.wrote()

    async def close(self) -> None:
        """Stop reading. What is read in a thread goes on to its end."""
        await self._scope.close()

    async def _read(self, path: Path) -> DigestIndex | None:
        try:
            digests = await asyncio.to_thread(self._store.get, path)
        except (GgufError, OSError) as error:
            _log.warning("no digests", model=path.stem, reason=str(error))
            return None
        index = DigestIndex(self._store)
        index.add_main(path, digests)
        return index


def _result(task: asyncio.Task[DigestIndex | None]) -> DigestIndex | None:
    """What a task that is done has read; None where it was cancelled or failed."""
    return None if task.cancelled() or task.exception() is not None else task.result()
