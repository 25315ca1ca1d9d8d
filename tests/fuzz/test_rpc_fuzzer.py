"""The long run of `make fuzz` in short, and that it would see something."""

import random
import struct

import pytest
from tests.fuzz.rpc_fuzzer import BUFFERS, FindingError, Fuzzer, Judge

from mesh_llm.wire.ggml_rpc import Command
from mesh_llm.wire.ggml_rpc_tensor import plain

SECONDS = 25.0


@pytest.mark.timeout(240)
def test_nothing_reaches_what_it_must_not() -> None:
    tally = Fuzzer(random.SystemRandom().randrange(1 << 32)).run(SECONDS)
    print(tally)
    assert tally.streams > 200
    # Most streams are damaged, and some of what is in them is sound: else the fuzzer tries nothing.
    assert tally.streams * 0.3 < tally.refused < tally.streams
    assert tally.passed > tally.streams * 0.1
    assert len(tally.kinds) > 15


def test_the_judge_sees_what_a_firewall_would_have_missed() -> None:
    pointer, base, size = BUFFERS[0]
    judge = Judge()
    inside = plain(0, (4, 1, 1, 1), pointer, base).pack()
    judge.judge(Command.GET_TENSOR, memoryview(inside + struct.pack("<QQ", 0, 16)), 0)
    for bad in (
        inside + struct.pack("<QQ", 8, 16),
        plain(0, (4, 1, 1, 1), pointer, base + size - 8).pack() + struct.pack("<QQ", 0, 16),
        plain(0, (4, 1, 1, 1), 0, base).pack() + struct.pack("<QQ", 0, 16),
    ):
        with pytest.raises(FindingError):
            judge.judge(Command.GET_TENSOR, memoryview(bad), 0)
    with pytest.raises(FindingError):
        judge.judge(Command.COMM_INIT, memoryview(bytes(80)), 0)
