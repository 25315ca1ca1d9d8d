"""A push stream is made wide enough for a token's tensor once, and never more than it may be."""

import pytest

from mesh_llm.split.push_sender import READY, PushSender
from mesh_llm.wire.ggml_rpc_tunnel import FILLING, MAX_FILLING, PUSH_HEADER, SESSION_BYTES, TAG_BYTES, Peer

TAG = b"t" * TAG_BYTES


class Receiver:
    """The other end's stream; keeps what is written."""

    def __init__(self) -> None:
        self.written = bytearray()

    async def read(self, limit: int) -> bytes:
        return READY[:limit]

    async def write(self, data: bytes) -> None:
        self.written += data

    async def finish(self) -> None: ...

    def abort(self) -> None: ...

    def messages(self) -> list[tuple[int, int]]:
        """Counter and size of each."""
        found: list[tuple[int, int]] = []
        at = 0
        while at < len(self.written):
            counter, tag, size = PUSH_HEADER.unpack_from(self.written, at)
            assert tag == (bytes(TAG_BYTES) if counter == FILLING else TAG)
            found.append((counter, size))
            at += PUSH_HEADER.size + size
        assert at == len(self.written)
        return found


async def sent(*sizes: int) -> list[tuple[int, int]]:
    receiver = Receiver()

    async def open_push(_address: str, _tunnel: bytes) -> Receiver:
        return receiver

    sender = PushSender(open_push)
    await sender.reach(Peer(0, "w1", bytes(SESSION_BYTES)))
    for counter, size in enumerate(sizes, 1):
        await sender.send(0, counter, TAG, bytes(size))
    return receiver.messages()


async def test_filling_follows_the_first_tensor_of_a_size_only() -> None:
    assert await sent(4096, 4096, 2000, 8192) == [
        (1, 4096), (FILLING, 7 * 4096), (2, 4096), (3, 2000), (4, 8192), (FILLING, 8 * 8192 - 8 * 4096),
    ]  # fmt: skip


async def test_a_prompts_tensor_fills_the_stream_by_itself() -> None:
    assert await sent(2 << 20, 4096) == [(1, 2 << 20), (2, 4096)]


@pytest.mark.parametrize("sizes", [(60_000,), (16_384, 20_000, 4096, 100_000), (1, 2, 3, 500_000)])
async def test_a_receiver_that_bounds_filling_takes_it(sizes: tuple[int, ...]) -> None:
    assert sum(size for counter, size in await sent(*sizes) if counter == FILLING) <= MAX_FILLING
