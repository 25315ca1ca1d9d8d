"""Which chunks are still to be had, and who was asked for which. Pure: time is an argument.

Gathers a model's chunks from all seeds at once: each is asked for as much as it gives in about a second.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mesh_llm.core.types.ids import NodeId
from mesh_llm.models.hub.progress import OnProgress, Progress
from mesh_llm.models.p2p.assembler import Assembler
from mesh_llm.models.p2p.swarm import SeederClient, SeederError

_MOST_ASKED = 2


class Piece(NamedTuple):
    """A chunk of one of a model's files."""

    file: int
    chunk: int


class PiecePicker:
    """Hands chunks out, each once; at the end those that are long in coming to a second seed as well."""

    def __init__(self, missing: Iterable[Piece]) -> None:
        self._open = deque(missing)
        self._asked: dict[Piece, dict[NodeId, float]] = {}

    @property
    def done(self) -> bool:
        """Nothing is to be had any more."""
        return not self._open and not self._asked

    def next(self, seed: NodeId, now: float, patience: float) -> Piece | None:
        """What this seed is to be asked for now; None: nothing, for now.

        Args:
            seed: who will be asked.
            now: seconds, any origin.
            patience: a chunk that another seed was asked for so many seconds ago may be asked for again.
        """
        while self._open:
            item = self._open.popleft()
            if item not in self._asked:
                self._asked[item] = {seed: now}
                return item
        late = [
            (min(asked.values()), item)
            for item, asked in self._asked.items()
            if seed not in asked and len(asked) < _MOST_ASKED and now - min(asked.values()) > patience
        ]
        if not late:
            return None
        item = min(late)[1]
        self._asked[item][seed] = now
        return item

    def got(self, item: Piece) -> bool:
        """A chunk is here, and right; False where it was here already."""
        return self._asked.pop(item, None) is not None

    def lost(self, seed: NodeId, items: Iterable[Piece]) -> None:
        """A seed will not give these: others are to be asked."""
        for item in items:
            asked = self._asked.get(item)
            if asked is None or asked.pop(seed, None) is None or asked:
                continue
            del self._asked[item]
            self._open.appendleft(item)


_LEAST_AHEAD, _MOST_AHEAD = 2, 8
_SECONDS_AHEAD = 1.0
_LEAST_PATIENCE = 2.0
_THREADS = 2


class Workers:
    """One fetch's seeds, and its files by their number in the offer.

    `failed` is told of each seed that gives nothing more, and why.
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
        self._board = PiecePicker(())
        self._changed = asyncio.Event()
        self._writers = ThreadPoolExecutor(_THREADS, "gather")
        self._cancel = threading.Event()
        self.received_bytes = 0
        """From all seeds, wrong and twice received chunks included."""

    @property
    def done(self) -> bool:
        """Whether every chunk is here."""
        return self._board.done

    async def look(self) -> None:
        """Take over what an earlier attempt left. Raises OSError."""
        loop = asyncio.get_running_loop()
        for file in self._files.values():
            await loop.run_in_executor(self._writers, file.look, self._cancel)
        self._board = PiecePicker(
            Piece(number, index) for number, file in self._files.items() for index in file.missing
        )
        self._tell()

    async def work(self, seed: SeederClient) -> None:
        """Take chunks from one seed until all are here, or it fails. Raises OSError: the disk failed."""
        asked = deque[Piece]()
        putting: asyncio.Future[bool] | None = None
        item = Piece(0, 0)
        pace = _SeedPace()
        try:
            while not self.done:
                await self._ask(seed, asked, pace)
                if not asked and putting is None:
                    await self._until_changed(_LEAST_PATIENCE)
                    continue
                data = b""
                began = self._clock()
                if asked:
                    data = await seed.take(self._size(asked[0]))
                    self.received_bytes += len(data)
                    pace.took(self._clock() - began)
                # One chunk is compared and written while the next one comes.
                if putting is not None:
                    self._put(seed, item, right=await putting)
                    putting = None
                if asked:
                    item = asked.popleft()
                    putting = self._write(item, data)
        except SeederError as failure:
            self._failed(seed.node, failure)
        finally:
            self._board.lost(seed.node, asked)
            if putting is not None:
                await asyncio.wait({putting})
                if not putting.cancelled() and putting.exception() is None and putting.result():
                    self._board.got(item)
                else:
                    self._board.lost(seed.node, [item])
            self._changed.set()
            seed.close()

    def close(self) -> None:
        """End the threads."""
        self._cancel.set()
        self._writers.shutdown(wait=True, cancel_futures=True)

    def _write(self, item: Piece, data: bytes) -> asyncio.Future[bool]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._writers, self._files[item.file].put, item.chunk, data)

    def _size(self, item: Piece) -> int:
        begin, end = self._files[item.file].chunks.span(item.chunk)
        return end - begin

    async def _ask(self, seed: SeederClient, asked: deque[Piece], pace: "_SeedPace") -> None:
        while len(asked) < pace.ahead:
            item = self._board.next(seed.node, self._clock(), pace.patience)
            if item is None:
                return
            asked.append(item)
            await seed.want(*item)

    def _put(self, seed: SeederClient, item: Piece, *, right: bool) -> None:
        if not right:
            self._board.lost(seed.node, [item])
            raise SeederError("a chunk that it gave is not what it said", liar=True)
        self._board.got(item)
        self._changed.set()
        self._tell()

    async def _until_changed(self, seconds: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    def _tell(self) -> None:
        done = sum(file.done_bytes for file in self._files.values())
        self._on_progress(
            Progress(phase="fetching", done_bytes=done, total_bytes=self._total, fetched_bytes=self.received_bytes)
        )


class _SeedPace:
    """How fast one seed is, and so how far ahead to ask it."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def took(self, seconds: float) -> None:
        """A chunk took so long."""
        self._seconds = seconds if not self._seconds else 0.7 * self._seconds + 0.3 * seconds

    @property
    def ahead(self) -> int:
        """Chunks to be asked for before the first of them is here."""
        if not self._seconds:
            return _LEAST_AHEAD
        return max(_LEAST_AHEAD, min(_MOST_AHEAD, round(_SECONDS_AHEAD / self._seconds)))

    @property
    def patience(self) -> float:
        """Seconds after which what others were asked for is worth asking this one for."""
        return max(_LEAST_PATIENCE, 3 * self._seconds)
