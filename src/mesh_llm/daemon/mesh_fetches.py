"""Carries out FetchModel: what the mesh calls for and this node has not got, from where others say that it is."""

import asyncio
from collections.abc import Callable

from mesh_llm.core.effects import FetchModel
from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import AnyEvent, FetchEnded, ModelsChanged
from mesh_llm.core.units import size
from mesh_llm.daemon.fetching import fetch
from mesh_llm.daemon.machine import Machine
from mesh_llm.daemon.progress import OnProgress, Stage
from mesh_llm.daemon.provide import rescan
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.repository import RemoteModel
from mesh_llm.models.source_ref import parse_source
from mesh_llm.runtime.tasks import TaskScope


class MeshFetches:
    """Fetches what the core asks for. A source is another node's word: it can name the hub's files only."""

    def __init__(
        self, settings: Settings, machine: Machine, post: Callable[[AnyEvent], None], on_progress: OnProgress
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._post = post
        self._on_progress = on_progress
        self._scope = TaskScope("mesh-fetches")

    def start(self, effect: FetchModel) -> None:
        """Begin; ModelsChanged and FetchEnded follow."""
        self._scope.spawn(self._fetch(effect), effect.model)

    async def close(self) -> None:
        """Stop fetching; what has arrived is kept."""
        await self._scope.close()

    async def _fetch(self, effect: FetchModel) -> None:
        problem = ""
        try:
            await fetch(parse_source(effect.source), self._reporter(effect), self._check)
            await rescan(self._settings, self._machine)
            shelf = self._machine.shelf
            found = shelf.library.find(effect.model)
            if found is not None:
                await asyncio.to_thread(shelf.find_drafts, [found])
            self._post(ModelsChanged(on_disk=shelf.facts(), drafts=shelf.drafts))
        except MeshError as error:
            problem = f"{error.message} {error.hint}".strip()
        self._post(FetchEnded(model=effect.model, problem=problem))

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
