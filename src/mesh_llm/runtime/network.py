"""TCP and Unix connections as a ByteStream, and the networks of this machine."""

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
"""Prefix of a Unix socket's address, before its path. Other addresses are `host:port`."""


class TcpStream:
    """A connected TCP or Unix stream: a core.types.ports.ByteStream. Nagle's algorithm is off."""

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
        """Send `data`; wait while the peer is slow. Raises ConnectionError."""
        self._writer.write(data)
        await self._writer.drain()

    def wake_at(self, size: int) -> None:
        """Wake the reader only when `size` bytes or the end have arrived (SO_RCVLOWAT), until the next call.

        Only a hint to the kernel: `read` may return fewer bytes.
        """
        if size == self._wakes_at or self._socket is None:
            return
        self._wakes_at = size
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    async def finish(self) -> None:
        """Half-close: the peer reads the end of the stream, and may still answer."""
        if self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()

    def abort(self) -> None:
        """Reset both directions."""
        self._writer.transport.abort()


def is_other_users(peer: tuple[str, int], table: Path = Path("/proc/net/tcp")) -> bool:
    """Whether a loopback connection from this address belongs to another user. False if the system has no table.

    A closed socket has no owner in that table (inode 0). It counts as another user's. Connections by IPv6 are in a
    table beside it, whose name ends in `6`.
    """
    try:
        if ":" in peer[0]:
            table, packed = table.with_name(table.name + "6"), socket.inet_pton(socket.AF_INET6, peer[0])
        else:
            packed = socket.inet_aton(peer[0])
        words = (packed[at : at + 4] for at in range(0, len(packed), 4))
        address = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{peer[1]:04X}"
        lines = table.read_text().splitlines()[1:]
    except (OSError, ValueError):
        return False
    fields = [line.split() for line in lines]
    return (str(os.getuid()), address) not in {(one[7], one[1]) for one in fields if len(one) > 9 and one[9] != "0"}


async def connect_tcp(host: str, port: int, timeout: float) -> TcpStream:
    """Connect within `timeout` seconds. Raises OSError or TimeoutError."""
    return await connect_to(f"{host}:{port}", timeout)


async def connect_to(address: str, timeout: float) -> TcpStream:
    """Connect to `unix:PATH` or `host:port` within `timeout` seconds. Raises OSError or TimeoutError."""
    async with asyncio.timeout(timeout):
        return TcpStream(*await open_address(address))


async def open_address(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect asyncio's streams to `unix:PATH` or `host:port`. Raises OSError, ValueError."""
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
    """IPv4 addresses of the interfaces for multicast: those that are up, except loopback."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    return tuple(
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    )


def is_near(address: str, networks: Iterable[Network]) -> bool:
    """Whether an address, with or without a port, is on one of these networks or link-local."""
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
