"""A split model in one process: real engines, the tunnel over TCP on loopback."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.integration.engine_fixtures import client_of, small_spec, started
from tests.support.split_lab import EngineServer, LabWorker

from mesh_llm.engine.sources.embedded.plugin import RPC_VERSION
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.engine.supervisor import RunningEngine, Supervisor
from mesh_llm.models.tensor_cache.digests import DigestIndex, DigestStore, ModelDigests, compute
from mesh_llm.split.host.session import SplitHost
from mesh_llm.split.worker.session import RpcServer


def index_of(model: Path, digests: ModelDigests, store: DigestStore | None = None) -> DigestIndex:
    """A host's index of one model."""
    index = DigestIndex(store)
    index.add_main(model, digests)
    return index


def offer_of(*digests: ModelDigests) -> DigestIndex:
    """What a worker offers."""
    index = DigestIndex()
    for each in digests:
        index.add(each)
    return index


@dataclass
class Split:
    """A running group: `engine` is the host's, if one was started."""

    supervisor: Supervisor
    source: EmbeddedSource
    host: SplitHost
    workers: list[LabWorker]
    endpoints: tuple[str, ...]
    engines: int = 0
    weights: DigestIndex | None = None
    pool: bytes = b""

    @asynccontextmanager
    async def another(self) -> AsyncGenerator["Split"]:
        """One more session with the same workers, for an engine that shares the weights."""
        host = SplitHost(rpc=RPC_VERSION, weights=self.weights, pool=self.pool)
        try:
            endpoints = await host.start(
                [worker.target() for worker in self.workers], sockets=self.supervisor.private()
            )
            yield replace(self, host=host, endpoints=endpoints, engines=self.engines + 10)
        finally:
            await host.close()

    async def start(self, model: Path, **changes: object) -> RunningEngine:
        """Start the host's engine."""
        self.engines += 1
        fields: dict[str, object] = {"rpc": self.endpoints, "output_on_host": True, "threads": 1}
        fields["tensor_split"] = (1.0,) * len(self.endpoints)
        spec = small_spec(model, **(fields | changes))
        return await started(self.supervisor, self.source, spec, f"split{self.engines}")


Launch = Callable[[], Awaitable[RpcServer]]


def launcher(supervisor: Supervisor, source: EmbeddedSource, name: str) -> Launch:
    """What starts a worker's rpc-server."""

    async def launch() -> RpcServer:
        return EngineServer(await supervisor.launch_rpc_worker(source, RpcWorkerSpec(threads=1), name))

    return launch


@asynccontextmanager
async def split(
    supervisor: Supervisor,
    source: EmbeddedSource,
    model: Path,
    count: int,
    *,
    push: bool = True,
    delay: float = 0.0,
    offer: DigestIndex | None = None,
    own: DigestIndex | None = None,
    change: Callable[[list[LabWorker]], None] | None = None,
    pool: bytes = b"",
) -> AsyncGenerator[Split]:
    """A group of `count` workers that have the same model."""
    digests = await asyncio.to_thread(compute, model)
    workers: list[LabWorker] = []
    weights = own or index_of(model, digests)
    host = SplitHost(rpc=RPC_VERSION, weights=weights, push=push, pool=pool)
    try:
        for number in range(count):
            launch = launcher(supervisor, source, f"worker{number}")
            worker = LabWorker(f"w{number}", launch, offer or offer_of(digests), delay=delay)
            await worker.start()
            workers.append(worker)
        if change is not None:
            change(workers)
        endpoints = await host.start([worker.target() for worker in workers], sockets=supervisor.private())
        yield Split(supervisor, source, host, workers, endpoints, weights=weights, pool=pool)
    finally:
        await host.close()
        for worker in workers:
            await worker.close()


async def complete(
    engine: RunningEngine, prompt: str = "the mesh of all the nodes", tokens: int = 24
) -> dict[str, Any]:
    """A greedy completion, whole."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return (await client_of(engine).post("/v1/completions", body)).expect().json()


async def text(engine: RunningEngine, prompt: str = "the mesh of all the nodes", tokens: int = 24) -> str:
    """Its text."""
    return (await complete(engine, prompt, tokens))["choices"][0]["text"]
