"""HTTP/1.1 as bytes (RFC 9112): hosts and origins, heads, and a parser for one request and for one response.

Framing headers (the body's length, whether the connection goes on) are written here, never taken from a caller. So a
message cannot state two lengths, and a value with a line break cannot become a header. The parsers are strict about
framing, and bound what they keep. They use llhttp (httptools).
"""

import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from ipaddress import ip_address
from typing import Generic, TypeAlias, TypeVar

import httptools
import msgspec

_HOST_AND_PORT = re.compile(
    r"(?i)(?P<host>\[[0-9a-f:.]{2,45}\]|[0-9a-z_](?:[0-9a-z_.-]{0,251}[0-9a-z_])?)(?::(?P<port>\d{1,5}))?"
)
_PROGRAM_ORIGIN = re.compile(r"(?i)[a-z][a-z0-9+.-]{0,31}://[0-9a-z_](?:[0-9a-z_.-]{0,251}[0-9a-z_])?")
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def split_authority(text: str) -> tuple[str, int | None] | None:
    """Host (lower-case; IPv6 with its brackets) and port of `host[:port]`; None if the text is not exactly that.

    RFC 9110, section 7.2: `Host = uri-host [ ":" port ]`. A lenient reader would take `localhost:80@evil.example` or
    `[::1]evil.example` for this machine.
    """
    found = _HOST_AND_PORT.fullmatch(text) if text.isascii() else None
    if found is None:
        return None
    port = int(found["port"]) if found["port"] is not None else None
    return None if port is not None and port > 65535 else (found["host"].lower(), port)


def host_of(text: str) -> str:
    """The host of `host[:port]`, lower-case; empty if the text is not exactly that."""
    found = split_authority(text)
    return found[0] if found is not None else ""


def split_origin(text: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an origin such as `https://host:8443`; None if it is not an origin of HTTP."""
    scheme, separator, authority = text.partition("://")
    found = split_authority(authority) if separator else None
    default = _DEFAULT_PORTS.get(scheme.lower())
    if found is None or default is None:
        return None
    return scheme.lower(), found[0], default if found[1] is None else found[1]


def canonical_origin(text: str) -> str | None:
    """An origin in the one form in which equal ones are equal; None if the text is none.

    Pages have `https://host:8443`, and programs made of pages an origin of their own: `app://obsidian.md`,
    `chrome-extension://ID`. `null`, which files and sandboxed frames of any page send, is no origin.
    """
    found = split_origin(text)
    if found is not None:
        scheme, host, port = found
        return f"{scheme}://{host}" + ("" if port == _DEFAULT_PORTS[scheme] else f":{port}")
    if _PROGRAM_ORIGIN.fullmatch(text) is None or text.partition("://")[0].lower() in _DEFAULT_PORTS:
        return None
    return text.lower()


def names_host(authority: str, allowed: Iterable[str]) -> bool:
    """Whether a Host header names one of these hosts: each with its port, or at any port where it has none."""
    given = split_authority(authority)
    return given is not None and any(
        found is not None and found[0] == given[0] and found[1] in {None, given[1]}
        for found in map(split_authority, allowed)
    )


def is_loopback_name(host: str) -> bool:
    """Whether a host, as `host_of` returns it, is a loopback name."""
    return host in _LOOPBACK_NAMES


def is_own_name(authority: str, bound: str) -> bool:
    """Whether a Host header contains a loopback name, or the address `bound` (without brackets)."""
    host = host_of(authority)
    return is_loopback_name(host) or (bool(host) and host.strip("[]") == bound.lower())


def unbracketed(address: str) -> str:
    """An address without the brackets that URLs put around IPv6."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def is_loopback_address(address: str) -> bool:
    """Whether an address without brackets is reached from this machine only."""
    try:
        return address == "localhost" or ip_address(address).is_loopback
    except ValueError:
        return False


Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""Name and value pairs in order; names lower-case."""


class Http1Error(Exception):
    """A message breaks HTTP/1.1 or a bound. `args[0]` says how, for a log or an error body."""


class Http1Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one message's head, and of its trailer.

    Attributes:
        head_bytes: bytes of names, values and the first line.
        headers: header lines.
        target_bytes: bytes of a request's target.
        interim: 1xx responses before the final one.
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
    """The first value of a header (name in lower case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that a proxy forwards: without hop-by-hop headers and those that `Connection` names."""
    headers = tuple(headers)
    named = {
        token.strip().lower() for key, value in headers if key == b"connection" for token in value.split(b",")
    } | _HOP_BY_HOP
    return [(key, value) for key, value in headers if key not in named]


def request_bytes(
    method: str, target: str, authority: str, headers: Iterable[tuple[bytes, bytes]], body_length: int
) -> bytes:
    """A request's head, with `Host: authority` and the body's length (none for a GET without a body).

    Raises:
        Http1Error: a part is ambiguous (line breaks, framing headers, unexpected characters).
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
    """The head of a response that ends its connection; `body_length` None: chunked.

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


def hint_bytes(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """An interim response before the final one, with headers that cannot wait (RFC 8297). Raises Http1Error."""
    return _finish([b"HTTP/1.1 103 Early Hints\r\n"], headers)


def chunk(data: bytes) -> bytes:
    """A piece of a chunked body. Empty data gives b"", because an empty chunk would end the body."""
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
    """The part that both parsers share: feeds llhttp, bounds what it keeps, and turns its callbacks into events.

    llhttp itself refuses folded headers, spaces before a colon, bare line feeds, odd Content-Length values, two of
    them, and one together with Transfer-Encoding. This class refuses other transfer codings, versions and upgrades.
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
        """Bytes came after the message's end: the connection must not be used again."""

    @property
    def complete(self) -> bool:
        """The whole message has been read."""
        return self._complete

    def feed(self, data: bytes) -> list[Head | bytes | End]:
        """Parse the next bytes; return the head once it is complete, pieces of the body, and END at the end.

        Raises:
            Http1Error: the message is malformed, exceeds a bound, or is ambiguous.
        """
        if self._failed is not None:
            raise Http1Error(self._failed)
        if self._complete:
            self.surplus = self.surplus or bool(data)
            return []
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("upgrades are not supported")
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
        """llhttp: a header line, or a trailer line. Trailers count for the bounds and are dropped."""
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
        """End the head; return its headers, whether the body is chunked, and the stated length, if any."""
        if version not in ("1.1", "1.0"):
            raise Http1Error(f"HTTP/{version} is not supported")
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
        """llhttp: the head is complete."""
        if self._request_parser.should_upgrade():
            raise Http1Error("upgrades are not supported")
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
    """Reads one response to a GET or POST. Skips interim (1xx) responses; refuses to switch protocols."""

    def __init__(self, limits: Http1Limits = _DEFAULT_LIMITS, hinted: Callable[[Headers], None] | None = None) -> None:
        """`hinted`: gets the headers of each interim response."""
        super().__init__(limits)
        self._hinted = hinted
        self._response_parser = self._parser = httptools.HttpResponseParser(self)
        self._interim = 0
        self._skipping = False
        self._until_close = False
        self._keep_alive = False

    @property
    def keep_alive(self) -> bool:
        """Whether the connection may carry another request."""
        return self._complete and self._keep_alive and not self.surplus

    def eof(self) -> list[ResponseHead | bytes | End]:
        """The connection ended cleanly. END if the body ends with the connection.

        Raises:
            Http1Error: the response is incomplete.
        """
        if self._complete:
            return []
        if not self._until_close:
            raise Http1Error("the connection ended within a response")
        self._complete = True
        return [END]

    def on_status(self, status: bytes) -> None:
        """llhttp: the reason phrase. It counts for the bound and is dropped."""
        self._count(len(status))

    def on_headers_complete(self) -> None:
        """llhttp: the head is complete."""
        status = self._response_parser.get_status_code()
        if status < 200:
            if status == 101 or status < 100:
                raise Http1Error(f"status {status} is not accepted")
            self._interim += 1
            if self._interim > self._limits.interim:
                raise Http1Error("too many interim responses")
            if self._hinted is not None:
                self._hinted(tuple(self._headers))
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
