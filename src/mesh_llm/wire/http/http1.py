"""HTTP/1.1 heads as bytes (RFC 9112): what may be said, and how it is written. The parsers are its neighbours.

Framing headers (how long a body is, whether the connection goes on) are written here only, never taken from a caller:
so a message cannot say two different things about its own length, and a value with a line break cannot become a header.

What request and response parsers share: bounded heads over llhttp (httptools), strict about framing.

The server side, for a stream that carries one request: its bytes in, its head, body and end out.

The client side: bytes of a response in, its head, body and end out.
"""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Generic, TypeAlias, TypeVar

import httptools
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


Head = TypeVar("Head", RequestHead, ResponseHead)


class MessageParser(Generic[Head]):
    """Base of the two parsers: feeds llhttp, bounds what it may keep, and turns callbacks into events.

    llhttp itself refuses folded headers, spaces before a colon, bare line feeds, odd Content-Length values, two of
    them, and one together with Transfer-Encoding. Other transfer codings, versions and upgrades are refused here.
    """

    def __init__(self, limits: Http1Limits) -> None:
        self._limits = limits
        self._parser: httptools.HttpRequestParser | httptools.HttpResponseParser
        self._events: list[Head | bytes | End] = []
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._pending = 0
        self._complete = False
        self._failed: str | None = None
        self.surplus = False
        """Bytes came after the message's end: the connection is not to be used again."""

    @property
    def complete(self) -> bool:
        """The whole message has been read."""
        return self._complete

    def feed(self, data: bytes) -> list[Head | bytes | End]:
        """Take the next bytes; return the head once it is whole, pieces of the body, END once it is.

        Raises:
            Http1Error: the message is malformed, over a bound, or could be read in two ways.
        """
        if self._failed is not None:
            raise Http1Error(self._failed)
        if self._complete:
            self.surplus = self.surplus or bool(data)
            return []
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("upgrades are not spoken here")
        except httptools.HttpParserError as error:
            if self._complete:
                self.surplus = True
            else:
                cause = error.__context__
                self._fail(str(cause) if isinstance(cause, Http1Error) else f"malformed: {error}")
        if not self._events:
            self._pending += len(data)
            if self._pending > self._limits.head_bytes:
                self._fail("the head or trailer is too large")
            return []
        self._pending = 0
        events, self._events = self._events, []
        return events

    def _fail(self, reason: str) -> None:
        self._failed = reason
        raise Http1Error(reason) from None

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp: a header line, or a trailer line, which is counted and dropped."""
        self._count(len(name) + len(value))
        if len(self._headers) >= self._limits.headers:
            raise Http1Error("too many header lines")
        self._headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        """llhttp: a piece of the body."""
        self._events.append(body)

    def on_message_complete(self) -> None:
        """llhttp: the end."""
        self._complete = True
        self._events.append(END)

    def on_message_begin(self) -> None:
        """llhttp: a message begins; only one is read."""
        if self._complete:
            raise Http1Error("a second message")

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            raise Http1Error("the head is too large")

    def _framing(self, version: str) -> tuple[Headers, bool, int | None]:
        """Close the head; return its headers, whether the body is chunked, and its length where it is given."""
        if version not in ("1.1", "1.0"):
            raise Http1Error(f"HTTP/{version} is not spoken here")
        headers, self._headers = tuple(self._headers), []
        codings = [value for name, value in headers if name == b"transfer-encoding"]
        lengths = [value for name, value in headers if name == b"content-length"]
        if codings and (lengths or version == "1.0" or len(codings) > 1 or codings[0].strip().lower() != b"chunked"):
            raise Http1Error("the body's length is said in a way that is not accepted")
        return headers, bool(codings), int(lengths[0]) if lengths else None


_DEFAULT_LIMITS = Http1Limits()


class RequestParser(MessageParser[RequestHead]):
    """Reads one HTTP/1.1 request in origin form."""

    def __init__(self, limits: Http1Limits = _DEFAULT_LIMITS) -> None:
        super().__init__(limits)
        self._request_parser = self._parser = httptools.HttpRequestParser(self)
        self._target = b""

    def on_url(self, url: bytes) -> None:
        """llhttp: a piece of the target."""
        self._target += url
        self._count(len(url))
        if len(self._target) > self._limits.target_bytes:
            raise Http1Error("the request target is too long")

    def on_headers_complete(self) -> None:
        """llhttp: the head is whole."""
        if self._request_parser.should_upgrade():
            raise Http1Error("upgrades are not spoken here")
        headers, chunked, length = self._framing(self._request_parser.get_http_version())
        if not self._target.startswith(b"/") or not self._target.isascii():
            raise Http1Error("the request target is not a path")
        method = self._request_parser.get_method().decode("ascii")
        self._events.append(
            RequestHead(
                method=method,
                target=self._target.decode("ascii"),
                headers=headers,
                length=None if chunked else length or 0,
            )
        )


_BODILESS = frozenset((204, 304))


class ResponseParser(MessageParser[ResponseHead]):
    """Reads one response to a GET or POST. Interim (1xx) ones are skipped; switching protocols is refused."""

    def __init__(self, limits: Http1Limits = _DEFAULT_LIMITS) -> None:
        super().__init__(limits)
        self._response_parser = self._parser = httptools.HttpResponseParser(self)
        self._interim = 0
        self._skipping = False
        self._until_close = False
        self._keep_alive = False

    @property
    def keep_alive(self) -> bool:
        """The connection may carry another request: the response is whole, and said nothing to the contrary."""
        return self._complete and self._keep_alive and not self.surplus

    def eof(self) -> list[ResponseHead | bytes | End]:
        """The connection ended cleanly. END where that is how the body ends.

        Raises:
            Http1Error: the response is not whole.
        """
        if self._complete:
            return []
        if not self._until_close:
            raise Http1Error("the connection ended within a response")
        self._complete = True
        return [END]

    def on_status(self, status: bytes) -> None:
        """llhttp: the reason phrase; it counts for the bound, and is dropped."""
        self._count(len(status))

    def on_headers_complete(self) -> None:
        """llhttp: the head is whole."""
        status = self._response_parser.get_status_code()
        if status < 200:
            if status == 101 or status < 100:
                raise Http1Error(f"status {status} is not accepted")
            self._interim += 1
            if self._interim > self._limits.interim:
                raise Http1Error("too many interim responses")
            self._headers.clear()
            self._skipping = True
            return
        headers, chunked, length = self._framing(self._response_parser.get_http_version())
        bodiless = status in _BODILESS
        self._until_close = not chunked and length is None and not bodiless
        self._keep_alive = not self._until_close and self._response_parser.should_keep_alive()
        self._events.append(ResponseHead(status=status, headers=headers, length=0 if bodiless else length))

    def on_message_complete(self) -> None:
        """llhttp: the end of this response, or of an interim one."""
        if self._skipping:
            self._skipping = False
            return
        super().on_message_complete()
