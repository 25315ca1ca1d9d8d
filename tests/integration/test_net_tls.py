"""TLS over TCP between two nodes: what carries a stream, and what happens when TCP is not to be had."""

import asyncio
import errno
import socket
import time

import pytest
from tests.integration.net_nodes import MeshNode, join, running
from tests.integration.net_pair import Pair, echo, offer, pair, port_of, read_all

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream, RequestStream, TransportSilentError
from mesh_llm.net.quic.connection import PeerConnection
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.tls import dialer, listener
from mesh_llm.net.tls import streams as tls_streams
from mesh_llm.net.tls.dialer import DIALS_AHEAD, MAX_CONNECTIONS_TO_PEER, MAX_DIALS_TO_PEER, TlsDialer, Transport
from mesh_llm.net.tls.streams import TlsConnection, TlsStream
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.transport import (
    TransportOffer,
)

TIMEOUT = 10.0


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
            await join(plain)
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
    # The farther a peer, the more dials: a busy machine makes it far.
    monkeypatch.setattr(PeerConnection, "round_trip", 0.0)
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
    # Long before the time in which a peer must accept a stream.
    async with pair(tls=True, accept_timeout=10 * TIMEOUT) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        connection = await deaf(nodes)
        stream = await nodes.http()
        await stream.write(b"question")
        with pytest.raises(TransportSilentError):
            await stream.read(100)
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

    async def refused(_: object, hosts: tuple[str, ...], *__: object) -> None:
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
        # However late the answer is: its acknowledgement waits for it.
        monkeypatch.setattr(tls_streams, "_ACCEPT_SECONDS", TIMEOUT)
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


async def test_dials_that_begin_together_ask_for_their_tickets_once(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    ask, all_open = TlsDialer._ask, asyncio.Event()

    async def counted(self: TlsDialer, connection: PeerConnection, tickets: int) -> TransportOffer:
        asked.append(tickets)
        # The first dial begins with the first stream, and must not be done before the last one.
        await all_open.wait()
        return await ask(self, connection, tickets)

    monkeypatch.setattr(TlsDialer, "_ask", counted)
    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        streams = [await nodes.asker.net.open_http(nodes.target) for _ in range(12)]
        all_open.set()
        while len(nodes.server.net.tls_listener) < len(streams):
            await offer(nodes, 0)
        for stream in streams:
            stream.abort()
    assert sum(asked) >= 12
    assert len(asked) <= 4


@pytest.mark.parametrize(("round_trip", "at_once"), [(0.0, DIALS_AHEAD), (0.04, 14), (0.2, MAX_DIALS_TO_PEER)])
async def test_the_farther_a_peer_the_more_dials_are_under_way(
    monkeypatch: pytest.MonkeyPatch, round_trip: float, at_once: int
):
    dials = 0
    never = asyncio.Event()

    async def waits(*_: object) -> None:
        nonlocal dials
        dials += 1
        await never.wait()

    monkeypatch.setattr(TlsDialer, "_connect", waits)
    monkeypatch.setattr(PeerConnection, "round_trip", round_trip)
    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        nodes.server.net.serve_http(echo)
        streams = [await nodes.asker.net.open_http(nodes.target) for _ in range(24)]
        while dials < at_once:
            await offer(nodes, 0)
        for _ in range(5):
            await offer(nodes, 0)
        assert dials == at_once
        for stream in streams:
            stream.abort()


@pytest.mark.parametrize(("asked_seconds", "over_tls"), [(0.0, False), (60.0, True)])
async def test_tcp_is_slower_only_than_quic_was_just_now(
    monkeypatch: pytest.MonkeyPatch, asked_seconds: float, over_tls: bool
):
    # TCP's round trip is 50 s, QUIC's mean that of loopback: it is right, or it is from before the way became longer.
    ask, later = TlsDialer._ask, 0.0

    async def asked(self: TlsDialer, connection: PeerConnection, tickets: int) -> TransportOffer:
        nonlocal later
        found = await ask(self, connection, tickets)
        later += asked_seconds
        return found

    monkeypatch.setattr(TlsDialer, "_ask", asked)

    def round_trip(_: object) -> float:
        return 50_000.0

    monkeypatch.setattr(dialer, "_kernel_round_trip", round_trip)
    monkeypatch.setattr(dialer, "_TICKET_SHOWN_SECONDS", 600.0)
    async with pair(tls=True) as nodes, asyncio.timeout(TIMEOUT):
        monkeypatch.setattr(nodes.asker.net.tls_dialer, "_clock", lambda: time.monotonic() + later)
        nodes.server.net.serve_http(echo)
        stream = await nodes.open(StreamType.HTTP)
        assert isinstance(stream, TlsStream) == over_tls
        stream.abort()
