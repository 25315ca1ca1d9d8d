"""Fetches one file over several connections at once, resumes it, and checks it before it is offered."""

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
from mesh_llm.models.hub.partial_file import BLOCK_BYTES, PartialFile
from mesh_llm.models.hub.progress import FetchCancelledError, OnProgress, Progress

CONNECTIONS = 6
# A request's length: short enough that all connections have work to the end.
_LEAST_BLOCKS, _MOST_BLOCKS = 4, 64
_MOST_FAILURES = 6
_LONGEST_PAUSE = 30.0
_READ_BYTES = 1 << 20


class TransientError(Exception):
    """A connection failed in a way that may pass. `pause`: seconds after which the server wants to be asked again."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause = pause


class NoRangesError(Exception):
    """The server sends whole files only."""


class Opener(Protocol):
    """Opens a connection for a part of the file; safe to call from several threads."""

    def __call__(self, begin: int, end: int | None) -> AbstractContextManager[Iterator[bytes]]:
        """Yield the bytes from `begin` up to and without `end` (None: the whole file), in pieces of any size.

        Raises:
            TransientError: trying again may help.
            NoRangesError: the server does not send parts.
            MeshError: it will not.
        """
        ...


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One file to fetch.

    Attributes:
        name: for people.
        size: bytes.
        sha256: 64 hex digits; empty where nobody knows it.
        digest: the SHA-256, or whatever else names the content.
        prefix: what the file must begin with; checked as soon as its first block is there.
    """

    name: str
    size: int
    sha256: str
    digest: str
    prefix: bytes = b""


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
    """Fetch `job` into `partial` and, when it is whole and right, move it to `target`. Blocks.

    What an earlier attempt left in `partial` is not fetched again. A connection that fails is tried again after
    `first_pause` seconds, then twice that, and so on, until it has failed several times without getting on. A file
    whose digest is wrong is fetched once more from its beginning.

    Raises:
        FetchCancelledError: `cancel` was set; what was fetched is kept.
        MeshError: `download_failed`, `download_corrupt`, or what `open_part` raises.
        OSError: the disk failed.
    """
    with PartialFile(partial, job.size, job.digest) as file:
        crew = _Crew(job, file, open_part, on_progress, cancel, first_pause)
        for _ in range(2):
            crew.run(connections)
            if not job.sha256 or _sha256(job, file, crew.fetched, on_progress, cancel) == job.sha256:
                file.finish(target)
                return
            file.forget()
        file.discard()
    raise MeshError(
        code="download_corrupt",
        message=f"{job.name} arrived twice with other content than the hub says (SHA-256 {job.sha256[:12]}...).",
        hint="A proxy or a mirror may alter it. Try again later, or set HF_ENDPOINT to another mirror.",
        status=502,
    )


class _Crew:
    """The threads that fetch what is missing, and what they tell the one that waits for them."""

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
        self._news: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.fetched = 0

    def run(self, connections: int) -> None:
        """Fetch all that is missing. Raises what `fetch` does."""
        try:
            self._parallel(connections)
        except NoRangesError:
            self._whole()

    def _parallel(self, connections: int) -> None:
        share = -(-self._file.blocks // (2 * connections))
        for segment in self._file.missing(min(_MOST_BLOCKS, max(_LEAST_BLOCKS, share))):
            self._segments.put(segment)
        count = min(connections, self._segments.qsize())
        self._stop.clear()
        with ThreadPoolExecutor(max(1, count), "fetch") as threads:
            try:
                for _ in range(count):
                    threads.submit(self._work).add_done_callback(lambda work: self._news.put(work.exception()))
                self._wait(count)
            finally:
                self._stop.set()
        self._segments, self._news = queue.SimpleQueue(), queue.SimpleQueue()

    def _wait(self, working: int) -> None:
        """Tell progress until all threads have ended."""
        self._tell()
        while working:
            if self._cancel.is_set():
                raise FetchCancelledError
            try:
                news = self._news.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(news, BaseException):
                raise news
            if news is None:
                working -= 1
            else:
                self.fetched += news
                self._tell()

    def _tell(self) -> None:
        done = self._file.done_bytes
        self._on_progress(
            Progress(phase="fetching", done_bytes=done, total_bytes=self._job.size, fetched_bytes=self.fetched)
        )

    def _work(self) -> None:
        """One connection's thread: segment after segment."""
        while not self._stop.is_set():
            try:
                segment = self._segments.get_nowait()
            except queue.Empty:
                return
            self._segment(segment)

    def _segment(self, segment: range) -> None:
        """Fetch one run of blocks, trying again from where it broke as long as it gets on."""
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
        """Fetch over one connection that always begins at the beginning."""
        failures = 0
        self._stop.clear()
        while not self._file.complete:
            try:
                with closing(self._blocks(0, 0, None)) as blocks:
                    for block, data in blocks:
                        self._put(block, data)
                        self._news.get()
                        self.fetched += len(data)
                        self._tell()
                        if self._cancel.is_set():
                            raise FetchCancelledError
                if not self._file.complete:
                    raise TransientError("the connection ended early")
            except TransientError as error:
                failures += 1
                self._pause(failures, error)

    def _blocks(self, block: int, begin: int, end: int | None) -> Generator[tuple[int, bytes]]:
        """Whole blocks as they come in, from `block` on, whose first byte is `begin`."""
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
            raise MeshError(
                code="download_invalid",
                message=f"{self._job.name} is not a GGUF file: it begins with {data[: len(self._job.prefix)]!r}.",
                hint="Choose another file of the repository.",
                status=502,
            )
        self._file.write(block, data)
        self._news.put(len(data))

    def _pause(self, failures: int, error: TransientError) -> None:
        if failures >= _MOST_FAILURES:
            raise MeshError(
                code="download_failed",
                message=f"{self._job.name} cannot be fetched: {error.reason}.",
                hint="Run the same command again: what has arrived is kept.",
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
