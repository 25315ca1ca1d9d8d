"""Downloads that the user starts on a running node, with their progress."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec

from mesh_llm.console.schema import DownloadRecord, ModelAccepted, Problem
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.daemon.model_fetcher import FetchOrigin, MeshModel, MissingModel, ModelFetcher, fetch_fault, no_provider
from mesh_llm.daemon.model_registry import Machine, register_fetched
from mesh_llm.daemon.published_state import PublishedState
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.disk import disk_error
from mesh_llm.models.library.library import LocalModel
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.runtime.transfer.progress import Progress, Speed

MOST_AT_ONCE = 3
_KEPT = 50
_ENDED = frozenset({"done", "failed", "cancelled"})


class Downloads:
    """The downloads of this run; implements console.calls.Downloader. `load` serves a model by name."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        fetcher: ModelFetcher,
        post: Callable[[AnyEvent], None],
        published: PublishedState,
        load: Callable[[str], Awaitable[ModelAccepted]],
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._fetcher = fetcher
        self._post = post
        self._published = published
        self._load = load
        self._records: dict[str, DownloadRecord] = {}
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._scope = TaskScope("downloads")

    async def close(self) -> None:
        """Stop all downloads. What has arrived is kept on disk."""
        await self._scope.close()
        for identity in list(self._tasks):
            self._end(identity, phase="cancelled")

    def records(self) -> list[DownloadRecord]:
        """The downloads, newest first. Old ended ones are forgotten."""
        return list(reversed(self._records.values()))

    async def start(self, model: str, *, load: bool, hub: bool = True) -> DownloadRecord:
        """Begin to fetch a model, or return the running download of it. `hub` False: from other nodes only."""
        await self._published.settled()
        found = await asyncio.to_thread(self._fetcher.interpret, model)
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
        if not hub and not self._fetcher.may_be_shared(found):
            raise no_provider(model)
        return self._begin(model, found, load=load, hub=hub)

    async def cancel(self, download: str) -> DownloadRecord:
        """Stop a download. An ended one is not changed."""
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

    def _begin(self, model: str, missing: MissingModel, *, load: bool, hub: bool) -> DownloadRecord:
        facts = missing.facts if isinstance(missing, MeshModel) else missing.entry.facts() if missing.entry else None
        record = DownloadRecord(
            id=secrets.token_hex(6),
            model=model,
            phase="asking",
            started=time.time(),
            name=facts.name if facts is not None and (isinstance(missing, MeshModel) or missing.ref.file) else "",
            source=_source(missing),
            origin="mesh" if isinstance(missing, MeshModel) else "hub",
            total_bytes=facts.size_bytes if facts is not None else 0,
            load=load,
        )
        self._records[record.id] = record
        self._forget()
        task = self._scope.spawn(self._run(record.id, missing, hub=hub), record.id)
        self._tasks[record.id] = task
        task.add_done_callback(lambda ended: self._ended(record.id, ended))
        self._published.changes.notify()
        return record

    async def _run(self, identity: str, missing: MissingModel, *, hub: bool) -> None:
        speed = Speed()

        def watch(progress: Progress) -> None:
            if identity in self._tasks:
                self._progress(identity, speed, progress)

        def on_origin(origin: FetchOrigin) -> None:
            self._change(
                identity,
                name=origin.name,
                total_bytes=origin.total_bytes,
                origin=origin.origin,
                origin_name=origin.origin_name,
                phase="waiting",
            )

        try:
            fetched = await self._fetcher.fetch(missing, watch, on_origin, hub=hub)
            found = await register_fetched(self._settings, self._machine, self._post, fetched.name)
            name = found.name if found is not None else str(fetched.path)
        except (MeshError, OSError) as error:
            self._end(identity, phase="failed", error=_problem(error))
        else:
            loaded = await self._loaded(name) if self._records[identity].load else ModelAccepted(model=name)
            error = loaded if isinstance(loaded, Problem) else None
            waiting = "" if isinstance(loaded, Problem) else loaded.waiting
            self._end(identity, phase="done", name=name, path=str(fetched.path), error=error, waiting=waiting)

    async def _loaded(self, name: str) -> ModelAccepted | Problem:
        """Serve a fetched model. Returns the problem if it cannot be served; its file stays."""
        try:
            return await self._load(name)
        except (MeshError, OSError) as error:
            return _problem(error)

    def _ended(self, identity: str, task: asyncio.Task[object]) -> None:
        """End the download with its task. No change if `_run` has ended it."""
        if task.cancelled():
            self._end(identity, phase="cancelled")
        elif task.exception() is not None:
            self._end(identity, phase="failed", error=_problem(fetch_fault("The download")))

    def _progress(self, identity: str, speed: Speed, progress: Progress) -> None:
        speed.update(time.monotonic(), progress.fetched_bytes)
        fetching = progress.phase == "fetching"
        # "preparing": another node still reads the file that it will send.
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
        self._published.changes.notify()

    def _forget(self) -> None:
        """Forget the oldest ended downloads."""
        ended = [identity for identity in self._records if identity not in self._tasks]
        for identity in ended[: max(0, len(self._records) - _KEPT)]:
            if self._records[identity].phase in _ENDED:
                del self._records[identity]


def _source(missing: MissingModel) -> str:
    if isinstance(missing, MeshModel):
        return missing.facts.source or f"mesh:{missing.facts.name}"
    return str(missing.ref)


def _problem(error: MeshError | OSError) -> Problem:
    if isinstance(error, OSError):
        error = disk_error(error)
    return Problem(code=error.code, message=error.message, hint=error.hint)
