"""Every frame that the pinned engine sends for a real model passes the firewall; the corpus covers the whole engine."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tests.rpc_corpus.recorder import Seen, steps
from tests.support.rpc_corpus import (
    ALLOCATED,
    Recording,
    architectures,
    each_architecture,
    index,
    load,
    new_firewall,
    recordings,
    save,
    show,
)

from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.split.firewall.memory import RefusedError
from mesh_llm.wire.ggml_rpc.protocol import V8, Command, FrameError
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, OPERATORS, Graph, pack_graph, parse_graph, plain

COMPUTED_ROWS = ("glm5-next", "minimax-m3", "qwen4exp")
"""Architectures that compute row numbers as floats: only the processor's own kernels are lent to them, which look."""


def refusals(recording: Recording, *, reference_kernels: bool = False) -> list[tuple[str, str]]:
    """What is refused, and where."""
    firewall = new_firewall(recording, reference_kernels=reference_kernels)
    found: list[tuple[str, str]] = []
    for number, step in enumerate(recording.steps):
        try:
            show(firewall, step)
        except (RefusedError, FrameError) as error:
            found.append((str(error), f"{recording}, step {number}, command {step.command}"))
    return found


@pytest.mark.parametrize("architecture", each_architecture())
def test_real_traffic_passes(architecture: str) -> None:
    looks = architecture in COMPUTED_ROWS
    found = [
        f"{where}: {why}"
        for recording in recordings(architecture)
        for why, where in refusals(recording, reference_kernels=looks)
    ]
    assert not found, "\n".join(found)
    for recording in recordings(architecture):
        commands = {step.command for step in recording.steps}
        assert {ALLOCATED, Command.SET_TENSOR, Command.GRAPH_COMPUTE} <= commands, str(recording)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", COMPUTED_ROWS)
def test_computed_rows_are_refused_where_no_kernel_looks(architecture: str) -> None:
    why = {why for recording in recordings(architecture) for why, _ in refusals(recording)}
    assert any("the indices" in each for each in why), why


def test_the_corpus_covers_what_the_engine_names() -> None:
    """The engine's own table of architectures: recorded, or listed with the reason."""
    named = subprocess.run([sys.executable, "-m", "tests.rpc_corpus.names"], capture_output=True, check=True)
    listed = index()
    assert sorted(json.loads(named.stdout)) == sorted([*listed.recorded, *listed.not_recorded])
    assert tuple(sorted(listed.recorded)) == architectures()
    assert all(listed.not_recorded.values())


def test_the_corpus_is_of_the_pinned_engine() -> None:
    assert index().engine == VERSION, "run `make rpc-corpus`: the corpus was recorded with another engine"


def seen(buffer: int, base: int, identity: int) -> list[Seen]:
    """A connection: a buffer, a tensor in it that is set, and a graph that doubles it."""
    source = plain(0, (4, 2, 1, 1), buffer, base + 128, b"x")._replace(id=identity)
    scale = OPERATORS["scale"]
    target = source._replace(
        id=identity + 7,
        op=scale,
        sources=(identity, *[0] * 9),
        flags=COMPUTE_FLAG,
        data=base + 256,
        name=b"RPC0[127.0.0.1:40000]#y#0",
    )
    graph = pack_graph(Graph(0, identity, (target.id,), (source, target)), V8)
    return [
        Seen(Command.ALLOC_BUFFER, struct.pack("<IQ", 0, 4096), struct.pack("<QQ", buffer, 4096)),
        Seen(Command.BUFFER_GET_BASE, struct.pack("<Q", buffer), struct.pack("<Q", base)),
        Seen(Command.SET_TENSOR, source.pack() + bytes(9) + bytes(32)),
        Seen(Command.GRAPH_COMPUTE, graph),
        Seen(Command.GRAPH_RECOMPUTE, struct.pack("<IQ", 0, identity)),
        Seen(Command.FREE_BUFFER, struct.pack("<Q", buffer)),
    ]


def test_a_recording_does_not_depend_on_where_things_lay(tmp_path: Path) -> None:
    one, other = steps(seen(0x1000, 0x7F0000, 99)), steps(seen(0x55550000, 0x123400, 0x9999))
    assert one == other
    graph = parse_graph(one[3].payload, V8)
    assert [tensor.data - one[1].buffer.base for tensor in graph.tensors] == [128, 256]
    assert graph.tensors[1].sources[0] == graph.tensors[0].id
    assert one[2].left_out == 32
    recording = Recording("made", "up", "8.0.0", one)
    save("made", [recording], tmp_path)
    assert load(tmp_path / "made.xz") == (recording,)
    assert not refusals(recording)
