"""What is kept of an answer while it passes: for its usage a beginning and a tail; all of it where it may be continued.

Nothing is parsed while an answer passes.
"""

import re
from collections import deque

import msgspec

_NUMBERS = re.compile(
    rb'"(prompt_n|cache_n|predicted_n|predicted_ms'
    rb"|prompt_tokens|completion_tokens|cached_tokens"
    rb'|input_tokens|output_tokens|cache_read_input_tokens)"\s*:\s*(\d+(?:\.\d+)?)'
)

_BEGINNING = 2048
_TAIL = 16 * 1024
_BLOCK = 64 * 1024
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one answer, as the engine counted them; 0 where it did not say.

    Attributes:
        prompt: tokens of the prompt, cached ones included.
        cached: those of them that the engine still had in its cache.
        generated: tokens of the answer.
        seconds: time spent on generating them; 0.0 unknown.
    """

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    seconds: float = 0.0


class Room:
    """Memory for the answers that are kept whole, shared by all of them."""

    def __init__(self, most_each: int, most: int) -> None:
        """`most_each`: bytes of one answer; `most`: of all, beyond the first block of each."""
        self.most_each = most_each
        self.free = most

    def take(self, size: int) -> bool:
        """Whether there is room for `size` bytes more; they are taken then."""
        if size > self.free:
            return False
        self.free -= size
        return True

    def give_back(self, size: int) -> None:
        """They are not needed any more."""
        self.free += size


class Transcript:
    """Takes every piece of an answer's body; keeps its beginning and the last `limit` bytes or little more.

    With a room it keeps all, while there is room; `close` gives that back. llama-server tells usage and timings in the
    last event of a stream, or in the JSON itself; `/v1/messages` tells the prompt's part in its first event.
    """

    __slots__ = ("_blocks", "_first", "_limit", "_room", "_tail", "_tail_size", "_taken", "size")

    def __init__(self, limit: int = _TAIL, room: Room | None = None) -> None:
        self._limit = limit if room is None else _BLOCK
        self._room = room
        self._taken = 0
        self._first = b""
        self._blocks: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self.size = 0
        """Bytes taken in all."""

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        if not self.size:
            self._first = data[:_BEGINNING]
        size = len(data)
        self.size += size
        self._tail_size += size
        self._tail.append(data)
        if self._tail_size >= self._limit:
            self._full()

    def _full(self) -> None:
        tail, room = self._tail, self._room
        if room is not None:
            if self._taken + self._tail_size <= room.most_each and room.take(self._tail_size):
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
        """Give the room back; from now on the tail is kept only."""
        if self._room is not None:
            self._tail.extendleft(self._blocks[-1:])
            self._tail_size = sum(map(len, self._tail))
            self._room.give_back(self._taken)
            self._room, self._taken, self._limit = None, 0, _TAIL
            self._blocks.clear()

    @property
    def between_events(self) -> bool:
        """The body so far ends where a server-sent event ends, or has not begun."""
        pieces = self._tail or self._blocks
        return not pieces or pieces[-1].endswith(_EVENT_ENDS)

    def _end(self) -> bytes:
        """The last bytes, at least as many as hold the engine's last word."""
        pieces: list[bytes] = []
        size = 0
        for piece in (*reversed(self._tail), *self._blocks[-1:]):
            pieces.append(piece[-_TAIL:])
            size += len(piece)
            if size >= _TAIL:
                break
        return b"".join(reversed(pieces))

    def usage(self) -> Usage:
        """Read the engine's last word on tokens out of what was kept."""
        kept = b"\n".join((self._first, self._end()))
        found = {name: float(value) for name, value in _NUMBERS.findall(kept)}

        def number(*names: bytes) -> int:
            return int(next((found[name] for name in names if name in found), 0))

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
            generated=number(b"predicted_n", b"completion_tokens", b"output_tokens"),
            seconds=found.get(b"predicted_ms", 0.0) / 1000.0,
        )


class EventCutter:
    """Lets whole server-sent events through, so that a client never holds a part of one whose source is lost."""

    __slots__ = ("_held",)

    _MOST_HELD = 1024 * 1024

    def __init__(self) -> None:
        self._held = b""

    def cut(self, data: bytes) -> bytes:
        """Take the next bytes; return those up to the end of an event, with what was held back before."""
        if self._held:
            data = self._held + data
        if data.endswith(_EVENT_ENDS):
            self._held = b""
            return data
        end = max(data.rfind(ending) + len(ending) if ending in data else 0 for ending in _EVENT_ENDS)
        if len(data) - end > self._MOST_HELD:
            end = len(data)
        self._held = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """What is held back."""
        rest, self._held = self._held, b""
        return rest
