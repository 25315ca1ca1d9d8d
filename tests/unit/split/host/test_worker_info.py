"""What the host answers from memory is what the worker said."""

import struct

from mesh_llm.split.host.worker_info import WorkerInfo
from mesh_llm.wire.ggml_rpc.protocol import V8, Command
from mesh_llm.wire.ggml_rpc.tensors import plain
from mesh_llm.wire.ggml_rpc.tunnel import DeviceFacts

FACTS = WorkerInfo(V8, (DeviceFacts(32, 1 << 40, 5, 9), DeviceFacts(64, 1 << 30, 6, 7)))


def size_request(device: int, identity: int, rows: int) -> memoryview:
    tensor = plain(8, (256, rows, 1, 1), 7, identity * 100, b"n%d" % identity)._replace(id=identity)
    return memoryview(struct.pack("<I", device) + tensor.pack() + bytes(296 * 10))


def test_devices() -> None:
    one = memoryview(struct.pack("<I", 1))
    assert FACTS.answer(Command.DEVICE_COUNT, memoryview(b"")) == struct.pack("<I", 2)
    assert FACTS.answer(Command.GET_ALIGNMENT, one) == struct.pack("<Q", 64)
    assert FACTS.answer(Command.GET_MAX_SIZE, one) == struct.pack("<Q", 1 << 30)
    assert FACTS.answer(Command.GET_DEVICE_MEMORY, one) == struct.pack("<QQ", 6, 7)
    assert FACTS.answer(Command.GET_ALIGNMENT, memoryview(struct.pack("<I", 2))) is None


def test_hello_has_no_capabilities() -> None:
    answer = FACTS.answer(Command.HELLO, memoryview(b"\xff" * 24))
    assert answer == bytes([8, 0, 0]) + bytes(25)


def test_allocation_sizes_are_known_by_shape_whatever_the_names_and_addresses() -> None:
    assert FACTS.answer(Command.GET_ALLOC_SIZE, size_request(0, 1, 4)) is None
    FACTS.learn_size(size_request(0, 1, 4))(struct.pack("<Q", 4711))
    assert FACTS.answer(Command.GET_ALLOC_SIZE, size_request(0, 2, 4)) == struct.pack("<Q", 4711)
    assert FACTS.answer(Command.GET_ALLOC_SIZE, size_request(1, 1, 4)) is None
    assert FACTS.answer(Command.GET_ALLOC_SIZE, size_request(0, 1, 5)) is None
