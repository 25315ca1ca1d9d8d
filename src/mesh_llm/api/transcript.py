"""What is kept of an answer while it passes: nothing is parsed before it has ended.

llama-server reports what it counted at the end of an answer; an answer that may be resumed is kept whole.
"""

import re
from collections import deque
from collections.abc import Sequence

from mesh_llm.api.types import Usage

_NUMBERS = re.compile(
    rb'"(prompt_n|prompt_ms|cache_n|predicted_n|predicted_ms|draft_n|draft_n_accepted'
    rb"|prompt_tokens|completion_tokens|cached_tokens"
    rb'|input_tokens|output_tokens|cache_read_input_tokens)"\s*:\s*(\d+(?:\.\d+)?)'
)

_BEGINNING = 2048
_TAIL = 16 * 1024
_BLOCK = 64 * 1024
_MOST_TOKENS = 1 << 26
"""Of one request; a number above it is a lie."""
_PER_BYTE = 16
"""Tokens that are believed for each byte of an answer."""
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")


class MemoryBudget:
    """Memory for the answers that are kept whole, shared by all of them."""

    def __init__(self, max_each: int, total: int) -> None:
        """`max_each`: bytes of one answer; `total`: of all, beyond the first block of each."""
        self.max_each = max_each
        self.free = total

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; False where there are not that many."""
        if size > self.free:
            return False
        self.free -= size
        return True

    def give_back(self, size: int) -> None:
        """Release bytes that were reserved."""
        self.free += size


class Transcript:
    """Records an answer's body while it passes: its beginning and at least its last `limit` bytes.

    With a budget it keeps the whole body while the budget lasts, so that the answer can be resumed; `close` gives the
    memory back. Nothing is parsed while an answer passes. llama-server reports usage and timings in the last event of a
    stream, or in the JSON itself; `/v1/messages` reports the prompt's part in its first event.
    """

    __slots__ = ("_blocks", "_budget", "_first", "_limit", "_tail", "_tail_size", "_taken", "events", "pieces", "size")

    def __init__(self, limit: int = _TAIL, budget: MemoryBudget | None = None) -> None:
        self._limit = limit if budget is None else _BLOCK
        self._budget = budget
        self._taken = 0
        self._first = b""
        self._blocks: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self.size = 0
        """Bytes recorded in all."""
        self.events = 0
        """Server-sent events recorded in all."""
        self.pieces = 0
        """Pieces in which they came."""

    def add(self, data: bytes) -> None:
        """Record the next piece."""
        if not self.size:
            self._first = data[:_BEGINNING]
        size = len(data)
        self.size += size
        if size:
            self.pieces += 1
        self.events += data.count(b"\n\n")
        self._tail_size += size
        self._tail.append(data)
        if self._tail_size >= self._limit:
            self._full()

    def _full(self) -> None:
        tail, budget = self._tail, self._budget
        if budget is not None:
            if self._taken + self._tail_size <= budget.max_each and budget.take(self._tail_size):
                # One block in place of many small pieces, which would take more than their bytes.
                self._taken += self._tail_size
                self._blocks.append(tail[0] if len(tail) == 1 else b"".join(tail))
                tail.clear()
                self._tail_size = 0
                return
            self.close()
        while self._tail_size - len(tail[0]) >= self._limit:
            self._tail_size -= len(tail.popleft())

    @property
    def whole(self) -> bytes | None:
        """The body so far, or None if not all of it was kept."""
        if self._taken + self._tail_size != self.size:
            return None
        return b"".join((*self._blocks, *self._tail))

    def close(self) -> None:
        """Give the budget's memory back; from now on only the tail is kept."""
        if self._budget is not None:
            self._tail.extendleft(self._blocks[-1:])
            self._tail_size = sum(map(len, self._tail))
            self._budget.give_back(self._taken)
            self._budget, self._taken, self._limit = None, 0, _TAIL
            self._blocks.clear()

    @property
    def between_events(self) -> bool:
        """The body so far ends where a server-sent event ends, or has not begun."""
        pieces = self._tail or self._blocks
        return not pieces or pieces[-1].endswith(_EVENT_ENDS)

    def ends_with_any(self, signs: Sequence[bytes]) -> bool:
        """Whether one of these is in what was kept of the answer's end."""
        end = self._end()
        return any(sign in end for sign in signs)

    def usage(self) -> Usage:
        """Find the engine's token counts in what was kept."""
        kept = self._end()
        if self.size > _TAIL or self._tail_size != self.size:
            kept = b"\n".join((self._first, kept))
        found = {name: float(value) for name, value in _NUMBERS.findall(kept)}

        def number(*names: bytes) -> int:
            said = next((found[name] for name in names if name in found), 0.0)
            return int(min(said, _MOST_TOKENS))

        cached = number(b"cache_n", b"cached_tokens", b"cache_read_input_tokens")
        if b"prompt_n" in found:
            prompt = number(b"prompt_n") + cached
        elif b"cache_read_input_tokens" in found:
            prompt = number(b"input_tokens") + cached
        else:
            prompt = number(b"prompt_tokens", b"input_tokens")
        return Usage(
            prompt=prompt,
            cached=cached,
            # A token may be no text at all; but another node's word is not taken for any number of them.
            generated=min(number(b"predicted_n", b"completion_tokens", b"output_tokens"), _PER_BYTE * self.size),
            seconds=found.get(b"predicted_ms", 0.0) / 1000.0,
            guessed=number(b"draft_n"),
            accepted=number(b"draft_n_accepted"),
            prompt_seconds=found.get(b"prompt_ms", 0.0) / 1000.0,
        )

    def _end(self) -> bytes:
        """The last bytes, at least as many as hold the engine's last event."""
        pieces: list[bytes] = []
        size = 0
        for piece in (*reversed(self._tail), *self._blocks[-1:]):
            pieces.append(piece[-_TAIL:])
            size += len(piece)
            if size >= _TAIL:
                break
        return b"".join(reversed(pieces))


class WholeEvents:
    """Lets only whole server-sent events through, so that a lost target never leaves a client with part of one."""

    __slots__ = ("_held",)

    _MAX_HELD = 1024 * 1024

    def __init__(self) -> None:
        self._held = b""

    def cut(self, data: bytes) -> bytes:
        """Take the next bytes; return all up to the last event's end, including what was held back before."""
        if self._held:
            data = self._held + data
        if data.endswith(_EVENT_ENDS):
            self._held = b""
            return data
        end = max(data.rfind(ending) + len(ending) if ending in data else 0 for ending in _EVENT_ENDS)
        if len(data) - end > self._MAX_HELD:
            end = len(data)
        self._held = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """What is held back; it is released."""
        rest, self._held = self._held, b""
        return rest
