"""The processes of the tunnel benchmark: `python -m bench.mesh.tunnel_roles ROLE ...`; each prints what it has to say.

server PORT             TCP: counts what comes (`S`), or sends it back (`E`)
relay PORT HOST PORT    TCP to TCP, as a yardstick for the proxy itself
exit HOST PORT          mesh node: streams to TCP; prints its invite
entry PORT TOKEN WAY    mesh node: TCP to streams over `quic` or `tls`
load HOST PORT KIND N   the measurement: `bulk` N megabytes, `rtt64` or `rtt16384` N round trips; prints JSON
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

from bench.mesh.nodes import make_node

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.streams import PeerStream
from mesh_llm.net.tls.streams import TlsStream
from mesh_llm.runtime.network import TcpStream, connect_tcp
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.invites import Invite, parse_invite

BLOCK = 256 * 1024
ANYWHERE = "0.0.0.0"


async def splice(one: ByteStream, other: ByteStream) -> None:
    """Carry bytes both ways until both ends are over."""

    async def carry(source: ByteStream, sink: ByteStream) -> None:
        while data := await source.read(BLOCK):
            await sink.write(data)
        await sink.finish()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(carry(one, other))
            group.create_task(carry(other, one))
    except* ConnectionError:
        one.abort()
        other.abort()


async def listen(port: int, serve: Callable[[TcpStream], Awaitable[None]]) -> None:
    """Serve TCP connections for ever; says `ready`."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(TcpStream(reader, writer))
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(accept, ANYWHERE, port, limit=BLOCK)
    print("ready", flush=True)
    await server.serve_forever()


async def server(port: str) -> None:
    """Count, or send back."""

    async def serve(stream: TcpStream) -> None:
        command = await stream.read(1)
        received = 0
        while data := await stream.read(BLOCK):
            received += len(data)
            if command == b"E":
                await stream.write(data)
        if command == b"S":
            await stream.write(received.to_bytes(8, "big"))
        await stream.finish()

    await listen(int(port), serve)


async def relay(port: str, host: str, target: str) -> None:
    """TCP to TCP."""

    async def serve(stream: TcpStream) -> None:
        await splice(stream, await connect_tcp(host, int(target), 10.0))

    await listen(int(port), serve)


async def leave(host: str, port: str) -> None:
    """The exit: what comes by the mesh goes on by TCP."""

    async def serve(stream: PeerStream, _peer: Peer, _parameters: bytes) -> None:
        await splice(stream, await connect_tcp(host, int(port), 10.0))

    node = make_node()
    node.streams.register(StreamType.RPC, serve, scope=Scope.SPLIT, per_peer=64)
    await node.start()
    print("token", node.create_invite("split", 3600.0, None).token, flush=True)
    await asyncio.Event().wait()


async def enter(port: str, token: str, way: str) -> None:
    """The entry: what comes by TCP goes on by the mesh."""
    invite = parse_invite(token)
    assert isinstance(invite, Invite)
    node = make_node(token, tls=way == "tls")
    await node.start()
    (await node.joiner.join()).raise_for_user()

    async def serve(stream: TcpStream) -> None:
        inner = await node.open(NodeId(invite.issuer), StreamType.RPC)
        assert isinstance(inner, TlsStream) == (way == "tls")
        await splice(stream, inner)

    await listen(int(port), serve)


async def load(host: str, port: str, kind: str, count: str) -> None:
    """Measure."""
    stream = await connect_tcp(host, int(port), 10.0)
    result = await (_bulk(stream, int(count)) if kind == "bulk" else _round_trips(stream, int(kind[3:]), int(count)))
    print(json.dumps(result), flush=True)


async def _bulk(stream: TcpStream, megabytes: int) -> dict[str, float]:
    block = os.urandom(BLOCK)
    total = megabytes * 1_000_000 // BLOCK * BLOCK
    await stream.write(b"S")
    # A little first, so that connections and windows are open when the clock starts.
    await stream.write(block)
    began = time.perf_counter()
    for _ in range(total // BLOCK):
        await stream.write(block)
    await stream.finish()
    received = b""
    while len(received) < 8 and (data := await stream.read(8)):
        received += data
    seconds = time.perf_counter() - began
    assert int.from_bytes(received, "big") == total + BLOCK
    return {"megabytes_per_second": total / 1e6 / seconds}


async def _round_trips(stream: TcpStream, size: int, count: int) -> dict[str, float]:
    message = os.urandom(size)
    await stream.write(b"E")
    times: list[float] = []
    for number in range(count + 10):
        began = time.perf_counter()
        await stream.write(message)
        received = 0
        while received < size:
            received += len(await stream.read(BLOCK))
        if number >= 10:
            times.append(time.perf_counter() - began)
    stream.abort()
    return {
        "p50_ms": statistics.median(times) * 1000,
        "p99_ms": statistics.quantiles(times, n=100)[98] * 1000,
    }


ROLES: dict[str, Callable[..., Awaitable[None]]] = {
    "server": server,
    "relay": relay,
    "exit": leave,
    "entry": enter,
    "load": load,
}


async def run(role: str, *arguments: str) -> None:
    """Be what the command line says."""
    await ROLES[role](*arguments)


if __name__ == "__main__":
    import uvloop

    uvloop.run(run(*sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)
