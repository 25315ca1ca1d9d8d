"""One child's output on disk, bounded in size, and its last lines in memory."""

import re
from collections import deque
from pathlib import Path

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LONGEST_LINE = 2000

MAX_BYTES = 4 * 1024 * 1024
BACKUPS = 2


def log_name(name: str) -> str:
    """A file name for the log of something that a user or a model named."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:80] or "engine"


class LogFile:
    """Appends bytes to `path`; at `max_bytes` it becomes `path.1`, and so on up to `backups`."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, backups: int = BACKUPS) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._backups = backups
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()

    def write(self, data: bytes) -> None:
        """Append; the files together never pass `max_bytes * (backups + 1)`."""
        for start in range(0, len(data), self._max_bytes):
            part = data[start : start + self._max_bytes]
            if self._size and self._size + len(part) > self._max_bytes:
                self._rotate()
            self._file.write(part)
            self._size += len(part)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        for number in range(self._backups, 0, -1):
            older = self._numbered(number)
            newer = self.path if number == 1 else self._numbered(number - 1)
            if newer.exists():
                newer.replace(older)
        self._file = self.path.open("wb", buffering=0)
        self._size = 0

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


class Tail:
    """The last lines of a byte stream, as text without terminal colours."""

    def __init__(self, lines: int = 40) -> None:
        self._lines: deque[str] = deque(maxlen=lines)
        self._partial = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the lines that they completed."""
        *whole, rest = (self._partial + data).split(b"\n")
        # A line without an end must not grow without bound.
        self._partial = rest[-_LONGEST_LINE:]
        for line in whole:
            self._keep(line)
        return whole

    def finish(self) -> None:
        """The stream has ended: an unfinished line counts as one."""
        self._keep(self._partial)
        self._partial = b""

    def text(self, lines: int = 12) -> str:
        """The last non-empty lines."""
        return "\n".join(list(self._lines)[-lines:])

    def _keep(self, line: bytes) -> None:
        text = _ANSI.sub("", line[:_LONGEST_LINE].decode(errors="replace")).rstrip()
        if text:
            self._lines.append(text)
