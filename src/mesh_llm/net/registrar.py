"""Decides who is admitted: reads requests, checks what they show, writes certificates. No sockets."""

from collections.abc import Callable

import structlog

from mesh_llm.core.ids import NodeId
from mesh_llm.net.approvals import ApprovalBook, Asker
from mesh_llm.net.invites import InviteBook
from mesh_llm.net.revocations import RevocationList
from mesh_llm.net.standing import Standing
from mesh_llm.wire.admit import AdmitRequest, Admitted, Approved, Ask, Refused, common_protocol
from mesh_llm.wire.certificate import (
    MAX_DEPTH,
    Certificate,
    Scope,
    admit,
    check_certificate,
    decode_certificate,
    encode_certificate,
)
from mesh_llm.wire.frames import OLDEST_PROTOCOL, PROTOCOL
from mesh_llm.wire.invite import Invite, check_invite, decode_invite
from mesh_llm.wire.refusal import Reason, Refusal, Subject
from mesh_llm.wire.signing import Verify, key_of

MEMBER_LIFETIME = 90 * 86400
CLIENT_LIFETIME = 7 * 86400
_WORTH_RENEWING = 86400
"""A renewal must gain so many seconds: else every reconnection would write a certificate."""

_log = structlog.get_logger(__name__)


class Registrar:
    """One per node. `clock` gives UNIX seconds."""

    def __init__(
        self,
        standing: Standing,
        invites: InviteBook,
        revocations: RevocationList,
        *,
        verify: Verify,
        clock: Callable[[], float],
        session: bytes,
        version: str,
        approvals: ApprovalBook | None = None,
    ) -> None:
        """`approvals`: who asks without an invite is kept there for the user; None: is refused."""
        self._standing = standing
        self._invites = invites
        self._revocations = revocations
        self._verify = verify
        self._clock = clock
        self._session = session
        self._version = version
        self._approvals = approvals

    def request(self, invites: tuple[bytes, ...] = ()) -> AdmitRequest:
        """What this node says when it dials."""
        return AdmitRequest(OLDEST_PROTOCOL, PROTOCOL, self._version, self._session, self._standing.encoded, invites)

    def decide(
        self, request: AdmitRequest, node: NodeId, source: str = ""
    ) -> tuple[Admitted, Certificate] | Refused | Approved:
        """Whether `node` comes in; with the certificate by which it does.

        `source`: the address of a newcomer, which may ask the user; empty for a peer that is in already.
        """
        protocol = common_protocol(request)
        if protocol is None:
            spoken = f"this is {self._version}, that is {request.version}"
            return self._no(Refusal(Reason.OTHER_VERSION, Subject.NODE, spoken[:200]))
        own = self._standing.certificate
        if own is None or own.expires <= self._clock():
            return self._no(Refusal(Reason.BUSY, Subject.NODE, "it is not admitted itself"))
        shown = self._by_certificate(request.certificate, node) if request.certificate else None
        held = shown if isinstance(shown, Certificate) else None
        granted = self._by_invites(request.invites, node, held, own)
        if isinstance(granted, Certificate):
            _log.info("admitted", node=node[:10], scope=granted.scope.word)
            return self._yes(protocol, granted), granted
        if held is not None:
            renewed = self._renewed(held, own)
            return self._yes(protocol, renewed), renewed or held
        refusal = granted or (shown if isinstance(shown, Refusal) else None)
        if refusal is None and request.ask is not None and source:
            return self._by_asking(request.ask, Asker(node, source, request.version))
        return self._no(refusal or Refusal(Reason.NOTHING_SHOWN, Subject.NODE))

    def check(self, certificate: Certificate, node: NodeId, scope: Scope = Scope.CLIENT) -> Refusal | None:
        """Whether this certificate holds here and now."""
        return check_certificate(
            certificate,
            mesh=self._standing.mesh,
            node=node,
            now=self._clock(),
            verify=self._verify,
            revoked=self._revocations,
            scope=scope,
        )

    def recheck(self, certificate: Certificate) -> Refusal | None:
        """Whether a certificate that `check` let pass before still holds: only time and revocations can tell."""
        if certificate.expires <= self._clock():
            return Refusal(Reason.EXPIRED, Subject.CERTIFICATE)
        if self._revocations.covers(certificate.links):
            return Refusal(Reason.REVOKED, Subject.CERTIFICATE)
        return None

    def accept_peer(self, reply: Admitted, node: NodeId) -> Certificate | Refusal:
        """The dialer's side: check the acceptor's certificate, and take the one that was granted, if any."""
        certificate = decode_certificate(reply.certificate)
        if isinstance(certificate, Refusal):
            return certificate
        if refusal := self.check(certificate, node, Scope.SERVE):
            return refusal
        if reply.granted:
            granted = decode_certificate(reply.granted)
            refusal = granted if isinstance(granted, Refusal) else self.check(granted, self._standing.key.node_id)
            if isinstance(refusal, Refusal) or isinstance(granted, Refusal):
                return refusal or Refusal(Reason.MALFORMED, Subject.CERTIFICATE)
            self._standing.accept(granted)
        return certificate

    def _by_certificate(self, data: bytes, node: NodeId) -> Certificate | Refusal:
        certificate = decode_certificate(data)
        if isinstance(certificate, Refusal):
            return certificate
        return self.check(certificate, node) or certificate

    def _by_invites(
        self, invites: tuple[bytes, ...], node: NodeId, held: Certificate | None, own: Certificate
    ) -> Certificate | Refusal | None:
        """A certificate by the first invite that gives more than is held; else the first refusal."""
        first: Refusal | None = None
        for data in invites:
            granted = self._by_invite(data, node, held, own)
            if isinstance(granted, Certificate):
                return granted
            first = first or granted
        return first

    def _by_invite(
        self, data: bytes, node: NodeId, held: Certificate | None, own: Certificate
    ) -> Certificate | Refusal | None:
        invite = decode_invite(data)
        if isinstance(invite, Refusal):
            return invite
        if held is not None and invite.terms.scope <= held.scope:
            return None
        refusal = check_invite(
            invite, now=self._clock(), verify=self._verify, revoked=self._revocations, mesh=self._standing.mesh
        )
        if refusal is None and self._revocations.names(key_of(node)):
            refusal = Refusal(Reason.REVOKED, Subject.CERTIFICATE, "this node was revoked, not only its invite")
        if refusal is None:
            refusal = self._can_grant(invite, own) or self._invites.redeem(invite, node)
        if refusal is not None:
            return refusal
        return self._grant(own, node, invite.terms.scope, invite.id)

    def _can_grant(self, invite: Invite, own: Certificate) -> Refusal | None:
        if invite.terms.scope > own.scope or len(own.links) >= MAX_DEPTH:
            # Not the joiner's fault: its issuer can. Counted as no use of the invite.
            return Refusal(Reason.NOT_ISSUER, Subject.INVITE, f"this node has scope {own.scope.word}")
        return None

    def _grant(self, own: Certificate, node: NodeId, scope: Scope, invite: bytes) -> Certificate | Refusal:
        lifetime = CLIENT_LIFETIME if scope is Scope.CLIENT else MEMBER_LIFETIME
        expires = int(self._clock()) + lifetime
        return admit(own, key_of(node), scope, expires, invite, self._standing.key.sign)

    def _renewed(self, held: Certificate, own: Certificate) -> Certificate | None:
        """A certificate that lasts longer, where the one held is past half its life and this node can give one."""
        lifetime = CLIENT_LIFETIME if held.scope is Scope.CLIENT else MEMBER_LIFETIME
        if held.expires - self._clock() > lifetime / 2 or held.scope > own.scope:
            return None
        fresh = self._grant(own, held.node, held.scope, held.links[-1].invite)
        if isinstance(fresh, Refusal) or fresh.expires < held.expires + _WORTH_RENEWING:
            return None
        return fresh

    def _by_asking(self, ask: Ask, asker: Asker) -> Refused | Approved:
        if self._approvals is None or self._revocations.names(key_of(asker.node)):
            return self._no(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
        outcome = self._approvals.ask(ask, asker)
        return self._no(outcome) if isinstance(outcome, Refusal) else Approved(outcome, self._version)

    def _yes(self, protocol: int, granted: Certificate | None) -> Admitted:
        encoded = encode_certificate(granted) if granted else b""
        return Admitted(protocol, self._version, self._session, self._standing.encoded, encoded)

    def _no(self, refusal: Refusal) -> Refused:
        return Refused(refusal, self._version)
