"""Carries out FetchModel: what the mesh calls for and is not here, from neighbours first, else from the hub."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from mesh_llm.core.effects import FetchModel
from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import AnyEvent, FetchEnded, ModelsChanged
from mesh_llm.core.ids import ModelName
from mesh_llm.core.units import size
from mesh_llm.daemon.fetching import Telling, fetch_watched, internal_fault, storage_failure
from mesh_llm.daemon.machine import Machine
from mesh_llm.daemon.neighbours import Neighbours
from mesh_llm.daemon.progress import OnProgress, Stage
from mesh_llm.daemon.provide import rescan
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.neighbours.taking import NeighboursError, Received
from mesh_llm.models.repository import RemoteModel
from mesh_llm.models.source_ref import parse_source
from mesh_llm.runtime.tasks import TaskScope

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
        on_progress: OnProgress,
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
            return _text(storage_failure(error))
        return ""

    async def _obtain(self, effect: FetchModel) -> None:
        """From neighbours as long as that gets on, then from the hub, which goes on where they ended."""
        report = self._reporter(effect)
        reason = ""
        for _ in range(_MOST_ROUNDS):
            received = Received()
            try:
                await self._take(effect, received)
            except NeighboursError as error:
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
        gave = [node for node, count in received.by_seed.items() if count]
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
