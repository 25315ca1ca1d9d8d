"""Connections to Nostr relays, and the Nostr events of listings (NIP-01). `wire.discovery` has the events' content.

Each relay is dialled and used independently, so a dead one does not delay the others.
"""

import asyncio
import time
from datetime import timedelta
from typing import cast

import msgspec
import nostr_sdk
import structlog
from nostr_sdk import (
    Client,
    ClientBuilder,
    Event,
    EventBuilder,
    Filter,
    Keys,
    Kind,
    PublicKey,
    Relay,
    RelayLimits,
    RelayOptions,
    RelayStatus,
    RelayUrl,
    SingleLetterTag,
    Tag,
    Timestamp,
)

from mesh_llm.core.listing.content import Listing
from mesh_llm.core.types.ids import MeshId
from mesh_llm.wire.codec import Malformed, Verify
from mesh_llm.wire.discovery import DELETION_KIND, KIND, TAG, check_posting, check_times, decode_posting

SdkError = cast("type[Exception]", nostr_sdk.NostrSdkError)
"""The Nostr library's exception: type checkers do not recognise its generated class as one."""


def reason_of(error: Exception) -> str:
    """An error's text. A relay may have written it, so it is cut, and cleaned of control characters."""
    text = str(error).strip("' ") or type(error).__name__
    return "".join(char if char.isprintable() else " " for char in text[:200])


MOST_EVENTS = 200
"""Most events of one relay's answer."""
_EVENTS_MOST_TAGS = 16


class FoundListing(msgspec.Struct, frozen=True, kw_only=True):
    """A valid listing.

    Attributes:
        listing: its content.
        token: its invite.
        author: the Nostr key that signed it, as hex.
        created, expires: UNIX seconds.
        relays: URLs of the relays that have it.
    """

    listing: Listing
    token: str
    author: str
    created: float
    expires: float
    relays: tuple[str, ...] = ()


def listing_event(keys: Keys, content: str, mesh: MeshId, *, created: int, expires: int) -> Event:
    """An event that lists a mesh. It replaces an older one of the same key and mesh."""
    tags = [["d", mesh], ["k", TAG], ["expiration", str(expires)]]
    return _signed(keys, KIND, content, tags, created)


def deletion_event(keys: Keys, mesh: MeshId, *, created: int) -> Event:
    """An event that asks relays to delete this key's listing of a mesh (NIP-09)."""
    coordinate = f"{KIND}:{keys.public_key().to_hex()}:{mesh}"
    return _signed(keys, DELETION_KIND, "", [["a", coordinate], ["k", str(KIND)]], created)


def all_listings() -> Filter:
    """Matches all listings of this protocol."""
    return Filter().kind(Kind(KIND)).custom_tag(SingleLetterTag.from_byte(ord("k")), TAG).limit(MOST_EVENTS)


def listings_of(author: PublicKey) -> Filter:
    """Matches the listings of one key."""
    return all_listings().author(author)


def mesh_of(event: Event) -> MeshId | None:
    """The mesh in an event's `d` tag, even if the content is invalid; None if there is none."""
    name = _tag(event, "d")
    if name is None or len(name) != 64 or not all(char in "0123456789abcdef" for char in name):
        return None
    return MeshId(name)


def read_event(event: Event, *, now: float, verify: Verify) -> FoundListing | Malformed:
    """Read and check an event of a relay, with its signature. `verify` checks Ed25519; `now`: UNIX seconds."""
    if event.kind().as_u16() != KIND or len(event.tags()) > _EVENTS_MOST_TAGS or _tag(event, "k") != TAG:
        return Malformed("not a mesh-llm listing")
    created = event.created_at().as_secs()
    expiration = _tag(event, "expiration") or ""
    if not expiration.isascii() or not expiration.isdigit() or len(expiration) > 12:
        return Malformed("it never expires")
    expires = int(expiration)
    if wrong := check_times(created, expires, now):
        return Malformed(wrong)
    posting = decode_posting(event.content())
    if isinstance(posting, Malformed):
        return posting
    if mesh_of(event) != posting.listing.mesh:
        return Malformed("it names two meshes")
    if not event.verify():
        return Malformed("its signature is wrong")
    author = event.author().to_hex()
    invite = check_posting(posting, bytes.fromhex(author), now=now, verify=verify)
    if isinstance(invite, Malformed):
        return invite
    return FoundListing(listing=posting.listing, token=posting.token, author=author, created=created, expires=expires)


def _tag(event: Event, name: str) -> str | None:
    for tag in event.tags():
        words = tag.to_vec()
        if len(words) >= 2 and words[0] == name:
            return words[1]
    return None


def _signed(keys: Keys, kind: int, content: str, tags: list[list[str]], created: int) -> Event:
    builder = EventBuilder(Kind(kind), content).tags([Tag.parse(tag) for tag in tags])
    return builder.custom_created_at(Timestamp.from_secs(created)).finalize(keys)


CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 4.0
_SLACK = 1.0
_MOST_EVENT = 64 * 1024
_MOST_MESSAGE = 96 * 1024
_RELAYS_MOST_TAGS = 100

_log = structlog.get_logger(__name__)


class RelayError(ConnectionError):
    """A relay could not be reached, did not answer, or refused. The text is a clause for people."""


class RelayLink:
    """One relay. Every method raises RelayError within a bounded time."""

    def __init__(self, url: str, relay: Relay) -> None:
        self.url = url
        self._relay = relay
        self._dialling = asyncio.Lock()

    async def send(self, event: Event) -> None:
        """Send an event, and wait until the relay has accepted it."""
        await self._connect()
        try:
            async with asyncio.timeout(ANSWER_SECONDS + _SLACK):
                await self._relay.send_event(event, ok_timeout=timedelta(seconds=ANSWER_SECONDS))
        except TimeoutError:
            raise RelayError("no answer") from None
        except SdkError as error:
            raise RelayError(reason_of(error)) from None

    async def fetch(self, wanted: Filter) -> list[Event]:
        """The relay's events that match, at most `MOST_EVENTS`."""
        await self._connect()
        began = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_SECONDS + _SLACK):
                events = await self._relay.fetch_events(
                    wanted, timeout=timedelta(seconds=ANSWER_SECONDS), max_events=MOST_EVENTS
                )
        except TimeoutError:
            raise RelayError("no answer") from None
        except SdkError as error:
            raise RelayError(reason_of(error)) from None
        # The library also returns an empty list if the connection was lost or the relay did not answer.
        if not events and self._relay.status() is not RelayStatus.CONNECTED:
            raise RelayError("the connection was lost")
        if not events and time.monotonic() - began >= ANSWER_SECONDS:
            raise RelayError("no answer")
        return events[:MOST_EVENTS]

    async def _connect(self) -> None:
        async with self._dialling:
            if self._relay.status() is RelayStatus.CONNECTED:
                return
            try:
                async with asyncio.timeout(CONNECT_SECONDS + _SLACK):
                    await self._relay.try_connect(timedelta(seconds=CONNECT_SECONDS))
            except TimeoutError:
                raise RelayError("no answer") from None
            except SdkError as error:
                raise RelayError(reason_of(error)) from None


async def clear_relay(link: RelayLink, keys: Keys, *, keep: MeshId | None = None) -> set[MeshId]:
    """Delete this key's listings on a relay, but for that of the mesh `keep`. Returns the meshes. Raises RelayError."""
    events = await link.fetch(listings_of(keys.public_key()))
    meshes = {mesh: event.created_at().as_secs() for event in events if (mesh := mesh_of(event)) and mesh != keep}
    for mesh, created in meshes.items():
        await link.send(deletion_event(keys, mesh, created=max(int(time.time()), created)))
    return set(meshes)


class RelayPool:
    """Connections to several relays. Call `close` when done."""

    def __init__(self, client: Client, links: tuple[RelayLink, ...]) -> None:
        self._client = client
        self.links = links

    @classmethod
    async def open(cls, urls: tuple[str, ...]) -> "RelayPool":
        """Make the links; a link dials when it is first used."""
        client = ClientBuilder().verify_subscriptions(enable=True).build()
        limits = (
            RelayLimits()
            .message_max_size(_MOST_MESSAGE)
            .event_max_size(_MOST_EVENT)
            .event_max_num_tags(_RELAYS_MOST_TAGS)
        )
        links: list[RelayLink] = []
        for url in urls:
            address = RelayUrl.parse(url)
            # Without this option the library would dial for ever in the background.
            options = RelayOptions().reconnect(reconnect=False).limits(limits)
            await client.add_relay(address, opts=options)
            relay = await client.relay(address)
            if relay is not None:
                links.append(RelayLink(url, relay))
        return cls(client, tuple(links))

    async def close(self) -> None:
        """Close all connections."""
        try:
            async with asyncio.timeout(_SLACK):
                await self._client.shutdown()
        except TimeoutError:
            _log.debug("relays did not hang up in time")
