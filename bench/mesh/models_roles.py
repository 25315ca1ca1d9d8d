"""The processes of the model benchmark: `python -m bench.mesh.models_roles ROLE ...`; each prints what it has to say.

seed FILE LISTS [TOKEN]       mesh node: gives FILE as a model, and plain bytes beside; prints invite, id and addresses
take FILE HOME TOKEN NODES HOSTS    the measurement: each line on standard input is a task, each line of output a result
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.mesh.nodes import PLAIN_LIMIT, PlainStream, make_node

from mesh_llm.core.types.gossip import Ping
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import BulkStream
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.models.p2p.assembler import in_directory
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.models.p2p.downloader import ModelDownload
from mesh_llm.models.p2p.seeder import RateLimit, SeededModel, Seeder
from mesh_llm.models.p2p.swarm import OpenModel
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import MAX_PARAMETERS, StreamType
from mesh_llm.wire.mesh.streams import ModelParameters

BLOCK = 1 << 20
NAME = "m"


async def seed(file: str, lists: str, token: str = "") -> None:
    """Give a model, and plain bytes."""
    path = Path(file)
    store = ChunkDigestStore(Path(lists))
    await asyncio.to_thread(store.make, path)
    giver = Seeder(lambda _name, _fingerprint: SeededModel((path,)), store, RateLimit(None))

    async def give(stream: PeerStream, peer: Peer, parameters: bytes) -> None:
        await giver.serve(stream, peer.node, parameters)

    block = os.urandom(BLOCK)

    async def pour(stream: PeerStream, _peer: Peer, parameters: bytes) -> None:
        for _ in range(int(parameters)):
            await stream.write(block)
        await stream.finish()

    scope = TaskScope("plain")

    async def give_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = PlainStream(reader, writer, scope)
        parameters = await stream.read_frame(MAX_PARAMETERS)
        with contextlib.suppress(ConnectionError):
            await giver.serve(stream, NodeId(""), parameters or b"")
        stream.abort()

    node = make_node(*([token] if token else []))
    plain = await asyncio.start_server(give_plainly, "0.0.0.0", 0, limit=PLAIN_LIMIT)
    node.streams.register(StreamType.MODEL, give, scope=Scope.SERVE, per_peer=8)
    node.streams.register(StreamType.RPC, pour, scope=Scope.SERVE, per_peer=8)
    await node.start()
    if token:
        (await node.joiner.join()).raise_for_user()
    invite = node.create_invite("serve", 3600.0, None).token
    print(
        "ready",
        json.dumps(
            {
                "token": invite,
                "node": node.node_id,
                "addresses": node.reachable().addresses,
                "port": plain.sockets[0].getsockname()[1],
            }
        ),
        flush=True,
    )
    await asyncio.Event().wait()


async def take(file: str, home: str, token: str, nodes: str, hosts: str) -> None:
    """Measure what is asked for.

    `plain N`: megabytes from the first node. `model N`: the model from the first N nodes. `tcp N`: the same over TCP
    without TLS, to the hosts of `HOSTS` in their order.
    """
    path, directory = Path(file), Path(home)
    fingerprint = (await asyncio.to_thread(lambda: read_facts([read_header(path)], NAME))).fingerprint
    seeds: list[NodeId] = []
    node = make_node(token)
    await node.start()
    (await node.joiner.join()).raise_for_user()
    for one in json.loads(nodes):
        seeds.append(NodeId(one["node"]))
        node.send(seeds[-1], Ping(nonce=1), tuple(one["addresses"]))

    async def open_model(peer: NodeId, parameters: bytes) -> BulkStream:
        return await node.open(peer, StreamType.MODEL, parameters)

    ports = {NodeId(one["node"]): int(one["port"]) for one in json.loads(nodes)}
    addresses = dict(zip(seeds, hosts.split(","), strict=True))
    scope = TaskScope("plain")

    async def open_plainly(peer: NodeId, parameters: bytes) -> BulkStream:
        reader, writer = await asyncio.open_connection(addresses[peer], ports[peer], limit=PLAIN_LIMIT)
        stream = PlainStream(reader, writer, scope)
        await stream.write_frame(parameters)
        return stream

    async def plain(blocks: int) -> dict[str, float]:
        stream = await node.open(seeds[0], StreamType.RPC, str(blocks).encode())
        await stream.flush()
        began = time.perf_counter()
        for _ in range(blocks):
            await stream.read_exact(BLOCK)
        seconds = time.perf_counter() - began
        await stream.finish()
        return {"MB_s": blocks * BLOCK / 1e6 / seconds, "seconds": seconds}

    async def model(count: int, open_model: OpenModel = open_model) -> dict[str, float]:
        target = directory / "taken"
        taking = ModelDownload(
            asked=ModelParameters(NAME, fingerprint),
            place=in_directory(NAME, target),
            open_model=open_model,
            store=ChunkDigestStore(directory / "lists"),
            on_progress=lambda _: None,
            failed=lambda peer, failure: print(f"{peer[:10]}: {failure.reason}", file=sys.stderr),
        )
        began = time.perf_counter()
        (taken,) = await taking.run(seeds[:count])
        seconds = time.perf_counter() - began
        size = (await asyncio.to_thread(taken.stat)).st_size
        await asyncio.to_thread(shutil.rmtree, target)
        return {"MB_s": size / 1e6 / seconds, "seconds": seconds, "received_MB": taking.received.total / 1e6}

    tasks: dict[str, Callable[[int], Awaitable[dict[str, float]]]] = {
        "plain": plain,
        "model": model,
        "tcp": lambda count: model(count, open_plainly),
    }
    # Connections and windows are open when a clock starts.
    await plain(4)
    print("ready {}", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        kind, number = line.split()
        cpu = time.process_time()
        result = await tasks[kind](int(number))
        print("result", json.dumps(result | {"cpu_seconds": time.process_time() - cpu}), flush=True)


ROLES: dict[str, Callable[..., Awaitable[None]]] = {"seed": seed, "take": take}


if __name__ == "__main__":
    import uvloop

    uvloop.run(ROLES[sys.argv[1]](*sys.argv[2:]))  # pyright: ignore[reportArgumentType]
    sys.stdout.flush()
    os._exit(0)
