"""Who is let in over TLS, with which tickets, and what an admitted peer may do there."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator

import pytest
from tests.integration.net_nodes import MeshNode, join, running
from tests.integration.net_pair import echo, offer, pair, port_of

from mesh_llm.core.types.events import PeerLost
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.streams import PeerStream
from mesh_llm.net.tls import listener
from mesh_llm.net.tls.listener import make_identity
from mesh_llm.net.tls.streams import TlsStream
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType, encode_header
from mesh_llm.wire.mesh.transport import ADMITTED, TICKET_BYTES, piece_head

TIMEOUT = 10.0


class Stranger:
    """A TLS client that may say anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, data: bytes) -> bytes:
        """Send this; returns what comes back, b"" if the connection is closed."""
        self.writer.write(data)
        return await self.hear()

    async def hear(self) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            try:
                return await self.reader.read(100)
            except ConnectionError:
                return b""


@contextlib.asynccontextmanager
async def stranger(port: int) -> AsyncGenerator[Stranger]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        yield Stranger(reader, writer)
    finally:
        writer.transport.abort()


# Who is let in


async def test_a_ticket_opens_a_connection_once():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        (ticket,) = (await offer(nodes)).tickets
        async with stranger(port_of(nodes.server)) as first:
            assert await first.say(ticket) == ADMITTED
            async with stranger(port_of(nodes.server)) as second:
                assert await second.say(ticket) == b""


async def test_an_old_ticket_opens_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listener, "TICKET_SECONDS", 0.0)
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        (ticket,) = (await offer(nodes)).tickets
        async with stranger(port_of(nodes.server)) as late:
            assert await late.say(ticket) == b""


@pytest.mark.parametrize(
    "said", [bytes(TICKET_BYTES), b"\xff" * TICKET_BYTES, b"GET / HTTP/1.1\r\n" * 3], ids=["zeros", "ones", "http"]
)
async def test_without_a_ticket_a_connection_is_closed_without_a_word(said: bytes):
    async with pair(tls=True) as nodes, stranger(port_of(nodes.server)) as unknown:
        assert await unknown.say(said) == b""
        assert len(nodes.server.net.tls_listener) == 0


async def test_nothing_may_follow_the_ticket_before_its_answer():
    async with pair(tls=True) as nodes:
        served: list[NodeId] = []

        async def handler(_stream: ByteStream, peer: NodeId) -> None:
            served.append(peer)

        nodes.server.net.serve_http(handler)
        (ticket,) = (await offer(nodes)).tickets
        header = encode_header(StreamType.HTTP)
        async with stranger(port_of(nodes.server)) as hasty:
            assert await hasty.say(ticket + piece_head(len(header)) + header) == b""
        assert served == []


async def test_who_says_nothing_is_closed_in_time():
    async with pair(tls=True, ticket_timeout=1.0) as nodes:
        async with stranger(port_of(nodes.server)) as silent:
            assert await silent.hear() == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(nodes.server))
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(ConnectionError):
                assert await reader.read(100) == b""
        writer.transport.abort()


async def test_half_open_connections_of_one_address_are_bounded():
    async with pair(tls=True, pending_per_address=3) as nodes:
        held = [await asyncio.open_connection("127.0.0.1", port_of(nodes.server)) for _ in range(3)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(nodes.server))
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(ConnectionError):
                assert await reader.read(100) == b""
        for _, other in [*held, (reader, writer)]:
            other.transport.abort()
        assert nodes.server.net.tls_listener.refused["too many"] == 1


async def test_a_node_that_shows_another_certificate_gets_no_ticket():
    """Somebody who answers on the peer's port must not learn the ticket, which would open the real one."""
    async with pair(tls=True) as nodes:
        heard: list[bytes] = []

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(await reader.read(100))
            writer.transport.abort()

        false = await asyncio.start_server(listen, ["127.0.0.1", "::1"], 0, ssl=make_identity().context)
        async with false:
            ports = {bound.family: bound.getsockname()[1] for bound in false.sockets}
            # Another program has the ports now.
            nodes.server.net.tls_listener._ports = (ports[socket.AF_INET], ports[socket.AF_INET6])
            stream = await nodes.open(StreamType.HTTP)
            assert isinstance(stream, IrohStream)
            state = nodes.asker.net.transport_of(nodes.server.net.node_id)
            assert state is not None
            assert "another certificate" in state.reason
            stream.abort()
        assert set(heard) <= {b""}


# What a peer may do


async def test_a_revoked_peer_is_cut_off_in_the_middle_of_a_stream():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        stream = await nodes.http()
        await stream.write(b"x")
        assert await stream.read(1) == b"X"
        (ticket,) = (await offer(nodes)).tickets
        nodes.server.net.revoke_node(nodes.asker.net.node_id)
        async with asyncio.timeout(TIMEOUT):
            with pytest.raises(ConnectionError):
                await stream.read(1)
        await nodes.server.seen(PeerLost)
        assert len(nodes.server.net.tls_listener) == 0
        async with stranger(port_of(nodes.server)) as late:
            assert await late.say(ticket) == b""


async def test_the_scope_of_a_peer_holds_on_tls():
    async with pair("client", tls=True) as nodes:

        async def never(stream: PeerStream, _peer: object, _parameters: bytes) -> None:
            await stream.write(b"secret")

        nodes.server.net.streams.register(StreamType.RPC, never, scope=Scope.SPLIT, per_peer=1)
        nodes.server.net.serve_http(echo)
        stream = await nodes.open(StreamType.RPC)
        assert isinstance(stream, TlsStream)
        await stream.write(b"x")
        with pytest.raises(ConnectionError):
            await stream.read(100)
        # The connection serves what the peer may have.
        allowed = await nodes.http()
        await allowed.write(b"x")
        assert await allowed.read(100) == b"X"


async def test_a_client_node_asks_over_tls_and_listens_to_nobody():
    server = MeshNode()
    async with running(server):
        server.net.serve_http(echo)
        asker = MeshNode(server.net.create_invite("client", 3600.0, None).token, client=True)
        async with running(asker):
            await join(asker)
            stream = await asker.net.open(server.net.node_id, StreamType.HTTP)
            assert isinstance(stream, TlsStream)
            await stream.write(b"x")
            assert await stream.read(1) == b"X"
            assert asker.net.tls_listener.ports == (0, 0)


async def test_garbage_on_an_admitted_connection_ends_it_and_nothing_else():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        first, second = (await offer(nodes, 2)).tickets
        async with stranger(port_of(nodes.server)) as rogue:
            assert await rogue.say(first) == ADMITTED
            assert await rogue.say(b"\x7f\xff\xff\xff") == b""
        async with stranger(port_of(nodes.server)) as rogue:
            assert await rogue.say(second) == ADMITTED
            # An end of a stream that never began.
            assert await rogue.say(bytes(4)) == b""
        stream = await nodes.http()
        await stream.write(b"fine")
        assert await stream.read(100) == b"FINE"
