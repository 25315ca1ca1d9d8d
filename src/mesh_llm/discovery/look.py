"""Asks all relays for listings at once, and keeps of what they say what may be believed."""

import asyncio
import time
from collections.abc import Iterable

import msgspec
import structlog
from nostr_sdk import Event

from mesh_llm.discovery.events import Found, all_listings, read_event
from mesh_llm.discovery.relays import RelayError, RelayLink, RelayPool
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.signing import Verify

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
