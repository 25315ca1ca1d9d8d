"""One node that is asked for a model's files: what it offers, and its chunks. Asks ahead, answers come in order.

Meets the nodes that say they have a model, and finds out which of them speak of the very same files.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import BulkStream
from mesh_llm.models.p2p.digests import ChunkDigests
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.streams import (
    REPLY_HEAD,
    ModelParameters,
    Offer,
    OfferedFile,
    ReplyHead,
    ReplyKind,
    WantChunk,
    WantDigests,
    WantOffer,
    decode_model_refused,
    decode_offer,
    decode_preparing,
    decode_reply_head,
)

_T = TypeVar("_T")
_PIECE = 1 << 20
_SILENCE_SECONDS = 20.0

OpenModel = Callable[[NodeId, bytes], Awaitable[BulkStream]]
"""Opens a MODEL stream with these parameters to a node that is admitted to serve. Raises ConnectionError."""


class SeederError(Exception):
    """A seed gives nothing more. `liar`: what it gave was not what it said."""

    def __init__(self, reason: str, *, liar: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.liar = liar


class SeederClient:
    """One MODEL stream. Every method raises SeederError; after that only `close` may be called."""

    def __init__(self, node: NodeId, stream: BulkStream, silence: float = _SILENCE_SECONDS) -> None:
        """`silence`: seconds without a byte after which it is given up."""
        self.node = node
        self._stream = stream
        self._silence = silence
        self.received_bytes = 0

    @classmethod
    async def open(cls, node: NodeId, asked: ModelParameters, open_model: OpenModel, silence: float) -> "SeederClient":
        """Begin. Raises SeederError."""
        try:
            async with asyncio.timeout(silence):
                return cls(node, await open_model(node, encode(asked)), silence)
        except TimeoutError:
            raise SeederError("it does not answer") from None
        except ConnectionError as error:
            raise SeederError(str(error)) from None

    async def offer(self, on_preparing: Callable[[int, int], None]) -> Offer:
        """What it has; `on_preparing` is told how many bytes of how many it has read to answer this."""
        await self._ask(encode(WantOffer()))
        while True:
            head = await self._head(ReplyKind.OFFER, ReplyKind.PREPARING)
            body = await self._body(head.length)
            if head.kind is ReplyKind.OFFER:
                return _valid(decode_offer(body))
            preparing = _valid(decode_preparing(body))
            on_preparing(preparing.done_bytes, preparing.total_bytes)

    async def chunks(self, number: int, file: OfferedFile) -> ChunkDigests:
        """The list of chunks of an offered file: the one that was named."""
        await self._ask(encode(WantDigests(number)))
        head = await self._head(ReplyKind.LIST)
        found = ChunkDigests(size=file.size, sha256=file.sha256, chunks=b"")
        if head.length != found.count * len(file.chunks):
            raise SeederError(f"its list has {head.length} bytes for {found.count} chunks", liar=True)
        found = ChunkDigests(size=file.size, sha256=file.sha256, chunks=await self._body(head.length))
        if bytes.fromhex(found.name) != file.chunks:
            raise SeederError("its list of chunks is not the one that it named", liar=True)
        return found

    async def want(self, number: int, index: int) -> None:
        """Ask for a chunk; `take` gives the answers in the order of the questions."""
        await self._ask(encode(WantChunk(number, index)))

    async def take(self, size: int) -> bytes:
        """The next chunk that was asked for, of this size; not yet compared with anything."""
        head = await self._head(ReplyKind.CHUNK)
        if head.length != size:
            raise SeederError(f"it gives {head.length} bytes instead of {size}", liar=True)
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
            raise SeederError("it takes nothing") from None
        except ConnectionError as error:
            raise SeederError(str(error)) from None

    async def _head(self, *expected: ReplyKind) -> ReplyHead:
        head = decode_reply_head(await self._exactly(REPLY_HEAD))
        if isinstance(head, Malformed):
            raise SeederError(head.reason)
        if head.kind is ReplyKind.REFUSED:
            raise SeederError(_valid(decode_model_refused(await self._body(head.length))).reason)
        if head.kind not in expected:
            raise SeederError(f"it answers with {head.kind.name}")
        return head

    async def _body(self, length: int) -> bytes:
        sizes = (min(_PIECE, length - begin) for begin in range(0, length, _PIECE))
        return b"".join([await self._exactly(size) for size in sizes])

    async def _exactly(self, size: int) -> bytes:
        try:
            async with asyncio.timeout(self._silence):
                return await self._stream.read_exact(size)
        except TimeoutError:
            raise SeederError(f"nothing came for {self._silence:.0f} s") from None
        except ConnectionError as error:
            raise SeederError(str(error)) from None


def _valid(value: _T | Malformed) -> _T:
    if isinstance(value, Malformed):
        raise SeederError(value.reason)
    return value


_GRACE_SECONDS = 0.5
_MOST_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class _Offered:
    seed: SeederClient
    offer: Offer


class Swarm:
    """Asks all of them at once; who answers late may still join in. Use as an async context manager."""

    def __init__(
        self,
        asked: ModelParameters,
        nodes: Sequence[NodeId],
        open_model: OpenModel,
        sha256: Sequence[bytes],
        silence: float,
        failed: Callable[[NodeId, SeederError], None],
    ) -> None:
        """`sha256`: of the parts, where the publisher's word is known; who offers other content is refused."""
        self._asked = asked
        self._nodes = tuple(dict.fromkeys(nodes))
        self._open_model = open_model
        self._sha256 = tuple(sha256)
        self._silence = silence
        self._failed = failed
        self._scope = TaskScope("meeting")
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)
        self._offered: dict[NodeId, _Offered] = {}
        self._used: set[NodeId] = set()
        self._pending = len(self._nodes)
        self._news = asyncio.Event()
        self._preparing: Callable[[int, int], None] = lambda _done, _total: None
        self._reasons: list[str] = []

    @property
    def pending(self) -> bool:
        """Whether somebody may still make an offer."""
        return self._pending > 0

    @property
    def why(self) -> str:
        """Why nobody is left, as a clause."""
        return self._reasons[-1] if self._reasons else "no other node has it"

    async def agree(self, on_preparing: Callable[[int, int], None]) -> Offer | None:
        """Wait for offers, and choose the one that most make; None where nobody is left to make any."""
        self._preparing = on_preparing
        while not self._offered and self._pending:
            await self.news(None)
        if self._pending:
            loop = asyncio.get_running_loop()
            end = loop.time() + _GRACE_SECONDS
            while self._pending and (left := end - loop.time()) > 0:
                await self.news(left)
        votes: dict[Offer, int] = {}
        for offered in self._offered.values():
            votes[offered.offer] = votes.get(offered.offer, 0) + 1
        return max(votes, key=lambda offer: votes[offer], default=None)

    def join(self, offer: Offer) -> list[SeederClient]:
        """The seeds that make this offer and were not given out yet."""
        found = [one.seed for node, one in self._offered.items() if one.offer == offer and node not in self._used]
        self._used.update(seed.node for seed in found)
        return found

    def leave(self, node: NodeId, failure: SeederError) -> None:
        """A seed gives nothing more."""
        self._offered.pop(node, None)
        self._note(node, failure)

    def distrust(self, offer: Offer, reason: str) -> None:
        """All who make this offer are wrong."""
        for node in [node for node, one in self._offered.items() if one.offer == offer]:
            self._offered.pop(node).seed.close()
            self._note(node, SeederError(reason, liar=True))

    def dismiss(self, offer: Offer) -> None:
        """Nobody who makes this offer is of use any more."""
        for node in [node for node, one in self._offered.items() if one.offer == offer]:
            self._offered.pop(node).seed.close()

    async def news(self, seconds: float | None) -> None:
        """Wait until an offer came or was refused, at most so long."""
        self._news.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return

    async def __aenter__(self) -> Self:
        for node in self._nodes:
            self._scope.spawn(self._meet(node), node[:10])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scope.close()
        for offered in self._offered.values():
            offered.seed.close()

    async def _meet(self, node: NodeId) -> None:
        seed: SeederClient | None = None
        try:
            async with self._places:
                seed = await SeederClient.open(node, self._asked, self._open_model, self._silence)
                offer = await seed.offer(self._prepared)
            self._check(offer)
            self._offered[node] = _Offered(seed, offer)
            seed = None
        except SeederError as failure:
            self._note(node, failure)
        finally:
            if seed is not None:
                seed.close()
            self._pending -= 1
            self._news.set()

    def _prepared(self, done: int, total: int) -> None:
        self._preparing(done, total)

    def _check(self, offer: Offer) -> None:
        parts = tuple(file.sha256 for file in offer.files if not file.projector)
        if not self._sha256:
            return
        if len(parts) != len(self._sha256) or any(
            known and known != told for known, told in zip(self._sha256, parts, strict=True)
        ):
            raise SeederError("what it offers is not what was published")

    def _note(self, node: NodeId, failure: SeederError) -> None:
        self._reasons.append(failure.reason)
        self._failed(node, failure)
