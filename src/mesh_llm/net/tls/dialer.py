"""The asking side: a bounded pool of TLS connections to each peer, and which transport a new stream takes."""

import asyncio
import hashlib
import hmac
import os
import socket
import ssl
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.quic.connection import PeerConnection
from mesh_llm.net.streams import PeerStream, StreamResetError
from mesh_llm.net.tls.streams import TlsConnection, TlsStream
from mesh_llm.runtime.supervision import TaskScope, error_text
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import ACKNOWLEDGED, ResetCode, StreamType, encode_header
from mesh_llm.wire.mesh.transport import (
    ADMITTED,
    MAX_SILENT,
    MAX_TICKETS,
    MAX_TRANSPORT_FRAME,
    TICKET_SECONDS,
    TransportOffer,
    TransportRequest,
    connection_name,
    decode_offer,
)

MAX_CONNECTIONS_TO_PEER = 96
MAX_DIALS_TO_PEER = 16
"""TLS handshakes with one peer at once: each takes some 2 ms of both nodes' event loops."""
DIALS_AHEAD = 4
"""Of these, those for streams to come, if the peer is near: requests that are answered meanwhile must not wait long."""
_SECONDS_FOR_DIAL = 0.004
"""Over so many seconds of round trip one more is under way: most of its time it waits."""
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0
"""Seconds before TCP is tried again after it failed; doubled by each failure in a row. A try delays no request."""
_UNKNOWN_PAUSE = 600.0
_HEAD_START = 0.5
"""Seconds that one host of a peer has to answer before the next is tried too: more than most handshakes take."""
_DOUBT_SECONDS, _DOUBT_ROUND_TRIPS = 0.25, 4
"""When the peer is asked over QUIC whether it answers at all: it accepts a stream within 50 ms, and TCP sends a lost
packet again after 200 ms and two round trips."""
_GRACE_SECONDS = 0.1
"""How much later than the answer over QUIC that over TLS may come: it was asked for before."""
_TICKET_SHOWN_SECONDS = TICKET_SECONDS / 2
"""How long after it was asked for a ticket is shown: it must reach the peer while it is good."""
_SLOWER_PAUSE = 15.0
"""One measurement may have been taken in a bad moment."""
_TCP_INFO_BYTES, _TCPI_MIN_RTT = 152, 148
_SLOWER_MS, _SLOWER_TIMES = 5.0, 1.5
"""TCP counts as slower than QUIC when its round trip is longer by both. iroh measures whole milliseconds."""

_log = structlog.get_logger(__name__)


class Transport(StrEnum):
    """What carries a peer's streams."""

    TCP = "tcp"
    QUIC = "quic"
    RELAY = "relay"


class PeerTransport(NamedTuple):
    """What carries a peer's streams, and why it is not TCP, as a clause; empty where nothing is known."""

    transport: Transport
    reason: str = ""


@dataclass(slots=True)
class _Link:
    """The TLS connections to one peer.

    Attributes:
        offer: the peer's last one.
        asked_ms: how long it took to ask for it over QUIC.
        tickets: those of it that were not shown, with the time until which they are shown.
        asking: held while the peer is asked for an offer.
        idle: those that carry no stream, least recently used first, with the time since when.
        open: all.
        dialing: dials under way.
        wanted: how many there should be: as many streams as were open at once lately.
        reason: why there are none; empty while there is no reason.
        failed_at: when it failed last.
        again_at: when to try again.
        pause: seconds from the one to the other; 0.0 if the last dial succeeded.
        hosts: where the peer was reached over QUIC when it failed.
        doubted: streams that the peer should have accepted by now.
        checking: it is being found out whether the peer answers on QUIC.
        sweep: closes idle connections when they are old.
    """

    offer: TransportOffer | None = None
    asked_ms: float = 0.0
    tickets: list[tuple[bytes, float]] = field(default_factory=list[tuple[bytes, float]])
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    idle: dict[TlsConnection, float] = field(default_factory=dict[TlsConnection, float])
    open: set[TlsConnection] = field(default_factory=set[TlsConnection])
    dialing: int = 0
    wanted: int = 0
    reason: str = ""
    failed_at: float = 0.0
    again_at: float = 0.0
    pause: float = 0.0
    hosts: tuple[str, ...] = ()
    doubted: list[weakref.ref[TlsStream]] = field(default_factory=list[weakref.ref[TlsStream]])
    checking: bool = False
    sweep: asyncio.TimerHandle | None = None


class _Greeting(NamedTuple):
    """A connection whose ticket has not been sent, and the answer to come."""

    carrier: TlsConnection
    answered: asyncio.Future[bytes]


class TlsDialer:
    """Opens streams over TLS where the peer can be reached by TCP, and says why where it cannot."""

    def __init__(self, limits: NetLimits, scope: TaskScope, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._scope = scope
        self._clock = clock
        self._links: dict[NodeId, _Link] = {}
        self._context = _client_context()

    def state(self, connection: PeerConnection) -> PeerTransport:
        """What carries the streams to this peer now."""
        link = self._links.get(connection.peer.node)
        if link is not None and link.open:
            return PeerTransport(Transport.TCP)
        if not connection.direct_hosts:
            return PeerTransport(Transport.RELAY, "the nodes do not reach each other directly")
        return PeerTransport(Transport.QUIC, link.reason if link is not None else "")

    async def open(
        self, connection: PeerConnection, kind: StreamType, parameters: bytes, scope: Scope, *, wait: bool
    ) -> TlsStream | None:
        """A stream to a peer over TLS; None: it must take QUIC.

        `wait`: wait for a new connection, as a stream that lasts does. Otherwise the stream takes QUIC while another
        connection is made for the next ones, so that no request waits for a handshake.
        """
        link = self._links.setdefault(connection.peer.node, _Link())
        carrier = self._take_idle(link)
        if carrier is None:
            # This stream is not among those that are counted as open.
            link.wanted = min(MAX_CONNECTIONS_TO_PEER, max(link.wanted, connection.busy + 1))
            if wait and self._may_dial(connection, link):
                carrier = await self._dial(connection, link)
            elif not self._scope.closed and self._may_dial_ahead(connection, link):
                self._scope.spawn(self._dial_ahead(connection, link), "tls-dial")
        if carrier is None or not carrier.idle:
            return None
        return self._begin(carrier, connection, kind, parameters, scope)

    def open_at_once(self, connection: PeerConnection, kind: StreamType, scope: Scope) -> TlsStream | None:
        """A stream without parameters, if a connection is idle; the peer's admission has been checked."""
        link = self._links.get(connection.peer.node)
        carrier = self._take_idle(link) if link is not None else None
        return None if carrier is None else self._begin(carrier, connection, kind, b"", scope)

    def _begin(
        self, carrier: TlsConnection, connection: PeerConnection, kind: StreamType, parameters: bytes, scope: Scope
    ) -> TlsStream:
        connection.begin()
        stream = TlsStream(carrier, self._scope, unsent=encode_header(kind, parameters), on_end=connection.end)
        carrier.begin(stream)
        if kind in ACKNOWLEDGED:
            doubt_after = _DOUBT_SECONDS + _DOUBT_ROUND_TRIPS * connection.round_trip
            stream.expect_acceptance(connection.acceptance_seconds, doubt_after)
        connection.require(stream, scope)
        return stream

    def reconsider(self, connection: PeerConnection) -> None:
        """If TCP failed, and QUIC reaches the peer at other addresses than then: let the next stream try TCP."""
        link = self._links.get(connection.peer.node)
        if link is not None and link.pause and (hosts := connection.direct_hosts) != link.hosts:
            link.hosts, link.pause, link.again_at = hosts, _FIRST_PAUSE, 0.0

    def network_changed(self) -> None:
        """This node's own addresses have changed: let the next stream to each peer try TCP."""
        for link in self._links.values():
            if link.pause:
                link.pause, link.again_at = _FIRST_PAUSE, 0.0

    def cut(self, node: NodeId) -> None:
        """End the connections to a peer, and forget what is known of it."""
        link = self._links.pop(node, None)
        if link is None:
            return
        if link.sweep is not None:
            link.sweep.cancel()
        for carrier in list(link.open):
            carrier.close()

    def close(self) -> None:
        """End all connections."""
        for node in list(self._links):
            self.cut(node)

    # Inside

    @staticmethod
    def _take_idle(link: _Link) -> TlsConnection | None:
        """The connection that was used last: others can become old and be closed."""
        while link.idle:
            carrier, _ = link.idle.popitem()
            if carrier.idle:
                return carrier
        return None

    def _may_dial(self, connection: PeerConnection, link: _Link) -> bool:
        # After a failure one dial finds out for all.
        at_once = 1 if link.pause else MAX_DIALS_TO_PEER
        if len(link.open) + link.dialing >= MAX_CONNECTIONS_TO_PEER or link.dialing >= at_once:
            return False
        return self._clock() >= link.again_at and bool(connection.direct_hosts)

    def _may_dial_ahead(self, connection: PeerConnection, link: _Link) -> bool:
        return (
            link.dialing < DIALS_AHEAD + int(connection.round_trip / _SECONDS_FOR_DIAL)
            and len(link.open) + link.dialing < link.wanted
            and self._may_dial(connection, link)
        )

    async def _dial_ahead(self, connection: PeerConnection, link: _Link) -> None:
        """Make connections until there are as many as streams were open at once."""
        while not self._scope.closed and self._may_dial_ahead(connection, link):
            carrier = await self._dial(connection, link)
            if carrier is None:
                return
            if carrier.idle:
                self._idle(link, carrier)

    async def _dial(self, connection: PeerConnection, link: _Link) -> TlsConnection | None:
        """A new connection to the peer; None if there can be none: the link knows why, and when to try again."""
        link.dialing += 1
        began = self._clock()
        try:
            async with asyncio.timeout(self._limits.direct_timeout):
                offer, ticket = await self._ticket(connection, link)
                carrier, round_trip_ms = await self._connect(connection.direct_hosts, offer, ticket)
        except StreamResetError as error:
            unknown = error.code == ResetCode.UNKNOWN_TYPE
            reason = "the other node speaks QUIC only" if unknown else error_text(error)
            self._failed(connection, link, reason, began, _UNKNOWN_PAUSE if unknown else 0.0)
            return None
        except TimeoutError:
            self._failed(connection, link, f"TCP gave no answer within {self._limits.direct_timeout:.0f} s", began)
            return None
        except (OSError, ssl.SSLError) as error:
            self._failed(connection, link, error_text(error), began)
            return None
        finally:
            link.dialing -= 1
        if self._links.get(connection.peer.node) is not link or self._scope.closed or carrier.ended:
            # The peer was cut meanwhile.
            carrier.close()
            return None
        quic = connection.sample()
        # QUIC's figure is a mean, which lags behind where the way became longer: the last question shows it.
        if quic is not None and _slower(round_trip_ms, max(quic.rtt_ms, link.asked_ms)):
            carrier.close()
            slower = f"its round trip over TCP is {round_trip_ms:.0f} ms, over QUIC {quic.rtt_ms:.0f} ms"
            self._failed(connection, link, slower, began, _SLOWER_PAUSE)
            return None
        link.reason, link.again_at, link.pause = "", 0.0, 0.0
        link.open.add(carrier)
        carrier.on_end = lambda ended: self._ended(connection, link, ended)
        carrier.on_idle = lambda free: self._idle(link, free)
        carrier.on_doubt = lambda stream: self._doubt(connection, link, stream)
        return carrier

    async def _ticket(self, connection: PeerConnection, link: _Link) -> tuple[TransportOffer, bytes]:
        """An offer, and a ticket for it. Dials that begin together share one question. Raises ConnectionError."""
        async with link.asking:
            while link.tickets:
                ticket, until = link.tickets.pop()
                if link.offer is not None and self._clock() < until:
                    return link.offer, ticket
            lacking = link.wanted - len(link.open)
            until = self._clock() + _TICKET_SHOWN_SECONDS
            asked = self._clock()
            link.offer = await self._ask(connection, max(1, min(MAX_TICKETS, lacking)))
            link.asked_ms = (self._clock() - asked) * 1000
            first, *rest = link.offer.tickets
            link.tickets = [(ticket, until) for ticket in rest]
            return link.offer, first

    async def _ask(self, connection: PeerConnection, tickets: int) -> TransportOffer:
        """Get an offer with so many tickets over QUIC, or fewer, but one. Raises ConnectionError."""
        stream = await connection.open(StreamType.TRANSPORT)
        try:
            offer = await _offer(stream, TransportRequest(tickets))
            await stream.finish()
        finally:
            stream.abort()
        if not any(offer.ports):
            raise ConnectionError(f"on the other node {offer.reason}" if offer.reason else "the other node has no port")
        if not offer.tickets:
            raise ConnectionError("the other node has no ticket left")
        return offer

    async def _connect(
        self, hosts: tuple[str, ...], offer: TransportOffer, ticket: bytes
    ) -> tuple[TlsConnection, float]:
        """Connect by the offer; returns the connection and the ticket's round trip in ms. Raises OSError.

        The first host that answers gets the ticket: the path in use may let QUIC through and not TCP.
        """
        places = [(host, port) for host in hosts if (port := offer.ports[":" in host])]
        if not places:
            raise ConnectionError("the other node has no port for this kind of address")
        greeting = await self._first_answer(places, offer.certificate)
        loop, carrier = asyncio.get_running_loop(), greeting.carrier
        try:
            sent = loop.time()
            carrier.name = connection_name(ticket)
            carrier.write(ticket)
            if await greeting.answered != ADMITTED:
                raise ConnectionError("the ticket was not taken")
            return carrier, _kernel_round_trip(carrier.transport) or (loop.time() - sent) * 1000
        except BaseException:
            carrier.close()
            raise

    async def _first_answer(self, places: list[tuple[str, int]], certificate: bytes) -> _Greeting:
        """Try these hosts and ports, the next one when none has answered for a while (RFC 8305). Raises OSError."""
        attempts: list[asyncio.Task[_Greeting | OSError]] = []
        pending: set[asyncio.Task[_Greeting | OSError]] = set()
        failure = OSError()
        chosen: _Greeting | None = None
        left = iter(places)
        async with TaskScope("tls-hosts") as scope:
            try:
                while chosen is None:
                    if (place := next(left, None)) is not None:
                        attempts.append(scope.spawn(self._attempt(*place, certificate), place[0]))
                        pending.add(attempts[-1])
                    elif not pending:
                        raise failure
                    head_start = _HEAD_START if len(attempts) < len(places) else None
                    done, pending = await asyncio.wait(pending, timeout=head_start, return_when=asyncio.FIRST_COMPLETED)
                    for outcome in [task.result() for task in done]:
                        if isinstance(outcome, OSError):
                            failure = outcome
                        else:
                            chosen = outcome
                return chosen
            finally:
                for task in attempts:
                    if task.done() and isinstance(other := task.result(), _Greeting) and other is not chosen:
                        other.carrier.close()

    async def _attempt(self, host: str, port: int, certificate: bytes) -> _Greeting | OSError:
        try:
            return await self._shake_hands(host, port, certificate)
        except (OSError, ssl.SSLError) as error:
            return ConnectionError(f"TCP port {port} of {host} cannot be reached: {_reason(error)}")

    async def _shake_hands(self, host: str, port: int, certificate: bytes) -> _Greeting:
        """A TLS connection with the owner of this certificate. Raises OSError, ssl.SSLError."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bytes] = loop.create_future()

        def greeted(_: TlsConnection, answer: bytes = b"") -> None:
            if not answered.done():
                answered.set_result(answer)

        carrier = TlsConnection(len(ADMITTED), greeted)
        carrier.on_end = greeted
        try:
            await loop.create_connection(lambda: carrier, host, port, ssl=self._context)
            shown = carrier.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
            if not hmac.compare_digest(hashlib.sha256(shown or b"").digest(), certificate):
                raise ConnectionError("another certificate than the node's own was shown")
        except BaseException:
            carrier.close()
            raise
        return _Greeting(carrier, answered)

    def _failed(self, connection: PeerConnection, link: _Link, reason: str, began: float, pause: float = 0.0) -> None:
        """TCP failed in what began then; `pause`: seconds at least until it is tried again."""
        link.reason = reason
        link.tickets.clear()
        if link.pause and began <= link.failed_at:
            # It was under way when another one failed: that is one failure.
            return
        link.failed_at, link.hosts = self._clock(), connection.direct_hosts
        link.pause = min(_LONGEST_PAUSE, max(_FIRST_PAUSE, 2 * link.pause))
        link.again_at = link.failed_at + max(pause, link.pause)
        _log.info("streams stay on QUIC", peer=connection.peer.node[:10], reason=reason)

    def _idle(self, link: _Link, carrier: TlsConnection) -> None:
        link.idle[carrier] = self._clock()
        if link.sweep is None:
            link.sweep = asyncio.get_running_loop().call_later(self._limits.direct_idle, self._sweep, link)

    def _sweep(self, link: _Link) -> None:
        """Close connections that were not used for a while."""
        link.wanted = 0
        now = self._clock()
        for carrier, since in list(link.idle.items()):
            if now - since >= self._limits.direct_idle / 2:
                carrier.close()
        link.sweep = (
            asyncio.get_running_loop().call_later(self._limits.direct_idle / 2, self._sweep, link)
            if link.idle
            else None
        )

    def _ended(self, connection: PeerConnection, link: _Link, carrier: TlsConnection) -> None:
        link.open.discard(carrier)
        link.idle.pop(carrier, None)
        if not carrier.silent:
            return
        if self._clock() >= link.again_at:
            self._failed(connection, link, "TCP stopped answering", self._clock())
        # The others would make each request wait in turn.
        for other in list(link.idle):
            other.close()

    # Silence on TLS alone

    def _doubt(self, connection: PeerConnection, link: _Link, stream: TlsStream) -> None:
        """The peer should have accepted this stream by now: it is busy or gone, or only its TCP is silent."""
        link.doubted.append(weakref.ref(stream))
        if not link.checking and not self._scope.closed:
            link.checking = True
            self._scope.spawn(self._check(connection, link), "tls-doubt")

    async def _check(self, connection: PeerConnection, link: _Link) -> None:
        """While there are streams in doubt: those that QUIC overtakes are withdrawn, and begun again by their users.

        A busy peer answers late on both, in the order in which it was asked. A dead one answers on neither: then the
        streams wait for their acceptance, as on QUIC.
        """
        try:
            while doubted := link.doubted[:MAX_SILENT]:
                del link.doubted[: len(doubted)]
                if not _unaccepted(doubted):
                    continue
                try:
                    await self._withdraw_silent(connection, doubted)
                except ConnectionError as error:
                    _log.debug("no answer on QUIC either", peer=connection.peer.node[:10], reason=error_text(error))
        finally:
            link.checking = False

    async def _withdraw_silent(self, connection: PeerConnection, doubted: list[weakref.ref[TlsStream]]) -> None:
        """Have the peer drop what it has not accepted of these a moment after it has answered. Raises ConnectionError.

        It drops them before they are begun again, so that it does not do the work of a request twice.
        """
        question = await connection.open(StreamType.TRANSPORT)
        try:
            await _offer(question, TransportRequest(0))
            await asyncio.sleep(_GRACE_SECONDS + connection.round_trip)
            names = tuple(stream.withdraw() for stream in _unaccepted(doubted))
            if not names:
                return
            await _offer(question, TransportRequest(0, names))
            for stream in _unaccepted(doubted):
                stream.abandon()
            await question.finish()
        finally:
            question.abort()


async def _offer(stream: PeerStream, request: TransportRequest) -> TransportOffer:
    """The answer to one frame on a TRANSPORT stream. Raises ConnectionError."""
    await stream.write_frame(encode(request))
    payload = await stream.read_frame(MAX_TRANSPORT_FRAME)
    offer = Malformed("no offer") if payload is None else decode_offer(payload)
    if isinstance(offer, Malformed):
        raise stream.break_off(offer.reason)
    return offer


def _unaccepted(streams: list[weakref.ref[TlsStream]]) -> list[TlsStream]:
    """Those of them that their users still hold, and that the peer has not accepted."""
    return [stream for one in streams if (stream := one()) is not None and stream.unaccepted]


def _reason(error: OSError) -> str:
    """Why a connection was not made, in the system's words: the event loop's name addresses again."""
    return os.strerror(error.errno) if error.errno and not isinstance(error, ssl.SSLError) else error_text(error)


def _kernel_round_trip(transport: asyncio.Transport) -> float:
    """The shortest round trip in ms that the system's TCP has seen, without the event loops; 0.0: not known.

    `tcpi_min_rtt` of `struct tcp_info` (linux/tcp.h), in microseconds.
    """
    option = getattr(socket, "TCP_INFO", None)
    if option is None or not sys.platform.startswith("linux"):
        return 0.0
    info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO_BYTES)
    return int.from_bytes(info[_TCPI_MIN_RTT:_TCP_INFO_BYTES], sys.byteorder) / 1000


def _slower(tls_ms: float, quic_ms: float) -> bool:
    return tls_ms > quic_ms + _SLOWER_MS and tls_ms > _SLOWER_TIMES * quic_ms


def _client_context() -> ssl.SSLContext:
    """TLS 1.3; who the other side is, is proven by the digest of its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
