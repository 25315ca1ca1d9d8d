"""What is kept of an answer while it passes: its beginning and its tail, from which its usage is learned at the end."""

import re
from collections import deque

import msgspec

_NUMBERS = re.compile(
    rb'"(prompt_n|cache_n|predicted_n|predicted_ms'
    rb"|prompt_tokens|completion_tokens|cached_tokens"
    rb'|input_tokens|output_tokens|cache_read_input_tokens)"\s*:\s*(\d+(?:\.\d+)?)'
)

_BEGINNING = 2048


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


class Transcript:
    """Takes every piece of an answer's body; keeps its beginning and the last `limit` bytes or little more.

    Nothing is parsed while the answer passes. llama-server tells usage and timings in the last event of a stream, or
    in the JSON itself; `/v1/messages` tells the prompt's part in its first event.
    """

    __slots__ = ("_first", "_kept", "_limit", "_tail", "size")

    def __init__(self, limit: int = 16 * 1024) -> None:
        self._limit = limit
        self._first = b""
        self._tail: deque[bytes] = deque()
        self._kept = 0
        self.size = 0
        """Bytes taken in all."""

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        tail = self._tail
        if not self.size:
            self._first = data[:_BEGINNING]
        self.size += len(data)
        self._kept += len(data)
        tail.append(data)
        while self._kept - len(tail[0]) >= self._limit:
            self._kept -= len(tail.popleft())

    @property
    def between_events(self) -> bool:
        """The body so far ends where a server-sent event ends, or has not begun."""
        return not self._tail or self._tail[-1].endswith((b"\n\n", b"\r\n\r\n"))

    def usage(self) -> Usage:
        """Read the engine's last word on tokens out of what was kept."""
        kept = b"\n".join((self._first, b"".join(self._tail)))
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
