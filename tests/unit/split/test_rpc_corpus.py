"""Every frame that the pinned engine sends for a real model passes the firewall; the corpus covers the whole engine."""

import json
import subprocess
import sys

import pytest
from tests.support.rpc_corpus import (
    ALLOCATED,
    Recording,
    architectures,
    index,
    new_firewall,
    recordings,
    show,
)

from mesh_llm.engine.embedded.release import VERSION
from mesh_llm.split.buffers import RefusedError
from mesh_llm.wire.ggml_rpc import Command
from mesh_llm.wire.ggml_rpc_frames import FrameError

NOT_SPLIT = {
    "glm5-next": "row numbers are computed from the data as floats, and only the processor's kernel looks at them",
    "minimax-m3": "row numbers are computed from the data as floats, and only the processor's kernel looks at them",
    "qwen4exp": "row numbers are computed from the data as floats, and only the processor's kernel looks at them",
}
"""Architectures with graphs that the firewall refuses; by the reason."""


def refusals(recording: Recording) -> list[tuple[str, str]]:
    """What is refused, and where."""
    firewall = new_firewall(recording)
    found: list[tuple[str, str]] = []
    for number, step in enumerate(recording.steps):
        try:
            show(firewall, step)
        except (RefusedError, FrameError) as error:
            found.append((str(error), f"{recording}, step {number}, command {step.command}"))
    return found


@pytest.mark.parametrize("architecture", [name for name in architectures() if name not in NOT_SPLIT])
def test_real_traffic_passes(architecture: str) -> None:
    found = [f"{where}: {why}" for recording in recordings(architecture) for why, where in refusals(recording)]
    assert not found, "\n".join(found)
    for recording in recordings(architecture):
        commands = {step.command for step in recording.steps}
        assert {ALLOCATED, Command.SET_TENSOR, Command.GRAPH_COMPUTE} <= commands, str(recording)


@pytest.mark.parametrize("architecture", NOT_SPLIT)
def test_what_is_not_split_is_refused(architecture: str) -> None:
    assert any(refusals(recording) for recording in recordings(architecture))


def test_the_corpus_covers_what_the_engine_names() -> None:
    """The engine's own table of architectures: recorded, or listed with the reason."""
    named = subprocess.run([sys.executable, "-m", "tests.rpc_corpus.names"], capture_output=True, check=True)
    listed = index()
    assert sorted(json.loads(named.stdout)) == sorted([*listed.recorded, *listed.not_recorded])
    assert tuple(sorted(listed.recorded)) == architectures()
    assert all(listed.not_recorded.values())


def test_the_corpus_is_of_the_pinned_engine() -> None:
    assert index().engine == VERSION, "run `make rpc-corpus`: the corpus was recorded with another engine"
