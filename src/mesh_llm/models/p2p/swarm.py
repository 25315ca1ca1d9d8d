"""The nodes that have a model: a client for one of them, and the swarm, which finds out who has the same files."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Self, TypeVar

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import BulkStream, TransportSilentError
from mesh_llm.models.p2p.digests import ChunkDigests
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
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
_GRACE_SECONDS = 0.5
_MOST_AT_ONCE = 8

OpenModel = Callable[[NodeId, bytes], Awaitable[BulkStream]]
"""Opens a MODEL stream with these parameters to an admitted node. Raises ConnectionError."""


class SeederError(Exception):
    """A seeder cannot be used any more.

    `liar`: it sent something else than it had announced. `silent`: only one transport to it is silent, and a new stream
    takes another one.
    """

    def __init__(self, reason: str, *, liar: bool = False, silent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.liar = liar
        self.silent = silent


class SeederClient:
    """One MODEL stream to a seeder. Requests may be sent ahead; answers come in order.

    Every method raises SeederError. After that, only `close` may be called.
    """

    def __init__(self, node: NodeId, stream: BulkStream, silence: float = _SILENCE_SECONDS) -> None:
        """`silence`: seconds without a byte after which it fails."""
        self.node = node
        self._stream = stream
        self._silence = silence
        self.received_bytes = 0

    @classmethod
    async def open(cls, node: NodeId, asked: ModelParameters, open_model: OpenModel, silence: float) -> "SeederClient":
        """Connect. Raises SeederError."""
        try:
            async with asyncio.timeout(silence):
                return cls(node, await open_model(node, encode(asked)), silence)
        except TimeoutError:
            raise SeederError("it does not answer") from None
        except ConnectionError as error:
            raise SeederError(str(error)) from None

    async def offer(self, on_preparing: Callable[[int, int], None]) -> Offer:
        """The files that it has. `on_preparing(done, total)`: bytes that it has digested so far to answer."""
        await self._send(encode(WantOffer()))
        while True:
            head = await self._head(ReplyKind.OFFER, ReplyKind.PREPARING)
            body = await self._body(head.length)
            if head.kind is ReplyKind.OFFER:
                return _valid(decode_offer(body))
            preparing = _valid(decode_preparing(body))
            on_preparing(preparing.done_bytes, preparing.total_bytes)

    async def chunks(self, number: int, file: OfferedFile) -> ChunkDigests:
        """The chunk list of an offered file. Raises SeederError if it is not the one that the offer names."""
        await self._send(encode(WantDigests(number)))
        head = await self._head(ReplyKind.LIST)
        found = ChunkDigests(size=file.size, sha256=file.sha256, chunks=b"")
        if head.length != found.count * len(file.chunks):
            raise SeederError(f"its chunk list has {head.length} bytes for {found.count} chunks", liar=True)
        found = ChunkDigests(size=file.size, sha256=file.sha256, chunks=await self._body(head.length))
        if bytes.fromhex(found.name) != file.chunks:
            raise SeederError("its chunk list is not the one in its offer", liar=True)
        return found

    async def request(self, number: int, index: int) -> None:
        """ModelRequest a chunk. `receive` returns the answers in the order of the requests."""
        await self._send(encode(WantChunk(number, index)))

    async def receive(self, size: int) -> bytes:
        """The next requested chunk, of this size. It is not verified yet."""
        head = await self._head(ReplyKind.CHUNK)
        if head.length != size:
            raise SeederError(f"it sends {head.length} bytes instead of {size}", liar=True)
        data = await self._body(size)
        self.received_bytes += size
        return data

    def close(self) -> None:
        """Close the stream."""
        self._stream.abort()

    async def _send(self, payload: bytes) -> None:
        try:
            async with asyncio.timeout(self._silence):
                await self._stream.write_frame(payload)
        except TimeoutError:
            raise SeederError("it does not read") from None
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
            raise SeederError(str(error), silent=isinstance(error, TransportSilentError)) from None


class Swarm:
    """Asks nodes for their offers, all at once. Late offers are used as well. An async context manager."""

    def __init__(
        self,
        asked: ModelParameters,
        nodes: Sequence[NodeId],
        open_model: OpenModel,
        sha256: Sequence[bytes],
        silence: float,
        failed: Callable[[NodeId, SeederError], None],
    ) -> None:
        """`sha256`: of the parts, as published, if known: offers of other content are refused."""
        self._asked = asked
        self._nodes = tuple(dict.fromkeys(nodes))
        self._open_model = open_model
        self._sha256 = tuple(sha256)
        self._silence = silence
        self._failed = failed
        self._scope = TaskScope("swarm")
        self._slots = asyncio.Semaphore(_MOST_AT_ONCE)
        self._offers: dict[NodeId, tuple[SeederClient, Offer]] = {}
        self._joined: set[NodeId] = set()
        self._pending = len(self._nodes)
        self._changed = asyncio.Event()
        self._preparing: Callable[[int, int], None] = lambda _done, _total: None
        self._reasons: list[str] = []

    @property
    def pending(self) -> bool:
        """Whether a node may still make an offer."""
        return self._pending > 0

    @property
    def failure(self) -> str:
        """Why no seeder is left, as a clause."""
        return self._reasons[-1] if self._reasons else "no other node has it"

    async def agree(self, on_preparing: Callable[[int, int], None]) -> Offer | None:
        """Wait for offers, and choose the one that most nodes make. None if no node makes any."""
        self._preparing = on_preparing
        while not self._offers and self._pending:
            await self.wait(None)
        if self._pending:
            loop = asyncio.get_running_loop()
            end = loop.time() + _GRACE_SECONDS
            while self._pending and (left := end - loop.time()) > 0:
                await self.wait(left)
        votes = Counter(offer for _, offer in self._offers.values())
        return max(votes, key=lambda offer: votes[offer], default=None)

    def join(self, offer: Offer) -> list[SeederClient]:
        """The seeders of this offer that were not returned before."""
        found = [seeder for node, seeder in self._seeders(offer) if node not in self._joined]
        self._joined.update(seeder.node for seeder in found)
        return found

    def remove(self, node: NodeId, failure: SeederError) -> None:
        """Remove a seeder that failed."""
        self._offers.pop(node, None)
        self._note(node, failure)

    def drop(self, offer: Offer, lie: str = "") -> None:
        """Remove all seeders of this offer. `lie`: why the offer is wrong, if it is."""
        for node, seeder in self._seeders(offer):
            del self._offers[node]
            seeder.close()
            if lie:
                self._note(node, SeederError(lie, liar=True))

    async def wait(self, seconds: float | None) -> None:
        """Wait until a node has made an offer or failed, at most this long."""
        self._changed.clear()
        await wait_for_event(self._changed, seconds)

    async def __aenter__(self) -> Self:
        for node in self._nodes:
            self._scope.spawn(self._ask(node), node[:10])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scope.close()
        for seeder, _offer in self._offers.values():
            seeder.close()

    async def _ask(self, node: NodeId) -> None:
        try:
            async with self._slots:
                try:
                    await self._ask_once(node)
                except SeederError as failure:
                    if not failure.silent:
                        raise
                    # It has not seen the question.
                    await self._ask_once(node)
        except SeederError as failure:
            self._note(node, failure)
        finally:
            self._pending -= 1
            self._changed.set()

    async def _ask_once(self, node: NodeId) -> None:
        seeder = await SeederClient.open(node, self._asked, self._open_model, self._silence)
        try:
            offer = await seeder.offer(self._prepared)
            self._check(offer)
        except BaseException:
            seeder.close()
            raise
        self._offers[node] = (seeder, offer)

    def _prepared(self, done: int, total: int) -> None:
        self._preparing(done, total)

    def _seeders(self, offer: Offer) -> list[tuple[NodeId, SeederClient]]:
        return [(node, seeder) for node, (seeder, made) in self._offers.items() if made == offer]

    def _check(self, offer: Offer) -> None:
        """Compare an offer with what was published. Raises SeederError."""
        parts = tuple(file.sha256 for file in offer.files if not file.projector)
        if not self._sha256:
            return
        if len(parts) != len(self._sha256) or any(
            known and known != offered for known, offered in zip(self._sha256, parts, strict=True)
        ):
            raise SeederError("what it offers is not what was published")

    def _note(self, node: NodeId, failure: SeederError) -> None:
        self._reasons.append(failure.reason)
        self._failed(node, failure)


def _valid(value: _T | Malformed) -> _T:
    if isinstance(value, Malformed):
        raise SeederError(value.reason)
    return value
