"""What request and response parsers share: bounded heads over llhttp (httptools), strict about framing."""

from typing import Generic, TypeVar

import httptools

from mesh_llm.wire.http1 import END, End, Headers, Http1Error, Http1Limits, RequestHead, ResponseHead

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
