"""Announce a mesh on the local network, and find meshes there, by multicast DNS (RFC 6762, 6763).

Anybody can answer. So answers are bounded in number and size, and only addresses on this machine's networks count.
"""

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import msgspec
import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.runtime.network import is_near, local_networks, multicast_addresses
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed, fingerprint
from mesh_llm.wire.discovery import SERVICE_TYPE, LanListing, decode_txt, encode_txt

LOOK_SECONDS = 15.0
"""Seconds between two checks of the interfaces: machines move from network to network."""
LEAST_SECONDS_BETWEEN = 3.0
"""Least seconds between two updates of the announcement."""
_CLOSE_SECONDS = 2.0

_log = structlog.get_logger(__name__)


class LanAnnouncer:
    """Announces a node on the local network while `run` runs."""

    def __init__(
        self,
        listing: Callable[[], LanListing | None],
        addresses: Callable[[], tuple[str, ...]],
        changed: Callable[[float], Awaitable[object]],
    ) -> None:
        """Announce `listing()` at `addresses()`. Both are called again after each `changed(seconds)`.

        `listing` returns None while there is nothing to announce. `changed` waits for a change, at most that long.
        """
        self._listing = listing
        self._addresses = addresses
        self._changed = changed

    async def run(self) -> None:
        """Announce until cancelled, then withdraw. Raises OSError, zeroconf.Error if the system does not allow it."""
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
        """Keep the announcement up to date until the interfaces change or there is nothing to announce."""
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
        """The zeroconf.ServiceInfo to announce; None: nothing."""
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
            properties=dict(encode_txt(listing)),
            server=f"{name}.local.",
            parsed_addresses=list(hosts),
        )


def near_place(addresses: tuple[str, ...]) -> tuple[tuple[str, ...], int] | None:
    """Hosts and port to announce: the most frequent port of the addresses on this machine's networks."""
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
        _log.debug("withdrawing from the local network took too long")


BROWSE_SECONDS = 3.0
MAX_ANSWERS = 128
"""Most names that one search resolves."""
MAX_ADDRESSES = 8
_RESOLVE_MS = 2000


class LanNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node that announces its mesh. `addresses`: `ip:port` each, all on networks of this machine."""

    listing: LanListing
    addresses: tuple[str, ...]


async def browse(seconds: float = BROWSE_SECONDS) -> list[LanNode]:
    """Find nodes on the local network. Always takes `seconds`, because more than one may answer.

    Raises MeshError(lan_unavailable) if this machine has no network, or does not allow multicast DNS.
    """
    from zeroconf import Error
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

    interfaces = multicast_addresses()
    if not interfaces:
        raise unavailable("no network interface is up")
    try:
        zeroconf = AsyncZeroconf(interfaces=list(interfaces))
    except (OSError, Error) as error:
        raise unavailable(str(error)) from None
    search = _Search(zeroconf)
    try:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[search.noticed])
        await asyncio.sleep(seconds)
        await browser.async_cancel()
    finally:
        await search.close()
        await zeroconf.async_close()
    return search.nodes()


def unavailable(reason: str) -> MeshError:
    """The error for a network on which nodes cannot find each other."""
    return MeshError(
        code="lan_unavailable",
        message=f"Other machines cannot be looked for on this network: {reason}.",
        hint="Check the network; multicast DNS needs UDP port 5353. Joining with an invite works without it.",
        status=503,
    )


class _Search:
    def __init__(self, zeroconf: Any) -> None:
        self._zeroconf = zeroconf
        self._networks = local_networks()
        self._names: set[str] = set()
        self._found: dict[tuple[MeshId, NodeId], LanNode] = {}
        self._scope = TaskScope("lan")

    def noticed(self, *, name: str, **_: Any) -> None:
        """The browser's handler, called on the loop for each instance that appears, changes or goes."""
        if name not in self._names and len(self._names) < MAX_ANSWERS:
            self._names.add(name)
            self._scope.spawn(self._resolve(name), "resolve")

    async def close(self) -> None:
        await self._scope.close()

    def nodes(self) -> list[LanNode]:
        """The found nodes, sorted by mesh and node."""
        return [self._found[key] for key in sorted(self._found)]

    async def _resolve(self, name: str) -> None:
        from zeroconf import Error
        from zeroconf.asyncio import AsyncServiceInfo

        try:
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            complete = await info.async_request(self._zeroconf.zeroconf, _RESOLVE_MS)
        except (Error, OSError):
            return
        node = read_answer(info.properties, info.parsed_addresses(), info.port, self._networks) if complete else None
        if node is None:
            return
        key = (node.listing.mesh, node.listing.node)
        known = self._found.get(key)
        if known is not None:
            # An impostor may have answered first. The node's key is verified when an address is dialled.
            merged = tuple(dict.fromkeys((*known.addresses, *node.addresses)))[:MAX_ADDRESSES]
            node = msgspec.structs.replace(known, addresses=merged)
        self._found[key] = node


def read_answer(
    entries: Mapping[bytes, bytes | None], addresses: Iterable[str], port: int | None, networks: Iterable[Any]
) -> LanNode | None:
    """An answer as a node; None if it is invalid or has no address on these networks."""
    listing = decode_txt(entries)
    if isinstance(listing, Malformed) or port is None or not 0 < port < 65536:
        return None
    known = tuple(networks)
    near = [address for address in list(addresses)[:64] if is_near(address, known)][:MAX_ADDRESSES]
    places = tuple(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in near)
    return LanNode(listing=listing, addresses=places) if places else None
