"""A machine that answers multicast DNS with lies: `python -m tests.support.mdns_liar ADDRESS COUNT`, until killed.

Announces so many meshes that do not exist, by names that would move a cursor, at addresses elsewhere, with records that
are too long, of other versions or no text; and throws garbage at everybody who listens.
"""

import asyncio
import contextlib
import os
import socket
import struct
import sys

from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

TYPE = "_mesh-llm._udp.local."
ESCAPES = b"\x1b[2J\x1b]0;owned\x07\r\nevil\xe2\x80\xae"
ELSEWHERE = "203.0.113.9"


def lies(number: int, address: str) -> AsyncServiceInfo:
    """One false announcement; every fifth would pass for a true one but for its texts."""
    true: dict[str | bytes, bytes] = {
        "txtvers": b"1",
        "p": b"1",
        "mesh": b"%064x" % number,
        "node": b"%064x" % (number + 1000),
        "mn": ESCAPES,
        "n": ESCAPES + b"%d" % number,
        "v": ESCAPES,
        "m0": ESCAPES,
    }
    wrong: list[dict[str | bytes, bytes]] = [
        {},
        {"mesh": b"g" * 64},
        {"txtvers": b"99"},
        {f"x{entry}": b"y" * 250 for entry in range(8)},
        {"n": b"\xff\xfe\xfd"},
    ]
    place = ELSEWHERE if number % 10 == 5 else address
    return AsyncServiceInfo(
        TYPE,
        f"evil {number}.{TYPE}",
        port=4000 + number,
        properties=true | wrong[number % 5],
        server=f"evil{number}.local.",
        parsed_addresses=[place],
    )


def odd_name() -> bytes:
    """An answer that names an instance as no honest library would: with escape sequences in it."""
    kind = b"".join(bytes([len(label)]) + label for label in (b"_mesh-llm", b"_udp", b"local")) + b"\0"
    instance = bytes([len(ESCAPES)]) + ESCAPES + b"\xc0\x0c"
    record = kind + struct.pack(">HHIH", 12, 1, 120, len(instance)) + instance
    return struct.pack(">HHHHHH", 0, 0x8400, 0, 1, 0, 0) + record


def garbage(address: str) -> None:
    """Packets of any length with anything in them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        sender.sendto(odd_name(), ("224.0.0.251", 5353))
        for length in range(0, 1200, 2):
            with contextlib.suppress(OSError):
                sender.sendto(os.urandom(length), ("224.0.0.251", 5353))
                sender.sendto(b"\0\0\x84\0\0\0\xff\xff\0\0\0\0" + os.urandom(length), ("224.0.0.251", 5353))


async def main() -> None:
    """Lie until killed."""
    address, count = sys.argv[1], int(sys.argv[2])
    zeroconf = AsyncZeroconf(interfaces=[address])
    await asyncio.gather(
        *(
            zeroconf.async_register_service(lies(number, address), cooperating_responders=True, strict=False)
            for number in range(count)
        )
    )
    print("lying", flush=True)
    while True:
        garbage(address)
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    asyncio.run(main())
