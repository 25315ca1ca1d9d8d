"""TLS over TCP between two nodes: who is let in, what carries a stream, and what happens when TCP is not to be had."""

import asyncio
import contextlib
import errno
import socket
import ssl
import time
from collections.abc import AsyncGenerator

import pytest
from tests.integration.net_nodes import MeshNode, running
from tests.integration.net_pair import Pair, echo, pair, read_all

from mesh_llm.core.types.events import PeerLost
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream, RequestStream, TransportSilentError
from mesh_llm.net.quic.connection import PeerConnection
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.streams import PeerStream
from mesh_llm.net.tls import listener
from mesh_llm.net.tls.dialer import DIALS_AHEAD, MAX_CONNECTIONS_TO_PEER, MAX_DIALS_TO_PEER, TlsDialer, Transport
from mesh_llm.net.tls.listener import make_identity
from mesh_llm.net.tls.streams import TlsConnection, TlsStream
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType, encode_header
from mesh_llm.wire.mesh.transport import (
    ADMITTED,
    MAX_TRANSPORT_FRAME,
    TICKET_BYTES,
    TransportOffer,
    TransportRequest,
    decode_offer,
    piece_head,
)

TIMEOUT = 10.0


def port_of(node: MeshNode) -> int:
    return node.net.tls_listener.ports[0]


async def offer(nodes: Pair, tickets: int = 1) -> TransportOffer:
    """An offer, as the peer's dialler gets it."""
    stream = await nodes.open(StreamType.TRANSPORT)
    await stream.write_frame(encode(TransportRequest(tickets)))
    payload = await stream.read_frame(MAX_TRANSPORT_FRAME)
    stream.abort()
    found = decode_offer(payload or b"")
    assert isinstance(found, TransportOffer)
    return found


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


# What carries a stream


async def test_the_first_request_takes_quic_and_later_ones_tls():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)

        async def ask() -> ByteStream:
            stream = await nodes.asker.net.open_http(nodes.target)
            await stream.write(b"question")
            await stream.finish()
            assert await read_all(stream) == b"QUESTION"
            return stream

        assert isinstance(await ask(), IrohStream)
        async with asyncio.timeout(TIMEOUT):
            while not isinstance(await ask(), TlsStream):
                pass
        assert nodes.asker.net.transport_of(nodes.server.net.node_id) == (Transport.TCP, "")
        # One after another: they share the few connections that were being made before the first was there.
        for _ in range(40):
            assert isinstance(await ask(), TlsStream)
        assert len(nodes.server.net.tls_listener) <= MAX_DIALS_TO_PEER


async def test_a_lasting_stream_takes_tls_at_once_and_its_connection_serves_the_next():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        for text in (b"one", b"two"):
            stream = await nodes.http()
            await stream.write(text)
            await stream.finish()
            assert await read_all(stream) == text.upper()
        assert len(nodes.server.net.tls_listener) == 1


async def test_more_streams_than_connections_take_quic():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        streams = [await nodes.open(StreamType.HTTP) for _ in range(MAX_CONNECTIONS_TO_PEER + 2)]
        assert sum(isinstance(stream, TlsStream) for stream in streams) == MAX_CONNECTIONS_TO_PEER
        for stream in streams[-2:]:
            await stream.write(b"still")
            assert await stream.read(100) == b"STILL"
            stream.abort()


async def test_without_a_port_streams_take_quic_and_the_reason_is_known(monkeypatch: pytest.MonkeyPatch):
    def taken(*_: object, **_options: object) -> socket.socket:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(listener, "_bind", taken)
    async with pair(tls=True) as nodes:
        assert nodes.server.net.tls_listener.ports == (0, 0)
        nodes.server.net.serve_http(echo)
        stream = await nodes.open(StreamType.HTTP)
        assert isinstance(stream, IrohStream)
        state = nodes.asker.net.transport_of(nodes.server.net.node_id)
        assert state is not None
        assert state.transport is Transport.QUIC
        assert "on the other node TCP port" in state.reason
        assert "already in use" in state.reason


async def test_a_peer_without_tls_is_asked_once():
    async with pair(tls=True) as nodes:
        plain = MeshNode(nodes.server.net.create_invite("serve", 3600.0, None).token, tls=False)
        async with running(plain):
            assert (await plain.net.joiner.join()).admitted
            plain.net.serve_http(echo)
            for _ in range(2):
                stream = await nodes.server.net.open(plain.net.node_id, StreamType.HTTP)
                assert isinstance(stream, IrohStream)
                stream.abort()
            state = nodes.server.net.transport_of(plain.net.node_id)
            assert state == (Transport.QUIC, "the other node speaks QUIC only")
            assert plain.net.transport_of(nodes.server.net.node_id) == (
                Transport.QUIC,
                "this node runs with --transport quic",
            )


async def test_what_is_in_flight_when_tcp_breaks_is_a_lost_stream_and_the_next_one_works():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        stream = await nodes.http()
        await stream.write(b"half")
        assert await stream.read(100) == b"HALF"
        for connections in list(nodes.server.net.tls_listener._connections.values()):
            for connection in list(connections):
                connection.close()
        with pytest.raises(ConnectionError):
            await stream.read(100)
        again = await nodes.http()
        await again.write(b"again")
        assert await again.read(100) == b"AGAIN"


async def test_a_host_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch):
    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        with socket.socket() as silent:
            # The system takes the connection; nobody speaks TLS on it.
            silent.bind(("127.0.0.2", port_of(nodes.server)))
            silent.listen()
            hosts = ("127.0.0.2", "127.0.0.3", "127.0.0.1")
            monkeypatch.setattr(PeerConnection, "direct_hosts", hosts)
            stream = await nodes.http()
            await stream.write(b"question")
            await stream.finish()
            assert await read_all(stream) == b"QUESTION"
        # Nothing is left of the attempts that lost.
        assert len(nodes.server.net.tls_listener) == 1


async def test_dials_that_fail_together_are_one_failure_and_after_it_one_dial_tries(monkeypatch: pytest.MonkeyPatch):
    now, blocked = 0.0, asyncio.Event()
    dials: asyncio.Queue[None] = asyncio.Queue()

    async def refused(*_: object) -> None:
        dials.put_nowait(None)
        await blocked.wait()
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(TlsDialer, "_connect", refused)
    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        nodes.asker.net.tls_dialer._clock = lambda: now

        async def ask(at_once: int) -> None:
            streams = [await nodes.asker.net.open_http(nodes.target) for _ in range(at_once)]
            for stream in streams:
                await stream.write(b"question")
                await stream.finish()
                assert await read_all(stream) == b"QUESTION"

        await ask(2 * DIALS_AHEAD)
        for _ in range(DIALS_AHEAD):
            await dials.get()
        now = 1.0
        blocked.set()
        while nodes.asker.net.transport_of(nodes.server.net.node_id) == (Transport.QUIC, ""):
            await ask(1)
        blocked.clear()
        # The first pause, not one that several failures have doubled.
        now += 5.5
        await ask(2 * DIALS_AHEAD)
        await dials.get()
        await ask(DIALS_AHEAD)
        assert dials.empty()


async def test_what_the_system_gives_up_counts_as_silence_and_takes_the_idle_connections_along():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        stream, other = await nodes.http(), await nodes.http()
        for one in (stream, other):
            await one.write(b"half")
            assert await one.read(100) == b"HALF"
        await other.finish()
        assert await read_all(other) == b""
        assert isinstance(stream, TlsStream)
        carrier = stream._connection
        assert carrier is not None
        carrier.connection_lost(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
        with pytest.raises(ConnectionError):
            await stream.read(100)
        state = nodes.asker.net.transport_of(nodes.server.net.node_id)
        assert state == (Transport.QUIC, "TCP stopped answering")


async def deaf(nodes: Pair) -> TlsConnection:
    """The server's end of the one TLS connection between them, from which it reads nothing. It carries no stream."""
    stream = await nodes.http()
    await stream.write(b"first")
    await stream.finish()
    assert await read_all(stream) == b"FIRST"
    (connections,) = nodes.server.net.tls_listener._connections.values()
    (connection,) = connections
    connection.transport.pause_reading()
    return connection


async def test_a_stream_that_tcp_does_not_bring_over_fails_as_soon_as_quic_answers():
    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        connection = await deaf(nodes)
        stream = await nodes.http()
        began = time.monotonic()
        await stream.write(b"question")
        with pytest.raises(TransportSilentError):
            await stream.read(100)
        # Long before the 2.5 s in which a peer must accept a stream.
        assert time.monotonic() - began < 1.0
        assert nodes.asker.net.transport_of(nodes.server.net.node_id) == (Transport.QUIC, "TCP stopped answering")
        # The server has dropped what it may have had of it, before it is asked again.
        assert connection.ended
        again = await nodes.asker.net.open_http(nodes.target)
        assert isinstance(again, IrohStream)
        await again.write(b"again")
        assert await again.read(100) == b"AGAIN"


async def test_a_request_that_its_node_has_and_does_not_confirm_ends_there_before_it_fails_here(
    monkeypatch: pytest.MonkeyPatch,
):
    """The direction from the server is cut: it works on a request of which the asker hears nothing."""
    ended = asyncio.Event()

    async def work(stream: RequestStream, _: NodeId) -> None:
        assert await stream.read(100) == b"question"
        try:
            await stream.read(100)
        finally:
            ended.set()

    def unsaid(*_: object) -> None:
        return

    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        connection = await deaf(nodes)
        nodes.server.net.serve_http(work)
        monkeypatch.setattr(connection, "owe", unsaid)
        connection.transport.resume_reading()
        stream = await nodes.http()
        await stream.write(b"question")
        with pytest.raises(TransportSilentError):
            await stream.read(100)
        assert ended.is_set()


async def test_a_silent_connection_that_the_system_has_just_ended_is_given_up_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
):
    class Closed:
        """A transport whose socket is closed, and whose protocol has not been told."""

        def get_extra_info(self, _: str) -> None:
            return None

        def abort(self) -> None:
            return

    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        stream = await nodes.http()
        await stream.write(b"question")
        assert isinstance(stream, TlsStream)
        carrier = stream._connection
        assert carrier is not None
        monkeypatch.setattr(carrier, "_transport", Closed())
        carrier.give_up()
        with pytest.raises(ConnectionError):
            await stream.read(100)


async def test_a_node_that_answers_on_neither_is_waited_for_as_on_quic(monkeypatch: pytest.MonkeyPatch):
    asked = asyncio.Event()

    async def unanswered(*_: object) -> None:
        asked.set()
        raise ConnectionError("the peer does not answer")

    async with pair(tls=True, accept_timeout=0.8) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        await deaf(nodes)
        monkeypatch.setattr(TlsDialer, "_withdraw_silent", unanswered)
        stream = await nodes.http()
        await stream.write(b"question")
        with pytest.raises(ConnectionError, match="the peer does not answer") as caught:
            await stream.read(100)
        assert asked.is_set()
        assert not isinstance(caught.value, TransportSilentError)


async def test_after_a_failure_tcp_is_tried_again_when_the_peer_is_reached_elsewhere_or_this_network_changes(
    monkeypatch: pytest.MonkeyPatch,
):
    now = 0.0
    dials: list[tuple[str, ...]] = []

    async def refused(_: object, hosts: tuple[str, ...], __: object) -> None:
        dials.append(hosts)
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(TlsDialer, "_connect", refused)
    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        dialer = nodes.asker.net.tls_dialer
        dialer._clock = lambda: now
        connection = nodes.asker.net.connections.find(nodes.server.net.node_id)
        assert connection is not None

        async def ask() -> int:
            nonlocal now
            now += 0.01
            (await nodes.open(StreamType.HTTP)).abort()
            return len(dials)

        for times in range(1, 8):
            assert await ask() == times
            assert await ask() == times
            # The longest pause is a minute.
            now += 61.0
        assert await ask() == 8
        dialer.reconsider(connection)
        assert await ask() == 8
        monkeypatch.setattr(PeerConnection, "direct_hosts", ("127.0.0.2",))
        dialer.reconsider(connection)
        assert await ask() == 9
        assert dials[-1] == ("127.0.0.2",)
        assert await ask() == 9
        dialer.network_changed()
        assert await ask() == 10
        # The pauses begin anew.
        now += 11.0
        assert await ask() == 11


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
    async with pair(tls=True, ticket_timeout=0.3) as nodes:
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
            assert (await asker.net.joiner.join()).admitted
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


# What a request costs


async def test_a_request_and_its_answer_are_one_write_on_each_side(monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[bytes, ...]] = []
    write = TlsConnection.write

    def counted(connection: TlsConnection, *parts: bytes) -> None:
        written.append(parts)
        write(connection, *parts)

    async def answer(stream: RequestStream, _: NodeId) -> None:
        data = await stream.read(100)
        await stream.finish(data.upper())

    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(answer)

        async def ask() -> None:
            stream = await nodes.http()
            await stream.write(b"question")
            assert await read_all(stream) == b"QUESTION"
            stream.abort()

        await ask()
        monkeypatch.setattr(TlsConnection, "write", counted)
        for _ in range(3):
            await ask()
        # The acknowledgement goes with the answer, and the asker's end of a stream with the next request.
        assert len(written) == 6
        assert len(nodes.server.net.tls_listener) == 1


async def test_a_stream_is_acknowledged_although_its_handler_says_nothing():
    async with pair(tls=True, accept_timeout=0.5) as nodes:
        release = asyncio.Event()

        async def slow(stream: RequestStream, _: NodeId) -> None:
            await release.wait()
            await stream.finish(b"late")

        nodes.server.net.serve_http(slow)
        stream = await nodes.http()
        await stream.write(b"question")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await stream.read(100)
        release.set()
        assert await read_all(stream) == b"late"


async def test_there_are_as_many_connections_as_streams_were_open_at_once():
    async with pair(tls=True) as nodes:
        nodes.server.net.serve_http(echo)
        streams = [await nodes.asker.net.open_http(nodes.target) for _ in range(12)]
        async with asyncio.timeout(TIMEOUT):
            while len(nodes.server.net.tls_listener) < len(streams):
                await offer(nodes, 0)
        for stream in streams:
            stream.abort()
        again = [await nodes.asker.net.open_http(nodes.target) for _ in range(len(streams) // 2)]
        assert all(isinstance(stream, TlsStream) for stream in again)
        for stream in again:
            stream.abort()
        assert len(nodes.server.net.tls_listener) == len(streams)
