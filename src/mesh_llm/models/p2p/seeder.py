"""Sends this node's model files to other nodes, chunk by chunk, under one rate limit for all of them.

A model is asked for by its announced name and fingerprint, never by a path.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import BulkStream
from mesh_llm.models.p2p.digests import ChunkDigests, ChunkDigestStore
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.streams import (
    CHUNK_BYTES,
    MAX_REQUEST,
    ModelRefused,
    ModelRequest,
    Offer,
    OfferedFile,
    Preparing,
    ReplyKind,
    WantChunk,
    WantDigests,
    WantOffer,
    decode_model_parameters,
    decode_model_request,
    encode_model_reply,
    reply_head,
)

_log = structlog.get_logger(__name__)

_BURST_SECONDS = 0.25
_PIECE = 1 << 20
_SECONDS_BETWEEN_REPORTS = 1.0
_PRIORITY = -10
_THREADS = 2


class RateLimit:
    """A token bucket of bytes. Senders that exceed it wait, in the order in which they came."""

    def __init__(
        self,
        bytes_per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`bytes_per_second`: None for no limit."""
        self._rate = bytes_per_second
        self._clock = clock
        self._pause = pause
        self._free_at = clock()

    def wait(self, size: int) -> float:
        """Take `size` bytes; returns the seconds to wait before they may be sent."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        begin = max(self._free_at, now - _BURST_SECONDS)
        self._free_at = begin + size / self._rate
        return max(0.0, self._free_at - now)

    async def take(self, size: int) -> None:
        """Return when `size` more bytes may be sent."""
        seconds = self.wait(size)
        if seconds > 0:
            await self._pause(seconds)


@dataclass(frozen=True, slots=True)
class SeededModel:
    """The files of a model that may be sent: its parts in order, and its projector."""

    parts: tuple[Path, ...]
    projector: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files, in the order in which they are offered."""
        return (*self.parts, *([self.projector] if self.projector is not None else []))


FindSeeded = Callable[[str, str], SeededModel | None]
"""Finds a model by its served name and fingerprint; None if it is not here, or is not sent to others."""


class _RefusedError(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Seeder:
    """Answers MODEL streams. A file is digested once; `store` keeps the chunk list while the file does not change."""

    def __init__(self, find: FindSeeded, store: ChunkDigestStore, limit: RateLimit) -> None:
        self._find = find
        self._store = store
        self._limit = limit
        self._scope = TaskScope("seeding")
        self._readers = ThreadPoolExecutor(_THREADS, "seed")
        self._digesting: dict[Path, asyncio.Task[ChunkDigests]] = {}
        self._digested: dict[Path, int] = {}
        self._one_at_a_time = asyncio.Lock()

    async def serve(self, stream: BulkStream, peer: NodeId, parameters: bytes, refusal: str = "") -> None:
        """Answer the requests of one stream until it ends. Raises ConnectionError.

        `refusal`: why this node gets nothing, as a clause; empty: it gets files.
        """
        asked = decode_model_parameters(parameters)
        if isinstance(asked, Malformed):
            stream.abort()
            return
        await stream.set_priority(_PRIORITY)
        _log.debug("model asked for", peer=peer[:10], model=asked.name)
        while (payload := await stream.read_frame(MAX_REQUEST)) is not None:
            request = decode_model_request(payload)
            if isinstance(request, Malformed):
                stream.abort()
                return
            try:
                if refusal:
                    raise _RefusedError(refusal)
                # Looked up for each request: the model may have been removed meanwhile.
                model = self._find(asked.name, asked.fingerprint)
                if model is None:
                    raise _RefusedError("it has no such model")
                await self._answer(stream, model, request)
            except _RefusedError as error:
                await stream.write(encode_model_reply(ModelRefused(error.reason)))
        await stream.finish()

    async def close(self) -> None:
        """Stop reading files."""
        await self._scope.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, stream: BulkStream, model: SeededModel, request: ModelRequest) -> None:
        match request:
            case WantOffer():
                await self._offer(stream, model)
            case WantDigests():
                digests = self._known(_file(model, request.file))
                await stream.write(reply_head(ReplyKind.LIST, len(digests.chunks)) + digests.chunks)
            case WantChunk():
                await self._chunk(stream, _file(model, request.file), request.index)

    async def _offer(self, stream: BulkStream, model: SeededModel) -> None:
        paths = model.paths
        total = sum(_size(path) for path in paths)
        done = 0
        files: list[OfferedFile] = []
        for path in paths:
            task = self._digests(path)
            while True:
                finished, _ = await asyncio.wait({task}, timeout=_SECONDS_BETWEEN_REPORTS)
                if finished:
                    break
                # Keeps the peer from giving up while files are digested.
                await stream.write(encode_model_reply(Preparing(done + self._digested.get(path, 0), total)))
            digests = _result(task)
            done += digests.size
            projector = path.name if path == model.projector else ""
            files.append(OfferedFile(digests.size, digests.sha256, bytes.fromhex(digests.name), projector))
        await stream.write(encode_model_reply(Offer(tuple(files))))

    def _digests(self, path: Path) -> asyncio.Task[ChunkDigests]:
        task = self._digesting.get(path)
        if task is None:
            task = self._digesting[path] = self._scope.spawn(self._digest(path), path.stem)
            task.add_done_callback(lambda _: self._digesting.pop(path, None))
        return task

    async def _digest(self, path: Path) -> ChunkDigests:
        def note(done: int) -> None:
            self._digested[path] = done

        async with self._one_at_a_time:
            try:
                return await asyncio.to_thread(self._store.make, path, note)
            finally:
                self._digested.pop(path, None)

    def _known(self, path: Path) -> ChunkDigests:
        try:
            digests = self._store.get(path)
        except OSError:
            digests = None
        if digests is None:
            raise _RefusedError("its file has changed")
        return digests

    async def _chunk(self, stream: BulkStream, path: Path, index: int) -> None:
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            raise _RefusedError("its file is gone") from None
        try:
            begin = index * CHUNK_BYTES
            end = min(begin + CHUNK_BYTES, os.fstat(handle).st_size)
            if begin >= end:
                raise _RefusedError("its file has no such part")
            await self._send(stream, handle, begin, end)
        finally:
            os.close(handle)

    async def _send(self, stream: BulkStream, handle: int, begin: int, end: int) -> None:
        """Send a part of a file. The next piece is read while one is sent."""
        head = reply_head(ReplyKind.CHUNK, end - begin)
        reading = self._read(handle, begin, end)
        try:
            while begin < end:
                data = await reading
                if not data:
                    # The file was cut short: the announced length cannot be sent any more.
                    stream.abort()
                    raise ConnectionAbortedError("the file became shorter")
                begin += len(data)
                if begin < end:
                    reading = self._read(handle, begin, end)
                await self._limit.take(len(data))
                await stream.write(head + data if head else data)
                head = b""
        finally:
            # The caller closes the handle next: the read must have ended.
            if not reading.done():
                await asyncio.wait({reading})

    def _read(self, handle: int, begin: int, end: int) -> asyncio.Future[bytes]:
        size = min(_PIECE, end - begin)
        return asyncio.get_running_loop().run_in_executor(self._readers, os.pread, handle, size, begin)


def _file(model: SeededModel, number: int) -> Path:
    paths = model.paths
    if number >= len(paths):
        raise _RefusedError("it has no such file")
    return paths[number]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _result(task: asyncio.Task[ChunkDigests]) -> ChunkDigests:
    try:
        return task.result()
    except OSError as error:
        raise _RefusedError(f"its file cannot be read: {error.strerror or error}"[:200]) from None
