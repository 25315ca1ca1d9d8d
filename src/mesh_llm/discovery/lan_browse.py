"""What meshes are on this network: asks by multicast DNS (RFC 6762), and reads what anybody answers.

Every answer is a stranger's: bounded in number and size, and only addresses of this machine's own networks count.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.runtime.local_networks import is_near, local_networks, multicast_addresses
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.lan_listing import SERVICE_TYPE, LanListing, decode_listing

BROWSE_SECONDS = 3.0
MAX_ANSWERS = 128
"""Names that are looked at in one search."""
MAX_ADDRESSES = 8
_RESOLVE_MS = 2000


class LanNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node that announces its mesh here. `addresses`: `ip:port` each, all on networks of this machine."""

    listing: LanListing
    addresses: tuple[str, ...]


async def browse(seconds: float = BROWSE_SECONDS) -> list[LanNode]:
    """Look around for `seconds`, all of them: the first to answer need not be the only one.

    Raises MeshError(lan_unavailable) where this machine has no network, or does not let anybody listen on it.
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
    """This network cannot be used for finding each other."""
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
        """Called by the browser, on the loop, for each instance that is announced, changed or gone."""
        if name not in self._names and len(self._names) < MAX_ANSWERS:
            self._names.add(name)
            self._scope.spawn(self._resolve(name), "resolve")

    async def close(self) -> None:
        await self._scope.close()

    def nodes(self) -> list[LanNode]:
        """What was found, in an order that does not depend on who was faster."""
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
            # Somebody else may have answered in its name first: its key will tell which address is right.
            merged = tuple(dict.fromkeys((*known.addresses, *node.addresses)))[:MAX_ADDRESSES]
            node = msgspec.structs.replace(known, addresses=merged)
        self._found[key] = node


def read_answer(
    entries: Mapping[bytes, bytes | None], addresses: Iterable[str], port: int | None, networks: Iterable[Any]
) -> LanNode | None:
    """One answer as a node; None where it is none of ours, or is nowhere near."""
    listing = decode_listing(entries)
    if isinstance(listing, Malformed) or port is None or not 0 < port < 65536:
        return None
    known = tuple(networks)
    near = [address for address in list(addresses)[:64] if is_near(address, known)][:MAX_ADDRESSES]
    places = tuple(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in near)
    return LanNode(listing=listing, addresses=places) if places else None
