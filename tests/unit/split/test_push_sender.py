"""Tensors on a push stream, and filling behind them for those who take it."""

from mesh_llm.split.worker.transfers import READY, WIDE, PushSender
from mesh_llm.wire.ggml_rpc.tunnel import FILLING, PUSH_HEADER, SESSION_BYTES, TAG_BYTES, Peer

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


async def sent(*sizes: int, fills: bool = True) -> list[tuple[int, int]]:
    receiver = Receiver()

    async def open_push(_address: str, _tunnel: bytes) -> Receiver:
        return receiver

    sender = PushSender(open_push)
    await sender.reach(Peer(0, "w1", bytes(SESSION_BYTES), fills))
    for counter, size in enumerate(sizes, 1):
        await sender.send(0, counter, TAG, bytes(size))
    return receiver.messages()


async def test_filling_follows_what_comes_again() -> None:
    assert await sent(2 << 20, 4096, 4096, 4096) == [
        (1, 2 << 20), (2, 4096), (3, 4096), (FILLING, WIDE * 4096), (4, 4096),
    ]  # fmt: skip


async def test_one_that_does_not_take_filling_gets_none() -> None:
    assert await sent(4096, 4096, 4096, fills=False) == [(1, 4096), (2, 4096), (3, 4096)]
