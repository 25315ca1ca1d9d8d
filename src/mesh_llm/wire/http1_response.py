"""The client side: bytes of a response in, its head, body and end out."""

import httptools

from mesh_llm.wire.http1 import END, End, Http1Error, Http1Limits, ResponseHead
from mesh_llm.wire.http1_parser import MessageParser

_DEFAULT_LIMITS = Http1Limits()
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
