"""One node that is asked for a model's files: what it offers, and its chunks. Asks ahead, answers come in order."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mesh_llm.core.ids import NodeId
from mesh_llm.core.ports import BulkStream
from mesh_llm.models.chunk_digests import ChunkDigests
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.model_stream import (
    REPLY_HEAD,
    ModelAsked,
    Offer,
    OfferedFile,
    ReplyHead,
    ReplyKind,
    WantChunk,
    WantList,
    WantOffer,
    decode_offer,
    decode_preparing,
    decode_refused,
    decode_reply_head,
    encode_asked,
    encode_request,
)

_T = TypeVar("_T")
_PIECE = 1 << 20
_SILENCE_SECONDS = 20.0

OpenModel = Callable[[NodeId, bytes], Awaitable[BulkStream]]
"""Opens a MODEL stream with these parameters to a node that is admitted to serve. Raises ConnectionError."""


class SeedError(Exception):
    """A seed gives nothing more. `liar`: what it gave was not what it said."""

    def __init__(self, reason: str, *, liar: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.liar = liar


class Seed:
    """One MODEL stream. Every method raises SeedError; after that only `close` may be called."""

    def __init__(self, node: NodeId, stream: BulkStream, silence: float = _SILENCE_SECONDS) -> None:
        """`silence`: seconds without a byte after which it is given up."""
        self.node = node
        self._stream = stream
        self._silence = silence
        self.received_bytes = 0

    @classmethod
    async def open(cls, node: NodeId, asked: ModelAsked, open_model: OpenModel, silence: float) -> "Seed":
        """Begin. Raises SeedError."""
        try:
            async with asyncio.timeout(silence):
                return cls(node, await open_model(node, encode_asked(asked)), silence)
        except TimeoutError:
            raise SeedError("it does not answer") from None
        except ConnectionError as error:
            raise SeedError(str(error)) from None

    async def offer(self, on_preparing: Callable[[int, int], None]) -> Offer:
        """What it has; `on_preparing` is told how many bytes of how many it has read to answer this."""
        await self._ask(encode_request(WantOffer()))
        while True:
            head = await self._head(ReplyKind.OFFER, ReplyKind.PREPARING)
            body = await self._body(head.length)
            if head.kind is ReplyKind.OFFER:
                return _valid(decode_offer(body))
            preparing = _valid(decode_preparing(body))
            on_preparing(preparing.done_bytes, preparing.total_bytes)

    async def chunks(self, number: int, file: OfferedFile) -> ChunkDigests:
        """The list of chunks of an offered file: the one that was named."""
        await self._ask(encode_request(WantList(number)))
        head = await self._head(ReplyKind.LIST)
        found = ChunkDigests(size=file.size, sha256=file.sha256, chunks=b"")
        if head.length != found.count * len(file.chunks):
            raise SeedError(f"its list has {head.length} bytes for {found.count} chunks", liar=True)
        found = ChunkDigests(size=file.size, sha256=file.sha256, chunks=await self._body(head.length))
        if bytes.fromhex(found.name) != file.chunks:
            raise SeedError("its list of chunks is not the one that it named", liar=True)
        return found

    async def want(self, number: int, index: int) -> None:
        """Ask for a chunk; `take` gives the answers in the order of the questions."""
        await self._ask(encode_request(WantChunk(number, index)))

    async def take(self, size: int) -> bytes:
        """The next chunk that was asked for, of this size; not yet compared with anything."""
        head = await self._head(ReplyKind.CHUNK)
        if head.length != size:
            raise SeedError(f"it gives {head.length} bytes instead of {size}", liar=True)
        data = await self._body(size)
        self.received_bytes += size
        return data

    def close(self) -> None:
        """Drop the stream."""
        self._stream.abort()

    async def _ask(self, payload: bytes) -> None:
        try:
            async with asyncio.timeout(self._silence):
                await self._stream.write_frame(payload)
        except TimeoutError:
            raise SeedError("it takes nothing") from None
        except ConnectionError as error:
            raise SeedError(str(error)) from None

    async def _head(self, *expected: ReplyKind) -> ReplyHead:
        head = decode_reply_head(await self._exactly(REPLY_HEAD))
        if isinstance(head, Malformed):
            raise SeedError(head.reason)
        if head.kind is ReplyKind.REFUSED:
            raise SeedError(_valid(decode_refused(await self._body(head.length))).reason)
        if head.kind not in expected:
            raise SeedError(f"it answers with {head.kind.name}")
        return head

    async def _body(self, length: int) -> bytes:
        sizes = (min(_PIECE, length - begin) for begin in range(0, length, _PIECE))
        return b"".join([await self._exactly(size) for size in sizes])

    async def _exactly(self, size: int) -> bytes:
        try:
            async with asyncio.timeout(self._silence):
                return await self._stream.read_exact(size)
        except TimeoutError:
            raise SeedError(f"nothing came for {self._silence:.0f} s") from None
        except ConnectionError as error:
            raise SeedError(str(error)) from None


def _valid(value: _T | Malformed) -> _T:
    if isinstance(value, Malformed):
        raise SeedError(value.reason)
    return value
