"""Downloads chunks from all seeders at once: the piece picker says who is asked for which; one worker per seeder asks.

Each seeder is asked ahead for as much as it sends in about a second.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mesh_llm.core.types.ids import NodeId
from mesh_llm.models.p2p.assembler import Assembler
from mesh_llm.models.p2p.swarm import SeederClient, SeederError
from mesh_llm.runtime.supervision import wait_for_event
from mesh_llm.runtime.transfer.progress import OnProgress, Progress

_MOST_ASKED = 2
_LEAST_AHEAD, _MOST_AHEAD = 2, 8
_SECONDS_AHEAD = 1.0
_LEAST_PATIENCE = 2.0
_THREADS = 2


class Piece(NamedTuple):
    """A chunk, by the number of its file in the offer and its number in the file."""

    file: int
    chunk: int


class PiecePicker:
    """Hands out missing chunks, each once; near the end, late ones a second time, to another seeder. Pure."""

    def __init__(self, missing: Iterable[Piece]) -> None:
        self._open = deque(missing)
        self._asked: dict[Piece, dict[NodeId, float]] = {}

    @property
    def done(self) -> bool:
        """Whether every chunk was received."""
        return not self._open and not self._asked

    def next(self, seeder: NodeId, now: float, patience: float) -> Piece | None:
        """The chunk to request from this seeder now; None for none at present.

        Args:
            seeder: the node.
            now: seconds, any origin.
            patience: seconds after which a chunk that another seeder was asked for may be requested again.
        """
        while self._open:
            piece = self._open.popleft()
            if piece not in self._asked:
                self._asked[piece] = {seeder: now}
                return piece
        late = [
            (min(asked.values()), piece)
            for piece, asked in self._asked.items()
            if seeder not in asked and len(asked) < _MOST_ASKED and now - min(asked.values()) > patience
        ]
        if not late:
            return None
        piece = min(late)[1]
        self._asked[piece][seeder] = now
        return piece

    def received(self, piece: Piece) -> None:
        """A chunk was received and verified."""
        self._asked.pop(piece, None)

    def failed(self, seeder: NodeId, pieces: Iterable[Piece]) -> None:
        """A seeder will not send these chunks. Others can be asked for them."""
        for piece in pieces:
            asked = self._asked.get(piece)
            if asked is None or asked.pop(seeder, None) is None or asked:
                continue
            del self._asked[piece]
            self._open.appendleft(piece)


class Workers:
    """The workers of one download, one for each seeder. They share the piece picker and the files.

    Args:
        files: by their number in the offer.
        on_progress: called as chunks arrive.
        failed: called for each seeder that fails, with the reason.
        clock: seconds, any origin.
    """

    def __init__(
        self,
        files: Mapping[int, Assembler],
        on_progress: OnProgress,
        failed: Callable[[NodeId, SeederError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._on_progress = on_progress
        self._failed = failed
        self._clock = clock
        self._total = sum(file.chunks.size for file in files.values())
        self._picker = PiecePicker(())
        self._changed = asyncio.Event()
        self._writers = ThreadPoolExecutor(_THREADS, "assemble")
        self._cancel = threading.Event()
        self.received_bytes = 0
        """From all seeders, including wrong and duplicate chunks."""

    @property
    def done(self) -> bool:
        """Whether every chunk was received."""
        return self._picker.done

    async def resume(self) -> None:
        """Verify and keep what an earlier attempt left. Raises OSError."""
        loop = asyncio.get_running_loop()
        for file in self._files.values():
            await loop.run_in_executor(self._writers, file.resume, self._cancel)
        self._picker = PiecePicker(
            Piece(number, index) for number, file in self._files.items() for index in file.missing
        )
        self._report()

    async def work(self, seeder: SeederClient) -> None:
        """Receive chunks from one seeder until all are received or it fails. Raises OSError: the disk failed."""
        asked = deque[Piece]()
        putting: asyncio.Future[bool] | None = None
        piece = Piece(0, 0)
        pace = _Pace()
        try:
            while not self.done:
                await self._request(seeder, asked, pace)
                if not asked and putting is None:
                    await self._until_changed(_LEAST_PATIENCE)
                    continue
                data = b""
                began = self._clock()
                if asked:
                    data = await seeder.receive(self._size(asked[0]))
                    self.received_bytes += len(data)
                    pace.measured(self._clock() - began)
                # One chunk is verified and written while the next one arrives.
                if putting is not None:
                    self._finish(seeder, piece, right=await putting)
                    putting = None
                if asked:
                    piece = asked.popleft()
                    putting = self._write(piece, data)
        except SeederError as failure:
            self._failed(seeder.node, failure)
        finally:
            self._picker.failed(seeder.node, asked)
            if putting is not None:
                await asyncio.wait({putting})
                if not putting.cancelled() and putting.exception() is None and putting.result():
                    self._picker.received(piece)
                else:
                    self._picker.failed(seeder.node, [piece])
            self._changed.set()
            seeder.close()

    def close(self) -> None:
        """End the threads."""
        self._cancel.set()
        self._writers.shutdown(wait=True, cancel_futures=True)

    def _write(self, piece: Piece, data: bytes) -> asyncio.Future[bool]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._writers, self._files[piece.file].put, piece.chunk, data)

    def _size(self, piece: Piece) -> int:
        begin, end = self._files[piece.file].chunks.span(piece.chunk)
        return end - begin

    async def _request(self, seeder: SeederClient, asked: deque[Piece], pace: "_Pace") -> None:
        while len(asked) < pace.ahead:
            piece = self._picker.next(seeder.node, self._clock(), pace.patience)
            if piece is None:
                return
            asked.append(piece)
            await seeder.request(*piece)

    def _finish(self, seeder: SeederClient, piece: Piece, *, right: bool) -> None:
        if not right:
            self._picker.failed(seeder.node, [piece])
            raise SeederError("a chunk that it sent is not the one in its list", liar=True)
        self._picker.received(piece)
        self._changed.set()
        self._report()

    async def _until_changed(self, seconds: float) -> None:
        self._changed.clear()
        await wait_for_event(self._changed, seconds)

    def _report(self) -> None:
        done = sum(file.done_bytes for file in self._files.values())
        self._on_progress(
            Progress(phase="fetching", done_bytes=done, total_bytes=self._total, fetched_bytes=self.received_bytes)
        )


class _Pace:
    """How fast one seeder is, and so how far ahead to request."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def measured(self, seconds: float) -> None:
        """A chunk took this long."""
        self._seconds = seconds if not self._seconds else 0.7 * self._seconds + 0.3 * seconds

    @property
    def ahead(self) -> int:
        """Chunks to request before the first of them arrives."""
        if not self._seconds:
            return _LEAST_AHEAD
        return max(_LEAST_AHEAD, min(_MOST_AHEAD, round(_SECONDS_AHEAD / self._seconds)))

    @property
    def patience(self) -> float:
        """Seconds after which a chunk that another seeder was asked for is requested from this one too."""
        return max(_LEAST_PATIENCE, 3 * self._seconds)
