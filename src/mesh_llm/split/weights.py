"""Weights on this machine's disk, as the tunnel needs them. `models` implements these; the daemon binds them."""

from collections.abc import Iterable
from typing import Protocol


class StoredTensor(Protocol):
    """The content of one tensor in a file."""

    @property
    def digest(self) -> bytes:
        """BLAKE3 of the content, 32 bytes, as it was when the file was indexed."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """Read up to `size` bytes. Blocks. Safe in any thread. Raises OSError."""
        ...


class Weights(Protocol):
    """Tensors on disk, with their digests."""

    def tensor(self, name: str) -> StoredTensor | None:
        """The tensor of this name in the split model."""
        ...

    def holding(self, digest: bytes) -> StoredTensor | None:
        """A tensor with this content, in any file."""
        ...

    def digests(self) -> Iterable[bytes]:
        """All digests."""
        ...

    def known_hash(self, name: str) -> int | None:
        """llama.cpp's hash of this tensor's content (FNV-1a, 64 bits), if it was learned."""
        ...

    def learn_hash(self, name: str, value: int) -> None:
        """Remember llama.cpp's hash of this tensor's content."""
        ...
