"""A request and the way back, whoever asks: an HTTP client through uvicorn, or another node through a mesh stream."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from mesh_llm.api.decisions import Trace
from mesh_llm.core.ids import NodeId
from mesh_llm.wire.http1 import Headers

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
