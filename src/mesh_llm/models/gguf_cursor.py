"""A forward reader over the first bytes of a file: buffered, bounded, hashing all that it passes."""

import hashlib
from typing import BinaryIO

from mesh_llm.models.gguf_types import GgufError

_CHUNK = 1 << 20


class Cursor:
    """Reads on from the start of `file`, at most `limit` bytes in all.

    `capped` says why the limit is there: True when the file goes on behind it, False when it is the file's end.
    """

    def __init__(self, file: BinaryIO, limit: int, capped: bool) -> None:
        self._file = file
        self._limit = limit
        self._capped = capped
        self._buffer = b""
        self._at = 0
        self._start = 0
        self._hash = hashlib.blake2b(digest_size=32)

    @property
    def position(self) -> int:
        """Bytes consumed so far."""
        return self._start + self._at

    @property
    def left(self) -> int:
        """Bytes that may still be read."""
        return self._limit - self.position

    def digest(self) -> bytes:
        """Hash of all bytes consumed so far; call it once, at the end."""
        self._hash.update(self._buffer[: self._at])
        return self._hash.digest()

    def need(self, count: int, what: str) -> None:
        """Raise GgufError unless `count` more bytes can be there."""
        if self.position + count > self._limit:
            if self._capped:
                raise GgufError(f"its header is over {self._limit} bytes")
            raise GgufError(f"the file ends inside {what}", incomplete=True)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if len(self._buffer) - self._at < count:
            self._fill(count)
        taken = self._buffer[self._at : self._at + count]
        self._at += count
        return taken

    def unsigned(self, width: int) -> int:
        """The next `width` bytes as an unsigned little-endian number."""
        return int.from_bytes(self.take(width), "little")

    def skip_hashed(self, count: int, prefix: bytes) -> str:
        """Pass over `count` bytes; the hash of `prefix` and of them, 32 hex digits."""
        digest = hashlib.blake2b(prefix, digest_size=16)
        while count:
            piece = self.take(min(count, _CHUNK))
            digest.update(piece)
            count -= len(piece)
        return digest.hexdigest()

    def skip_strings(self, count: int, prefix: bytes, longest: int, *, keep: bool) -> tuple[str, list[bytes] | None]:
        """Pass over `count` strings, each a 64-bit length and at most `longest` bytes.

        Returns the hash of `prefix` and of them, 32 hex digits; and the strings themselves, if `keep` is set and all
        together have at most `longest` bytes.
        """
        digest = hashlib.blake2b(prefix, digest_size=16)
        kept: list[bytes] | None = [] if keep else None
        room = longest
        mark = self._at
        for _ in range(count):
            # In place while the string lies in the buffer: vocabularies have hundreds of thousands.
            at = self._at
            if at + 8 > len(self._buffer):
                digest.update(self._buffer[mark:at])
                self._fill(8)
                at = mark = 0
            length = int.from_bytes(self._buffer[at : at + 8], "little")
            if length > longest:
                raise GgufError(f"an array has a string of {length} bytes, more than {longest}")
            end = at + 8 + length
            if end > len(self._buffer):
                digest.update(self._buffer[mark:at])
                self._fill(8 + length)
                at = mark = 0
                end = 8 + length
            item = self._buffer[at + 8 : end] if kept is not None else b""
            self._at = end
            if kept is not None:
                kept.append(item)
                room -= len(item)
                if room < 0:
                    kept = None
        digest.update(self._buffer[mark : self._at])
        return digest.hexdigest(), kept

    def _fill(self, count: int) -> None:
        self.need(count, "its header")
        self._hash.update(self._buffer[: self._at])
        self._start += self._at
        rest = self._buffer[self._at :]
        wanted = min(max(count, _CHUNK), self._limit - self._start) - len(rest)
        self._buffer = rest + self._file.read(wanted)
        self._at = 0
        if len(self._buffer) < count:
            raise GgufError("the file ends inside its header", incomplete=True)
