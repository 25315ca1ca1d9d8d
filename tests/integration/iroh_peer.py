"""A program for a lab host: one end of an iroh connection, without the product's code.

`accept ADDRESS` prints the endpoint's id and port, and echoes what each stream brings. `connect ADDRESS ID PEER`
opens streams to it and prints, as JSON, the milliseconds of the fastest of several round trips.
"""

import asyncio
import json
import os
import sys
import time

import iroh

ALPN = b"netlab-test/1"


class _Preset(iroh.Preset):
    """Neither relays nor address look-up: what is not told does not exist."""

    def apply(self, builder: iroh.EndpointBuilder) -> None:
        builder.apply_minimal()


async def _bind(address: str) -> iroh.Endpoint:
    options = iroh.EndpointOptions(
        preset=_Preset(), bind_addr=f"{address}:0", alpns=[ALPN], relay_mode=iroh.RelayMode.disabled()
    )
    return await iroh.Endpoint.bind(options)


async def _accept(address: str) -> None:
    endpoint = await _bind(address)
    port = next(socket.rpartition(":")[2] for socket in endpoint.bound_sockets() if socket.startswith(address))
    print(endpoint.id(), port, flush=True)
    incoming = await endpoint.accept_next()
    if incoming is None:
        return
    connection = await (await incoming.accept()).connect()
    while True:
        stream = await connection.accept_bi()
        await stream.send().write_all(await stream.recv().read_to_end(1024))
        await stream.send().finish()


async def _connect(address: str, identity: str, peer: str) -> None:
    endpoint = await _bind(address)
    target = iroh.EndpointAddr(iroh.EndpointId.from_string(identity), None, [peer])
    connection = await endpoint.connect(target, ALPN)
    times: list[float] = []
    for _ in range(10):
        started = time.perf_counter()
        stream = await connection.open_bi()
        await stream.send().write_all(b"x" * 64)
        await stream.send().finish()
        assert await stream.recv().read_to_end(1024) == b"x" * 64
        times.append((time.perf_counter() - started) * 1000)
    print(json.dumps({"round_trip_ms": min(times)}), flush=True)
    await endpoint.close()


if __name__ == "__main__":
    asyncio.run(_accept(*sys.argv[2:]) if sys.argv[1] == "accept" else _connect(*sys.argv[2:]))
    # The bindings abort at interpreter shutdown now and then.
    os._exit(0)
