"""Real Nostr relays on loopback, for one test: nostr-sdk's own, in this process."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

from nostr_sdk import ClientBuilder, Event, Filter, Kind, LocalRelay, LocalRelayBuilder, RateLimit, RelayUrl

from mesh_llm.wire.discovery import KIND

Contents = list[dict[str, Any]]


class TestRelay:
    """One relay. `events` is what it would tell anybody; `put` takes any event, good or not."""

    __test__ = False

    def __init__(self, relay: LocalRelay, url: str) -> None:
        self._relay = relay
        self.url = url

    @classmethod
    async def start(cls, address: str = "127.0.0.1") -> "TestRelay":
        with socket.socket() as probe:
            probe.bind((address, 0))
            port: int = probe.getsockname()[1]
        limit = RateLimit(max_reqs=500, notes_per_minute=10_000)
        relay = LocalRelayBuilder().addr(address).port(port).rate_limit(limit).build()
        await relay.run()
        return cls(relay, f"ws://{address}:{port}")

    async def stop(self) -> None:
        """End it, and wait until nobody can connect; doing it twice is allowed."""
        async with asyncio.timeout(30):
            while await self._listens():
                # A shutdown is lost while the relay does not yet wait for clients, so it is repeated.
                self._relay.shutdown()

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rpartition(":")[2]))
        except OSError:
            return False
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return True

    async def events(self) -> list[Event]:
        """Every event of a listing's kind, whoever's."""
        client, relay = await self._connected()
        try:
            return await relay.fetch_events(Filter().kind(Kind(KIND)), timeout=timedelta(seconds=5))
        finally:
            await client.shutdown()

    async def contents(self) -> Contents:
        """The contents of those that are JSON objects."""
        return [json.loads(event.content()) for event in await self.events() if event.content().startswith("{")]

    async def put(self, *events: Event) -> None:
        """Publish events as they are."""
        client, relay = await self._connected()
        try:
            for event in events:
                await relay.send_event(event)
        finally:
            await client.shutdown()

    async def until(self, holds: Callable[[Contents], object], what: str, timeout: float = 30.0) -> Contents:
        """Wait until what is listed here is as wanted; AssertionError with what it is."""
        last: Contents = []
        changed = asyncio.Event()
        try:
            async with asyncio.timeout(timeout):
                while not holds(last := await self.contents()):
                    # A relay tells of new events but not of expired ones, so it is asked again.
                    try:
                        async with asyncio.timeout(0.2):
                            await changed.wait()
                    except TimeoutError:
                        continue
        except TimeoutError:
            raise AssertionError(f"not {what} within {timeout} s; listed: {last}") from None
        return last

    async def _connected(self) -> Any:
        client = ClientBuilder().build()
        url = RelayUrl.parse(self.url)
        await client.add_relay(url)
        relay = await client.relay(url)
        assert relay is not None
        await relay.try_connect(timedelta(seconds=5))
        return client, relay


@asynccontextmanager
async def relays(count: int = 1) -> AsyncGenerator[list[TestRelay]]:
    """So many relays; they end with the block."""
    running = [await TestRelay.start() for _ in range(count)]
    try:
        yield running
    finally:
        for relay in running:
            await relay.stop()
