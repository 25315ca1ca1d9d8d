"""What the split room needs of others, by shape: streams to other nodes, weights on disk, an rpc-server to run."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from mesh_llm.core.types.ports import ByteStream

OpenStream = Callable[[bytes], Awaitable[ByteStream]]
"""Opens an RPC stream to one worker; the argument travels in its header. Raises ConnectionError or MeshError."""

OpenPush = Callable[[str, bytes], Awaitable[ByteStream]]
"""Opens a PUSH stream to the worker at an address; the second argument travels in its header. Raises the same."""


Pace = Callable[[int], Awaitable[None]]
"""Returns when so many bytes more may be sent."""


async def unlimited(_: int) -> None:
    """A Pace: at once."""


class StoredTensor(Protocol):
    """The content of one tensor in a file on this machine."""

    @property
    def digest(self) -> bytes:
        """BLAKE3 of the content, 32 bytes, as it was when it was computed."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """Read as much as there is, up to `size` bytes. Blocks. Safe in any thread. Raises OSError."""
        ...


class Weights(Protocol):
    """Tensors on this machine's disk, with digests."""

    def tensor(self, name: str) -> StoredTensor | None:
        """The tensor of this name in the model at hand."""
        ...

    def holding(self, digest: bytes) -> StoredTensor | None:
        """A tensor with this content, in whatever file."""
        ...

    def digests(self) -> Iterable[bytes]:
        """All of them."""
        ...

    def known_hash(self, name: str) -> int | None:
        """The hash by which llama.cpp names this tensor's content (FNV-1a, 64 bits), where it was learned."""
        ...

    def learn_hash(self, name: str, value: int) -> None:
        """The content of this tensor was seen to have this hash."""
        ...


class Arriving(Protocol):
    """A tensor that is being kept. Blocks, in any one thread at a time. Ended by `keep` or `drop`, once."""

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes. Raises OSError."""
        ...

    def keep(self, digest: bytes) -> None:
        """It is whole, and has this BLAKE3. Raises OSError."""
        ...

    def drop(self) -> None:
        """It is not wanted. Raises OSError."""
        ...


class Keep(Protocol):
    """Where a worker keeps what its host sends of a model that is not on this machine's disk."""

    def begin(self, size: int) -> Arriving | None:
        """Take a tensor of so many bytes; None: there is no room, or another one is coming. Raises OSError."""
        ...

    def forget(self, digest: bytes) -> None:
        """What was kept as this is not that any more. Blocks. Raises OSError."""
        ...


class RpcServer(Protocol):
    """A running rpc-server of this machine, for one session."""

    @property
    def address(self) -> str:
        """Its `unix:PATH`, or `host:port`."""
        ...

    @property
    def reference(self) -> bool:
        """Whether it computes on the processor with the kernels that the firewall's rules were read from."""
        ...

    async def ended(self) -> str:
        """Wait for its end; why it ended."""
        ...

    async def stop(self) -> None:
        """End it. Idempotent."""
        ...


LaunchRpcServer = Callable[[], Awaitable[RpcServer]]
"""Starts one that is ready. Raises MeshError."""
