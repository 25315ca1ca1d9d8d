"""Incoming streams find who answers them: by type, if the peer's scope allows it, and not too many at once."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeAlias

import structlog

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import NodeId
from mesh_llm.net.peer import Peer
from mesh_llm.net.streams import IrohStream
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.frames import (
    ACCEPTED,
    ACKNOWLEDGED,
    MAX_HEADER,
    ResetCode,
    StreamType,
    decode_header,
    known_type,
)

_log = structlog.get_logger(__name__)

StreamHandler: TypeAlias = Callable[[IrohStream, Peer, bytes], Awaitable[None]]
"""Serves one stream: takes the stream after its header, the peer, and the header's parameters.

When it returns or raises, whatever of the stream is still open is dropped.
"""


class _Entry(NamedTuple):
    handler: StreamHandler
    scope: Scope
    per_peer: int


class StreamDispatcher:
    """The table of handlers. Types without one are reset like unknown ones."""

    def __init__(self, header_timeout: float, admitted: Callable[[Peer], bool] = lambda _: True) -> None:
        """`admitted`: whether a peer's admission still holds; asked for every stream but ADMIT."""
        self._header_timeout = header_timeout
        self._admitted = admitted
        self._entries: dict[StreamType, _Entry] = {}
        self._open: Counter[tuple[NodeId, StreamType]] = Counter()
        self.refused: Counter[str] = Counter()
        """Streams that were refused, by reason; for metrics."""

    def register(self, kind: StreamType, handler: StreamHandler, *, scope: Scope, per_peer: int) -> None:
        """Let `handler` serve streams of this type from peers of at least `scope`, `per_peer` of one peer at once."""
        self._entries[kind] = _Entry(handler, scope, per_peer)

    def open_streams(self, kind: StreamType) -> int:
        """How many streams of a type are being served, from everybody."""
        return sum(count for (_, open_kind), count in self._open.items() if open_kind is kind)

    async def serve(self, stream: IrohStream, peer: Peer) -> None:
        """Read the header, and serve the stream to its end. Raises nothing that the peer can cause."""
        try:
            await self._serve(stream, peer)
        except ConnectionError as error:
            _log.debug("stream ended", peer=peer.node[:10], reason=str(error))
        finally:
            if not stream.ended:
                stream.abort()

    async def _serve(self, stream: IrohStream, peer: Peer) -> None:
        try:
            async with asyncio.timeout(self._header_timeout):
                payload = await stream.read_frame(MAX_HEADER)
        except TimeoutError:
            self._refuse(stream, peer, ResetCode.TIMEOUT, "no header")
            return
        header = Malformed("no header") if payload is None else decode_header(payload)
        if isinstance(header, Malformed):
            self._refuse(stream, peer, ResetCode.PROTOCOL, "malformed header")
            return
        kind = known_type(header.type)
        entry = self._entries.get(kind) if kind is not None else None
        if kind is None or entry is None:
            self._refuse(stream, peer, ResetCode.UNKNOWN_TYPE, "unknown type")
            return
        if kind is not StreamType.ADMIT and not self._admitted(peer):
            self._refuse(stream, peer, ResetCode.NOT_ADMITTED, "admission ended")
            return
        if peer.scope < entry.scope:
            self._refuse(stream, peer, ResetCode.WRONG_SCOPE, "wrong scope")
            return
        key = (peer.node, kind)
        if self._open[key] >= entry.per_peer:
            self._refuse(stream, peer, ResetCode.BUSY, "too many streams")
            return
        self._open[key] += 1
        try:
            if kind in ACKNOWLEDGED:
                await stream.write(ACCEPTED)
            await entry.handler(stream, peer, header.parameters)
        except MeshError as error:
            _log.info("stream failed", peer=peer.node[:10], kind=kind.name, code=error.code, reason=str(error))
            stream.abort(ResetCode.FAILED)
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def _refuse(self, stream: IrohStream, peer: Peer, code: ResetCode, reason: str) -> None:
        self.refused[reason] += 1
        _log.debug("stream refused", peer=peer.node[:10], reason=reason)
        stream.abort(code)
