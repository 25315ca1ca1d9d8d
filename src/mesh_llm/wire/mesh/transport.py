"""How two nodes move a stream from QUIC to TLS over TCP, and how streams follow each other there. Sans-IO and bounded.

TRANSPORT: over the authenticated QUIC connection, each frame of the asker is a `TransportRequest`, and gets one
`TransportOffer`. An offer names the TCP ports, the digest of the certificate, and tickets. A ticket is used once, by
the peer that it was made for, within `TICKET_SECONDS`. A connection is named by the SHA-256 of its ticket: the asker
can have those closed that say nothing.

On the TLS connection the asker first sends a ticket, and nothing else before the other side has answered `ADMITTED`.
From then on the connection carries one stream at a time, in both directions, in pieces: the length as u32, big-endian,
then so many bytes. Two lengths have no bytes: `END` ends a direction cleanly, and `RESET` with a code in its last byte
ends it by an error. The next stream begins when both directions of the last one have ended. The bytes of a stream are
those that it would have on QUIC, its header included.
"""

import hashlib
from functools import partial
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from mesh_llm.core.types.announcement import MAX_TEXT, ONE_LINE
from mesh_llm.wire.codec import Malformed, decode

TICKET_BYTES = 32
TICKET_SECONDS = 30.0
MAX_TICKETS = 16
"""Most tickets of one offer."""
MAX_SILENT = 32
"""Most connections that one request names."""
DIGEST_BYTES = 32
MAX_TRANSPORT_FRAME = 2048

ADMITTED = b"\x01"
"""The answer to a ticket."""

MAX_PIECE = 1 << 20
LENGTH_BYTES = 4
_RESET = 0xFFFFFF00
END_PIECE = bytes(LENGTH_BYTES)

_Port: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=65535)]
_Ticket: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]
_Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class TransportRequest(msgspec.Struct, frozen=True, array_like=True):
    """Asks for tickets, or whether the peer answers on QUIC.

    Attributes:
        tickets: how many.
        silent: SHA-256 of the tickets of connections on which the peer said nothing: it closes them, and with them what
            it does for their streams, before it answers. Older versions ignore it.
    """

    tickets: Annotated[int, msgspec.Meta(ge=0, le=MAX_TICKETS)] = 1
    silent: Annotated[tuple[_Digest, ...], msgspec.Meta(max_length=MAX_SILENT)] = ()


class TransportOffer(msgspec.Struct, frozen=True, array_like=True):
    """Where and how to connect.

    Attributes:
        ports: TCP ports for IPv4 and IPv6; 0: none.
        certificate: SHA-256 of the certificate that the listener presents, in DER.
        tickets: at most as many as were asked for; fewer when too many are out.
        reason: why there is no port, as a clause; empty where there is one.
    """

    ports: tuple[_Port, _Port]
    certificate: _Digest
    tickets: Annotated[tuple[_Ticket, ...], msgspec.Meta(max_length=MAX_TICKETS)] = ()
    reason: Annotated[str, msgspec.Meta(max_length=MAX_TEXT, pattern=ONE_LINE)] = ""


def connection_name(ticket: bytes) -> bytes:
    """How both sides name the connection that a ticket opened, and how a ticket is found: its SHA-256."""
    return hashlib.sha256(ticket).digest()


decode_request = partial(decode, msgspec.msgpack.Decoder(TransportRequest))
decode_offer = partial(decode, msgspec.msgpack.Decoder(TransportOffer))


class Ending(NamedTuple):
    """The end of one direction of a stream; `code` None: a clean one."""

    code: int | None


def piece_head(length: int) -> bytes:
    """What precedes a piece of 1..MAX_PIECE bytes. Raises ValueError for another length."""
    if not 0 < length <= MAX_PIECE:
        raise ValueError(f"a piece of {length} bytes")
    return length.to_bytes(LENGTH_BYTES, "big")


def reset_piece(code: int) -> bytes:
    """What ends a direction by an error. Raises ValueError for a code outside 0..255."""
    if not 0 <= code <= 255:
        raise ValueError(f"the code {code}")
    return (_RESET | code).to_bytes(LENGTH_BYTES, "big")


class PieceParser:
    """Cuts received bytes into the bytes of streams and the ends of their directions. Keeps at most three bytes."""

    def __init__(self) -> None:
        self._head = b""
        self._missing = 0
        """Bytes of the present piece that have not come."""

    def feed(self, data: bytes | memoryview) -> list[bytes | Ending] | Malformed:
        """What these bytes bring, in order; no event is empty. Of a memoryview the events are copies."""
        events: list[bytes | Ending] = []
        at, size = 0, len(data)
        while at < size:
            if self._missing:
                end = min(size, at + self._missing)
                events.append(bytes(data[at:end]))
                self._missing -= end - at
                at = end
                continue
            end = min(size, at + LENGTH_BYTES - len(self._head))
            self._head += data[at:end]
            at = end
            if len(self._head) < LENGTH_BYTES:
                break
            length, self._head = int.from_bytes(self._head, "big"), b""
            if length == 0:
                events.append(Ending(None))
            elif length >= _RESET:
                events.append(Ending(length & 0xFF))
            elif length > MAX_PIECE:
                return Malformed(f"a piece of {length} bytes, at most {MAX_PIECE}")
            else:
                self._missing = length
        return events
