"""Watches the models on disk, by the events of the file system."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import structlog

from mesh_llm.models.library.files import Store, is_model_file, linked_directories
from mesh_llm.models.library.library import BEING_WRITTEN, FactsCache, Library, scan
from mesh_llm.runtime.supervision import TaskScope, WriteHealth, wait_for_event

_log = structlog.get_logger(__name__)

_POLL_MS = 5_000
WATCH_STEP_MS = 400
"""A watcher's thread looks this often for events that the system has brought, and whether it is to end."""
NO_TIMEOUT = 0
"""Of a watcher. With the default one, it begins anew every five seconds for nothing."""


async def watch(
    directories: Sequence[Path],
    cache: FactsCache | None = None,
    *,
    builtin: bool = True,
    debounce_seconds: float = 1.0,
    quiet_seconds: float = 2.0,
    stores: Sequence[Store] = (),
) -> AsyncIterator[Library]:
    """Yield the library at once, and again whenever it changes.

    Directories may be created later. A file that is being written counts only once it is complete and has not changed
    for `quiet_seconds`; in the first scan it is enough that it is complete.

    Args:
        directories: as in `scan`.
        cache: as in `scan`; saved after each scan.
        builtin: as in `scan`.
        debounce_seconds: how long changes are collected before a scan.
        quiet_seconds: how long a file must be unchanged.
        stores: as in `scan`; they are watched too.
    """
    cache = cache or FactsCache()
    health = WriteHealth("the cache of model facts", "The next start reads all models again.")
    changed = asyncio.Event()
    roots = (*directories, *(store.root for store in stores))
    async with _Watchers(roots, changed, debounce_seconds) as watchers:
        last: Library | None = None
        while True:
            changed.clear()
            await watchers.renew()
            quiet = quiet_seconds if last is not None else 0.0
            library = await asyncio.to_thread(
                partial(scan, directories, cache, builtin=builtin, quiet_seconds=quiet, stores=stores)
            )
            await asyncio.to_thread(_save, cache, health)
            if library != last:
                last = library
                yield library
            resting = any(item.reason == BEING_WRITTEN for item in library.unusable)
            await wait_for_event(changed, quiet_seconds if resting else None)


def _save(cache: FactsCache, health: WriteHealth) -> None:
    try:
        cache.save()
    except OSError as error:
        health.failed(error)
    else:
        health.wrote()


class _Watchers:
    """One watcher for each directory; if it does not exist, for the nearest one above it."""

    def __init__(self, directories: Sequence[Path], changed: asyncio.Event, debounce_seconds: float) -> None:
        self._directories = directories
        self._changed = changed
        self._debounce = int(debounce_seconds * 1000)
        self._ways = frozenset(way for directory in directories for way in (directory, *directory.parents))
        self._scope = TaskScope("models-watch")
        self._running: dict[Path, asyncio.Task[object]] = {}

    async def renew(self) -> None:
        """Watch the directories that exist now. Changes after the return are noticed."""
        wanted = await asyncio.to_thread(_watchable, self._directories)
        if set(wanted) == set(self._running) and not any(task.done() for task in self._running.values()):
            return
        await self._scope.close()
        self._scope = TaskScope("models-watch")
        self._running = {
            root: self._scope.supervise(partial(self._notice, root, deep=deep), root.name)
            for root, deep in sorted(wanted.items())
        }
        # A watcher starts in its task's second step: the supervisor takes the first.
        for _ in range(2):
            await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scope.close()

    async def _notice(self, root: Path, *, deep: bool) -> None:
        """Set `changed` on every relevant change, until the directory is gone."""
        from watchfiles import Change, awatch  # pyright: ignore[reportUnknownVariableType]
        from watchfiles._rust_notify import WatchfilesRustInternalError  # not exported, but part of its type stubs

        def matters(change: Change, path: str) -> bool:
            item = Path(path)
            if item in self._ways:
                return True
            if not deep or item.name.startswith("."):
                return False
            # Ollama's contents have no suffix, but it writes its manifests last.
            return is_model_file(item) or change is Change.deleted or item.is_dir() or "manifests" in item.parts

        for polling in (False, True):
            try:
                try:
                    async for changes in awatch(
                        root,
                        watch_filter=matters,
                        debounce=self._debounce,
                        step=min(WATCH_STEP_MS, self._debounce),
                        rust_timeout=NO_TIMEOUT,
                        recursive=deep,
                        force_polling=polling,
                        poll_delay_ms=_POLL_MS,
                        ignore_permission_denied=True,
                    ):
                        self._changed.set()
                        if (Change.deleted, str(root)) in changes:
                            return
                except* WatchfilesRustInternalError as errors:
                    # A name that is not UTF-8 ends the watch. It starts again before the next scan.
                    _log.debug("watch interrupted", directory=str(root), reason=str(errors.exceptions[0]))
                    self._changed.set()
                return
            except FileNotFoundError:
                self._changed.set()
                return
            except OSError as error:
                # No inotify watches left, or a file system without events.
                _log.warning("directory is polled for models", directory=str(root), reason=str(error))


def _watchable(directories: Sequence[Path]) -> dict[Path, bool]:
    """Directories to watch, with those that links in them lead to; True: with everything below."""
    found: dict[Path, bool] = {}
    for directory in directories:
        here = directory
        while not here.is_dir() and here != here.parent:
            here = here.parent
        found[here] = found.get(here, False) or here == directory
        if here == directory:
            # File system events do not follow links.
            found |= dict.fromkeys(linked_directories(directory), True)
    return found
