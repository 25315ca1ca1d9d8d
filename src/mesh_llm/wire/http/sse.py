"""An incremental parser of server-sent events (WHATWG HTML, section 9.2.6), with a bound on the size of an event."""

import msgspec


class SseError(Exception):
    """An event exceeds the bound, or is not UTF-8."""


class SseEvent(msgspec.Struct, frozen=True):
    """One event. `event` is its type, or empty; `data` its lines, joined by line feeds."""

    data: str
    event: str = ""
    id: str = ""


class SseParser:
    """Turns bytes into events. Drops an event without data, as browsers do, and an incomplete last one."""

    def __init__(self, limit: int = 1024 * 1024) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0
        self._data: list[bytes] = []
        self._size = 0
        self._event = b""
        self._id = b""
        self._first = True

    @property
    def inside(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._buffer or self._data or self._event)

    def feed(self, data: bytes) -> list[SseEvent]:
        """Parse the next bytes; return the events that they complete.

        Raises:
            SseError: an event is larger than the limit, or is not UTF-8.
        """
        self._buffer += data
        events: list[SseEvent] = []
        for line in self._lines():
            if line:
                self._field(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        if self._size + len(self._buffer) > self._limit:
            raise SseError("an event is larger than is accepted")
        return events

    def _lines(self) -> list[bytes]:
        """Cut complete lines off the buffer. A CR at its end waits, because an LF may follow."""
        lines: list[bytes] = []
        buffer = self._buffer
        start, position = 0, self._scanned
        while True:
            line_feed = buffer.find(b"\n", position)
            carriage_return = buffer.find(b"\r", position, line_feed if line_feed >= 0 else len(buffer))
            end = carriage_return if carriage_return >= 0 else line_feed
            if end < 0 or (end == carriage_return and end + 1 == len(buffer)):
                break
            lines.append(bytes(buffer[start:end]))
            start = position = end + (2 if buffer.startswith(b"\r\n", end) else 1)
        del buffer[:start]
        self._scanned = len(buffer) - (1 if buffer.endswith(b"\r") else 0)
        if self._first and lines:
            self._first = False
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        return lines

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value) + 1
            if self._size > self._limit:
                raise SseError("an event is larger than is accepted")
        elif name == b"event":
            self._event = value
        elif name == b"id" and b"\0" not in value:
            self._id = value

    def _dispatch(self) -> SseEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._size = [], b"", 0
        if not data:
            return None
        try:
            return SseEvent(data=b"\n".join(data).decode(), event=event.decode(), id=self._id.decode())
        except UnicodeDecodeError:
            raise SseError("an event is not UTF-8") from None
