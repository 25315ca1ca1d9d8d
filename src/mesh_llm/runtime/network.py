"""A TCP or Unix connection as a ByteStream.

Which addresses are on a network of this machine: what comes from there needs no router.
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import psutil

_HIGH_WATER = 256 * 1024

UNIX = "unix:"
"""How the address of a Unix socket begins; its path follows. Other addresses are `host:port`."""


class TcpStream:
    """A connected TCP stream, Nagle off; see core.ports.ByteStream for the meaning of each method."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER)
        raw = self._socket = writer.get_extra_info("socket")
        self._wakes_at = 1
        if raw is not None and raw.family != getattr(socket, "AF_UNIX", None):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, b"" at the end. Raises ConnectionError when the peer aborted."""
        return await self._reader.read(limit)

    async def write(self, data: bytes) -> None:
        """Send `data`, waiting while the peer is slow. Raises ConnectionError."""
        self._writer.write(data)
        await self._writer.drain()

    def wake_at(self, size: int) -> None:
        """Be woken only when `size` bytes are there, or the end: where it is known that so many come.

        A hint for the kernel: `read` may return less all the same. It holds until it is changed.
        """
        if size == self._wakes_at or self._socket is None:
            return
        self._wakes_at = size
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    async def finish(self) -> None:
        """Half-close: the peer reads an end, and may still answer."""
        if self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()

    def abort(self) -> None:
        """Reset both directions."""
        self._writer.transport.abort()


def is_foreign(peer: tuple[str, int], table: Path = Path("/proc/net/tcp")) -> bool:
    """Whether a connection on loopback, from this address, is not this user's. False where the system has no table.

    A socket whose process has closed it belongs to nobody in that table (inode 0): that is not this user's either.
    """
    try:
        address = f"{int.from_bytes(socket.inet_aton(peer[0]), sys.byteorder):08X}:{peer[1]:04X}"
        lines = table.read_text().splitlines()[1:]
    except (OSError, ValueError):
        return False
    fields = [line.split() for line in lines]
    return (str(os.getuid()), address) not in {(one[7], one[1]) for one in fields if len(one) > 9 and one[9] != "0"}


async def connect(host: str, port: int, timeout: float) -> TcpStream:
    """Connect within `timeout` seconds. Raises OSError or TimeoutError."""
    return await connect_to(f"{host}:{port}", timeout)


async def connect_to(address: str, timeout: float) -> TcpStream:
    """Connect to `unix:PATH` or `host:port` within `timeout` seconds. Raises OSError or TimeoutError."""
    async with asyncio.timeout(timeout):
        return TcpStream(*await open_address(address))


async def open_address(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Asyncio's streams to `unix:PATH` or `host:port`. Raises OSError, ValueError."""
    if address.startswith(UNIX):
        return await asyncio.open_unix_connection(address.removeprefix(UNIX), limit=_HIGH_WATER)
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port), limit=_HIGH_WATER)


Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def local_networks() -> tuple[Network, ...]:
    """The networks of all interfaces that are up."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    found: list[Network] = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries if name in up else ():
            if entry.family not in {socket.AF_INET, socket.AF_INET6} or not entry.netmask:
                continue
            network = _network(entry.address.partition("%")[0], entry.netmask)
            if network is not None:
                found.append(network)
    return tuple(dict.fromkeys(found))


def multicast_addresses() -> tuple[str, ...]:
    """IPv4 addresses of the interfaces on which others can be found: up, and not loopback."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    return tuple(
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    )


def is_near(address: str, networks: Iterable[Network]) -> bool:
    """Whether `ip:port` or an address alone is on one of these networks, or link-local. A relay's word is not."""
    host = _host(address)
    if host is None or host.is_multicast or host.is_unspecified:
        return False
    return host.is_link_local or any(host.version == network.version and host in network for network in networks)


def _host(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    for text in (address, address.rpartition(":")[0]):
        try:
            parsed = ipaddress.ip_address(text.strip("[]").partition("%")[0])
        except ValueError:
            continue
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            return parsed.ipv4_mapped
        return parsed
    return None


def _network(address: str, netmask: str) -> Network | None:
    try:
        if ":" in address:
            bits = int(ipaddress.IPv6Address(netmask)).bit_count()
            return ipaddress.ip_network((address, bits), strict=False)
        return ipaddress.ip_network(f"{address}/{netmask}", strict=False)
    except ValueError:
        return None
