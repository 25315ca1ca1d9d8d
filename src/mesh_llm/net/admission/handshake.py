"""The ADMIT exchange: a dialer shows its certificate and invites, and the other side decides and writes certificates.

A connection that is not admitted can do nothing but ask for it.

No admission outlives what it rests on. A certificate ends with the admission of the node that signed it, and with that
of the node that made the invite. It is renewed only by a node on which it rests already, and only while the inviter is
a member. So no new node enters a chain, and a revocation reaches every node that it should.
"""

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

import iroh
import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.approvals import ApprovalBook, Requester
from mesh_llm.net.admission.credentials import Credentials
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.net.admission.revocations import RevocationList
from mesh_llm.net.limits import AdmissionRateLimit, NetLimits, source_key
from mesh_llm.net.quic.bindings import close_reason, reason_of
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.quic.streams import IrohStream, exchange_frames
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed, Verify, encode, key_of
from mesh_llm.wire.mesh.admission import (
    AdmitRequest,
    Admitted,
    ApprovalRequest,
    Approved,
    Reason,
    Refusal,
    Refused,
    Scope,
    Subject,
    common_protocol,
    decode_admit_reply,
    decode_admit_request,
)
from mesh_llm.wire.mesh.certificates import (
    Certificate,
    came_by_listing,
    check_certificate,
    check_chain,
    decode_certificate,
    issue_certificate,
    rests_on,
)
from mesh_llm.wire.mesh.frames import (
    ALPN,
    MAX_ADMIT_FRAME,
    MAX_HEADER,
    OLDEST_PROTOCOL,
    PROTOCOL,
    CloseCode,
    ResetCode,
    StreamType,
    decode_header,
)
from mesh_llm.wire.mesh.invites import Invite, check_invite, decode_invite, invite_rests_on

MEMBER_LIFETIME = 90 * 86400
CLIENT_LIFETIME = 7 * 86400
_WORTH_RENEWING = 86400
"""Seconds that a renewal must gain: otherwise every reconnection would write a certificate."""

_log = structlog.get_logger(__name__)


def lifetime_of(scope: Scope) -> int:
    """Seconds from the writing of a certificate to its end."""
    return CLIENT_LIFETIME if scope is Scope.CLIENT else MEMBER_LIFETIME


class Program(NamedTuple):
    """The version of this program, and random bytes that name this run of it."""

    version: str
    session: bytes


class CertificateIssuer:
    """Decides who is admitted, by what scope and until when. `clock` gives UNIX seconds. No sockets."""

    def __init__(
        self,
        credentials: Credentials,
        invites: InviteBook,
        revocations: RevocationList,
        verify: Verify,
        clock: Callable[[], float],
        program: Program,
    ) -> None:
        self.credentials = credentials
        self.clock = clock
        self.approvals: ApprovalBook | None = None
        """Where requests without an invite wait for the user; None: they are refused."""
        self.known: Callable[[NodeId], Certificate | None] = lambda _: None
        """The latest certificate of a node that was heard of; it may have expired or been revoked since."""
        self._invites = invites
        self._revocations = revocations
        self._verify = verify
        self._program = program

    def request(self, invites: tuple[bytes, ...] = (), *, earlier: Certificate | None = None) -> AdmitRequest:
        """The request that this node sends when it dials. `earlier`: the certificate to show, for the present one."""
        shown = encode(earlier) if earlier else self.credentials.encoded or self.credentials.outdated
        return AdmitRequest(OLDEST_PROTOCOL, PROTOCOL, *self._program, shown, invites)

    def earlier(self) -> Certificate | None:
        """The admission that this node had before it was granted its present one, if it still holds."""
        earlier = self.credentials.earlier
        return earlier if earlier is not None and self.recheck(earlier) is None else None

    def fall_back(self) -> bool:
        """Return to the earlier admission if the present one has ended; returns whether it did.

        Whoever grants a scope can take the new admission back. That must not cost the member the one that it had.
        """
        own, earlier = self.credentials.certificate, self.earlier()
        if own is None or earlier is None or self.recheck(own) is None:
            return False
        _log.info("the earlier admission counts again", scope=earlier.scope.word)
        self.credentials.accept(earlier)
        return True

    def decide(
        self, request: AdmitRequest, node: NodeId, source: str = ""
    ) -> tuple[Admitted, Certificate] | Refused | Approved:
        """Decide about `node`: admitted with this certificate, refused, or given an invite that the user approved.

        `source`: the address of a newcomer, which may ask the user; empty for an admitted peer.
        """
        protocol = common_protocol(request)
        if protocol is None:
            spoken = f"this is {self._program.version}, that is {request.version}"
            return self._refused(Refusal(Reason.OTHER_VERSION, Subject.NODE, spoken[:200]))
        own = self.credentials.certificate
        if own is None or self.recheck(own) is not None:
            return self._refused(Refusal(Reason.BUSY, Subject.NODE, "it is not admitted itself"))
        shown = self._check_shown(request.certificate, node, own) if request.certificate else None
        held = shown if isinstance(shown, Certificate) else None
        granted = self._redeem_first(request.invites, node, held, own)
        if isinstance(granted, Certificate):
            _log.info("admitted", node=node[:10], scope=granted.scope.word)
            return self._admitted(protocol, granted), granted
        if held is not None:
            renewed = self._renewed(held, own)
            if renewed is None and encode(held) != request.certificate:
                # It showed a certificate of the older form, and gets a new one for it.
                renewed = held
            return self._admitted(protocol, renewed), renewed or held
        refusal = granted or (shown if isinstance(shown, Refusal) else None)
        if refusal is None and request.ask is not None and source:
            return self._request_approval(request.ask, Requester(node, source, request.version))
        return self._refused(refusal or Refusal(Reason.NOTHING_SHOWN, Subject.NODE))

    def check(self, certificate: Certificate, node: NodeId, scope: Scope = Scope.CLIENT) -> Refusal | None:
        """Check a certificate completely; None: it holds now."""
        return check_certificate(
            certificate,
            mesh=self.credentials.mesh,
            node=node,
            now=self.clock(),
            verify=self._verify,
            revoked=self._revocations,
            scope=scope,
        )

    def recheck(self, certificate: Certificate) -> Refusal | None:
        """Check a certificate again that passed `check` before: only time and revocations can have ended it."""
        if certificate.expires <= self.clock():
            return Refusal(Reason.EXPIRED, Subject.CERTIFICATE)
        if self._revocations.covers(certificate.links):
            return Refusal(Reason.REVOKED, Subject.CERTIFICATE)
        return None

    def scope_of(self, certificate: Certificate) -> Scope:
        """What a node with this certificate may do now."""
        return min(certificate.scope, self._revocations.ceiling(certificate.links))

    def peer(self, node: NodeId, certificate: Certificate, version: str, session: bytes) -> Peer:
        """An admitted node."""
        return Peer(node, certificate, version, session, self._revocations.ceiling(certificate.links))

    def accept_peer(self, reply: Admitted, node: NodeId, request: AdmitRequest) -> Certificate | Refusal:
        """The dialer's side: check the acceptor's certificate, and keep the one that it granted, if any.

        `request`: what the reply answers. A granted certificate that this node did not ask for, or that gives less than
        it has, is ignored: any member can write one for any key, and take it back.
        """
        certificate = decode_certificate(reply.certificate)
        if isinstance(certificate, Refusal):
            return certificate
        if refusal := self.check(certificate, node, Scope.SERVE):
            return refusal
        if reply.granted:
            granted = decode_certificate(reply.granted)
            refusal = granted if isinstance(granted, Refusal) else self.check(granted, self.credentials.key.node_id)
            if isinstance(refusal, Refusal) or isinstance(granted, Refusal):
                return refusal or Refusal(Reason.MALFORMED, Subject.CERTIFICATE)
            self._take(granted, key_of(node), request)
        return certificate

    def _take(self, granted: Certificate, giver: bytes, request: AdmitRequest) -> None:
        held, earlier = self.credentials.certificate, self.earlier()
        if earlier is not None and request.certificate == encode(earlier) and self._renews(granted, earlier, giver):
            self.credentials.keep_earlier(granted)
        elif held is None or self.recheck(held) is not None or self._renews(granted, held, giver):
            self.credentials.accept(granted, earlier)
        elif self._asked_for(granted, request) and self.scope_of(granted) >= self.scope_of(held):
            # As much is enough: the giver may know of a revocation of the held one.
            self.credentials.accept(granted, earlier or held)
        else:
            _log.warning("a certificate that was not asked for is not taken", giver=giver.hex()[:10])

    def _renews(self, fresh: Certificate, old: Certificate, giver: bytes) -> bool:
        """Whether a certificate is an old one made wider or longer, by a node on which the old one rests."""
        link, last = fresh.links[-1], old.links[-1]
        if (link.invite, link.inviter) != (last.invite, last.inviter) or giver not in rests_on(old.links):
            return False
        wider = self.scope_of(fresh) - self.scope_of(old)
        return wider > 0 or (wider == 0 and fresh.expires >= old.expires + _WORTH_RENEWING)

    def _asked_for(self, granted: Certificate, request: AdmitRequest) -> bool:
        """Whether a certificate is by an invite that this node showed."""
        link = granted.links[-1]
        invites = [one for one in map(decode_invite, request.invites) if isinstance(one, Invite)]
        return any((one.id, one.terms.contacts[0].node) == (link.invite, link.inviter) for one in invites)

    def fresh(self, certificate: Certificate) -> Certificate | None:
        """This certificate or the latest known one of its node, whichever holds now; None: the node is no member."""
        for candidate in (certificate, self.known(certificate.node)):
            if candidate is not None and self.recheck(candidate) is None:
                return candidate
        return None

    def _check_shown(self, data: bytes, node: NodeId, own: Certificate) -> Certificate | Refusal:
        certificate = decode_certificate(data)
        if isinstance(certificate, Refusal):
            return certificate
        refusal = self.check(certificate, node)
        if refusal is not None and refusal.reason is Reason.OTHER_VERSION:
            return self._replace_outdated(certificate, own) or refusal
        return refusal or certificate

    def _replace_outdated(self, old: Certificate, own: Certificate) -> Certificate | None:
        """Replace a certificate of the older form, if this node issued its invite.

        No other node can know who issued it. The new certificate rests on what the old chain rests on, too.
        """
        link = old.links[-1]
        if self._revocations.covers(old.links) or not self._invites.issued(link.invite):
            return None
        if check_chain(old.mesh, old.links, self._verify, Subject.CERTIFICATE, outdated=True) is not None:
            return None
        rests = rests_on(old.links) - {link.node}
        outcome = self._issue(own, old.node, link.scope, link.invite, inviter=self._own_key, rests=rests)
        return outcome if isinstance(outcome, Certificate) else None

    def _redeem_first(
        self, invites: tuple[bytes, ...], node: NodeId, held: Certificate | None, own: Certificate
    ) -> Certificate | Refusal | None:
        """A certificate by the first invite that gives more than the node has; else the first refusal."""
        first: Refusal | None = None
        for data in invites:
            granted = self._redeem(data, node, held, own)
            if isinstance(granted, Certificate):
                return granted
            first = first or granted
        return first

    def _redeem(
        self, data: bytes, node: NodeId, held: Certificate | None, own: Certificate
    ) -> Certificate | Refusal | None:
        invite = decode_invite(data)
        if isinstance(invite, Refusal):
            return invite
        if held is not None and not self._may_gain(invite, held):
            return None
        refusal = check_invite(
            invite, now=self.clock(), verify=self._verify, revoked=self._revocations, mesh=self.credentials.mesh
        )
        if refusal is not None:
            return refusal
        made = self._certificate_by_invite(invite, key_of(node), own)
        if isinstance(made, Refusal) or (held is not None and not self._gains(made, held)):
            return made if isinstance(made, Refusal) else None
        return self._invites.redeem(invite, node) or made

    def _may_gain(self, invite: Invite, held: Certificate) -> bool:
        """Whether an invite may give more: a wider scope, a member's standing, or another inviter at renewal."""
        scope = self.scope_of(held)
        if invite.terms.scope != scope:
            return invite.terms.scope > scope
        if came_by_listing(rests_on(held.links)) and not came_by_listing(invite_rests_on(invite)):
            return True
        return self.due(held) and invite.id not in rests_on(held.links)

    def _certificate_by_invite(self, invite: Invite, node: bytes, own: Certificate) -> Certificate | Refusal:
        """The certificate by a valid invite, or why this node does not write it."""
        inviter, rests = invite.terms.contacts[0].node, invite_rests_on(invite)
        if node == inviter or node in rests:
            return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, "it comes from the node itself, or from one it invited")
        until = invite.chain[-1].expires if invite.chain else None
        if inviter == self._own_key:
            # This node's chain may be newer than the one in the invite.
            rests, until = frozenset[bytes](), None
        own_rests = rests_on(own.links)
        if invite.terms.scope > own.scope or node in own_rests:
            # Not the joiner's fault: the issuer can admit it. This does not count as a use of the invite.
            return Refusal(Reason.NOT_ISSUER, Subject.INVITE, f"this node has scope {own.scope.word}")
        made = self._issue(own, NodeId(node.hex()), invite.terms.scope, invite.id, inviter, rests, until)
        if isinstance(made, Refusal):
            return Refusal(Reason.NOT_ISSUER, Subject.INVITE, made.detail)
        if self._revocations.covers(made.links):
            return Refusal(Reason.REVOKED, Subject.CERTIFICATE, "this node was revoked, not only its invite")
        return made

    def _issue(
        self,
        own: Certificate,
        node: NodeId,
        scope: Scope,
        invite: bytes,
        inviter: bytes,
        rests: frozenset[bytes],
        until: int | None = None,
    ) -> Certificate | Refusal:
        """Write a certificate; `until`: when the inviter's admission ends, if another node is the inviter."""
        expires = int(self.clock()) + lifetime_of(scope)
        if until is not None:
            expires = min(expires, until)
        sign = self.credentials.key.sign
        return issue_certificate(own, key_of(node), scope, expires, invite, sign, inviter=inviter, rests=rests)

    def due(self, certificate: Certificate) -> bool:
        """Whether half of its lifetime is over."""
        return certificate.expires - self.clock() <= lifetime_of(certificate.scope) / 2

    def _gains(self, fresh: Certificate, held: Certificate) -> bool:
        """Whether a certificate permits more than the held one, or lasts longer and comes when renewal is due.

        A node that came by a public listing gains by an invite of its own: it is no stranger any more.
        """
        wider = self.scope_of(fresh) - self.scope_of(held)
        stranger = came_by_listing(rests_on(held.links)) and not came_by_listing(rests_on(fresh.links))
        if wider > 0 or (wider == 0 and stranger):
            return True
        return self.due(held) and fresh.expires >= held.expires + _WORTH_RENEWING

    def _renewed(self, held: Certificate, own: Certificate) -> Certificate | None:
        """A certificate that lasts longer, if the held one is due and this node may renew it.

        It may if the held one rests on this node already, and while the inviter is known to be a member.
        """
        link, rests = held.links[-1], rests_on(held.links)
        if not self.due(held) or held.scope > own.scope or link.inviter is None or self._own_key not in rests:
            return None
        until: int | None = None
        if link.inviter != self._own_key:
            known = self.known(NodeId(link.inviter.hex()))
            if known is None or self.recheck(known) is not None:
                return None
            until = known.expires
        fresh = self._issue(own, held.node, held.scope, link.invite, link.inviter, rests - {link.node}, until)
        if isinstance(fresh, Refusal) or not self._gains(fresh, held) or self._revocations.covers(fresh.links):
            return None
        return fresh

    @property
    def _own_key(self) -> bytes:
        return self.credentials.key.public

    def _request_approval(self, ask: ApprovalRequest, requester: Requester) -> Refused | Approved:
        if self.approvals is None or self._revocations.names(key_of(requester.node)):
            return self._refused(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
        outcome = self.approvals.ask(ask, requester)
        return self._refused(outcome) if isinstance(outcome, Refusal) else Approved(outcome, self._program.version)

    def _admitted(self, protocol: int, granted: Certificate | None) -> Admitted:
        encoded = encode(granted) if granted else b""
        return Admitted(protocol, *self._program, self.credentials.encoded, encoded)

    def _refused(self, refusal: Refusal) -> Refused:
        return Refused(refusal, self._program.version)


def remote_node(connection: iroh.Connection) -> NodeId:
    """The node at the other end, by its TLS key."""
    return NodeId(bytes(connection.remote_id().to_bytes()).hex())


async def ask(
    connection: iroh.Connection, issuer: CertificateIssuer, request: AdmitRequest, scope: TaskScope, limits: NetLimits
) -> Peer | Refusal:
    """The dialer's side: ask for admission, and check the other node's certificate.

    Raises ConnectionError if the connection breaks or no answer comes in time.
    """
    try:
        async with asyncio.timeout(limits.admission_timeout):
            return await _ask(connection, issuer, request, scope)
    except TimeoutError:
        raise ConnectionError("it did not answer the request for admission") from None


async def _ask(
    connection: iroh.Connection, issuer: CertificateIssuer, request: AdmitRequest, scope: TaskScope
) -> Peer | Refusal:
    try:
        payload = await exchange_frames(connection, StreamType.ADMIT, encode(request), scope, MAX_ADMIT_FRAME)
    except ConnectionError as error:
        # A refusal closes the connection, and that may overtake the reply with the reason.
        words, code = close_reason(connection.close_reason())
        if code in {CloseCode.BUSY, CloseCode.REFUSED, CloseCode.NOT_ADMITTED}:
            return Refusal(Reason.BUSY, Subject.NODE, words[:200])
        raise ConnectionError(str(error)) from None
    reply = Malformed("no reply") if payload is None else decode_admit_reply(payload)
    if isinstance(reply, Malformed):
        return Refusal(Reason.MALFORMED, Subject.NODE, reply.reason[:200])
    if isinstance(reply, Refused):
        return reply.refusal
    if isinstance(reply, Approved):
        return Refusal(Reason.MALFORMED, Subject.NODE, "an answer to what was not asked")
    node = remote_node(connection)
    certificate = issuer.accept_peer(reply, node, request)
    if isinstance(certificate, Refusal):
        return certificate
    return issuer.peer(node, certificate, reply.version, reply.session)


async def answer(stream: PeerStream, issuer: CertificateIssuer, node: NodeId, source: str = "") -> Peer | Refusal:
    """The acceptor's side of one ADMIT stream after its header; `source` as in `CertificateIssuer.decide`.

    A node that the user approved is not admitted yet: it gets an invite, and asks again with it.
    Raises ConnectionError.
    """
    payload = await stream.read_frame(MAX_ADMIT_FRAME)
    request = Malformed("no request") if payload is None else decode_admit_request(payload)
    if isinstance(request, Malformed):
        raise stream.break_off(request.reason)
    decision = issuer.decide(request, node, source)
    if isinstance(decision, Refused | Approved):
        await stream.write_frame(encode(decision))
        await stream.finish()
        return decision.refusal if isinstance(decision, Refused) else Refusal(Reason.PENDING, Subject.REQUEST)
    admitted, certificate = decision
    await stream.write_frame(encode(admitted))
    await stream.finish()
    return issuer.peer(node, certificate, request.version, request.session)


class AdmissionServer:
    """The acceptor's side of a connection, from the first packet to an admitted peer."""

    def __init__(self, issuer: CertificateIssuer, rate_limit: AdmissionRateLimit, limits: NetLimits) -> None:
        self._issuer = issuer
        self._rate_limit = rate_limit
        self._limits = limits

    async def receive(self, incoming: iroh.Incoming, scope: TaskScope) -> tuple[iroh.Connection, Peer, str] | None:
        """Take an incoming connection through admission: who it is, and its source (`source_key`).

        None: it was refused and closed.
        """
        source = _address(await incoming.remote_addr())
        if not self._rate_limit.enter(source, time.monotonic()):
            await incoming.refuse()
            return None
        refused = True
        try:
            async with asyncio.timeout(self._limits.admission_timeout):
                admitted = await self._admit(incoming, scope, source)
            refused = admitted is None
            return None if admitted is None else (*admitted, source_key(source))
        except (TimeoutError, ConnectionError, iroh.IrohError) as error:
            reason = reason_of(error) if isinstance(error, iroh.IrohError) else str(error) or "too slow"
            _log.debug("not admitted", source=source, reason=reason)
            return None
        finally:
            self._rate_limit.leave(source, time.monotonic(), refused=refused)

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
            if (ban := self._rate_limit.banned(node, time.monotonic())) is not None:
                connection.close(int(CloseCode.REFUSED), ban.reason.encode())
                return None
            for _ in range(self._limits.admission_tries):
                stream = IrohStream(await connection.accept_bi(), scope)
                outcome = await self._try(stream, node, source)
                if isinstance(outcome, Peer):
                    admitted = True
                    return connection, outcome
                if outcome is not None and outcome.permanent:
                    _log.info("refused", node=node[:10], reason=outcome.reason, about=outcome.subject)
                    # The dialer closes after it has read the reason; the time-out for admission bounds this wait.
                    await connection.closed()
                    return None
            return None
        finally:
            if not admitted:
                connection.close(int(CloseCode.NOT_ADMITTED), b"not admitted")

    async def _try(self, stream: PeerStream, node: NodeId, source: str) -> Peer | Refusal | None:
        """Serve one stream of an unadmitted peer; None: it was not an ADMIT stream."""
        try:
            payload = await stream.read_frame(MAX_HEADER)
            header = Malformed("no header") if payload is None else decode_header(payload)
            if isinstance(header, Malformed):
                raise stream.break_off(header.reason)
            if header.type != StreamType.ADMIT:
                stream.abort(ResetCode.NOT_ADMITTED)
                return None
            return await answer(stream, self._issuer, node, source)
        except ConnectionError as error:
            _log.debug("admission stream failed", node=node[:10], reason=str(error))
            return None
        finally:
            if not stream.ended:
                stream.abort()


def _address(address: iroh.IncomingAddr) -> str:
    """The source of an incoming connection: `ip:port`, or `relay` for all that come by one."""
    return str(address.addr) if isinstance(address, iroh.IncomingAddr.IP) else "relay"
