"""Tells this network that a mesh is here, by multicast DNS (RFC 6762, 6763), as long as it runs."""

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from mesh_llm.runtime.local_networks import is_near, local_networks, multicast_addresses
from mesh_llm.wire.fingerprint import fingerprint
from mesh_llm.wire.lan_listing import SERVICE_TYPE, LanListing, encode_listing

LOOK_SECONDS = 15.0
"""How often the interfaces are looked at: machines move from network to network."""
LEAST_SECONDS_BETWEEN = 3.0
"""However fast models come and go, the network hears of it so often at most."""
_CLOSE_SECONDS = 2.0

_log = structlog.get_logger(__name__)


class LanAnnouncer:
    """See the module's text."""

    def __init__(
        self,
        listing: Callable[[], LanListing | None],
        addresses: Callable[[], tuple[str, ...]],
        changed: Callable[[float], Awaitable[object]],
    ) -> None:
        """Announce `listing()` at `addresses()`, both asked again after each `changed(seconds)`.

        `listing` gives None while there is nothing to announce. `changed` waits for news, at most so many seconds.
        """
        self._listing = listing
        self._addresses = addresses
        self._changed = changed

    async def run(self) -> None:
        """Announce until cancelled; then tell the network goodbye. Raises OSError, zeroconf.Error: not allowed to."""
        from zeroconf.asyncio import AsyncZeroconf

        while True:
            interfaces = multicast_addresses()
            if not interfaces or self._service() is None:
                await self._changed(LOOK_SECONDS)
                continue
            zeroconf = AsyncZeroconf(interfaces=list(interfaces))
            try:
                await self._announce(zeroconf, interfaces)
            finally:
                await _close(zeroconf)

    async def _announce(self, zeroconf: Any, interfaces: tuple[str, ...]) -> None:
        """Keep it up to date until the interfaces are others, or there is nothing to announce any more."""
        said = self._service()
        if said is None:
            return
        await (await zeroconf.async_register_service(said, allow_name_change=True))
        _log.info("announced on the local network", name=said.name, interfaces=interfaces)
        while True:
            await self._changed(LOOK_SECONDS)
            await asyncio.sleep(LEAST_SECONDS_BETWEEN)
            now = self._service()
            if now is None or multicast_addresses() != interfaces:
                return
            now.name = said.name
            if _content(now) == _content(said):
                continue
            said = now
            await (await zeroconf.async_update_service(said))

    def _service(self) -> Any:
        """A zeroconf.ServiceInfo of what is to be announced; None: nothing."""
        from zeroconf.asyncio import AsyncServiceInfo

        listing = self._listing()
        place = near_place(self._addresses())
        if listing is None or place is None:
            return None
        hosts, port = place
        name = f"mesh-llm-{fingerprint(listing.node)}"
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{name}.{SERVICE_TYPE}",
            port=port,
            properties=dict(encode_listing(listing)),
            server=f"{name}.local.",
            parsed_addresses=list(hosts),
        )


def near_place(addresses: tuple[str, ...]) -> tuple[tuple[str, ...], int] | None:
    """Hosts and the one port to announce: of the addresses on this machine's networks, the port that most have."""
    networks = local_networks()
    parts = [address.rpartition(":") for address in addresses if is_near(address, networks)]
    places = [(ipaddress.ip_address(host.strip("[]").partition("%")[0]), int(port)) for host, _, port in parts]
    places = [place for place in places if not place[0].is_loopback]
    if not places:
        return None
    ports = [port for host, port in places if host.version == 4] or [port for _, port in places]
    port = Counter(ports).most_common(1)[0][0]
    return tuple(str(host) for host, of in places if of == port), port


def _content(service: Any) -> tuple[object, ...]:
    return (service.text, service.port, tuple(service.parsed_addresses()))


async def _close(zeroconf: Any) -> None:
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await zeroconf.async_close()
    except TimeoutError:
        _log.debug("the goodbye to the local network took too long")
