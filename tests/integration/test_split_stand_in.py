"""Stand-ins (bench/split/stand_in.py) send what real engines send, and take the time that is set."""

import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.split.requests import read_prompt
from bench.split.stand_in import Pace, StandInSource, build
from tests.integration.engine_fixtures import CACHE, Model, client_of, embedded, model, rpc_embedded, supervisor
from tests.integration.split_fixtures import split

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.host.worker_info import WorkerStats

__all__ = ["embedded", "model", "rpc_embedded", "supervisor"]

_TOKENS, _BATCH = 400, 128


class Tap:
    """Between the host's engine and its tunnel to one worker: counts the bytes of both directions, as llama.cpp's."""

    def __init__(self, path: Path, endpoint: str) -> None:
        self.path = path
        self._target = endpoint.removeprefix("unix:")
        self.sent = self.received = 0
        self._scope = TaskScope("tap")

    async def start(self) -> str:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return f"unix:{self.path}"

    async def close(self) -> None:
        self._server.close()
        await self._scope.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_unix_connection(self._target)
        for source, target, name in ((reader, ahead, "sent"), (behind, writer, "received")):
            self._scope.spawn(self._carry(source, target, name), name)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, name: str) -> None:
        while data := await source.read(1 << 18):
            setattr(self, name, getattr(self, name) + len(data))
            target.write(data)
            await target.drain()
        target.close()


Bytes = list[tuple[int, int]]
"""Of each worker: bytes that the engine sent and received."""


async def traffic(
    supervisor: Supervisor, source: EmbeddedSource, path: Path, scratch: Path
) -> tuple[WorkerStats, Bytes, dict[str, Any]]:
    """What a host and two workers exchange for a prompt, after a first one."""
    async with split(supervisor, source, path, 2) as group:
        taps = [Tap(scratch / f"{number}.sock", endpoint) for number, endpoint in enumerate(group.endpoints)]
        group.endpoints = tuple([await tap.start() for tap in taps])
        engine = await group.start(path, gpu_layers=5, batch=_BATCH, micro_batch=_BATCH)
        await read_prompt(client_of(engine), _TOKENS, 1)
        before, counted = group.host.stats().total, [(tap.sent, tap.received) for tap in taps]
        answer = await read_prompt(client_of(engine), _TOKENS, 2)
        stats = group.host.stats().total.minus(before)
        sizes = [(tap.sent - sent, tap.received - got) for tap, (sent, got) in zip(taps, counted, strict=True)]
        await engine.stop()
        for tap in taps:
            await tap.close()
    return stats, sizes, answer


async def test_a_stand_in_exchanges_what_a_real_engine_does_and_takes_the_time_that_is_set(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    path = model("small")
    with TemporaryDirectory() as scratch:
        real, real_sizes, _ = await traffic(supervisor, rpc_embedded, path, Path(scratch))
    facts = read_facts([read_header(path)], path.stem)
    # Both engines, and the host, are one machine here: each waits for the others.
    settings = Pace(prompt=800.0, answer=100.0).settings(facts, _BATCH, tmp_path / "machine")
    source = StandInSource(CACHE, build(tmp_path), settings)
    began = time.monotonic()
    with TemporaryDirectory() as scratch:
        shown, sizes, answer = await traffic(supervisor, source, path, Path(scratch))
    # Bytes within the tunnel are not compared: it compresses, and a stand-in's results do not compress.
    assert sizes == real_sizes
    counted = ("requests", "round_trips", "graphs", "pushed", "relayed", "rescued")
    assert {name: getattr(shown, name) for name in counted} == {name: getattr(real, name) for name in counted}
    # Of the last layer only the last token is computed whole; the last micro-batch is a part of one.
    assert answer["prompt_ms"] >= 0.85 * _TOKENS / 800.0 * 1e3
    assert time.monotonic() - began >= 2 * 0.85 * _TOKENS / 800.0
