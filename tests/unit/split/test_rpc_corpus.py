"""Every frame that the pinned engine sends for a real model passes the firewall; the corpus covers the whole engine."""

import json
import subprocess
import sys

import pytest
from tests.support.rpc_corpus import (
    ALLOCATED,
    Recording,
    architectures,
    every_recording,
    index,
    new_firewall,
    recordings,
    show,
)

from mesh_llm.engine.embedded.release import VERSION
from mesh_llm.split.buffers import RefusedError
from mesh_llm.wire.ggml_rpc import Command
from mesh_llm.wire.ggml_rpc_frames import FrameError

REFUSED_TODAY: set[str] = set()
"""Refusals of real frames that are known and not mended yet."""


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


@pytest.mark.parametrize("architecture", architectures())
def test_real_traffic_passes(architecture: str) -> None:
    found = [
        f"{where}: {why}"
        for recording in recordings(architecture)
        for why, where in refusals(recording)
        if why not in REFUSED_TODAY
    ]
    assert not found, "\n".join(found)


def test_what_is_refused_today_is_still_refused() -> None:
    """The list above holds no more than what is wrong."""
    found = {why for recording in every_recording() for why, _ in refusals(recording)}
    assert found >= REFUSED_TODAY


@pytest.mark.parametrize("architecture", architectures())
def test_each_recording_computes_graphs_in_buffers_of_its_own(architecture: str) -> None:
    for recording in recordings(architecture):
        commands = {step.command for step in recording.steps}
        assert {ALLOCATED, Command.SET_TENSOR, Command.GRAPH_COMPUTE, Command.GET_TENSOR} <= commands, recording


def test_the_corpus_covers_what_the_engine_names() -> None:
    """The engine's own table of architectures: recorded, or listed with the reason."""
    named = subprocess.run([sys.executable, "-m", "tests.rpc_corpus.names"], capture_output=True, check=True)
    listed = index()
    assert sorted(json.loads(named.stdout)) == sorted([*listed.recorded, *listed.not_recorded])
    assert tuple(sorted(listed.recorded)) == architectures()
    assert all(listed.not_recorded.values())


def test_the_corpus_is_of_the_pinned_engine() -> None:
    assert index().engine == VERSION, "run `make rpc-corpus`: the corpus was recorded with another engine"
