"""`/api/events`: server-sent events of everything that changes, resumable by id.

The id of every event is `RUN.N`: N is the last notice that the reader has seen, RUN tells this run of the node from
others, so that a reader of a run before gets all notices of this one.
"""

from collections.abc import AsyncGenerator, Callable

import msgspec

from mesh_llm.console.call import Desk
from mesh_llm.core.console_values import DownloadRecord
from mesh_llm.core.errors import MeshError
from mesh_llm.core.status import Status

MOST_READERS = 64
_TICK = 1.0
"""Load, speeds and round trips change without a bell: they are looked at this often, in seconds."""
_ALIVE = 15
"""After so many looks without news a comment shows that the connection lives."""


class EventFeed:
    """Feeds any number of readers, up to `MOST_READERS`."""

    def __init__(self, desk: Desk, run: str) -> None:
        self._desk = desk
        self._run = run
        self._readers = 0

    def after(self, last_event_id: str | None) -> int:
        """The last notice that a reader has seen, by the id that its browser sends."""
        run, _, number = (last_event_id or "").partition(".")
        known = run == self._run and number.isascii() and number.isdigit() and len(number) < 16
        return int(number) if known else 0

    def open(self, after: int) -> AsyncGenerator[bytes]:
        """Events after a notice. Raises MeshError(too_many_readers)."""
        if self._readers >= MOST_READERS:
            raise MeshError(
                code="too_many_readers",
                message=f"{MOST_READERS} readers follow the events already.",
                hint="Close some of the console's pages.",
                status=429,
            )
        return self._stream(after)

    async def _stream(self, after: int) -> AsyncGenerator[bytes]:
        self._readers += 1
        try:
            yield b"retry: 1000\n\n"
            told = _Told()
            quiet = 0
            while True:
                quiet += 1
                for notice in self._desk.management.notices(after):
                    after, quiet = notice.id, 0
                    yield self._event("notice", after, notice)
                status = self._desk.management.status()
                if told.status_is_news(status):
                    quiet = 0
                    yield self._event("status", after, status)
                for record in told.news(self._desk.parts.downloader.records if self._desk.parts.downloader else None):
                    quiet = 0
                    yield self._event("download", after, record)
                if quiet >= _ALIVE:
                    quiet = 0
                    yield b": still here\n\n"
                await self._desk.management.next_change(_TICK)
        finally:
            self._readers -= 1

    def _event(self, kind: str, after: int, value: object) -> bytes:
        head = f"id: {self._run}.{after}\nevent: {kind}\ndata: ".encode()
        return head + msgspec.json.encode(value) + b"\n\n"


class _Told:
    """What one reader knows already."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._downloads: dict[str, DownloadRecord] = {}

    def status_is_news(self, status: Status) -> bool:
        """Whether anything but the clock differs from the last one."""
        still = msgspec.structs.replace(status, uptime_s=0.0)
        if still == self._status:
            return False
        self._status = still
        return True

    def news(self, records: Callable[[], list[DownloadRecord]] | None) -> list[DownloadRecord]:
        """Downloads that are other than they were."""
        now = {record.id: record for record in records()} if records is not None else {}
        changed = [record for identity, record in now.items() if self._downloads.get(identity) != record]
        self._downloads = now
        return changed
