"""A request and the way back, whoever asks: an HTTP client through uvicorn, or another node through a mesh stream.

Read a request's body: whole, for it may be sent more than once, and within bounds of size, time and memory.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from mesh_llm.api.config import MIB, ApiConfig
from mesh_llm.api.request_trace import Trace
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.wire.http.http1 import Headers

ReadPiece = Callable[[], Awaitable[bytes]]
"""Returns the next piece of a request's body, b"" once at its end. Raises ConnectionError if the asker is gone."""


@dataclass(slots=True)
class Request:
    """One request, its body still to be read.

    Attributes:
        method: as in `POST`.
        path: decoded, without the query.
        query: raw, without the question mark.
        headers: as sent; names lower-case.
        read: the body's next piece, for a body that is not there as a whole yet.
        whole: the whole body, where it came together with the head; `read` is not used then.
        peer: the node that passes the request on; None for a client of this node.
        checked: the one who asks was let in elsewhere: neither name, origin nor key is looked at.
        owner: whose share of this node's time it takes; see Gate.owner.
        trace: where it is written down what becomes of it.
    """

    method: str
    path: str
    query: str
    headers: Headers
    read: ReadPiece
    whole: bytes | None = None
    peer: NodeId | None = None
    checked: bool = False
    owner: str = ""
    trace: Trace | None = None

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header (its name lower-case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Reply(Protocol):
    """The way back for one answer: `start`, any number of `write`, then `end`; or `abort` at any time."""

    @property
    def started(self) -> bool:
        """The head is on its way: nothing can be taken back."""
        ...

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head. A `content-length` among the headers frames the body; without one it is chunked."""
        ...

    async def write(self, data: bytes) -> None:
        """Send a piece of the body; returns when the asker can take more (back-pressure)."""
        ...

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece of the body: the answer is complete."""
        ...

    def abort(self) -> None:
        """Cut the connection, so that the asker sees that the answer is not complete."""
        ...

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` once, as soon as the asker leaves. Only to be used once the request's body has been read."""
        ...

    def unwatch(self) -> None:
        """Stop watching."""
        ...


class BodyReader:
    """Reads bodies; knows how much all of them hold at this moment."""

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self.held = 0
        """Bytes of all bodies being read or answered."""

    async def read(self, request: Request) -> bytes:
        """Return the whole body. Its bytes count as held until `release`.

        Raises:
            MeshError: 413 too large, 415 compressed, 408 too slow, 503 while others hold the memory for it.
            ConnectionError: the asker is gone.
        """
        self._check_head(request)
        pieces: list[bytes] = []
        try:
            if request.whole is not None:
                self._take(request.whole, pieces, 0)
            else:
                await self._gather(request, pieces)
        except BaseException:
            self.held -= sum(map(len, pieces))
            raise
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def release(self, body: bytes) -> None:
        """The body is not needed any more."""
        self.held -= len(body)

    async def _gather(self, request: Request, pieces: list[bytes]) -> None:
        config = self._config
        begin = asyncio.get_running_loop().time()
        size = 0
        try:
            async with asyncio.timeout(config.body_seconds) as deadline:
                while piece := await request.read():
                    size = self._take(piece, pieces, size)
                    deadline.reschedule(begin + config.body_seconds + size / config.body_rate)
        except TimeoutError:
            raise MeshError(
                "request_timeout", "The request's body came too slowly.", "Send it again, faster.", 408
            ) from None

    def _take(self, piece: bytes, pieces: list[bytes], size: int) -> int:
        pieces.append(piece)
        self.held += len(piece)
        size += len(piece)
        if size > self._config.body_bytes:
            raise self._too_large()
        if self.held > self._config.buffered_bytes:
            raise MeshError("out_of_buffers", "Too many large requests at once.", "Try again shortly.", 503, 1.0)
        return size

    def _check_head(self, request: Request) -> None:
        coding = request.header(b"content-encoding")
        if coding is not None and coding.strip().lower() != b"identity":
            raise MeshError(
                "compressed_body", "Compressed request bodies are not accepted.", "Send the body as it is.", 415
            )
        length = request.header(b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > self._config.body_bytes:
            raise self._too_large()

    def _too_large(self) -> MeshError:
        limit = self._config.body_bytes
        shown = f"{limit // MIB} MiB" if limit >= MIB else f"{limit} bytes"
        return MeshError("body_too_large", f"The request's body is larger than {shown}.", "Send less at once.", 413)
