"""The one exception of the Nostr library, whose generated class type checkers do not take for one.

Nostr events of listings: made, and read with their signature checked. What is in them is wire.nostr_listing's.

Connections to Nostr relays. Each is dialled and used independently: one that is dead delays nobody else.
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
"""Everything that fails in there; its text says why."""


def reason_of(error: Exception) -> str:
    """Why, as a clause; a relay may have written it, so it is bounded and harmless."""
    text = str(error).strip("' ") or type(error).__name__
    return "".join(char if char.isprintable() else " " for char in text[:200])


MOST_EVENTS = 200
"""Of one relay in one answer."""
_EVENTS_MOST_TAGS = 16


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A listing that may be believed as far as it goes.

    Attributes:
        listing: what it says.
        token: the invite that it holds.
        author: the Nostr key that signed it, as hex.
        created, expires: UNIX seconds.
        relays: where it was found.
    """

    listing: Listing
    token: str
    author: str
    created: float
    expires: float
    relays: tuple[str, ...] = ()


def listing_event(keys: Keys, content: str, mesh: MeshId, *, created: int, expires: int) -> Event:
    """A listing; it replaces an older one of the same key and mesh."""
    tags = [["d", mesh], ["k", TAG], ["expiration", str(expires)]]
    return _signed(keys, KIND, content, tags, created)


def deletion_event(keys: Keys, mesh: MeshId, *, created: int) -> Event:
    """Asks relays to forget this key's listing of a mesh."""
    coordinate = f"{KIND}:{keys.public_key().to_hex()}:{mesh}"
    return _signed(keys, DELETION_KIND, "", [["a", coordinate], ["k", str(KIND)]], created)


def all_listings() -> Filter:
    """Every listing of this protocol."""
    return Filter().kind(Kind(KIND)).custom_tag(SingleLetterTag.from_byte(ord("k")), TAG).limit(MOST_EVENTS)


def listings_of(author: PublicKey) -> Filter:
    """Those that one key signed."""
    return all_listings().author(author)


def mesh_of(event: Event) -> MeshId | None:
    """The mesh that an event names, whether or not its content is good; None where it names none."""
    name = _tag(event, "d")
    if name is None or len(name) != 64 or not all(char in "0123456789abcdef" for char in name):
        return None
    return MeshId(name)


def read_event(event: Event, *, now: float, verify: Verify) -> Found | Malformed:
    """Read and judge an event of a relay. `verify` checks Ed25519; the event's own signature is checked here too."""
    if event.kind().as_u16() != KIND or len(event.tags()) > _EVENTS_MOST_TAGS or _tag(event, "k") != TAG:
        return Malformed("no listing of ours")
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
    return Found(listing=posting.listing, token=posting.token, author=author, created=created, expires=expires)


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
    """A relay could not be reached, did not answer, or refused; its text is a clause for people."""


class RelayLink:
    """One relay. Every method raises RelayError within a bounded time."""

    def __init__(self, url: str, relay: Relay) -> None:
        self.url = url
        self._relay = relay
        self._dialling = asyncio.Lock()

    async def send(self, event: Event) -> None:
        """Hand over an event, and wait until the relay has taken it."""
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
        # A relay that is lost, or says nothing, gives an empty list as well: that is no answer.
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


class RelayPool:
    """The relays of one use. `close` when done."""

    def __init__(self, client: Client, links: tuple[RelayLink, ...]) -> None:
        self._client = client
        self.links = links

    @classmethod
    async def open(cls, urls: tuple[str, ...]) -> "RelayPool":
        """Make the links; nothing is dialled yet."""
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
            # Who reconnects, and when, is decided here: the library would dial for ever in the background.
            options = RelayOptions().reconnect(reconnect=False).limits(limits)
            await client.add_relay(address, opts=options)
            relay = await client.relay(address)
            if relay is not None:
                links.append(RelayLink(url, relay))
        return cls(client, tuple(links))

    async def close(self) -> None:
        """Hang up."""
        try:
            async with asyncio.timeout(_SLACK):
                await self._client.shutdown()
        except TimeoutError:
            _log.debug("relays did not hang up in time")
