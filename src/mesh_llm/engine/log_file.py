"""One child's output on disk, bounded in size, and its last lines in memory."""

import re
from collections import deque
from io import FileIO
from pathlib import Path

from mesh_llm.runtime.supervision import WriteHealth

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LONGEST_LINE = 2000

MAX_BYTES = 4 * 1024 * 1024
BACKUPS = 2


def log_name(name: str) -> str:
    """A file name for the log of something that a user or a model named."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:80] or "engine"


class LogFile:
    """Appends bytes to `path`; at `max_bytes` it becomes `path.1`, and so on up to `backups`.

    Writing never raises: what a full disk, or a lack of descriptors, does not take is dropped, and a line says so as
    soon as there is room.
    """

    def __init__(
        self, path: Path, max_bytes: int = MAX_BYTES, backups: int = BACKUPS, *, must_open: bool = False
    ) -> None:
        """`must_open`: raise OSError where it cannot be opened now; else that is tried again at each write."""
        self.path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._file: FileIO | None = None
        self._size = 0
        self._closed = False
        self._dropped = 0
        self._torn = False
        self._health = WriteHealth(f"the log {path.name}", "What it would say is lost meanwhile.")
        try:
            self._open()
        except OSError as error:
            if must_open:
                raise
            self._health.failed(error)

    def write(self, data: bytes) -> None:
        """Append; the files together never pass `max_bytes * (backups + 1)`."""
        for start in range(0, len(data), self._max_bytes):
            part = data[start : start + self._max_bytes]
            try:
                self._write(part)
            except OSError as error:
                self._dropped += len(part)
                self._health.failed(error)
            else:
                self._health.wrote()

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._health.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, part: bytes) -> None:
        if self._closed:
            return
        file = self._file or self._open()
        if self._size and self._size + len(part) > self._max_bytes:
            file = self._rotate(file)
        if self._dropped:
            start = "\n" if self._torn else ""
            self._append(file, f"{start}--- {self._dropped} bytes could not be written here\n".encode())
            self._dropped, self._torn = 0, False
        self._append(file, part)

    def _append(self, file: FileIO, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = file.write(view) or 0
            self._size += count
            view = view[count:]
            # The last room on a disk may take a part of a line.
            self._torn = bool(view)

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self._file = FileIO(self.path, "ab")
        self._size = file.seek(0, 2)
        return file

    def _rotate(self, file: FileIO) -> FileIO:
        file.close()
        self._file = None
        for number in range(self._backups, 0, -1):
            older = self._numbered(number)
            newer = self.path if number == 1 else self._numbered(number - 1)
            if newer.exists():
                newer.replace(older)
        return self._open()

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
