"""Downloads that a user asks a running node for, with their progress. Satisfies core.console_ports.Downloader."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec

from mesh_llm.console.schema import DownloadRecord, Problem
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, ModelsChanged
from mesh_llm.daemon.model_fetcher import internal_fault, rescan
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.daemon.notices import Bell
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.startup_models import Elsewhere, Obtainer, Wanted, Way, no_neighbour
from mesh_llm.models.disk import disk_error
from mesh_llm.models.hub.progress import Progress, Speed
from mesh_llm.models.library.library import LocalModel
from mesh_llm.runtime.supervision import TaskScope

MOST_AT_ONCE = 3
_KEPT = 50
_ENDED = frozenset({"done", "failed", "cancelled"})


class Downloads:
    """Downloads of this run.

    `load`: serves a model by name, as the management does; `settled`: returns once the node knows what its mesh has.
    """

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        obtainer: Obtainer,
        post: Callable[[AnyEvent], None],
        bell: Bell,
        load: Callable[[str], Awaitable[str]],
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._obtainer = obtainer
        self._post = post
        self._bell = bell
        self._load = load
        self._settled = settled
        self._records: dict[str, DownloadRecord] = {}
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._scope = TaskScope("downloads")

    async def close(self) -> None:
        """Stop all; what has arrived is kept on disk."""
        await self._scope.close()
        for identity in list(self._tasks):
            self._end(identity, phase="cancelled")

    def records(self) -> list[DownloadRecord]:
        """All that are remembered, newest first."""
        return list(reversed(self._records.values()))

    async def start(self, model: str, *, load: bool, hub: bool = True) -> DownloadRecord:
        """Begin to fetch a model; one that is being fetched already is told as it is. `hub` False: not from there."""
        await self._settled()
        found = await asyncio.to_thread(self._obtainer.interpret, model)
        if isinstance(found, LocalModel):
            raise MeshError(
                code="already_here",
                message=f"{found.name} is on this machine's disk already.",
                hint=f"Serve it: mesh-llm load {found.name}",
                status=409,
            )
        running = [self._records[identity] for identity in self._tasks]
        for record in running:
            if record.source == _source(found):
                return record
        if len(running) >= MOST_AT_ONCE:
            raise MeshError(
                code="too_many_downloads",
                message=f"{MOST_AT_ONCE} downloads are under way already.",
                hint="Wait for one of them, or cancel one.",
                status=429,
            )
        if not hub and not self._obtainer.may_be_given(found):
            raise no_neighbour(model)
        return self._begin(model, found, load=load, hub=hub)

    async def cancel(self, download: str) -> DownloadRecord:
        """Stop a download; one that has ended is left as it is."""
        record = self._records.get(download)
        if record is None:
            raise MeshError(
                code="download_not_found",
                message=f"There is no download {download!r}.",
                hint="GET /api/downloads lists those of this run of the node.",
                status=404,
            )
        task = self._tasks.get(download)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            self._ended(download, task)
        return self._records[download]

    def _begin(self, model: str, wanted: Wanted, *, load: bool, hub: bool) -> DownloadRecord:
        facts = wanted.facts if isinstance(wanted, Elsewhere) else wanted.entry.facts() if wanted.entry else None
        record = DownloadRecord(
            id=secrets.token_hex(6),
            model=model,
            phase="asking",
            started=time.time(),
            name=facts.name if facts is not None and (isinstance(wanted, Elsewhere) or wanted.ref.file) else "",
            source=_source(wanted),
            origin="mesh" if isinstance(wanted, Elsewhere) else "hub",
            total_bytes=facts.size_bytes if facts is not None else 0,
            load=load,
        )
        self._records[record.id] = record
        self._forget()
        task = self._scope.spawn(self._run(record.id, wanted, hub=hub), record.id)
        self._tasks[record.id] = task
        task.add_done_callback(lambda ended: self._ended(record.id, ended))
        self._bell.ring()
        return record

    async def _run(self, identity: str, wanted: Wanted, *, hub: bool) -> None:
        speed = Speed()

        def watch(progress: Progress) -> None:
            if identity in self._tasks:
                self._progress(identity, speed, progress)

        def on_way(way: Way) -> None:
            self._change(
                identity,
                name=way.name,
                total_bytes=way.total_bytes,
                origin=way.origin,
                origin_name=way.origin_name,
                phase="waiting",
            )

        try:
            obtained = await self._obtainer.obtain(wanted, watch, on_way, hub=hub)
            name = await self._shelve(obtained.name, str(obtained.path))
        except (MeshError, OSError) as error:
            self._end(identity, phase="failed", error=_problem(error))
        else:
            problem = await self._loaded(name) if self._records[identity].load else None
            self._end(identity, phase="done", name=name, path=str(obtained.path), error=problem)

    async def _loaded(self, name: str) -> Problem | None:
        """Serve what was fetched, or say why not: the file is here all the same."""
        try:
            await self._load(name)
        except (MeshError, OSError) as error:
            return _problem(error)
        return None

    def _ended(self, identity: str, task: asyncio.Task[object]) -> None:
        """Whatever ended the task, the download has ended. Changes nothing where `_run` said so itself."""
        if task.cancelled():
            self._end(identity, phase="cancelled")
        elif task.exception() is not None:
            self._end(identity, phase="failed", error=_problem(internal_fault("The download")))

    def _progress(self, identity: str, speed: Speed, progress: Progress) -> None:
        speed.saw(time.monotonic(), progress.fetched_bytes)
        fetching = progress.phase == "fetching"
        # That another node still reads what it will give is one more way of waiting.
        phase = "waiting" if progress.phase == "preparing" else progress.phase
        left = speed.seconds_left(progress.total_bytes - progress.done_bytes) if fetching else None
        self._change(
            identity,
            phase=phase,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            bytes_per_second=round(speed.per_second(), 1) if fetching else 0.0,
            eta_s=round(left, 1) if left is not None else None,
        )

    async def _shelve(self, name: str, path: str) -> str:
        """Make what was fetched known; what it is to be loaded by."""
        await rescan(self._settings, self._machine)
        shelf = self._machine.shelf
        found = shelf.library.find(name)
        if found is not None:
            await shelf.find_drafts([found])
        self._post(ModelsChanged(on_disk=shelf.facts(), drafts=shelf.drafts))
        return found.name if found is not None else path

    def _end(self, identity: str, **changes: object) -> None:
        if self._tasks.pop(identity, None) is None:
            return
        self._change(identity, ended=time.time(), bytes_per_second=0.0, eta_s=None, **changes)
        self._forget()

    def _change(self, identity: str, **changes: object) -> None:
        record = self._records.get(identity)
        if record is None or record.phase in _ENDED:
            return
        self._records[identity] = msgspec.structs.replace(record, **changes)
        self._bell.ring()

    def _forget(self) -> None:
        """Forget the oldest of those that have ended."""
        ended = [identity for identity in self._records if identity not in self._tasks]
        for identity in ended[: max(0, len(self._records) - _KEPT)]:
            if self._records[identity].phase in _ENDED:
                del self._records[identity]


def _source(wanted: Wanted) -> str:
    if isinstance(wanted, Elsewhere):
        return wanted.facts.source or f"mesh:{wanted.facts.name}"
    return str(wanted.ref)


def _problem(error: MeshError | OSError) -> Problem:
    if isinstance(error, OSError):
        error = disk_error(error)
    return Problem(code=error.code, message=error.message, hint=error.hint)
