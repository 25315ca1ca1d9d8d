"""A short run of `make fuzz-frames`, and proof that its judge detects faults."""

import random
import struct

import pytest
from tests.fuzz.rpc_fuzzer import Fuzzer
from tests.fuzz.rpc_judge import FindingError, Judge
from tests.fuzz.rpc_made import BUFFERS, COMPUTATIONS

from mesh_llm.wire.ggml_rpc.packing import PACKED, PACKED_SET
from mesh_llm.wire.ggml_rpc.protocol import TENSOR_BYTES, Command
from mesh_llm.wire.ggml_rpc.tensors import plain
from mesh_llm.wire.ggml_rpc.tunnel import ALLOC, PACKED_GET, PUSH, REFERENCE, WAIT

SECONDS = 30.0
"""Of each half: a minute of chance in every run, in two tests because those run side by side."""

TRIED = (
    *(ALLOC, REFERENCE, PUSH, WAIT, PACKED, PACKED_SET, PACKED_GET),
    *(Command.SET_TENSOR, Command.GET_TENSOR, Command.SET_TENSOR_2D, Command.GET_TENSOR_2D, Command.MEMSET_TENSOR),
    *(Command.COPY_TENSOR, Command.INIT_TENSOR, Command.GET_ALLOC_SIZE, Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE),
    *(Command.FREE_BUFFER, Command.BUFFER_CLEAR, Command.GET_ALIGNMENT, Command.GET_MAX_SIZE),
    Command.GET_DEVICE_MEMORY,
)
"""All that a worker answers: the tunnel's own commands, and ggml's but one that asks for nothing."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("half", ["first", "second"])
def test_no_request_gets_past_the_rules(half: str) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"{half} half, seed {seed}")
    tally = Fuzzer(seed).run(SECONDS)
    print(tally)
    assert tally.streams > 200
    # Most streams are damaged, but some of their requests are valid. Otherwise the fuzzer tests nothing.
    assert tally.streams * 0.3 < tally.refused < tally.streams
    assert tally.passed > tally.streams * 0.1
    assert len(tally.kinds) > 15


def test_every_command_is_sent_valid_and_damaged() -> None:
    fuzzer = Fuzzer(1)
    for _ in range(6000):
        fuzzer.one_stream()
    assert {command for command in TRIED if fuzzer.tally.let_pass[command] < 5} == set()
    assert {command for command in TRIED if fuzzer.tally.stopped[command] < 5} == set()


def test_the_judge_detects_what_a_firewall_would_have_missed() -> None:
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
    again = struct.pack("<IQ", 0, 7)
    with pytest.raises(FindingError, match="computed again"):
        judge.judge(Command.GRAPH_RECOMPUTE, memoryview(again), 0)
    with pytest.raises(FindingError):
        judge.judge(Command.COMM_INIT, memoryview(bytes(80)), 0)


def test_the_judge_reads_the_rows_that_a_graph_follows() -> None:
    sets, graph = COMPUTATIONS[0][:-1], memoryview(COMPUTATIONS[0][-1][1])
    rows = next(payload for _, payload in sets if payload[:TENSOR_BYTES].find(b"attn_inp_k_idxs") > 0)
    sound = Judge()
    for command, payload in sets:
        sound.judge(command, memoryview(payload), 0)
    sound.judge(Command.GRAPH_COMPUTE, graph, 0)
    far = rows[:-8] + struct.pack("<q", 1 << 20)
    for last, reason in ((far, "row 1048576 of"), (None, "that nobody set")):
        judge = Judge()
        for command, payload in sets:
            if payload != rows:
                judge.judge(command, memoryview(payload), 0)
        if last is not None:
            judge.judge(Command.SET_TENSOR, memoryview(last), 0)
        with pytest.raises(FindingError, match=reason):
            judge.judge(Command.GRAPH_COMPUTE, graph, 0)
