"""Connections to Nostr relays. Each is dialled and used independently: one that is dead delays nobody else."""

import asyncio
import time
from datetime import timedelta

import structlog
from nostr_sdk import (
    Client,
    ClientBuilder,
    Event,
    Filter,
    Relay,
    RelayLimits,
    RelayOptions,
    RelayStatus,
    RelayUrl,
)

from mesh_llm.discovery.events import MOST_EVENTS
from mesh_llm.discovery.sdk_errors import SdkError, reason_of

CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 4.0
_SLACK = 1.0
_MOST_EVENT = 64 * 1024
_MOST_MESSAGE = 96 * 1024
_MOST_TAGS = 100

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
            RelayLimits().message_max_size(_MOST_MESSAGE).event_max_size(_MOST_EVENT).event_max_num_tags(_MOST_TAGS)
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
