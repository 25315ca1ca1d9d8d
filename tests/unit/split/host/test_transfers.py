"""Direct transfers: what is learned, what is not, and handles that go astray."""

import pytest

from mesh_llm.split.host.transfers import DirectTransfers, HandleLeakedError, Transfer
from mesh_llm.wire.ggml_rpc.tensors import plain
from mesh_llm.wire.ggml_rpc.tunnel import push_tag

SIZE = 256
GRAPH, OTHER = b"g" * 32, b"h" * 32
CONTENT = bytes(range(256))


def get_payload(name: bytes = b"l_out-3", address: int = 0x1000) -> memoryview:
    tensor = plain(0, (SIZE // 4, 1, 1, 1), 7, address, name)
    return memoryview(tensor.pack() + bytes(8) + SIZE.to_bytes(8, "little"))


def set_payload(data: bytes, name: bytes = b"RPC1#l_out-3#0", address: int = 0x2000, offset: int = 0) -> memoryview:
    tensor = plain(0, (SIZE // 4, 1, 1, 1), 9, address, name)
    return memoryview(tensor.pack() + b"\0" + offset.to_bytes(8, "little") + data)


def two_workers() -> DirectTransfers:
    """Connections 1 and 2 to workers 0 and 1, which reach each other."""
    pushes = DirectTransfers()
    pushes.connected(1, 0)
    pushes.connected(2, 1)
    pushes.reachable(0, 1, yes=True)
    return pushes


def learn(pushes: DirectTransfers, name: bytes = b"RPC1#l_out-3#0") -> None:
    """One computation in which the engine copies from worker 0 to worker 1."""
    pushes.computes(1, (0, 5), GRAPH)
    get, transfer = pushes.get(1, get_payload())
    assert transfer is None
    pushes.answered(get, bytes(get_payload()), CONTENT)
    assert pushes.set(2, set_payload(CONTENT, name)) is None


def handed_out(pushes: DirectTransfers) -> Transfer:
    """The same graph again: the transfer that its copy becomes."""
    pushes.computes(1, (0, 5), None)
    _, transfer = pushes.get(1, get_payload())
    assert transfer is not None
    return transfer


async def test_a_copy_is_learned_and_becomes_a_transfer() -> None:
    pushes = two_workers()
    learn(pushes)
    for counter in (1, 2, 3):
        transfer = handed_out(pushes)
        assert (transfer.counter, transfer.worker, len(transfer.handle)) == (counter, 1, SIZE)
        assert transfer.tag == push_tag(pushes.key(1), counter, SIZE)
        assert pushes.set(2, set_payload(transfer.handle)) == transfer
        await pushes.settled(pushes.order, 0.1)


async def test_handles_are_never_the_same() -> None:
    handles: set[bytes] = set()
    for _ in range(3):
        pushes = two_workers()
        learn(pushes)
        for _ in range(3):
            transfer = handed_out(pushes)
            handles.add(transfer.handle)
            pushes.set(2, set_payload(transfer.handle))
    assert len(handles) == 9


@pytest.mark.parametrize(
    "name", [b"l_out-3", b"RPC1#l_out-4#0", b"RPC1#l_out-3", b"RPC1#l_out-3#x", b"x#l_out-33#0", b""]
)
async def test_only_the_schedulers_copies_are_learned(name: bytes) -> None:
    pushes = two_workers()
    learn(pushes, name)
    pushes.computes(1, (0, 5), None)
    assert pushes.get(1, get_payload())[1] is None


async def test_other_contents_graphs_turns_and_tensors_are_not_pushed() -> None:
    pushes = two_workers()
    pushes.computes(1, (0, 5), GRAPH)
    get, _ = pushes.get(1, get_payload())
    pushes.answered(get, bytes(get_payload()), CONTENT)
    pushes.set(2, set_payload(CONTENT[::-1]))
    pushes.computes(1, (0, 5), None)
    assert pushes.get(1, get_payload())[1] is None
    learn(pushes)
    pushes.computes(1, (0, 6), OTHER)
    assert pushes.get(1, get_payload())[1] is None
    pushes.computes(1, (0, 5), None)
    assert pushes.get(1, get_payload(address=0x1100))[1] is None
    transfer = handed_out(pushes)
    pushes.set(2, set_payload(transfer.handle))
    # The second time within one computation is another use: for the host itself, as far as is known.
    assert pushes.get(1, get_payload())[1] is None


async def test_several_consumers_are_told_apart_by_their_turn() -> None:
    pushes = two_workers()
    pushes.connected(3, 2)
    pushes.reachable(0, 2, yes=True)
    pushes.computes(1, (0, 5), GRAPH)
    for connection, name in ((2, b"RPC1#l_out-3#0"), (3, b"RPC2#l_out-3#0")):
        get, _ = pushes.get(1, get_payload())
        pushes.answered(get, bytes(get_payload()), CONTENT)
        pushes.set(connection, set_payload(CONTENT, name))
    pushes.computes(1, (0, 5), None)
    for connection, worker in ((2, 1), (3, 2)):
        _, transfer = pushes.get(1, get_payload())
        assert transfer is not None
        assert transfer.worker == worker
        assert pushes.set(connection, set_payload(transfer.handle)) == transfer


async def test_a_handle_in_another_place_ends_everything() -> None:
    for connection, address, offset in ((2, 0x3000, 0), (2, 0x2000, 4), (1, 0x2000, 0)):
        pushes = two_workers()
        learn(pushes)
        with pytest.raises(HandleLeakedError):
            pushes.set(connection, set_payload(handed_out(pushes).handle, address=address, offset=offset))


async def test_a_part_of_a_handle_ends_everything() -> None:
    for start, end, before, after in ((0, -4, b"", b"abcd"), (0, 64, b"", bytes(SIZE - 64)), (0, -16, bytes(16), b"")):
        pushes = two_workers()
        learn(pushes)
        with pytest.raises(HandleLeakedError):
            pushes.set(2, set_payload(before + handed_out(pushes).handle[start:end] + after))


async def test_no_answer_passes_a_handle_that_is_out() -> None:
    pushes = two_workers()
    learn(pushes)
    before = pushes.order
    handed_out(pushes)
    await pushes.settled(before, 0.05)
    with pytest.raises(HandleLeakedError, match="was not used"):
        await pushes.settled(pushes.order, 0.05)


async def test_a_handle_is_used_once() -> None:
    pushes = two_workers()
    learn(pushes)
    transfer = handed_out(pushes)
    pushes.set(2, set_payload(transfer.handle))
    with pytest.raises(HandleLeakedError):
        pushes.set(2, set_payload(transfer.handle))
    with pytest.raises(HandleLeakedError):
        pushes.check_no_handle(bytes(100) + transfer.handle)


async def test_what_was_learned_is_forgotten() -> None:
    pushes = two_workers()
    learn(pushes)
    pushes.reachable(0, 1, yes=False)
    pushes.computes(1, (0, 5), None)
    assert pushes.get(1, get_payload())[1] is None
    for connection, worker in ((1, 0), (2, 1)):
        for freed in (True, False):
            pushes = two_workers()
            learn(pushes)
            if freed:
                pushes.freed(connection)
            else:
                pushes.disconnected(connection)
                pushes.connected(connection, worker)
            pushes.computes(1, (0, 5), None)
            assert pushes.get(1, get_payload())[1] is None
