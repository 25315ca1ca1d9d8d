"""Replies that stand between a request to an engine and the client: they translate what comes, or keep it."""

from collections.abc import Callable

from mesh_llm.api.dialects.corrected import MAX_WHOLE
from mesh_llm.api.dialects.ollama.answers import NDJSON, AnswerTranslator, Sum, encode_lines
from mesh_llm.api.errors import MAX_ERROR_BYTES, Dialect, error_response, upstream_error
from mesh_llm.api.request import Reply
from mesh_llm.core.types.errors import MeshError
from mesh_llm.wire.http.http1 import Headers
from mesh_llm.wire.http.sse import SseError, SseParser

JSON = b"application/json; charset=utf-8"
_NOT_KEPT = frozenset((b"content-type", b"content-length"))


class _InnerReply:
    """A reply whose client is watched by another one's."""

    def __init__(self, outer: Reply) -> None:
        self._outer = outer
        self._status = 0
        self._headers: Headers = ()
        self.started = False

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` when the client leaves."""
        self._outer.watch(gone)

    def unwatch(self) -> None:
        """Stop watching."""
        self._outer.unwatch()

    def abort(self) -> None:
        """Cut the client's connection."""
        self._outer.abort()

    async def _respond(self, status: int, body: bytes, headers: Headers = ()) -> None:
        head = [(b"content-type", JSON), (b"content-length", b"%d" % len(body)), *headers]
        await self._outer.start(status, head)
        await self._outer.end(body)


class KeptReply(_InnerReply):
    """Keeps the whole answer of a request that is a part of a client's request. It is never sent.

    Attributes:
        complete: the whole answer came.
        error: the engine's, or that there was too much to keep.
    """

    def __init__(self, outer: Reply, limit: int) -> None:
        """`limit`: most bytes that are kept."""
        super().__init__(outer)
        self._limit = limit
        self._pieces: list[bytes] = []
        self._size = 0
        self.complete = False
        self.error: MeshError | None = None

    @property
    def body(self) -> bytes:
        """What came."""
        return b"".join(self._pieces)

    @property
    def headers(self) -> Headers:
        """Of the answer, without those of its body."""
        return self._headers

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Keep the head."""
        self.started, self._status = True, status
        self._headers = tuple((name, value) for name, value in headers if name not in _NOT_KEPT)

    async def write(self, data: bytes) -> None:
        """Keep a piece. Raises ConnectionError for more than the limit, as if the client had left."""
        self._size += len(data)
        if self._size > self._limit:
            self.error = MeshError("answer_too_large", "The answer is too large.", "Ask for less at once.", 413)
            raise ConnectionAbortedError("the answer is too large to keep")
        self._pieces.append(data)

    async def end(self, data: bytes = b"") -> None:
        """Keep the last piece."""
        await self.write(data)
        if self._status >= 400:
            self.error = upstream_error(self.body[:MAX_ERROR_BYTES], self._status, self._headers)
        self.complete = True


class TranslatedReply(_InnerReply):
    """Translates an engine's stream into Ollama's, piece by piece; or sums it up for a client that wants no stream.

    Comments before the engine's first event become chunks without text: they keep the client's connection alive while
    the model is loaded, and lines of JSON can have no comments. The same reply serves for a further attempt after that.

    Attributes:
        answered: something that an engine said has been sent.
    """

    def __init__(self, outer: Reply, translator: AnswerTranslator, *, stream: bool) -> None:
        super().__init__(outer)
        self._translator = translator
        self._parser = SseParser()
        self._sum = None if stream else Sum()
        self._summed = 0
        self._error = b""
        self.answered = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The engine's answer begins. Of an error, and without a stream, the head is sent with the body."""
        self.started, self._status = True, status
        self._headers = tuple((name, value) for name, value in headers if name not in _NOT_KEPT)
        if status < 400 and self._sum is None and not self._outer.started:
            await self._outer.start(status, [(b"content-type", NDJSON), *self._headers])

    async def write(self, data: bytes) -> None:
        """Translate a piece."""
        lines = self._translate(data)
        if lines:
            self.answered = True
        elif self._sum is None and self._status < 400 and not self.answered and data.startswith(b":"):
            lines = encode_lines([self._translator.pause()])
        if lines:
            await self._outer.write(lines)

    async def refuse(self, error: MeshError) -> bool:
        """End with an error, if no more than chunks without text were sent; else False: the error is sent as usual."""
        if not self._outer.started or self.answered:
            return False
        await self._outer.end(encode_lines([{"error": str(error)}]))
        return True

    async def end(self, data: bytes = b"") -> None:
        """Translate the last piece, and end the client's answer."""
        lines = self._translate(data)
        if self._status >= 400:
            await self._refuse(upstream_error(self._error, self._status, self._headers))
            return
        rest = self._translator.end()
        incomplete = MeshError("engine_error", "The engine's answer is not complete.", "Ask again.")
        if self._sum is None:
            if not self._translator.over:
                rest.append({"error": str(incomplete)})
            await self._outer.end(lines + encode_lines(rest))
            return
        for chunk in rest:
            self._sum.add(chunk)
        if self._translator.error is not None:
            await self._refuse(self._translator.error)
        elif self._sum.answer is None:
            await self._refuse(incomplete)
        else:
            await self._respond(200, encode_lines([self._sum.answer]).rstrip(), self._headers)

    def _translate(self, data: bytes) -> bytes:
        """What a piece of the engine's answer becomes; without a stream it is summed up."""
        if self._status >= 400:
            self._error = (self._error + data)[:MAX_ERROR_BYTES]
            return b""
        try:
            events = self._parser.feed(data)
        except SseError as error:
            # It came from an engine and was relayed whole: a fault of ours, or of the engine.
            raise ConnectionResetError(f"the engine's stream is not understood: {error}") from error
        chunks = [chunk for event in events for chunk in self._translator.translate(event)]
        if self._sum is None:
            return encode_lines(chunks)
        self._summed += len(data)
        if self._summed > MAX_WHOLE and not self._translator.over:
            self._translator.fail(MeshError("answer_too_large", "The answer is too large.", "Stream it.", 413))
            self._sum = Sum()
        for chunk in chunks:
            self._sum.add(chunk)
        return b""

    async def _refuse(self, error: MeshError) -> None:
        if await self.refuse(error):
            return
        status, headers, body = error_response(error, Dialect.OLLAMA)
        kept = [(name, value) for name, value in self._headers if name.startswith((b"x-mesh-llm", b"access-", b"vary"))]
        await self._outer.start(status, [*headers, *kept])
        await self._outer.end(body)
