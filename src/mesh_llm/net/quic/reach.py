"""What is at an address that does not answer as the wanted node: another node, nothing, or silence.

A dial with the wrong key only times out: the other node does not say that it is another one. But every QUIC server
answers a packet of an unknown version with the versions that it speaks (RFC 8999, 6; RFC 9000, 6.1). And a machine
whose port is closed sends ICMP Port Unreachable, which a connected socket reports.
"""

import asyncio
import os
import socket
from collections.abc import Iterable
from enum import StrEnum

_UNKNOWN_VERSION = bytes.fromhex("1a2a3a4a")
"""Of the form 0x?a?a?a?a, which is reserved: no server speaks it."""
_LEAST_BYTES = 1200
"""A server may ignore shorter packets."""
_KEY_BYTES = 8
_PROBES = 3
_MOST_ADDRESSES = 16


class Reach(StrEnum):
    """What an address answered."""

    QUIC = "quic"
    """A QUIC server, whoever it is."""
    CLOSED = "closed"
    """The machine is there, and nothing listens on the port."""
    SILENT = "silent"
    """Nothing: the machine is off or elsewhere, or a firewall drops the packets."""


async def probe_addresses(addresses: Iterable[str], timeout: float) -> dict[str, Reach]:
    """Ask some addresses (`ip:port`) at once what they are, within `timeout` seconds."""
    asked = list(dict.fromkeys(addresses))[:_MOST_ADDRESSES]
    found = await asyncio.gather(*(_probe(address, timeout) for address in asked))
    return dict(zip(asked, found, strict=True))


async def _probe(address: str, timeout: float) -> Reach:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    loop = asyncio.get_running_loop()
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect((host.strip("[]"), int(port)))
            for _ in range(_PROBES):
                await loop.sock_sendall(probe, _packet())
                try:
                    async with asyncio.timeout(timeout / _PROBES):
                        answer = await loop.sock_recv(probe, 2048)
                except TimeoutError:
                    continue
                return Reach.QUIC if _negotiates(answer) else Reach.SILENT
        except ConnectionRefusedError:
            return Reach.CLOSED
        except OSError:
            # There is no route, or this network has no such addresses.
            return Reach.SILENT
    return Reach.SILENT


def _packet() -> bytes:
    """A long header (RFC 8999, 5.1) of an unknown version, with two random connection IDs."""
    ids = b"".join(bytes([_KEY_BYTES]) + os.urandom(_KEY_BYTES) for _ in range(2))
    return (b"\xc0" + _UNKNOWN_VERSION + ids).ljust(_LEAST_BYTES, b"\0")


def _negotiates(answer: bytes) -> bool:
    """Whether this is a Version Negotiation packet: a long header whose version is 0."""
    return len(answer) > 7 and answer[0] & 0x80 != 0 and answer[1:5] == bytes(4)
