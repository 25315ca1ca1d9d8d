"""A joiner's own models that are not on its disk: fetched once it has joined, from neighbours first, and served."""

import asyncio
from collections.abc import Callable

from mesh_llm.core.effects import Notice, NoticeLevel
from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import AnyEvent, LoadRequested, ModelsChanged
from mesh_llm.core.units import size
from mesh_llm.daemon.fetching import Telling, storage_failure
from mesh_llm.daemon.machine import Machine
from mesh_llm.daemon.notices import Bell, NoticeBook
from mesh_llm.daemon.obtaining import Obtainer, OnWay, Way
from mesh_llm.daemon.progress import OnProgress, Stage
from mesh_llm.daemon.provide import rescan
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.library import LocalModel

_SECONDS_FOR_OTHERS = 10.0


class Bringing:
    """Used once, when the node has joined, or has seen that nobody answers yet."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        obtainer: Obtainer,
        post: Callable[[AnyEvent], None],
        on_progress: OnProgress,
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
                error = storage_failure(failure) if isinstance(failure, OSError) else failure
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
            text = f"Fetching {way.name} ({size(way.total_bytes)}) from {way.whence} to serve it."
            self._notices.add(Notice(level=NoticeLevel.INFO, code="model_fetching", text=text, about=spec))

        return on_way

    def _stage(self, spec: str, text: str, *, done: bool) -> None:
        self._on_progress(Stage(name="fetch", text=f"{spec}: {text}", done=done))
