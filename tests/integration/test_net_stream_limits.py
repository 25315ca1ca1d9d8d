"""Typed streams between two nodes over real iroh: who may open which, how many, and what is not held up by them."""

import asyncio
import contextlib

import pytest
from tests.integration.net_nodes import TIMEOUT
from tests.integration.net_pair import echo, pair, read_all

from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import MessageReceived
from mesh_llm.core.types.gossip import Ping
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.streams import PeerStream, StreamResetError
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import ResetCode, StreamType


async def test_types_that_nobody_serves_are_reset():
    async with pair() as nodes:
        stream = await nodes.open(StreamType.MODEL)
        await stream.flush()
        with pytest.raises(StreamResetError) as reset:
            await stream.read(1)
        assert reset.value.code == ResetCode.UNKNOWN_TYPE


async def test_the_scope_of_a_certificate_counts_for_each_stream():
    async with pair("client") as nodes:

        async def rpc(stream: PeerStream, _peer: Peer, _parameters: bytes) -> None:
            await stream.finish()

        nodes.server.net.streams.register(StreamType.RPC, rpc, scope=Scope.SPLIT, per_peer=4)
        for kind in (StreamType.RPC, StreamType.GOSSIP, StreamType.PROBE):
            stream = await nodes.open(kind)
            await stream.flush()
            with pytest.raises(StreamResetError) as reset:
                await stream.read(1)
            assert reset.value.code == ResetCode.WRONG_SCOPE


async def test_streams_of_one_type_are_limited_per_peer():
    async with pair() as nodes:

        async def hold(stream: PeerStream, _peer: Peer, _parameters: bytes) -> None:
            await stream.write(b"taken")
            await stream.read(1)

        nodes.server.net.streams.register(StreamType.MODEL, hold, scope=Scope.SERVE, per_peer=2)
        held = [await nodes.open(StreamType.MODEL) for _ in range(2)]
        for stream in held:
            await stream.flush()
            assert await stream.read(5) == b"taken"
        third = await nodes.open(StreamType.MODEL)
        await third.flush()
        with pytest.raises(StreamResetError) as reset:
            await third.read(1)
        assert reset.value.code == ResetCode.BUSY
        held[0].abort()
        # Its place is free as soon as the other side has seen it go.
        async with asyncio.timeout(TIMEOUT):
            while True:
                fourth = await nodes.open(StreamType.MODEL, b"again")
                await fourth.flush()
                with contextlib.suppress(StreamResetError):
                    assert await fourth.read(5) == b"taken"
                    break


async def test_parameters_reach_the_handler():
    async with pair() as nodes:

        async def handler(stream: PeerStream, peer: Peer, parameters: bytes) -> None:
            await stream.write(parameters + peer.node.encode())
            await stream.finish()

        nodes.server.net.streams.register(StreamType.MODEL, handler, scope=Scope.SERVE, per_peer=2)
        stream = await nodes.open(StreamType.MODEL, b"which? ")
        await stream.flush()
        assert await read_all(stream) == b"which? " + nodes.asker.net.node_id.encode()


async def test_a_peer_that_opens_streams_without_headers_does_not_block_others():
    async with pair(header_timeout=0.3) as nodes:
        nodes.server.net.serve_http(echo)
        connection = await nodes.asker.net.connections.get(nodes.server.net.node_id)
        scope = TaskScope("rude")
        rude = IrohStream(await connection.raw.open_bi(), scope)
        await rude.write(b"\x00")
        stream = await nodes.http()
        await stream.write(b"hello")
        assert await stream.read(100) == b"HELLO"
        with pytest.raises(StreamResetError) as reset:
            await rude.read(1)
        assert reset.value.code == ResetCode.TIMEOUT
        await scope.close()


@pytest.mark.parametrize("reads", [True, False])
async def test_probes_do_not_wait_behind_bulk(reads: bool):
    async with pair() as nodes:
        server, asker = nodes.server.net, nodes.asker.net
        full = asyncio.Event()

        async def swallow(stream: PeerStream, _peer: Peer, _parameters: bytes) -> None:
            while reads and await stream.read(1 << 18):
                pass
            await asyncio.Event().wait()

        server.streams.register(StreamType.MODEL, swallow, scope=Scope.SERVE, per_peer=4)
        async with TaskScope("bulk") as scope:
            for _ in range(2):
                stream = await nodes.open(StreamType.MODEL)

                async def pour(stream: PeerStream = stream) -> None:
                    while True:
                        await stream.write(bytes(1 << 18))
                        full.set()

                scope.spawn(pour(), "pour")
            await full.wait()
            # The bulk never ends; where nobody reads it, every window is full. Each probe passes it nevertheless.
            for nonce in range(20):
                asker.send(server.node_id, Ping(nonce=nonce))
                wanted = Ping(nonce=nonce)
                await nodes.server.seen(MessageReceived, lambda event, wanted=wanted: event.message == wanted)


async def test_nobody_to_dial_is_an_error_with_a_hint():
    async with pair() as nodes:
        with pytest.raises(MeshError) as error:
            await nodes.asker.net.open_http(Target(node=NodeId("0" * 63 + "1"), local=False))
        assert error.value.code == "target_unreachable"
        assert error.value.retry_after
