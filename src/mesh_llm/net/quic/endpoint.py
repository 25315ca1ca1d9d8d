"""This node's QUIC endpoint: binds, knows where it can be reached, dials, and measures round trips to other nodes."""

import asyncio
import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple, Self

import iroh
import msgspec
import psutil
import structlog
from iroh.iroh_ffi import uniffi_set_event_loop

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.net.quic.bindings import deferred_frees, install, reason_of
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import KEY_BYTES
from mesh_llm.wire.mesh.frames import ALPN, CloseCode
from mesh_llm.wire.mesh.invites import Contact, Invite, unpack_address

MAX_ADVERTISED = 8
_CLOSE_SECONDS = 1.0
_KEPT_TRIES, _KEPT_PAUSE = 5, 0.1

_log = structlog.get_logger(__name__)


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to bind.

    Attributes:
        relay: False: direct connections only, without relays and the public lookup service.
        host: address to bind; empty: all.
        port: UDP port; 0 picks one.
        kept: without `port`, the UDP ports of an earlier run for IPv4 and IPv6, bound again if they are free; 0: none.
        advertise: `ip:port` of this node for others, besides the addresses that it finds out.
    """

    relay: bool = True
    host: str = ""
    port: int = 0
    kept: tuple[int, int] = (0, 0)
    advertise: tuple[str, ...] = ()


class Reachable(NamedTuple):
    """Where this node can be dialled: `ip:port` each, and the relay's URL or an empty string."""

    addresses: tuple[str, ...]
    relay: str


class _Preset(iroh.Preset):
    """Called by iroh while binding."""

    def __init__(self, settings: EndpointSettings, ports: tuple[int, int]) -> None:
        self._settings = settings
        self._ports = ports

    def apply(self, builder: iroh.EndpointBuilder) -> None:
        settings = self._settings
        if settings.relay:
            builder.apply_n0()
        else:
            builder.apply_minimal()
            builder.relay_mode(iroh.RelayMode.disabled())
        if settings.host:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            builder.bind_addr(f"{host}:{self._ports[0]}")
            return
        for address, port in zip(("0.0.0.0", "[::]"), self._ports, strict=True):  # noqa: S104 - the mesh's own port
            if port:
                builder.bind_addr(f"{address}:{port}")


class _Changes(iroh.AddrChangeCallback):
    """Called by iroh when the endpoint's addresses change."""

    def __init__(self) -> None:
        self.happened = asyncio.Event()

    async def on_change(self, addr: iroh.EndpointAddr) -> None:  # noqa: ARG002 - the address is read afresh
        self.happened.set()


class Endpoint:
    """A QUIC endpoint with the key `secret`; unusable before `bind()`. `close()` closes every connection."""

    def __init__(self, secret: bytes, settings: EndpointSettings) -> None:
        self.node_id = NodeId(bytes(iroh.SecretKey.from_bytes(secret).public().to_bytes()).hex())
        self._secret = secret
        self._settings = settings
        self._raw: iroh.Endpoint | None = None

    @property
    def raw(self) -> iroh.Endpoint:
        """The bound endpoint. Raises ConnectionError before `bind`."""
        if self._raw is None:
            raise ConnectionError("this node is still starting")
        return self._raw

    @property
    def bound(self) -> bool:
        """Whether `bind` has succeeded."""
        return self._raw is not None

    async def bind(self) -> Self:
        """Bind; returns itself. Kept ports that are taken are given up. Raises MeshError(quic_port_unavailable)."""
        install()
        deferred_frees.use(asyncio.get_running_loop())
        # iroh calls back from its own threads, which would not find the loop.
        uniffi_set_event_loop(asyncio.get_running_loop())  # pyright: ignore[reportArgumentType]
        settings = self._settings
        try:
            self._raw = await self._bind_kept() or await self._bind((settings.port, settings.port))
        except iroh.IrohError as error:
            where = f"UDP port {settings.port}" if settings.port else "a UDP port"
            raise MeshError(
                code="quic_port_unavailable",
                message=f"The mesh cannot bind {where}: {reason_of(error)}.",
                hint="Stop what uses it, or choose another one with `--quic-port`.",
            ) from None
        _log.debug("endpoint bound", node=self.node_id[:10], sockets=self._raw.bound_sockets(), relay=settings.relay)
        return self

    async def _bind_kept(self) -> iroh.Endpoint | None:
        """Bind the kept ports; None if there are none, or another program has them."""
        settings = self._settings
        if settings.port or not any(settings.kept):
            return None
        reason = ""
        # An earlier endpoint of this process lets go of its socket a moment after it was closed.
        for _ in range(_KEPT_TRIES):
            try:
                return await self._bind(settings.kept)
            except iroh.IrohError as error:
                reason = reason_of(error)
            await asyncio.sleep(_KEPT_PAUSE)
        _log.info("the UDP ports of the last run are taken", ports=settings.kept, reason=reason)
        return None

    async def _bind(self, ports: tuple[int, int]) -> iroh.Endpoint:
        preset = _Preset(self._settings, ports)
        return await iroh.Endpoint.bind(iroh.EndpointOptions(preset=preset, secret_key=self._secret, alpns=[ALPN]))

    @property
    def ports(self) -> tuple[int, int]:
        """The bound UDP ports for IPv4 and IPv6; 0: none."""
        found = [0, 0]
        for bound in self.raw.bound_sockets():
            host, _, port = bound.rpartition(":")
            found[":" in host] = int(port)
        return found[0], found[1]

    def reachable(self) -> Reachable:
        """Where others can dial this node, best first; nothing before `bind`. Changes as networks come and go."""
        if self._raw is None:
            return Reachable((), "")
        address = self._raw.addr()
        found = [*self._settings.advertise, *address.direct_addresses()]
        return Reachable(advertised(found), address.relay_url() or "")

    async def settle(self, timeout: float) -> None:
        """Wait until the addresses for an invite are known, at most `timeout` seconds.

        Right after binding only loopback is known; interfaces and the relay are found a moment later.
        """
        on_network = not self._settings.host and _has_network()

        def settled() -> bool:
            addresses, relay = self.reachable()
            found = any(_rank(address) < _LOOPBACK for address in addresses)
            return (found or not on_network) and (bool(relay) or not self._settings.relay)

        changes = _Changes()
        watch = self.raw.watch_addr(changes)
        try:
            async with asyncio.timeout(timeout):
                while not settled():
                    changes.happened.clear()
                    await changes.happened.wait()
        except TimeoutError:
            _log.info("not all addresses of this node are known yet", known=self.reachable().addresses)
        finally:
            # A watcher that is alive when the process ends may abort it.
            await watch.stop()

    async def connect(self, node: NodeId, addresses: tuple[str, ...], relay: str, timeout: float) -> iroh.Connection:
        """Dial within `timeout` seconds. Raises ConnectionError with a reason for people."""
        if not addresses and not relay and not self._settings.relay:
            raise ConnectionError("no address of it is known")
        try:
            key = iroh.EndpointId.from_string(node)
            target = iroh.EndpointAddr(key, relay or None, list(addresses))
            async with asyncio.timeout(timeout):
                return await self.raw.connect(target, ALPN)
        except TimeoutError:
            raise ConnectionError(f"no answer within {timeout:.0f} s") from None
        except iroh.IrohError as error:
            raise ConnectionError(reason_of(error)) from None

    async def close(self) -> None:
        """Close all connections; peers see it at once."""
        raw, self._raw = self._raw, None
        if raw is None or raw.is_closed():
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await raw.close()
        except TimeoutError:
            # A dial to a dead address delays it; living peers have been told already.
            return
        except iroh.IrohError as error:
            _log.debug("endpoint close failed", reason=reason_of(error))


def advertised(addresses: list[str]) -> tuple[str, ...]:
    """The addresses to announce: no duplicates, loopback only if there is nothing else, at most `MAX_ADVERTISED`."""
    unique = list(dict.fromkeys(addresses))
    ranked = sorted(unique, key=_rank)
    useful = [address for address in ranked if _rank(address) < _LOOPBACK]
    return tuple((useful or ranked)[:MAX_ADVERTISED])


_LOOPBACK = 8


def _has_network() -> bool:
    """Whether any interface besides loopback is up and has an address."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    return any(
        entry.family in {socket.AF_INET, socket.AF_INET6} and _rank(f"{entry.address}:0") < _LOOPBACK
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
    )


def _rank(address: str) -> int:
    """Sort key: IPv4 before IPv6; addresses that other machines cannot dial come last."""
    host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]").partition("%")[0])
    if host.is_loopback or host.is_unspecified:
        return _LOOPBACK
    return (1 if host.version == 6 else 0) + (2 if host.is_link_local else 0)


MOST_AT_ONCE = 32


async def measure_round_trips(
    invites: Mapping[MeshId, Invite], settings: EndpointSettings, timeout: float
) -> dict[MeshId, float | None]:
    """Dial the nodes that each invite names, all at once. Returns the shortest round trip in ms of each mesh, or None.

    No node is asked for admission. The dialler uses a new key for this one time, so that it stays anonymous.

    Raises:
        MeshError: no UDP port can be bound.
    """
    if not invites:
        return {}
    endpoint = await Endpoint(os.urandom(KEY_BYTES), EndpointSettings(relay=settings.relay, host=settings.host)).bind()
    try:
        async with TaskScope("probe") as scope:
            chosen = [*invites.items()][:MOST_AT_ONCE]
            tasks = {
                mesh: scope.spawn(_nearest(endpoint, invite.terms.contacts, timeout), mesh[:8])
                for mesh, invite in chosen
            }
            return {mesh: await task for mesh, task in tasks.items()}
    finally:
        await endpoint.close()


async def _nearest(endpoint: Endpoint, contacts: tuple[Contact, ...], timeout: float) -> float | None:
    async with TaskScope("probe-mesh") as scope:
        tasks = [scope.spawn(_round_trip(endpoint, contact, timeout), "contact") for contact in contacts]
        measured: list[float | None] = [await task for task in tasks]
    return min((rtt for rtt in measured if rtt is not None), default=None)


async def _round_trip(endpoint: Endpoint, contact: Contact, timeout: float) -> float | None:
    began = asyncio.get_running_loop().time()
    try:
        addresses = tuple(unpack_address(packed) for packed in contact.addresses)
        connection = await endpoint.connect(NodeId(contact.node.hex()), addresses, contact.relay, timeout)
    except (ConnectionError, ValueError):
        return None
    # The library reports whole milliseconds; the handshake takes about two round trips and is an upper bound.
    handshake = (asyncio.get_running_loop().time() - began) * 1000
    rtt = float(connection.rtt() or 0)
    connection.close(int(CloseCode.GOODBYE), b"only measured")
    return min(rtt, handshake) if rtt else min(1.0, handshake)
