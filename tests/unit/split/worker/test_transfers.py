"""Transfers between workers: used once and in order, bounded in memory, and padded so that they leave at once."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.worker import transfers as transfers_module
from mesh_llm.split.worker.transfers import (
    PADDED_TENSORS,
    READY,
    REPAD_SECONDS,
    ForgedError,
    PushSender,
    TransferInbox,
    WindowPadding,
)
from mesh_llm.wire.ggml_rpc.tunnel import (
    KEY_BYTES,
    MAX_PADDING,
    PADDING,
    PUSH_HEADER,
    SESSION_BYTES,
    TAG_BYTES,
    Peer,
    push_tag,
)

KEY = b"k" * KEY_BYTES
SOON = 30.0


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers_module, "MAX_BYTES", 100)


@pytest.fixture
async def scope() -> AsyncIterator[TaskScope]:
    scope = TaskScope("test")
    yield scope
    await scope.close()


def tag(counter: int, size: int) -> bytes:
    return push_tag(KEY, counter, size)


async def turns() -> None:
    """More turns of the loop than anything here needs that does not wait for something else."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_bytes_count_from_the_moment_that_they_may_come(scope: TaskScope) -> None:
    inbox = TransferInbox(KEY)
    await inbox.admit(2, tag(2, 60), 60)
    assert inbox.bytes == 60
    second = scope.spawn(inbox.admit(3, tag(3, 60), 60), "waiting")
    await turns()
    assert not second.done()
    inbox.drop(2)
    await second
    assert inbox.bytes == 60
    inbox.put(3, bytes(60))
    assert inbox.bytes == 60
    assert await inbox.take(3, 60, SOON) == bytes(60)
    assert inbox.bytes == 0


async def test_what_is_asked_for_next_has_room_in_a_full_inbox() -> None:
    inbox = TransferInbox(KEY)
    await inbox.admit(2, tag(2, 100), 100)
    inbox.put(2, bytes(100))
    await inbox.admit(1, tag(1, 70), 70)
    inbox.put(1, bytes(70))
    assert await inbox.take(1, 70, SOON) == bytes(70)
    assert await inbox.take(2, 100, SOON) == bytes(100)
    assert inbox.bytes == 0


async def test_what_is_waited_for_has_room_even_where_the_host_skipped_some(scope: TaskScope) -> None:
    inbox = TransferInbox(KEY)
    await inbox.admit(9, tag(9, 100), 100)
    inbox.put(9, bytes(100))
    waiting = scope.spawn(inbox.take(5, 10, SOON), "waiting")
    await turns()
    await inbox.admit(5, tag(5, 10), 10)
    inbox.put(5, bytes(10))
    assert await waiting == bytes(10)


async def test_what_the_host_brings_waits_for_room_as_well(scope: TaskScope) -> None:
    inbox = TransferInbox(KEY)
    await inbox.rescue(2, tag(2, 60), bytes(60), SOON)
    rescued = scope.spawn(inbox.rescue(3, tag(3, 60), bytes(60), SOON), "waiting")
    await turns()
    assert not rescued.done()
    assert inbox.bytes == 60
    assert await inbox.take(2, 60, SOON) == bytes(60)
    await rescued
    assert inbox.bytes == 60


async def test_what_the_host_brings_far_too_early_is_refused_after_a_while() -> None:
    inbox = TransferInbox(KEY)
    await inbox.rescue(2, tag(2, 100), bytes(100), SOON)
    with pytest.raises(ForgedError, match="long before"):
        await inbox.rescue(3, tag(3, 1), bytes(1), 0.001)
    assert inbox.bytes == 100


async def test_a_duplicate_in_the_same_turn_of_the_loop_leaves_nothing_behind(scope: TaskScope) -> None:
    inbox = TransferInbox(KEY)
    waiting = scope.spawn(inbox.take(1, 4, SOON), "waiting")
    await turns()
    inbox.put(1, b"once")
    # The one that waits has not run yet.
    with pytest.raises(ForgedError, match="twice"):
        inbox.put(1, b"more")
    assert await waiting == b"once"
    assert inbox.bytes == 0


async def test_a_duplicate_that_the_host_brings_in_the_same_turn_leaves_nothing_behind(scope: TaskScope) -> None:
    inbox = TransferInbox(KEY)
    waiting = scope.spawn(inbox.take(1, 4, SOON), "waiting")
    await turns()
    inbox.put(1, b"once")
    await inbox.rescue(1, tag(1, 4), b"more", SOON)
    assert await waiting == b"once"
    assert inbox.bytes == 0


async def test_what_was_brought_while_it_came_is_used_and_the_late_one_refused() -> None:
    inbox = TransferInbox(KEY)
    await inbox.admit(1, tag(1, 4), 4)
    await inbox.rescue(1, tag(1, 4), b"host", SOON)
    with pytest.raises(ForgedError, match="twice"):
        inbox.put(1, b"late")
    assert await inbox.take(1, 4, SOON) == b"host"
    assert inbox.bytes == 0


async def test_the_same_transfer_does_not_come_on_two_streams() -> None:
    inbox = TransferInbox(KEY)
    await inbox.admit(1, tag(1, 4), 4)
    with pytest.raises(ForgedError, match="twice"):
        await inbox.admit(1, tag(1, 4), 4)


async def test_what_the_host_passes_over_is_not_kept() -> None:
    inbox = TransferInbox(KEY)
    for counter in (1, 2, 3):
        await inbox.admit(counter, tag(counter, 10), 10)
        inbox.put(counter, bytes(10))
    assert await inbox.take(3, 10, SOON) == bytes(10)
    assert inbox.bytes == 0


async def test_a_transfer_that_the_host_did_not_allow_is_refused() -> None:
    inbox = TransferInbox(KEY)
    for counter, mark, size in ((1, tag(1, 4), 5), (2, tag(1, 4), 4), (1, bytes(16), 4)):
        with pytest.raises(ForgedError, match="not allowed"):
            await inbox.admit(counter, mark, size)
        with pytest.raises(ForgedError, match="not allowed"):
            await inbox.rescue(counter, mark, bytes(size), SOON)
    assert inbox.bytes == 0


async def test_the_inbox_takes_what_the_host_allowed_once() -> None:
    inbox = TransferInbox(KEY)
    inbox.check(1, push_tag(KEY, 1, 3), 3)
    inbox.put(1, b"abc")
    with pytest.raises(ForgedError, match="twice"):
        inbox.put(1, b"abc")
    assert await inbox.take(1, 3, 1) == b"abc"
    with pytest.raises(ForgedError, match="twice"):
        inbox.check(1, push_tag(KEY, 1, 3), 3)
    with pytest.raises(ForgedError, match="twice"):
        await inbox.take(1, 3, 1)
    await inbox.rescue(1, push_tag(KEY, 1, 3), b"abc", SOON)


@pytest.mark.parametrize(("counter", "size", "key"), [(2, 3, KEY), (1, 4, KEY), (1, 3, b"x" * 32)])
async def test_the_inbox_refuses_forgeries(counter: int, size: int, key: bytes) -> None:
    inbox = TransferInbox(KEY)
    with pytest.raises(ForgedError, match="not allowed"):
        inbox.check(1, push_tag(key, counter, size), 3)
    with pytest.raises(ForgedError, match="not allowed"):
        await inbox.rescue(1, push_tag(key, counter, size), b"abc", SOON)


async def test_the_inbox_does_not_wait_for_ever() -> None:
    with pytest.raises(TimeoutError):
        await TransferInbox(KEY).take(1, 3, 0.02)


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
            assert tag == (bytes(TAG_BYTES) if counter == PADDING else TAG)
            found.append((counter, size))
            at += PUSH_HEADER.size + size
        assert at == len(self.written)
        return found


async def sent(*sizes: int, takes_padding: bool = True) -> list[tuple[int, int]]:
    receiver = Receiver()

    async def open_push(_address: str, _tunnel: bytes) -> Receiver:
        return receiver

    sender = PushSender(open_push)
    await sender.connect(Peer(0, "w1", bytes(SESSION_BYTES), takes_padding))
    for counter, size in enumerate(sizes, 1):
        await sender.send(0, counter, TAG, bytes(size))
    return receiver.messages()


async def test_filling_follows_what_comes_again() -> None:
    assert await sent(2 << 20, 4096, 4096, 4096) == [
        (1, 2 << 20), (2, 4096), (3, 4096), (PADDING, PADDED_TENSORS * 4096), (4, 4096),
    ]  # fmt: skip


async def test_one_that_does_not_take_filling_gets_none() -> None:
    assert await sent(4096, 4096, 4096, takes_padding=False) == [(1, 4096), (2, 4096), (3, 4096)]


def test_filling_follows_what_comes_a_second_time() -> None:
    window = WindowPadding()
    assert [window.padding(4096, at) for at in (0.0, 0.1, 0.2)] == [0, PADDED_TENSORS * 4096, 0]


def test_what_comes_once_is_not_followed_by_filling() -> None:
    window = WindowPadding()
    assert [window.padding(size, 0.0) for size in (28_672, 4096, 8192, 12_288)] == [0, 0, 0, 0]


def test_smaller_ones_need_no_more_than_there_is() -> None:
    window = WindowPadding()
    window.padding(4096, 0.0)
    window.padding(4096, 0.0)
    assert [window.padding(2000, 0.1), window.padding(2000, 0.2)] == [0, 0]


def test_a_window_is_filled_again_after_a_while() -> None:
    window = WindowPadding()
    window.padding(4096, 0.0)
    window.padding(4096, 1.0)
    assert window.padding(4096, 1.0 + REPAD_SECONDS / 2) == 0
    assert window.padding(4096, 1.0 + REPAD_SECONDS) == PADDED_TENSORS * 4096


def test_large_ones_fill_it_themselves() -> None:
    window = WindowPadding()
    assert [window.padding(MAX_PADDING, at) for at in (0.0, 1.0, 2.0)] == [0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 1 << 22), st.floats(0.0, 5.0)), max_size=200))
def test_it_is_bounded_and_seldom(steps: list[tuple[int, float]]) -> None:
    window, now, filled = WindowPadding(), 0.0, list[tuple[float, int]]()
    for size, wait in steps:
        now += wait
        padding = window.padding(size, now)
        assert 0 <= padding <= MAX_PADDING
        if padding:
            # More than the last one, or long after it.
            assert not filled or padding > filled[-1][1] or now >= filled[-1][0] + REPAD_SECONDS
            filled.append((now, padding))
