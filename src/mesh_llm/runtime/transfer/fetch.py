"""Fetches one file over several connections, resumes it after a failure, and verifies it."""

import hashlib
import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Protocol

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.transfer.partial_file import BLOCK_BYTES, PartialFile
from mesh_llm.runtime.transfer.progress import FetchCancelledError, OnProgress, Progress

CONNECTIONS = 6
# Blocks per request: few enough that all connections have work until the end.
_LEAST_BLOCKS, _MOST_BLOCKS = 4, 64
_MOST_FAILURES = 6
_LONGEST_PAUSE = 30.0
_READ_BYTES = 1 << 20


class TransientError(Exception):
    """A connection failed, and trying again may help. `pause`: seconds to wait, if the server said so."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause = pause


class NoRangesError(Exception):
    """The server does not send parts of files."""


class Opener(Protocol):
    """Opens a connection for a part of the file. Safe to call from several threads."""

    def __call__(self, begin: int, end: int | None) -> AbstractContextManager[Iterator[bytes]]:
        """Yield the bytes from `begin` to before `end` (None: the whole file), in pieces of any size.

        Raises:
            TransientError: trying again may help.
            NoRangesError: the server does not send parts.
            MeshError: trying again does not help.
        """
        ...


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One file to fetch.

    Attributes:
        name: for people.
        size: bytes.
        sha256: 64 hex digits; empty if it is not known.
        digest: names the content: the SHA-256, or another entity tag.
        prefix: the first bytes of the file; checked when its first block arrives.
        kind: with `prefix`: what such files are, as in `a GGUF file`, and what to do if it is none.
        mirror: how to use another source, as the end of a sentence.
    """

    name: str
    size: int
    sha256: str
    digest: str
    prefix: bytes = b""
    kind: tuple[str, str] = ("", "")
    mirror: str = "use another source"


def fetch(
    job: Job,
    partial: Path,
    target: Path,
    open_part: Opener,
    on_progress: OnProgress,
    cancel: threading.Event,
    connections: int = CONNECTIONS,
    first_pause: float = 0.5,
) -> None:
    """Fetch `job` into `partial`; when it is complete and verified, move it to `target`. Blocks.

    Blocks of an earlier attempt in `partial` are not fetched again. A failed connection is tried again after
    `first_pause` seconds, then after twice as long, and so on, until it has failed several times without progress. A
    file with a wrong digest is fetched once more from its beginning.

    Raises:
        FetchCancelledError: `cancel` was set. What was fetched is kept.
        MeshError: `download_failed`, `download_corrupt`, or what `open_part` raises.
        OSError: the disk failed.
    """
    with PartialFile(partial, job.size, job.digest) as file:
        transfer = _Transfer(job, file, open_part, on_progress, cancel, first_pause)
        for _ in range(2):
            transfer.run(connections)
            if not job.sha256 or _sha256(job, file, transfer.fetched, on_progress, cancel) == job.sha256:
                file.finish(target)
                return
            file.forget()
        file.discard()
    raise MeshError(
        code="download_corrupt",
        message=f"{job.name} arrived twice with other content than was announced (SHA-256 {job.sha256[:12]}...).",
        hint=f"A proxy or mirror may alter it. Try again later, or {job.mirror}.",
        status=502,
    )


class _Transfer:
    """The threads that fetch the missing blocks, and the thread that waits for them and reports progress."""

    def __init__(
        self,
        job: Job,
        file: PartialFile,
        open_part: Opener,
        on_progress: OnProgress,
        cancel: threading.Event,
        first_pause: float,
    ) -> None:
        self._job = job
        self._file = file
        self._open_part = open_part
        self._on_progress = on_progress
        self._cancel = cancel
        self._first_pause = first_pause
        self._stop = threading.Event()
        self._segments: queue.SimpleQueue[range] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.fetched = 0

    def run(self, connections: int) -> None:
        """Fetch all missing blocks. Raises as `fetch`."""
        try:
            self._parallel(connections)
        except NoRangesError:
            self._whole()

    def _parallel(self, connections: int) -> None:
        even = -(-self._file.blocks // (2 * connections))
        for segment in self._file.missing(min(_MOST_BLOCKS, max(_LEAST_BLOCKS, even))):
            self._segments.put(segment)
        count = min(connections, self._segments.qsize())
        self._stop.clear()
        with ThreadPoolExecutor(max(1, count), "fetch") as threads:
            try:
                for _ in range(count):
                    threads.submit(self._work).add_done_callback(lambda work: self._results.put(work.exception()))
                self._wait(count)
            finally:
                self._stop.set()
        self._segments, self._results = queue.SimpleQueue(), queue.SimpleQueue()

    def _wait(self, working: int) -> None:
        """Report progress until all threads have ended."""
        self._report()
        while working:
            if self._cancel.is_set():
                raise FetchCancelledError
            try:
                result = self._results.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(result, BaseException):
                raise result
            if result is None:
                working -= 1
            else:
                self.fetched += result
                self._report()

    def _report(self) -> None:
        done = self._file.done_bytes
        self._on_progress(
            Progress(phase="fetching", done_bytes=done, total_bytes=self._job.size, fetched_bytes=self.fetched)
        )

    def _work(self) -> None:
        """The thread of one connection: fetches segment after segment."""
        while not self._stop.is_set():
            try:
                segment = self._segments.get_nowait()
            except queue.Empty:
                return
            self._segment(segment)

    def _segment(self, segment: range) -> None:
        """Fetch one run of blocks. After a failure, continue where it stopped."""
        at, failures = segment.start, 0
        while at < segment.stop and not self._stop.is_set():
            begin, end = self._file.block_range(at)[0], self._file.block_range(segment.stop - 1)[1]
            try:
                with closing(self._blocks(at, begin, end)) as blocks:
                    for block, data in blocks:
                        self._put(block, data)
                        at, failures = block + 1, 0
                        if self._stop.is_set():
                            return
                if at < segment.stop:
                    raise TransientError("the connection ended early")
            except TransientError as error:
                failures += 1
                self._pause(failures, error)

    def _whole(self) -> None:
        """Fetch over one connection, which always starts at the beginning of the file."""
        failures = 0
        self._stop.clear()
        while not self._file.complete:
            try:
                with closing(self._blocks(0, 0, None)) as blocks:
                    for block, data in blocks:
                        self._put(block, data)
                        self._results.get()
                        self.fetched += len(data)
                        self._report()
                        if self._cancel.is_set():
                            raise FetchCancelledError
                if not self._file.complete:
                    raise TransientError("the connection ended early")
            except TransientError as error:
                failures += 1
                self._pause(failures, error)

    def _blocks(self, block: int, begin: int, end: int | None) -> Generator[tuple[int, bytes]]:
        """Blocks as they arrive, from `block` on, which begins at byte `begin`."""
        last = self._file.size if end is None else end
        buffer = bytearray()
        with self._open_part(begin, end) as pieces:
            for piece in pieces:
                buffer += piece
                while begin < last and len(buffer) >= (size := min(BLOCK_BYTES, last - begin)):
                    yield block, bytes(buffer[:size])
                    del buffer[:size]
                    block, begin = block + 1, begin + size
                if begin >= last:
                    return

    def _put(self, block: int, data: bytes) -> None:
        if block == 0 and not data.startswith(self._job.prefix):
            kind, hint = self._job.kind
            raise MeshError(
                code="download_invalid",
                message=f"{self._job.name} is not {kind}: it begins with {data[: len(self._job.prefix)]!r}.",
                hint=hint,
                status=502,
            )
        self._file.write(block, data)
        self._results.put(len(data))

    def _pause(self, failures: int, error: TransientError) -> None:
        if failures >= _MOST_FAILURES:
            raise MeshError(
                code="download_failed",
                message=f"{self._job.name} cannot be fetched: {error.reason}.",
                hint="What has arrived is kept. Run the same command again to continue.",
                status=502,
            ) from None
        pause = min(_LONGEST_PAUSE, self._first_pause * 2 ** (failures - 1)) if error.pause is None else error.pause
        self._stop.wait(min(pause, 2 * _LONGEST_PAUSE))


def _sha256(job: Job, file: PartialFile, fetched: int, on_progress: OnProgress, cancel: threading.Event) -> str:
    digest = hashlib.sha256()
    done = 0
    with file.path.open("rb") as content:
        while piece := content.read(_READ_BYTES):
            if cancel.is_set():
                raise FetchCancelledError
            digest.update(piece)
            done += len(piece)
            on_progress(Progress(phase="checking", done_bytes=done, total_bytes=job.size, fetched_bytes=fetched))
    return digest.hexdigest()
