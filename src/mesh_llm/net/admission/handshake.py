"""The ADMIT exchange on a fresh connection. Before it succeeds, a connection can do nothing but ask for it."""

import asyncio
import time

import iroh
import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.issuer import Registrar
from mesh_llm.net.admission.rate_limit import AdmissionGate
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.peers import Peer
from mesh_llm.net.quic.bindings import close_reason, reason_of, stream_failure
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.admission import (
    AdmitRequest,
    Approved,
    Reason,
    Refusal,
    Refused,
    Subject,
    decode_admit_reply,
    decode_admit_request,
)
from mesh_llm.wire.mesh.frames import (
    ALPN,
    MAX_ADMIT_FRAME,
    MAX_HEADER,
    CloseCode,
    ResetCode,
    StreamType,
    decode_header,
    encode_header,
)

_log = structlog.get_logger(__name__)


def remote_node(connection: iroh.Connection) -> NodeId:
    """Who is at the other end, by its TLS key."""
    return NodeId(bytes(connection.remote_id().to_bytes()).hex())


async def ask(
    connection: iroh.Connection, registrar: Registrar, request: AdmitRequest, scope: TaskScope, limits: NetLimits
) -> Peer | Refusal:
    """The dialer's side: ask to be admitted, and check whom it talks to.

    Raises ConnectionError where the connection breaks or nothing is answered in time.
    """
    try:
        async with asyncio.timeout(limits.admission_timeout):
            return await _ask(connection, registrar, request, scope)
    except TimeoutError:
        raise ConnectionError("it did not answer the request for admission") from None


async def _ask(
    connection: iroh.Connection, registrar: Registrar, request: AdmitRequest, scope: TaskScope
) -> Peer | Refusal:
    try:
        raw = await connection.open_bi()
    except iroh.IrohError as error:
        raise stream_failure(error) from None
    stream = IrohStream(raw, scope, unsent=encode_header(StreamType.ADMIT))
    try:
        await stream.write_frame(encode(request))
        await stream.finish()
        payload = await stream.read_frame(MAX_ADMIT_FRAME)
    except ConnectionError as error:
        # A refusal that closes the connection may overtake the reply that says why.
        words, code = close_reason(connection.close_reason())
        if code in {CloseCode.BUSY, CloseCode.REFUSED, CloseCode.NOT_ADMITTED}:
            return Refusal(Reason.BUSY, Subject.NODE, words[:200])
        raise ConnectionError(str(error)) from None
    finally:
        stream.abort()
    reply = Malformed("no reply") if payload is None else decode_admit_reply(payload)
    if isinstance(reply, Malformed):
        return Refusal(Reason.MALFORMED, Subject.NODE, reply.reason[:200])
    if isinstance(reply, Refused):
        return reply.refusal
    if isinstance(reply, Approved):
        return Refusal(Reason.MALFORMED, Subject.NODE, "an answer to what was not asked")
    node = remote_node(connection)
    certificate = registrar.accept_peer(reply, node)
    if isinstance(certificate, Refusal):
        return certificate
    return Peer(node, certificate, reply.version, reply.session)


async def answer(stream: IrohStream, registrar: Registrar, node: NodeId, source: str = "") -> Peer | Refusal:
    """The acceptor's side of one ADMIT stream, its header already read; `source` of a newcomer.

    Who was approved by the user is not in yet: it has been given an invite, and has to come again with it.
    Raises ConnectionError.
    """
    payload = await stream.read_frame(MAX_ADMIT_FRAME)
    request = Malformed("no request") if payload is None else decode_admit_request(payload)
    if isinstance(request, Malformed):
        raise stream.break_off(request.reason)
    decision = registrar.decide(request, node, source)
    if isinstance(decision, Refused | Approved):
        await stream.write_frame(encode(decision))
        await stream.finish()
        return decision.refusal if isinstance(decision, Refused) else Refusal(Reason.PENDING, Subject.REQUEST)
    admitted, certificate = decision
    await stream.write_frame(encode(admitted))
    await stream.finish()
    return Peer(node, certificate, request.version, request.session)


class Admission:
    """The acceptor's side of connections: from the first packet to an admitted peer, within bounds."""

    def __init__(self, registrar: Registrar, gate: AdmissionGate, limits: NetLimits) -> None:
        self._registrar = registrar
        self._gate = gate
        self._limits = limits

    async def receive(self, incoming: iroh.Incoming, scope: TaskScope) -> tuple[iroh.Connection, Peer] | None:
        """Take an incoming connection through admission; None: it was turned away, and is closed."""
        source = _address(await incoming.remote_addr())
        if not self._gate.enter(source, time.monotonic()):
            await incoming.refuse()
            return None
        refused = True
        try:
            async with asyncio.timeout(self._limits.admission_timeout):
                admitted = await self._admit(incoming, scope, source)
            refused = admitted is None
            return admitted
        except (TimeoutError, ConnectionError, iroh.IrohError) as error:
            reason = reason_of(error) if isinstance(error, iroh.IrohError) else str(error) or "too slow"
            _log.debug("not admitted", source=source, reason=reason)
            return None
        finally:
            self._gate.leave(source, time.monotonic(), refused=refused)

    async def _admit(
        self, incoming: iroh.Incoming, scope: TaskScope, source: str
    ) -> tuple[iroh.Connection, Peer] | None:
        accepting = await incoming.accept()
        connection = await accepting.connect()
        admitted = False
        try:
            if bytes(connection.alpn()) != ALPN:
                return None
            connection.set_max_concurrent_bi_streams(self._limits.streams_before_admission)
            connection.set_max_concurrent_uni_streams(0)
            node = remote_node(connection)
            if self._gate.expelled(node, time.monotonic()):
                connection.close(int(CloseCode.REFUSED), b"it broke the protocol a moment ago")
                return None
            for _ in range(self._limits.admission_tries):
                stream = IrohStream(await connection.accept_bi(), scope)
                outcome = await self._try(stream, node, source)
                if isinstance(outcome, Peer):
                    admitted = True
                    return connection, outcome
                if outcome is not None and outcome.permanent:
                    _log.info("refused", node=node[:10], reason=outcome.reason, about=outcome.subject)
                    # The dialer closes once it has read why; not waited for longer than admission may take.
                    await connection.closed()
                    return None
            return None
        finally:
            if not admitted:
                connection.close(int(CloseCode.NOT_ADMITTED), b"not admitted")

    async def _try(self, stream: IrohStream, node: NodeId, source: str) -> Peer | Refusal | None:
        """One stream of an unadmitted peer; None where it was not an ADMIT stream."""
        try:
            payload = await stream.read_frame(MAX_HEADER)
            header = Malformed("no header") if payload is None else decode_header(payload)
            if isinstance(header, Malformed):
                raise stream.break_off(header.reason)
            if header.type != StreamType.ADMIT:
                stream.abort(ResetCode.NOT_ADMITTED)
                return None
            return await answer(stream, self._registrar, node, source)
        except ConnectionError as error:
            _log.debug("admission stream failed", node=node[:10], reason=str(error))
            return None
        finally:
            if not stream.ended:
                stream.abort()


def _address(address: iroh.IncomingAddr) -> str:
    """The source of an incoming connection: `ip:port`, or `relay` for all that come by one."""
    return str(address.addr) if isinstance(address, iroh.IncomingAddr.IP) else "relay"
