"""`GET /api/events`: server-sent events of everything that changes, resumable by id.

One task polls the node and encodes its status once for all readers; each reader sends what it has not sent yet. The id
of an event is `RUN.N`: N is the last notice that the reader has seen, RUN identifies this run of the node. A reader
that resumes from an earlier run gets all notices of this one.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import msgspec

from mesh_llm.console.calls import Backend
from mesh_llm.console.schema import NoticeRecord
from mesh_llm.console.status import Status
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.supervision import TaskScope

MOST_READERS = 64
_POLL_SECONDS = 1.0
"""Load, speeds and round trips change without a signal, so they are polled."""
_KEEPALIVE_POLLS = 15
"""After so many polls without news, a comment shows that the connection is alive."""


@dataclass
class _Part:
    """A part of the state, encoded. `version`: the poll that found it changed."""

    version: int
    data: bytes


@dataclass
class _Snapshot:
    """The result of the last poll. `polls`: how many there were."""

    polls: int = 0
    notices: list[NoticeRecord] = field(default_factory=list[NoticeRecord])
    status: _Part | None = None
    downloads: dict[str, _Part] = field(default_factory=dict[str, _Part])


class EventFeed:
    """Serves up to `MOST_READERS` readers. It polls only while there are readers."""

    def __init__(self, backend: Backend, run: str) -> None:
        self._backend = backend
        self._run = run
        self._readers = 0
        self._scope = TaskScope("events", self._failed)
        self._polling: asyncio.Task[object] | None = None
        self._snapshot = _Snapshot()
        self._still: Status | None = None
        self._polled = asyncio.Event()
        self._failure: BaseException | None = None

    def after(self, last_event_id: str | None) -> int:
        """The number of the last notice that a reader has seen, from the id that its browser sends."""
        run, _, number = (last_event_id or "").partition(".")
        known = run == self._run and number.isascii() and number.isdigit() and len(number) < 16
        return int(number) if known else 0

    def open(self, after: int, allowed: Callable[[], bool] = lambda: True) -> AsyncGenerator[bytes]:
        """Events after a notice, until `allowed` returns False.

        Raises MeshError(too_many_readers).
        """
        if self._readers >= MOST_READERS:
            raise MeshError(
                code="too_many_readers",
                message=f"{MOST_READERS} readers follow the events already.",
                hint="Close some pages of the console.",
                status=429,
            )
        return self._stream(after, allowed)

    async def close(self) -> None:
        """Stop polling."""
        await self._scope.close()

    async def _stream(self, after: int, allowed: Callable[[], bool]) -> AsyncGenerator[bytes]:
        self._readers += 1
        try:
            yield b"retry: 1000\n\n"
            self._ensure_polling()
            polls, sent, quiet = 0, 0, 0
            while True:
                while self._snapshot.polls == polls:
                    if self._failure is not None:
                        raise self._failure
                    await self._polled.wait()
                if not allowed():
                    return
                snapshot = self._snapshot
                polls, quiet = snapshot.polls, quiet + snapshot.polls - polls
                for notice in snapshot.notices:
                    if notice.id > after:
                        after, quiet = notice.id, 0
                        yield self._event("notice", after, msgspec.json.encode(notice))
                if snapshot.status is not None and snapshot.status.version > sent:
                    quiet = 0
                    yield self._event("status", after, snapshot.status.data)
                for part in list(snapshot.downloads.values()):
                    if part.version > sent:
                        quiet = 0
                        yield self._event("download", after, part.data)
                sent = polls
                if quiet >= _KEEPALIVE_POLLS:
                    quiet = 0
                    yield b": still here\n\n"
        finally:
            self._readers -= 1
            if self._readers == 0 and self._polling is not None:
                self._polling.cancel()
                self._polling = None

    def _ensure_polling(self) -> None:
        if self._polling is None:
            self._failure = None
            self._poll()
            self._polling = self._scope.spawn(self._poll_forever(), "poll")

    async def _poll_forever(self) -> None:
        while True:
            await self._backend.management.next_change(_POLL_SECONDS)
            self._poll()

    def _poll(self) -> None:
        """Read the node's state, and wake the readers. What has not changed keeps its version."""
        before, management = self._snapshot, self._backend.management
        polls = before.polls + 1
        status = management.status()
        part = before.status
        still = msgspec.structs.replace(status, uptime_s=0.0)
        if part is None or still != self._still:
            self._still, part = still, _Part(polls, msgspec.json.encode(status))
        downloader = self._backend.capabilities.downloader
        downloads: dict[str, _Part] = {}
        for record in downloader.records() if downloader is not None else ():
            data, known = msgspec.json.encode(record), before.downloads.get(record.id)
            downloads[record.id] = known if known is not None and known.data == data else _Part(polls, data)
        self._snapshot = _Snapshot(polls, management.notices(0), part, downloads)
        self._wake()

    def _wake(self) -> None:
        polled, self._polled = self._polled, asyncio.Event()
        polled.set()

    def _failed(self, failure: BaseException) -> None:
        """End the readers' streams with the error. Browsers reconnect, and polling begins again."""
        self._failure, self._polling = failure, None
        self._wake()

    def _event(self, kind: str, after: int, data: bytes) -> bytes:
        return f"id: {self._run}.{after}\nevent: {kind}\ndata: ".encode() + data + b"\n\n"
