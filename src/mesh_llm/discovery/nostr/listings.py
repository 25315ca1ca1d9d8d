"""Find listings on Nostr relays (`query_relays`), and keep a listing of one's own there (`ListingBoard`).

One key has one listing. A reader takes the newest of each key, and a publisher deletes what its key listed before.
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
    FoundListing,
    RelayError,
    RelayLink,
    RelayPool,
    all_listings,
    clear_relay,
    deletion_event,
    listing_event,
    read_event,
)
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
from mesh_llm.wire.codec import Malformed, Verify

GRACE_SECONDS = 1.0
"""Seconds that the other relays have once one has answered, so that a dead relay delays nothing."""

_log = structlog.get_logger(__name__)


class FoundListings(msgspec.Struct, frozen=True, kw_only=True):
    """The listings on the queried relays.

    Attributes:
        found: the newest listing of each mesh; of each key only its newest counts.
        answered: URLs of the relays that answered.
        failed: why the others did not, by URL.
        refused: number of invalid events.
    """

    found: tuple[FoundListing, ...] = ()
    answered: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    refused: int = 0


async def query_relays(urls: tuple[str, ...], verify: Verify) -> FoundListings:
    """Query these relays concurrently. Never raises: a relay that does not answer is in `failed`."""
    pool = await RelayPool.open(urls)
    answers: dict[str, list[Event]] = {}
    failed = {link.url: "no answer in time" for link in pool.links}
    try:
        async with TaskScope("nostr-query") as scope:
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
    found, refused = select_listings(answers, time.time(), verify)
    return FoundListings(found=found, answered=tuple(answers), failed=failed, refused=refused)


def select_listings(
    answers: dict[str, list[Event]], now: float, verify: Verify
) -> tuple[tuple[FoundListing, ...], int]:
    """The newest listing of each mesh in these events, by relay; and the number of invalid events.

    Of each key only the newest counts: an older one is of a mesh that its publisher has left.
    """
    seen: dict[str, FoundListing | None] = {}
    where: dict[str, list[str]] = {}
    for url, events in answers.items():
        for event in events:
            identifier = event.id().to_hex()
            if identifier not in seen:
                seen[identifier] = _read(event, now, verify, url)
            relays = where.setdefault(identifier, [])
            if url not in relays:
                relays.append(url)
    valid = [
        (entry.created, identifier, msgspec.structs.replace(entry, relays=tuple(where[identifier])))
        for identifier, entry in seen.items()
        if entry is not None
    ]
    by_author = {entry.author: entry for _, _, entry in sorted(valid, key=lambda item: item[:2])}
    by_mesh = {entry.listing.mesh: entry for entry in sorted(by_author.values(), key=_age)}
    return _ordered(by_mesh.values()), len(seen) - len(valid)


def _age(found: FoundListing) -> tuple[float, str]:
    return found.created, found.author


def _read(event: Event, now: float, verify: Verify, url: str) -> FoundListing | None:
    read = read_event(event, now=now, verify=verify)
    if isinstance(read, Malformed):
        _log.debug("invalid listing", relay=url, reason=read.reason)
        return None
    return read


def _ordered(found: Iterable[FoundListing]) -> tuple[FoundListing, ...]:
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
"""Called with the number of relays that have the newest listing, and why one does not."""


class _Worker:
    """The state of one relay: the last event that it accepted (`sent`), and failures since.

    `cleared`: it has no listing of another mesh by this key any more.
    """

    def __init__(self, link: RelayLink) -> None:
        self.link = link
        self.wake = asyncio.Event()
        self.sent = 0
        self.failures = 0
        self.reason = ""
        self.cleared = False


class ListingBoard:
    """Keeps this key's listing of one mesh on all relays; `close` deletes it there.

    Each relay has a worker that sends the newest event, and tries again with back-off. After the first one it deletes
    this key's listings of other meshes: a node that was killed could not delete its own.
    """

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
        self._scope = TaskScope("listing")
        self._event: Event | None = None
        self._until = 0.0
        self._number = 0
        self._created = 0
        self._reported = (0, 0)
        self._listed = False
        self._delivered = asyncio.Event()

    def publish(self, content: str, life: float) -> None:
        """Publish this content, which expires after `life` seconds."""
        created = self._next_time()
        expires = int(self._clock() + life)
        self._listed = True
        self._send(listing_event(self._keys, content, self._mesh, created=created, expires=expires), expires)

    def withdraw(self) -> None:
        """Delete the listing, if one was published."""
        if self._listed:
            self._listed = False
            self._send(deletion_event(self._keys, self._mesh, created=self._next_time()), self._until)

    async def close(self) -> None:
        """Delete the listing on the relays that answer within a few seconds, and close the connections."""
        self.withdraw()
        if self._event is not None and not await wait_for_event(self._delivered, _GOODBYE_SECONDS):
            _log.info("not every relay deleted the listing; it expires there")
        await self._scope.close()
        await self._pool.close()

    def _next_time(self) -> int:
        """UNIX seconds for `created_at`. They rise, because relays keep the older of two events with the same."""
        self._created = max(int(self._clock()), self._created + 1)
        return self._created

    def _send(self, event: Event, until: float) -> None:
        self._event, self._until = event, until
        self._number += 1
        self._reported = (0, 0)
        self._delivered.clear()
        for worker in self._workers:
            worker.failures = 0
            worker.wake.set()
        if not len(self._scope):
            for worker in self._workers:
                self._scope.supervise(partial(self._serve, worker), worker.link.url)

    async def _serve(self, worker: _Worker) -> None:
        pause: float | None = None
        # An earlier run of this service may have failed before it sent the newest event.
        worker.wake.set()
        while True:
            await wait_for_event(worker.wake, pause)
            worker.wake.clear()
            event, number, pause = self._event, self._number, None
            if event is None or worker.sent == number:
                continue
            try:
                await worker.link.send(event)
            except RelayError as error:
                worker.failures += 1
                worker.reason = f"{worker.link.url}: {error}"
                _log.info("relay did not accept the listing", relay=worker.link.url, reason=str(error))
                if self._clock() < self._until:
                    pause = min(_RETRY_MOST, _RETRY_FIRST * 2 ** (worker.failures - 1))
            else:
                worker.sent, worker.failures, worker.reason = number, 0, ""
            if number == self._number:
                self._report()
            if worker.sent and not worker.cleared:
                await self._clear(worker)

    async def _clear(self, worker: _Worker) -> None:
        try:
            deleted = await clear_relay(worker.link, self._keys, keep=self._mesh)
        except RelayError as error:
            _log.debug("earlier listings were not deleted; trying after the next one", reason=str(error))
            return
        worker.cleared = True
        if deleted:
            _log.info("deleted earlier listings", relay=worker.link.url, meshes=[mesh[:10] for mesh in deleted])

    def _report(self) -> None:
        """Report each further relay that accepted the newest event; or, after each round of tries, that none did."""
        accepted = sum(worker.sent == self._number for worker in self._workers)
        waiting = [worker for worker in self._workers if worker.sent != self._number]
        tried = min((worker.failures for worker in waiting), default=1)
        problem = next((worker.reason for worker in waiting if worker.reason), "")
        if tried:
            self._delivered.set()
        before, self._reported = self._reported, (accepted, tried)
        if accepted > before[0] or (not accepted and tried > before[1]):
            self._on_outcome(accepted, problem)
