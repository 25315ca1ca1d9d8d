"""What is said on an ADMIT stream: one request, one reply, each one frame."""

from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.wire.mesh.certificates import MAX_CERTIFICATE_BYTES, Scope
from mesh_llm.wire.mesh.frames import OLDEST_PROTOCOL, PROTOCOL, Malformed, decoded
from mesh_llm.wire.mesh.invites import MAX_TEXT
from mesh_llm.wire.mesh.refusal import Refusal

MAX_INVITES = 4
MAX_ASKER_NAME = 64
SESSION_BYTES = 8

Version = Annotated[str, msgspec.Meta(max_length=64)]
Session = Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
CertificateBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """Whoever has no invite asks the acceptor's user: `name` of the machine, `scope` that it would like to have."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_ASKER_NAME)]
    scope: Scope


class AdmitRequest(msgspec.Struct, frozen=True, array_like=True):
    """Please let me in.

    Attributes:
        oldest: oldest protocol that the dialer speaks.
        newest: newest one.
        version: of its program, for people.
        session: random, one per life of the process: tells a restart from a second connection.
        certificate: what it was admitted by before, or empty.
        invites: what it was given, best first.
        ask: let a person decide, where nothing of the above is accepted.
    """

    oldest: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    newest: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    version: Version
    session: Session
    certificate: CertificateBytes = b""
    invites: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_TEXT)], ...], msgspec.Meta(max_length=MAX_INVITES)
    ] = ()
    ask: Ask | None = None


class Admitted(msgspec.Struct, frozen=True, array_like=True, tag="admitted"):
    """Come in.

    Attributes:
        protocol: the version spoken from here on.
        version: of the acceptor's program.
        session: the acceptor's.
        certificate: the acceptor's own: the dialer checks it too.
        granted: the dialer's new certificate; empty where the one that it showed is to be kept.
    """

    protocol: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    version: Version
    session: Session
    certificate: CertificateBytes
    granted: CertificateBytes = b""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """No, and why. `version` is the acceptor's program's."""

    refusal: Refusal
    version: Version = ""


class Approved(msgspec.Struct, frozen=True, array_like=True, tag="approved"):
    """A person said yes: an invite for the asker alone, to join with. `version` is the acceptor's program's."""

    invite: Annotated[bytes, msgspec.Meta(max_length=MAX_TEXT)]
    version: Version = ""


AdmitReply: TypeAlias = Admitted | Refused | Approved

_encode = msgspec.msgpack.Encoder().encode
_request_decoder = msgspec.msgpack.Decoder(AdmitRequest)
_reply_decoder = msgspec.msgpack.Decoder(Admitted | Refused | Approved)


def encode_request(request: AdmitRequest) -> bytes:
    """As it travels."""
    return _encode(request)


def decode_request(payload: bytes) -> AdmitRequest | Malformed:
    """Read a request."""
    return decoded(_request_decoder, payload)


def encode_reply(reply: AdmitReply) -> bytes:
    """As it travels."""
    return _encode(reply)


def decode_reply(payload: bytes) -> AdmitReply | Malformed:
    """Read a reply."""
    return decoded(_reply_decoder, payload)


def common_protocol(request: AdmitRequest) -> int | None:
    """The newest protocol that both speak, if there is one."""
    newest = min(request.newest, PROTOCOL)
    return newest if newest >= max(request.oldest, OLDEST_PROTOCOL) else None
