"""Asks all relays for listings at once, and keeps of what they say what may be believed.

Keeps one listing on all relays: each relay has a worker of its own that sends what is newest, and tries again.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial

import msgspec
import structlog
from nostr_sdk import Event, Keys

from mesh_llm.core.types.ids import MeshId
from mesh_llm.discovery.nostr.relays import (
    Found,
    RelayError,
    RelayLink,
    RelayPool,
    all_listings,
    deletion_event,
    listing_event,
    read_event,
)
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed, Verify

GRACE_SECONDS = 1.0
"""How long the others may take once one relay has answered: a dead one delays nothing."""

_log = structlog.get_logger(__name__)


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What the relays know.

    Attributes:
        found: one listing for each mesh, the newest.
        answered: relays that answered.
        failed: why each of the others did not.
        refused: how many events were not believed.
    """

    found: tuple[Found, ...] = ()
    answered: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    refused: int = 0


async def look(urls: tuple[str, ...], verify: Verify) -> Look:
    """Ask these relays, each for itself. Never raises: a relay that does not answer is in `failed`."""
    pool = await RelayPool.open(urls)
    answers: dict[str, list[Event]] = {}
    failed = {link.url: "no answer in time" for link in pool.links}
    try:
        async with TaskScope("look") as scope:
            pending = {scope.spawn(_ask(link), link.url) for link in pool.links}
            timeout = None
            while pending:
                done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for task in done:
                    url, outcome = task.result()
                    if isinstance(outcome, str):
                        failed[url] = outcome
                    else:
                        answers[url] = outcome
                        del failed[url]
                        timeout = GRACE_SECONDS
    finally:
        await pool.close()
    found, refused = judge(answers, time.time(), verify)
    return Look(found=found, answered=tuple(answers), failed=failed, refused=refused)


def judge(answers: dict[str, list[Event]], now: float, verify: Verify) -> tuple[tuple[Found, ...], int]:
    """Of all relays' events one listing a mesh, and how many events were not believed."""
    seen: dict[str, Found | None] = {}
    newest: dict[str, Found] = {}
    for url, events in answers.items():
        for event in events:
            identifier = event.id().to_hex()
            if identifier not in seen:
                seen[identifier] = _read(event, now, verify, url)
            found = seen[identifier]
            if found is None:
                continue
            best = newest.get(found.listing.mesh)
            if best is None or (found.created, found.author) > (best.created, best.author):
                newest[found.listing.mesh] = msgspec.structs.replace(found, relays=(url,))
            elif (found.created, found.author) == (best.created, best.author) and url not in best.relays:
                newest[found.listing.mesh] = msgspec.structs.replace(best, relays=(*best.relays, url))
    return _ordered(newest.values()), sum(entry is None for entry in seen.values())


def _read(event: Event, now: float, verify: Verify, url: str) -> Found | None:
    read = read_event(event, now=now, verify=verify)
    if isinstance(read, Malformed):
        _log.debug("a listing was not believed", relay=url, reason=read.reason)
        return None
    return read


def _ordered(found: Iterable[Found]) -> tuple[Found, ...]:
    return tuple(sorted(found, key=lambda entry: entry.listing.mesh))


async def _ask(link: RelayLink) -> tuple[str, list[Event] | str]:
    try:
        return link.url, await link.fetch(all_listings())
    except RelayError as error:
        return link.url, str(error)


_RETRY_FIRST = 2.0
_RETRY_MOST = 30.0
_GOODBYE_SECONDS = 3.0


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
