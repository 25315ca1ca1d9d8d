"""Keeps what this node gives away under a rate, over all that ask at once.

Gives this node's models to others of the mesh: by announced name and fingerprint, chunk by chunk.
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

_BURST_SECONDS = 0.25


class RateLimit:
    """A bucket of bytes that fills steadily; whoever takes more than is there waits for his turn."""

    def __init__(
        self,
        bytes_per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`bytes_per_second` None: no limit."""
        self._rate = bytes_per_second
        self._clock = clock
        self._pause = pause
        self._free_at = clock()

    def wait(self, size: int) -> float:
        """Take `size` bytes; returns how many seconds to wait before they may be sent."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        begin = max(self._free_at, now - _BURST_SECONDS)
        self._free_at = begin + size / self._rate
        return max(0.0, self._free_at - now)

    async def take(self, size: int) -> None:
        """Return when `size` bytes more may be sent."""
        seconds = self.wait(size)
        if seconds > 0:
            await self._pause(seconds)


_log = structlog.get_logger(__name__)

_PIECE = 1 << 20
_SECONDS_BETWEEN_REPORTS = 1.0
_PRIORITY = -10
_THREADS = 2


@dataclass(frozen=True, slots=True)
class SeededModel:
    """The files of a model that may be given away: its parts in order, and its projector."""

    parts: tuple[Path, ...]
    projector: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files, in the order in which they are offered."""
        return (*self.parts, *([self.projector] if self.projector is not None else []))


FindSeeded = Callable[[str, str], SeededModel | None]
"""The files of the model of this served name and fingerprint; None where there is no such model, or it is not given."""


class _UnableError(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Seeder:
    """Answers MODEL streams. What a file contains is read once, and kept by `store` as long as the file stays."""

    def __init__(self, find: FindSeeded, store: ChunkDigestStore, pace: RateLimit) -> None:
        self._find = find
        self._store = store
        self._pace = pace
        self._scope = TaskScope("giving")
        self._readers = ThreadPoolExecutor(_THREADS, "give")
        self._digesting: dict[Path, asyncio.Task[ChunkDigests]] = {}
        self._digested: dict[Path, int] = {}
        self._one_at_a_time = asyncio.Lock()
        self.given_bytes = 0
        """Sent so far, to everybody."""

    async def serve(self, stream: BulkStream, peer: NodeId, parameters: bytes) -> None:
        """Answer one stream to its end. Raises ConnectionError."""
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
                # Looked up anew each time: the model may have been removed meanwhile.
                given = self._find(asked.name, asked.fingerprint)
                if given is None:
                    raise _UnableError("it has no such model")
                await self._answer(stream, given, request)
            except _UnableError as error:
                await stream.write(encode_model_reply(ModelRefused(error.reason)))
        await stream.finish()

    async def close(self) -> None:
        """Stop reading files."""
        await self._scope.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, stream: BulkStream, given: SeededModel, request: ModelRequest) -> None:
        match request:
            case WantOffer():
                await self._offer(stream, given)
            case WantDigests():
                digests = self._known(_file(given, request.file))
                await stream.write(reply_head(ReplyKind.LIST, len(digests.chunks)) + digests.chunks)
            case WantChunk():
                await self._chunk(stream, _file(given, request.file), request.index)

    async def _offer(self, stream: BulkStream, given: SeededModel) -> None:
        paths = given.paths
        total = sum(_size(path) for path in paths)
        done = 0
        files: list[OfferedFile] = []
        for path in paths:
            task = self._digests(path)
            while True:
                finished, _ = await asyncio.wait({task}, timeout=_SECONDS_BETWEEN_REPORTS)
                if finished:
                    break
                # The asker knows by it that this node lives.
                await stream.write(encode_model_reply(Preparing(done + self._digested.get(path, 0), total)))
            digests = _result(task)
            done += digests.size
            projector = path.name if path == given.projector else ""
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
            raise _UnableError("its file has changed")
        return digests

    async def _chunk(self, stream: BulkStream, path: Path, index: int) -> None:
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            raise _UnableError("its file is gone") from None
        try:
            begin = index * CHUNK_BYTES
            end = min(begin + CHUNK_BYTES, os.fstat(handle).st_size)
            if begin >= end:
                raise _UnableError("its file has no such part")
            await self._send(stream, handle, begin, end)
        finally:
            os.close(handle)

    async def _send(self, stream: BulkStream, handle: int, begin: int, end: int) -> None:
        """Send a piece of a file; the next piece is read while one is sent."""
        head = reply_head(ReplyKind.CHUNK, end - begin)
        coming = self._read(handle, begin, end)
        try:
            while begin < end:
                data = await coming
                if not data:
                    # Cut short meanwhile: what was promised cannot be sent any more.
                    stream.abort()
                    raise ConnectionAbortedError("the file became shorter")
                begin += len(data)
                if begin < end:
                    coming = self._read(handle, begin, end)
                await self._pace.take(len(data))
                await stream.write(head + data if head else data)
                head = b""
                self.given_bytes += len(data)
        finally:
            # The handle is closed after this: nobody may read from it then.
            if not coming.done():
                await asyncio.wait({coming})

    def _read(self, handle: int, begin: int, end: int) -> asyncio.Future[bytes]:
        size = min(_PIECE, end - begin)
        return asyncio.get_running_loop().run_in_executor(self._readers, os.pread, handle, size, begin)


def _file(given: SeededModel, number: int) -> Path:
    paths = given.paths
    if number >= len(paths):
        raise _UnableError("it has no such file")
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
        raise _UnableError(f"its file cannot be read: {error.strerror or error}"[:200]) from None
