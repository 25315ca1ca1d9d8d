"""The server side, for a stream that carries one request: its bytes in, its head, body and end out."""

import httptools

from mesh_llm.wire.http1 import Http1Error, Http1Limits, RequestHead
from mesh_llm.wire.http1_parser import MessageParser

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
