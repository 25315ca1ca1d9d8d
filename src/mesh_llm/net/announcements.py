"""Announcements at the edge: this node's own are signed, others' are verified before the core sees them."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from mesh_llm.core.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.bounds import trimmed
from mesh_llm.core.ids import NodeId
from mesh_llm.net.registrar import Registrar
from mesh_llm.net.standing import Standing
from mesh_llm.wire.certificate import Certificate, Scope, decode_certificate
from mesh_llm.wire.refusal import Reason, Refusal, Subject
from mesh_llm.wire.signing import ANNOUNCEMENT, Verify, key_of, statement

EncodeAnnouncement = Callable[[Announcement], bytes]

_MAX_VERIFIED = 16384
_MAX_CERTIFICATES = 16384


class _Heard(NamedTuple):
    """A node's certificate, and the incarnation and sequence of the announcement that it came with."""

    certificate: Certificate
    said: tuple[int, int]


class AnnouncementGuard:
    """Signs and verifies. Keeps digests of what it verified: gossip brings the same thing many times."""

    def __init__(self, standing: Standing, registrar: Registrar, verify: Verify, encode: EncodeAnnouncement) -> None:
        self._standing = standing
        self._registrar = registrar
        self._verify = verify
        self._encode = encode
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self._certificates: OrderedDict[NodeId, _Heard] = OrderedDict()
        self._own: tuple[tuple[int, int, bytes], SignedAnnouncement] | None = None

    def seal(self, entry: SignedAnnouncement) -> SignedAnnouncement:
        """An entry as it travels: this node's own gets its certificate and signature, once per version of it."""
        announcement = entry.announcement
        if entry.payload or announcement.node != self._standing.key.node_id:
            return entry
        certificate = self._standing.encoded
        version = (announcement.incarnation, announcement.sequence, certificate)
        if self._own is not None and self._own[0] == version:
            return self._own[1]
        # Trimmed with the certificate in it: the core did not know how much room that takes.
        announcement = trimmed(msgspec.structs.replace(announcement, certificate=certificate))
        payload = self._encode(announcement)
        signature = self._standing.key.sign(statement(ANNOUNCEMENT, payload))
        sealed = SignedAnnouncement(announcement=announcement, payload=payload, signature=signature)
        self._own = (version, sealed)
        return sealed

    def check(self, entry: SignedAnnouncement) -> Refusal | None:
        """Whether a node of this mesh, admitted now, said this. None: it did."""
        announcement = entry.announcement
        if announcement.mesh != self._standing.mesh:
            return Refusal(Reason.OTHER_MESH, Subject.NODE)
        digest = hashlib.blake2b(entry.signature + entry.payload, digest_size=16).digest()
        if digest not in self._verified:
            try:
                key = key_of(announcement.node)
            except ValueError:
                return Refusal(Reason.MALFORMED, Subject.NODE, "not a node id")
            if not self._verify(key, statement(ANNOUNCEMENT, entry.payload), entry.signature):
                return Refusal(Reason.FORGED, Subject.NODE)
        certificate = self._certificate(announcement)
        if isinstance(certificate, Refusal):
            return certificate
        self._verified[digest] = None
        self._verified.move_to_end(digest)
        if len(self._verified) > _MAX_VERIFIED:
            self._verified.popitem(last=False)
        return None

    def certificate(self, node: NodeId) -> Certificate | None:
        """By which a node that was heard of was admitted."""
        heard = self._certificates.get(node)
        return heard.certificate if heard is not None else None

    def drop_ended(self) -> dict[NodeId, Refusal]:
        """The nodes heard of whose admission has ended since the last call, and why. They are forgotten here."""
        ended = {
            node: refusal
            for node, heard in self._certificates.items()
            if (refusal := self._registrar.recheck(heard.certificate)) is not None
        }
        for node in ended:
            del self._certificates[node]
        return ended

    def next_expiry(self) -> float | None:
        """When the next admission of a node heard of ends, UNIX seconds."""
        return min((heard.certificate.expires for heard in self._certificates.values()), default=None)

    def _certificate(self, announcement: Announcement) -> Certificate | Refusal:
        """The announcement's certificate, if it holds now. Chains are verified once; time and revocations each time."""
        node = announcement.node
        known = self._certificates.get(node)
        said = announcement.incarnation, announcement.sequence
        certificate = decode_certificate(announcement.certificate)
        if isinstance(certificate, Refusal):
            return certificate
        if known is not None and certificate == known.certificate:
            refusal = self._registrar.recheck(certificate)
        else:
            refusal = self._registrar.check(certificate, node, Scope.SERVE)
        if refusal is not None:
            return refusal
        if known is None or said >= known.said:
            # Anybody can say an old word again: when the certificate in it ends, its node is not out for that.
            self._certificates[node] = _Heard(certificate, said)
        self._certificates.move_to_end(node)
        if len(self._certificates) > _MAX_CERTIFICATES:
            self._certificates.popitem(last=False)
        return certificate


def is_lie(refusal: Refusal) -> bool:
    """Whether passing this on is the fault of who did: an honest node would have found it out. Clocks may differ."""
    return refusal.reason in {Reason.FORGED, Reason.MALFORMED, Reason.OTHER_MESH, Reason.WRONG_SCOPE}
