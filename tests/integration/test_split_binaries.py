"""A user's own llama.cpp in a split, on either side and on both: `make test-binaries BIN_DIR=...`."""

import asyncio
import os
from pathlib import Path

import pytest
from tests.integration.engine_fixtures import (
    CACHE,
    Model,
    embedded,
    model,
    rpc_embedded,
    small_spec,
    started,
    supervisor,
)
from tests.integration.split_fixtures import index_of, offer_of, text
from tests.support.split_lab import EngineServer, LabWorker

from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources.binaries import BinarySource
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.tensor_cache.digests import compute
from mesh_llm.split.host.session import SplitHost
from mesh_llm.split.worker.session import RpcServer

__all__ = ["embedded", "model", "rpc_embedded", "supervisor"]

pytestmark = [pytest.mark.binaries, pytest.mark.timeout(300)]

SHORT = "the mesh of all the nodes"
LONG = "the mesh of all the nodes and what they have of it " * 30


@pytest.fixture
def binaries() -> BinarySource:
    """The programs that `MESH_LLM_TEST_BIN_DIR` names."""
    directory = os.environ.get("MESH_LLM_TEST_BIN_DIR", "")
    assert directory, "say where the programs are: make test-binaries BIN_DIR=..."
    source = BinarySource.find(Path(directory), CACHE)
    assert source is not None
    return source


async def test_the_programs_say_what_they_are(binaries: BinarySource) -> None:
    info = await binaries.info()
    assert info.usable
    assert not info.problems
    assert info.version
    assert info.rpc_version
    assert [device.id for device in info.devices][-1] == "CPU"


@pytest.mark.parametrize("host", ["binaries", "embedded"])
@pytest.mark.parametrize("worker", ["binaries", "embedded"])
async def test_tokens_are_those_of_solo(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, binaries: BinarySource, model: Model, host: str, worker: str
) -> None:
    sources: dict[str, EngineSource] = {"binaries": binaries, "embedded": rpc_embedded}
    path = model("small")
    version = (await sources[host].info()).rpc_version
    assert version == (await sources[worker].info()).rpc_version, "engines of one version pair; these do not"
    solo = await started(supervisor, sources[host], small_spec(path, threads=1), "solo")
    expected = [await text(solo, prompt) for prompt in (SHORT, LONG)]
    await solo.stop()
    digests = await asyncio.to_thread(compute, path)
    workers: list[LabWorker] = []
    split = SplitHost(rpc=version, weights=index_of(path, digests))

    async def launch(number: int) -> RpcServer:
        spec = RpcWorkerSpec(threads=1)
        return EngineServer(await supervisor.launch_rpc_worker(sources[worker], spec, f"worker{number}"))

    try:
        for number in range(2):
            lab = LabWorker(f"w{number}", lambda number=number: launch(number), offer_of(digests))
            await lab.start()
            workers.append(lab)
        endpoints = await split.start([lab.target() for lab in workers])
        spec = small_spec(
            path, rpc=endpoints, tensor_split=(1.0, 1.0), output_on_host=True, threads=1, batch=128, micro_batch=128
        )
        engine = await started(supervisor, sources[host], spec, "split")
        load = split.stats().total
        for _ in range(2):
            assert [await text(engine, prompt) for prompt in (SHORT, LONG)] == expected
        assert await asyncio.gather(text(engine, SHORT), text(engine, LONG)) == expected
        stats = split.stats().total
        assert load.weight_bytes_sent == 0
        assert load.weight_bytes_referenced > 4_000_000
        assert stats.pushed > 0
        await engine.stop()
    finally:
        await split.close()
        for lab in workers:
            await lab.close()


async def test_a_draft_with_the_programs_own_flags(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, binaries: BinarySource, model: Model
) -> None:
    path = model("small")
    solo = await started(supervisor, binaries, small_spec(path, threads=1), "solo")
    expected = await text(solo, SHORT)
    await solo.stop()
    drafting = small_spec(path, threads=1, draft=model("small-draft"), draft_max=6)
    engine = await started(supervisor, binaries, drafting, "drafting")
    assert await text(engine, SHORT) == expected
    await engine.stop()
