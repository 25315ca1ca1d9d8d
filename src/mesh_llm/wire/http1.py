"""HTTP/1.1 heads as bytes (RFC 9112): what may be said, and how it is written. The parsers are its neighbours.

Framing headers (how long a body is, whether the connection goes on) are written here only, never taken from a caller:
so a message cannot say two different things about its own length, and a value with a line break cannot become a header.
"""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import TypeAlias

import msgspec

Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""Name and value pairs in order; names lower-case."""


class Http1Error(Exception):
    """A message that breaks HTTP/1.1 or our bounds. `args[0]` says how, in words fit for a log or an error body."""


class Http1Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one message's head, and of its trailer.

    Attributes:
        head_bytes: names, values and the first line together, in bytes.
        headers: number of header lines.
        target_bytes: length of a request's target.
        interim: 1xx responses before the real one.
    """

    head_bytes: int = 64 * 1024
    headers: int = 128
    target_bytes: int = 8 * 1024
    interim: int = 8


class RequestHead(msgspec.Struct, frozen=True, kw_only=True):
    """First line and headers of a request. `target` is in origin form (`/path?query`)."""

    method: str
    target: str
    headers: Headers = ()
    length: int | None = 0
    """Bytes of body that follow; None: chunked."""


class ResponseHead(msgspec.Struct, frozen=True, kw_only=True):
    """Status line and headers of a response. `length` None: chunked, or up to the end of the connection."""

    status: int
    headers: Headers = ()
    length: int | None = 0


class End(msgspec.Struct, frozen=True):
    """The message is complete."""


END = End()

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_METHOD = re.compile(r"[A-Z]+")
_TARGET = re.compile(r"/[\x21-\x7e]*")
_AUTHORITY = re.compile(r"[0-9A-Za-z.:\[\]_-]+")

_FRAMING = frozenset(
    (
        b"connection",
        b"content-length",
        b"host",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_HOP_BY_HOP = _FRAMING - {b"host", b"content-length"} | {b"proxy-authenticate", b"proxy-authorization"}
_REASONS = {status.value: status.phrase for status in HTTPStatus}


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the first value of a header (its name lower-case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers that may pass a proxy: without hop-by-hop ones and those that `Connection` names."""
    headers = tuple(headers)
    named = {
        token.strip().lower() for key, value in headers if key == b"connection" for token in value.split(b",")
    } | _HOP_BY_HOP
    return [(key, value) for key, value in headers if key not in named]


def request_bytes(
    method: str, target: str, authority: str, headers: Iterable[tuple[bytes, bytes]], body_length: int
) -> bytes:
    """Write a request's head with `Host: authority` and, unless it is a GET without one, its body's length.

    Raises:
        Http1Error: where a part could be read as something else (line breaks, framing headers, odd characters).
    """
    if not _METHOD.fullmatch(method):
        raise Http1Error("a method is made of capital letters")
    if not _TARGET.fullmatch(target):
        raise Http1Error("a request target begins with / and holds visible ASCII only")
    if not _AUTHORITY.fullmatch(authority):
        raise Http1Error("a host is a name or an address")
    lines = [f"{method} {target} HTTP/1.1\r\nhost: {authority}\r\n".encode("ascii")]
    if body_length or method != "GET":
        lines.append(b"content-length: %d\r\n" % body_length)
    return _finish(lines, headers)


def response_bytes(status: int, headers: Iterable[tuple[bytes, bytes]], body_length: int | None) -> bytes:
    """Write a response's head for one that ends its connection; `body_length` None: chunked.

    Raises:
        Http1Error: as `request_bytes`.
    """
    if not 200 <= status <= 599:
        raise Http1Error("a final status is a number from 200 to 599")
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\nconnection: close\r\n".encode("ascii")]
    if body_length is None:
        lines.append(b"transfer-encoding: chunked\r\n")
    elif status not in (204, 304):
        lines.append(b"content-length: %d\r\n" % body_length)
    return _finish(lines, headers)


def chunk(data: bytes) -> bytes:
    """Frame a piece of a chunked body. Empty data gives b"": an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


LAST_CHUNK = b"0\r\n\r\n"


def _finish(lines: list[bytes], headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if not _TOKEN.fullmatch(name):
            raise Http1Error("a header's name is a token")
        if name.lower() in _FRAMING:
            raise Http1Error("framing headers are not a caller's to set")
        if not _VALUE.fullmatch(value):
            raise Http1Error("a header's value has no control characters")
        lines.append(b"%b: %b\r\n" % (name, value))
    lines.append(b"\r\n")
    return b"".join(lines)
