"""`/api/events`: server-sent events of everything that changes, resumable by id.

One task looks at the node, builds its status and encodes it, once for all readers; a reader only sends what it has not
sent yet. The id of every event is `RUN.N`: N is the last notice that the reader has seen, RUN tells this run of the
node from others, so that a reader of a run before gets all notices of this one.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import msgspec

from mesh_llm.console.calls import Desk
from mesh_llm.console.status import NoticeRecord, Status
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.supervision import TaskScope

MOST_READERS = 64
_TICK = 1.0
"""Load, speeds and round trips change without a bell: they are looked at this often, in seconds."""
_ALIVE = 15
"""After so many looks without news a comment shows that the connection lives."""


@dataclass
class _Part:
    """A part of the state, encoded; `version`: of the look that found it changed last."""

    version: int
    data: bytes


@dataclass
class _Seen:
    """What the last look found. `looks`: how many there were."""

    looks: int = 0
    notices: list[NoticeRecord] = field(default_factory=list[NoticeRecord])
    status: _Part | None = None
    downloads: dict[str, _Part] = field(default_factory=dict[str, _Part])


class EventFeed:
    """Feeds any number of readers, up to `MOST_READERS`. While there are none, nobody looks."""

    def __init__(self, desk: Desk, run: str) -> None:
        self._desk = desk
        self._run = run
        self._readers = 0
        self._scope = TaskScope("events", self._failed)
        self._looking: asyncio.Task[object] | None = None
        self._seen = _Seen()
        self._still: Status | None = None
        self._looked = asyncio.Event()
        self._failure: BaseException | None = None

    def after(self, last_event_id: str | None) -> int:
        """The last notice that a reader has seen, by the id that its browser sends."""
        run, _, number = (last_event_id or "").partition(".")
        known = run == self._run and number.isascii() and number.isdigit() and len(number) < 16
        return int(number) if known else 0

    def open(self, after: int, allowed: Callable[[], bool] = lambda: True) -> AsyncGenerator[bytes]:
        """Events after a notice, until `allowed` says that the reader may have no more.

        Raises MeshError(too_many_readers).
        """
        if self._readers >= MOST_READERS:
            raise MeshError(
                code="too_many_readers",
                message=f"{MOST_READERS} readers follow the events already.",
                hint="Close some of the console's pages.",
                status=429,
            )
        return self._stream(after, allowed)

    async def close(self) -> None:
        """Look no more."""
        await self._scope.close()

    async def _stream(self, after: int, allowed: Callable[[], bool]) -> AsyncGenerator[bytes]:
        self._readers += 1
        try:
            yield b"retry: 1000\n\n"
            self._look_if_nobody_does()
            looks, sent, quiet = 0, 0, 0
            while True:
                while self._seen.looks == looks:
                    if self._failure is not None:
                        raise self._failure
                    await self._looked.wait()
                if not allowed():
                    return
                seen = self._seen
                looks, quiet = seen.looks, quiet + seen.looks - looks
                for notice in seen.notices:
                    if notice.id > after:
                        after, quiet = notice.id, 0
                        yield self._event("notice", after, msgspec.json.encode(notice))
                if seen.status is not None and seen.status.version > sent:
                    quiet = 0
                    yield self._event("status", after, seen.status.data)
                for part in list(seen.downloads.values()):
                    if part.version > sent:
                        quiet = 0
                        yield self._event("download", after, part.data)
                sent = looks
                if quiet >= _ALIVE:
                    quiet = 0
                    yield b": still here\n\n"
        finally:
            self._readers -= 1
            if self._readers == 0 and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    def _look_if_nobody_does(self) -> None:
        if self._looking is None:
            self._failure = None
            self._look()
            self._looking = self._scope.spawn(self._go_on(), "look")

    async def _go_on(self) -> None:
        while True:
            await self._desk.management.next_change(_TICK)
            self._look()

    def _look(self) -> None:
        """Look at the node, and wake the readers. What has not changed keeps its version."""
        before, management = self._seen, self._desk.management
        looks = before.looks + 1
        status = management.status()
        part = before.status
        still = msgspec.structs.replace(status, uptime_s=0.0)
        if part is None or still != self._still:
            self._still, part = still, _Part(looks, msgspec.json.encode(status))
        downloader = self._desk.parts.downloader
        downloads: dict[str, _Part] = {}
        for record in downloader.records() if downloader is not None else ():
            data, known = msgspec.json.encode(record), before.downloads.get(record.id)
            downloads[record.id] = known if known is not None and known.data == data else _Part(looks, data)
        self._seen = _Seen(looks, management.notices(0), part, downloads)
        self._wake()

    def _wake(self) -> None:
        looked, self._looked = self._looked, asyncio.Event()
        looked.set()

    def _failed(self, failure: BaseException) -> None:
        """End the readers' streams, as their own failure would: browsers come back, and the look begins anew."""
        self._failure, self._looking = failure, None
        self._wake()

    def _event(self, kind: str, after: int, data: bytes) -> bytes:
        return f"id: {self._run}.{after}\nevent: {kind}\ndata: ".encode() + data + b"\n\n"
