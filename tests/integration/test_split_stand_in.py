"""Stand-ins (bench/split/stand_in.py) send what real engines send, and take the time that is set."""

import time
from pathlib import Path
from typing import Any

import pytest
from bench.split.requests import read_prompt
from bench.split.stand_in import Pace, StandInSource, build
from tests.integration.engine_fixtures import CACHE, Model, client_of, embedded, model, rpc_embedded, supervisor
from tests.integration.split_fixtures import split

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.split.host.worker_info import WorkerStats

__all__ = ["embedded", "model", "rpc_embedded", "supervisor"]

_TOKENS, _BATCH = 400, 128


async def traffic(supervisor: Supervisor, source: EmbeddedSource, path: Path) -> tuple[WorkerStats, dict[str, Any]]:
    """What a host and two workers exchange for a prompt, after a first one."""
    async with split(supervisor, source, path, 2) as group:
        engine = await group.start(path, gpu_layers=5, batch=_BATCH, micro_batch=_BATCH)
        await read_prompt(client_of(engine), _TOKENS, 1)
        before = group.host.stats().total
        answer = await read_prompt(client_of(engine), _TOKENS, 2)
        stats = group.host.stats().total.minus(before)
        await engine.stop()
    return stats, answer


async def test_a_stand_in_exchanges_what_a_real_engine_does_and_takes_the_time_that_is_set(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    path = model("small")
    real, _ = await traffic(supervisor, rpc_embedded, path)
    facts = read_facts([read_header(path)], path.stem)
    # Both engines, and the host, are one machine here: each waits for the others.
    settings = Pace(prompt=800.0, answer=100.0).settings(facts, _BATCH, tmp_path / "machine")
    began = time.monotonic()
    shown, answer = await traffic(supervisor, StandInSource(CACHE, build(tmp_path), settings), path)
    counted = ("requests", "round_trips", "graphs", "pushed", "relayed", "rescued")
    assert {name: getattr(shown, name) for name in counted} == {name: getattr(real, name) for name in counted}
    assert shown.bytes_sent == pytest.approx(real.bytes_sent, rel=0.02)
    assert shown.bytes_received == pytest.approx(real.bytes_received, rel=0.02)
    # Of the last layer only the last token is computed whole; the last micro-batch is a part of one.
    assert answer["prompt_ms"] >= 0.85 * _TOKENS / 800.0 * 1e3
    assert time.monotonic() - began >= 2 * 0.85 * _TOKENS / 800.0
