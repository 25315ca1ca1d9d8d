"""What two nodes say on an ADMIT stream: one request, one reply, each one frame; and why admission is refused.

Certificates and invites travel in it as bytes: see `certificates` and `invites`.
"""

from enum import IntEnum, StrEnum
from functools import partial
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.wire.codec import Malformed, decode
from mesh_llm.wire.mesh.frames import OLDEST_PROTOCOL, PROTOCOL

T = TypeVar("T")

MAX_CERTIFICATE_BYTES = 2048
MAX_INVITE_BYTES = 4096
MAX_DETAIL = 200
MAX_INVITES = 4
MAX_ASKER_NAME = 64
SESSION_BYTES = 8

Version = Annotated[str, msgspec.Meta(max_length=64)]
Session = Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
CertificateBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]


class Scope(IntEnum):
    """What a node may do. Each scope includes the ones before it."""

    CLIENT = 1
    """Send requests to models."""
    SERVE = 2
    """Also answer requests, gossip, and invite."""
    SPLIT = 3
    """Also take part in split models: lend and use RPC."""

    @classmethod
    def parse(cls, word: str) -> "Scope":
        """Read `client`, `serve` or `split`. Raises ValueError."""
        try:
            return cls[word.upper()]
        except KeyError:
            raise ValueError(f"unknown scope {word!r}: client, serve or split") from None

    @property
    def word(self) -> str:
        """As people write it."""
        return self.name.lower()


class Reason(StrEnum):
    """The causes. Their values are part of the protocol."""

    MALFORMED = "malformed"
    EXPIRED = "expired"
    REVOKED = "revoked"
    OTHER_MESH = "other_mesh"
    OTHER_VERSION = "other_version"
    USES_EXHAUSTED = "uses_exhausted"
    WRONG_SCOPE = "wrong_scope"
    NOT_ISSUER = "not_issuer"
    FORGED = "forged"
    NOTHING_SHOWN = "nothing_shown"
    BUSY = "busy"
    PENDING = "pending"
    DENIED = "denied"


class Subject(StrEnum):
    """What was refused."""

    INVITE = "invite"
    CERTIFICATE = "certificate"
    REVOCATION = "revocation"
    NODE = "node"
    REQUEST = "request"
    """A request to join without an invite."""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """Why a node, an invite or a certificate is not accepted. `detail` is for people, such as a date."""

    reason: Reason
    subject: Subject = Subject.INVITE
    detail: Annotated[str, msgspec.Meta(max_length=MAX_DETAIL)] = ""

    @property
    def permanent(self) -> bool:
        """Whether another try with the same means will fail too."""
        if self.reason is Reason.OTHER_VERSION and self.subject is Subject.CERTIFICATE:
            # Another node refuses it, but the node that invited can renew it.
            return False
        return self.reason not in {Reason.BUSY, Reason.NOT_ISSUER, Reason.NOTHING_SHOWN, Reason.PENDING}


class ApprovalRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request to the acceptor's user to admit a node without an invite: the machine's name, the wanted scope."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_ASKER_NAME)]
    scope: Scope


class AdmitRequest(msgspec.Struct, frozen=True, array_like=True):
    """The dialer asks for admission.

    Attributes:
        oldest: oldest protocol that the dialer speaks.
        newest: newest protocol that the dialer speaks.
        version: of the dialer's program, for people.
        session: random, one for each process: distinguishes a restart from a second connection.
        certificate: the dialer's certificate from an earlier admission, or empty.
        invites: the dialer's invites, best first.
        ask: asks a person, if nothing of the above is accepted.
    """

    oldest: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    newest: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    version: Version
    session: Session
    certificate: CertificateBytes = b""
    invites: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_INVITE_BYTES)], ...], msgspec.Meta(max_length=MAX_INVITES)
    ] = ()
    ask: ApprovalRequest | None = None


class Admitted(msgspec.Struct, frozen=True, array_like=True, tag="admitted"):
    """The dialer is admitted.

    Attributes:
        protocol: the version that both use from here on.
        version: of the acceptor's program.
        session: the acceptor's.
        certificate: the acceptor's own, which the dialer checks.
        granted: the dialer's new certificate; empty if the dialer keeps the one that it showed.
    """

    protocol: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    version: Version
    session: Session
    certificate: CertificateBytes
    granted: CertificateBytes = b""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The dialer is not admitted. `version` is that of the acceptor's program."""

    refusal: Refusal
    version: Version = ""


class Approved(msgspec.Struct, frozen=True, array_like=True, tag="approved"):
    """A person approved the request: `invite` admits the dialer only. `version` is that of the acceptor's program."""

    invite: Annotated[bytes, msgspec.Meta(max_length=MAX_INVITE_BYTES)]
    version: Version = ""


AdmitReply: TypeAlias = Admitted | Refused | Approved

decode_admit_request = partial(decode, msgspec.msgpack.Decoder(AdmitRequest))
decode_admit_reply = partial(decode, msgspec.msgpack.Decoder(Admitted | Refused | Approved))


def decode_or_refuse(decoder: msgspec.msgpack.Decoder[T], data: bytes, limit: int, subject: Subject) -> T | Refusal:
    """Decode an invite, certificate or revocation of at most `limit` bytes; nothing is verified yet."""
    value = decode(decoder, data) if len(data) <= limit else Malformed("too long")
    return Refusal(Reason.MALFORMED, subject, value.reason[:100]) if isinstance(value, Malformed) else value


def common_protocol(request: AdmitRequest) -> int | None:
    """The newest protocol that both nodes speak; None if there is none."""
    newest = min(request.newest, PROTOCOL)
    return newest if newest >= max(request.oldest, OLDEST_PROTOCOL) else None


_NEW_INVITE = "Ask for a new one: `mesh-llm invite create` on a node of the mesh."
_NEW_CERTIFICATE = "Join again with a new invite: `mesh-llm --join TOKEN`."

_TEXTS: dict[tuple[Subject, Reason], tuple[str, str]] = {
    (Subject.INVITE, Reason.MALFORMED): (
        "The invite is malformed",
        "Copy the whole token again, from `mesh2` to its last character: a part is missing or mistyped.",
    ),
    (Subject.INVITE, Reason.EXPIRED): ("The invite has expired", _NEW_INVITE),
    (Subject.INVITE, Reason.REVOKED): ("The invite was revoked", _NEW_INVITE),
    (Subject.INVITE, Reason.OTHER_MESH): (
        "The invite is for another mesh",
        "The mesh of that invite may be gone: type `mesh-llm status` on the other machine, and join with its token.",
    ),
    (Subject.INVITE, Reason.OTHER_VERSION): (
        "The invite was made by another version of mesh-llm",
        "Bring both nodes to the same version of mesh-llm, then make a new invite.",
    ),
    (Subject.INVITE, Reason.USES_EXHAUSTED): ("The invite was already used as often as it may be", _NEW_INVITE),
    (Subject.INVITE, Reason.WRONG_SCOPE): (
        "The invite gives more than its issuer may give",
        "Ask for one from a node with a wider scope.",
    ),
    (Subject.INVITE, Reason.NOT_ISSUER): (
        "The invite is limited in uses: only the node that made it can accept it",
        "Start that node, or ask for an invite without a limit of uses.",
    ),
    (Subject.INVITE, Reason.FORGED): ("The invite is not signed by its mesh", _NEW_INVITE),
    (Subject.CERTIFICATE, Reason.MALFORMED): ("The certificate is malformed", _NEW_CERTIFICATE),
    (Subject.CERTIFICATE, Reason.EXPIRED): ("This node's admission has expired", _NEW_CERTIFICATE),
    (Subject.CERTIFICATE, Reason.REVOKED): ("This node's admission was revoked", _NEW_CERTIFICATE),
    (Subject.CERTIFICATE, Reason.OTHER_MESH): ("The node belongs to another mesh", _NEW_CERTIFICATE),
    (Subject.CERTIFICATE, Reason.OTHER_VERSION): (
        "This node was admitted by an older version of mesh-llm, which did not write down whose invite it came by",
        "Start the node that invited this one, it renews the admission; or join again: `mesh-llm --join TOKEN`.",
    ),
    (Subject.CERTIFICATE, Reason.WRONG_SCOPE): (
        "This node was not admitted for that",
        "Join again with an invite of a wider scope: `mesh-llm invite create --scope serve|split`.",
    ),
    (Subject.CERTIFICATE, Reason.FORGED): ("The certificate is not signed by its mesh", _NEW_CERTIFICATE),
    (Subject.NODE, Reason.OTHER_VERSION): (
        "The other node runs a version of mesh-llm that this one cannot speak with",
        "Bring both nodes to the same version.",
    ),
    (Subject.NODE, Reason.OTHER_MESH): ("The node belongs to another mesh", "Use an invite of that mesh."),
    (Subject.NODE, Reason.NOTHING_SHOWN): ("The mesh admits only invited nodes", "Join with `mesh-llm --join TOKEN`."),
    (Subject.NODE, Reason.BUSY): ("The node accepts no more connections for now", "It will be tried again."),
    (Subject.REQUEST, Reason.PENDING): (
        "Nobody has answered the request to join yet",
        "Allow it on the machine that was asked: `mesh-llm approve`.",
    ),
    (Subject.REQUEST, Reason.DENIED): (
        "The request to join was denied",
        "Ask the owner of that mesh for an invite: `mesh-llm invite create` there, `mesh-llm --join TOKEN` here.",
    ),
    (Subject.REQUEST, Reason.EXPIRED): (
        "Nobody answered the request to join in time",
        "Ask again, and allow it on the machine that is asked: `mesh-llm approve`.",
    ),
    (Subject.REQUEST, Reason.BUSY): (
        "Too many requests to join wait for an answer there",
        "Answer them on that machine: `mesh-llm approve`; or join with an invite.",
    ),
    (Subject.NODE, Reason.MALFORMED): (
        "The node does not speak this protocol",
        "Bring both nodes to the same version.",
    ),
}


def refusal_error(refusal: Refusal) -> MeshError:
    """The error for the user. Its code is `SUBJECT_REASON`, as in `invite_expired`."""
    text, hint = _TEXTS.get((refusal.subject, refusal.reason), (f"The {refusal.subject} was refused", _NEW_INVITE))
    detail = f" ({refusal.detail})" if refusal.detail else ""
    return MeshError(code=f"{refusal.subject}_{refusal.reason}", message=f"{text}{detail}.", hint=hint, status=403)
