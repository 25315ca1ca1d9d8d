"""Keeps one listing on all relays: each relay has a worker of its own that sends what is newest, and tries again."""

import asyncio
import time
from collections.abc import Callable
from functools import partial

import structlog
from nostr_sdk import Event, Keys

from mesh_llm.core.ids import MeshId
from mesh_llm.discovery.events import deletion_event, listing_event
from mesh_llm.discovery.relays import RelayError, RelayLink, RelayPool
from mesh_llm.runtime.tasks import TaskScope

_RETRY_FIRST = 2.0
_RETRY_MOST = 30.0
_GOODBYE_SECONDS = 3.0

_log = structlog.get_logger(__name__)

OnOutcome = Callable[[int, str], None]
"""Told how many relays have what is newest, and why one has not."""


class _Worker:
    """What one relay is to have, and how far it is."""

    def __init__(self, link: RelayLink) -> None:
        self.link = link
        self.wake = asyncio.Event()
        self.sent = 0
        self.failures = 0
        self.reason = ""


class Board:
    """Writes, replaces and deletes this key's listing of one mesh. For one loop; `close` deletes it."""

    def __init__(
        self, pool: RelayPool, keys: Keys, mesh: MeshId, on_outcome: OnOutcome, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock`: UNIX seconds."""
        self._pool = pool
        self._keys = keys
        self._mesh = mesh
        self._on_outcome = on_outcome
        self._clock = clock
        self._workers = [_Worker(link) for link in pool.links]
        self._scope = TaskScope("board")
        self._event: Event | None = None
        self._until = 0.0
        self._number = 0
        self._created = 0
        self._told = (0, 0)
        self._listed = False
        self._delivered = asyncio.Event()

    def post(self, content: str, life: float) -> None:
        """List the mesh with this content; it expires by itself after `life` seconds."""
        created = self._next_time()
        expires = int(self._clock() + life)
        self._listed = True
        self._send(listing_event(self._keys, content, self._mesh, created=created, expires=expires), expires)

    def take_down(self) -> None:
        """Delete the listing, if there may be one."""
        if self._listed:
            self._listed = False
            self._send(deletion_event(self._keys, self._mesh, created=self._next_time()), self._until)

    async def close(self) -> None:
        """Delete the listing wherever it can be done in a moment, and hang up."""
        self.take_down()
        if self._event is not None:
            try:
                async with asyncio.timeout(_GOODBYE_SECONDS):
                    await self._delivered.wait()
            except TimeoutError:
                _log.info("not every relay heard that the listing ended; it expires there by itself")
        await self._scope.close()
        await self._pool.close()

    def _next_time(self) -> int:
        """Seconds for `created_at`: rising, since relays keep the older of two with the same."""
        self._created = max(int(self._clock()), self._created + 1)
        return self._created

    def _send(self, event: Event, until: float) -> None:
        self._event, self._until = event, until
        self._number += 1
        self._told = (0, 0)
        self._delivered.clear()
        for worker in self._workers:
            worker.failures = 0
            worker.wake.set()
        if not len(self._scope):
            for worker in self._workers:
                self._scope.supervise(partial(self._serve, worker), worker.link.url)

    async def _serve(self, worker: _Worker) -> None:
        pause: float | None = None
        # Also what a run before this one failed to send.
        worker.wake.set()
        while True:
            try:
                async with asyncio.timeout(pause):
                    await worker.wake.wait()
            except TimeoutError:
                pass
            worker.wake.clear()
            event, number, pause = self._event, self._number, None
            if event is None or worker.sent == number:
                continue
            try:
                await worker.link.send(event)
            except RelayError as error:
                worker.failures += 1
                worker.reason = f"{worker.link.url}: {error}"
                _log.info("relay did not take the listing", relay=worker.link.url, reason=str(error))
                if self._clock() < self._until:
                    pause = min(_RETRY_MOST, _RETRY_FIRST * 2 ** (worker.failures - 1))
            else:
                worker.sent, worker.failures, worker.reason = number, 0, ""
            if number == self._number:
                self._tell()

    def _tell(self) -> None:
        """Report each relay that took it; and that none did, once after each time that all have tried."""
        accepted = sum(worker.sent == self._number for worker in self._workers)
        waiting = [worker for worker in self._workers if worker.sent != self._number]
        tried = min((worker.failures for worker in waiting), default=1)
        problem = next((worker.reason for worker in waiting if worker.reason), "")
        if tried:
            self._delivered.set()
        told, self._told = self._told, (accepted, tried)
        if accepted > told[0] or (not accepted and tried > told[1]):
            self._on_outcome(accepted, problem)
