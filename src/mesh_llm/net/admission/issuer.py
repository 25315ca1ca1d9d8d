"""Decides who is admitted: reads requests, checks what they show, writes certificates. No sockets.

Nothing outlives what it rests on. A certificate ends with the admission of the node that signed it and with that of the
node whose invite was shown. It is renewed only by a node on which it rests already, and only as long as the inviter is
a member: so nobody new comes into a chain, and a revocation reaches everybody whom it should.
"""

from collections.abc import Callable

import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.approvals import ApprovalBook, Asker
from mesh_llm.net.admission.credentials import Standing
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.net.admission.revocations import RevocationList
from mesh_llm.wire.codec import Verify, encode, key_of
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
)
from mesh_llm.wire.mesh.certificates import (
    Certificate,
    check_certificate,
    check_chain,
    decode_certificate,
    issue_certificate,
    rests_on,
)
from mesh_llm.wire.mesh.frames import OLDEST_PROTOCOL, PROTOCOL
from mesh_llm.wire.mesh.invites import Invite, check_invite, decode_invite, invite_rests_on

MEMBER_LIFETIME = 90 * 86400
CLIENT_LIFETIME = 7 * 86400
_WORTH_RENEWING = 86400
"""A renewal must gain so many seconds: else every reconnection would write a certificate."""

KnownCertificate = Callable[[NodeId], Certificate | None]

_log = structlog.get_logger(__name__)


def lifetime_of(scope: Scope) -> int:
    """Seconds for which a certificate is written."""
    return CLIENT_LIFETIME if scope is Scope.CLIENT else MEMBER_LIFETIME


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
        known: KnownCertificate = lambda _: None,
    ) -> None:
        """`approvals`: who asks without an invite is kept there for the user; None: is refused.

        `known`: the certificate by which a node was last heard of; it may have expired or been revoked since.
        """
        self._standing = standing
        self._invites = invites
        self._revocations = revocations
        self._verify = verify
        self._clock = clock
        self._session = session
        self._version = version
        self._approvals = approvals
        self._known = known

    def request(self, invites: tuple[bytes, ...] = ()) -> AdmitRequest:
        """What this node says when it dials."""
        shown = self._standing.encoded or self._standing.outdated
        return AdmitRequest(OLDEST_PROTOCOL, PROTOCOL, self._version, self._session, shown, invites)

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
        if own is None or self.recheck(own) is not None:
            return self._no(Refusal(Reason.BUSY, Subject.NODE, "it is not admitted itself"))
        shown = self._by_certificate(request.certificate, node, own) if request.certificate else None
        held = shown if isinstance(shown, Certificate) else None
        granted = self._by_invites(request.invites, node, held, own)
        if isinstance(granted, Certificate):
            _log.info("admitted", node=node[:10], scope=granted.scope.word)
            return self._yes(protocol, granted), granted
        if held is not None:
            renewed = self._renewed(held, own)
            if renewed is None and encode(held) != request.certificate:
                # It showed one of the older form, and has a new one for it.
                renewed = held
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

    def fresh(self, certificate: Certificate) -> Certificate | None:
        """The certificate by which its node is in now: this one, or a newer one that was heard of; None: it is out."""
        for candidate in (certificate, self._known(certificate.node)):
            if candidate is not None and self.recheck(candidate) is None:
                return candidate
        return None

    def _by_certificate(self, data: bytes, node: NodeId, own: Certificate) -> Certificate | Refusal:
        certificate = decode_certificate(data)
        if isinstance(certificate, Refusal):
            return certificate
        refusal = self.check(certificate, node)
        if refusal is not None and refusal.reason is Reason.OTHER_VERSION:
            return self._reissued(certificate, own) or refusal
        return refusal or certificate

    def _reissued(self, old: Certificate, own: Certificate) -> Certificate | None:
        """A certificate of the present form for one of the older form, where this node itself issued the invite.

        No other node can tell whose invite it was. What the old chain rests on counts for the new one too.
        """
        link = old.links[-1]
        if self._revocations.covers(old.links) or not self._invites.issued(link.invite):
            return None
        if check_chain(old.mesh, old.links, self._verify, Subject.CERTIFICATE, outdated=True) is not None:
            return None
        rests = rests_on(old.links) - {link.node}
        outcome = self._grant(own, old.node, link.scope, link.invite, inviter=self._me, rests=rests)
        return outcome if isinstance(outcome, Certificate) else None

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
        if held is not None and not self._may_gain(invite, held):
            return None
        refusal = check_invite(
            invite, now=self._clock(), verify=self._verify, revoked=self._revocations, mesh=self._standing.mesh
        )
        if refusal is not None:
            return refusal
        made = self._by_good_invite(invite, key_of(node), own)
        if isinstance(made, Refusal) or (held is not None and not _gains(made, held)):
            return made if isinstance(made, Refusal) else None
        return self._invites.redeem(invite, node) or made

    def _may_gain(self, invite: Invite, held: Certificate) -> bool:
        """Whether an invite could give more than what is held: a wider scope, or another inviter when time runs out."""
        if invite.terms.scope != held.scope:
            return invite.terms.scope > held.scope
        return self._due(held) and invite.id not in rests_on(held.links)

    def _by_good_invite(self, invite: Invite, node: bytes, own: Certificate) -> Certificate | Refusal:
        """The certificate that an invite gives which holds, or why this node does not write it."""
        inviter, rests = invite.terms.contacts[0].node, invite_rests_on(invite)
        if node == inviter or node in rests:
            return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, "it comes from the node itself, or from one it invited")
        until = invite.chain[-1].expires if invite.chain else None
        if inviter == self._me:
            # Its own chain may be a newer one than that in the invite.
            rests, until = frozenset[bytes](), None
        own_rests = rests_on(own.links)
        if invite.terms.scope > own.scope or node in own_rests:
            # Not the joiner's fault: its issuer can. Counted as no use of the invite.
            return Refusal(Reason.NOT_ISSUER, Subject.INVITE, f"this node has scope {own.scope.word}")
        made = self._grant(own, NodeId(node.hex()), invite.terms.scope, invite.id, inviter, rests, until)
        if isinstance(made, Refusal):
            return Refusal(Reason.NOT_ISSUER, Subject.INVITE, made.detail)
        if self._revocations.covers(made.links):
            return Refusal(Reason.REVOKED, Subject.CERTIFICATE, "this node was revoked, not only its invite")
        return made

    def _grant(
        self,
        own: Certificate,
        node: NodeId,
        scope: Scope,
        invite: bytes,
        inviter: bytes,
        rests: frozenset[bytes],
        until: int | None = None,
    ) -> Certificate | Refusal:
        """Write a certificate; `until`: UNIX seconds at which the inviter's admission ends, where that is another's."""
        expires = int(self._clock()) + lifetime_of(scope)
        if until is not None:
            expires = min(expires, until)
        sign = self._standing.key.sign
        return issue_certificate(own, key_of(node), scope, expires, invite, sign, inviter=inviter, rests=rests)

    def _due(self, certificate: Certificate) -> bool:
        """Whether half of its life is over."""
        return certificate.expires - self._clock() <= lifetime_of(certificate.scope) / 2

    def _renewed(self, held: Certificate, own: Certificate) -> Certificate | None:
        """A certificate that lasts longer, where the one held is past half its life and this node may give one.

        It may where the one held rests on it already, and as long as the inviter itself is known to be a member.
        """
        link, rests = held.links[-1], rests_on(held.links)
        if not self._due(held) or held.scope > own.scope or link.inviter is None or self._me not in rests:
            return None
        until: int | None = None
        if link.inviter != self._me:
            known = self._known(NodeId(link.inviter.hex()))
            if known is None or self.recheck(known) is not None:
                return None
            until = known.expires
        fresh = self._grant(own, held.node, held.scope, link.invite, link.inviter, rests - {link.node}, until)
        if isinstance(fresh, Refusal) or not _gains(fresh, held) or self._revocations.covers(fresh.links):
            return None
        return fresh

    @property
    def _me(self) -> bytes:
        return self._standing.key.public

    def _by_asking(self, ask: ApprovalRequest, asker: Asker) -> Refused | Approved:
        if self._approvals is None or self._revocations.names(key_of(asker.node)):
            return self._no(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
        outcome = self._approvals.ask(ask, asker)
        return self._no(outcome) if isinstance(outcome, Refusal) else Approved(outcome, self._version)

    def _yes(self, protocol: int, granted: Certificate | None) -> Admitted:
        encoded = encode(granted) if granted else b""
        return Admitted(protocol, self._version, self._session, self._standing.encoded, encoded)

    def _no(self, refusal: Refusal) -> Refused:
        return Refused(refusal, self._version)


def _gains(fresh: Certificate, held: Certificate) -> bool:
    """Whether a certificate gives so much more than the one held that it is worth writing."""
    return fresh.scope > held.scope or fresh.expires >= held.expires + _WORTH_RENEWING
