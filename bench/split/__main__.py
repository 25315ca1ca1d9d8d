"""A model on one machine, split by llama.cpp's own RPC, and split by mesh-llm, over links of several lengths.

    python -m bench.split [--model small|half-gigabyte] [--workers 2] [--delays 0,5,10,20,30] [--json FILE]

All in one run on one machine, so that what is compared has met the same noise: each way is measured `--rounds` times in
turn, and the best round counts. Run it in a network namespace without a route (see CONTRIBUTING.md).
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.split.stock import StockLink
from tests.support.gguf_models import cached_model
from tests.support.http import HttpClient
from tests.support.split_lab import EngineServer, LabWorker

from mesh_llm.engine.embedded.release import RPC_VERSION
from mesh_llm.engine.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, RunningEngine, Supervisor
from mesh_llm.models.digest_index import DigestIndex
from mesh_llm.models.digests import ModelDigests, compute
from mesh_llm.split.host import SplitHost

_PROMPT = "the mesh of all the nodes"
_WAYS = ("solo", "stock", "relayed", "pushed", "pushed+draft")


@dataclass
class Result:
    """One way over one delay. Milliseconds, bytes, counts; per token where it says so."""

    way: str
    delay_ms: float
    ring_ms: float
    load_s: float
    ms_per_token: float
    tokens_per_s: float
    load_bytes: int = 0
    load_round_trips: int = 0
    bytes_per_token: float = 0
    round_trips_per_token: float = 0
    same_tokens: bool = True


class Bench:
    """One run."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path, source: EmbeddedSource) -> None:
        self.arguments = arguments
        self._source = source
        self._supervisor = Supervisor(scratch / "logs")
        models = Path(arguments.models) if arguments.models else scratch / "models"
        models.mkdir(parents=True, exist_ok=True)
        self._model = cached_model(models, arguments.model)
        self._draft = cached_model(models, "small-draft")
        self._digests: ModelDigests = compute(self._model)
        self._expected = ""

    async def close(self) -> None:
        """End all children."""
        await self._supervisor.close()

    async def solo(self) -> Result:
        """Undivided; its text is what all others are compared with."""
        engine, load = await self._engine()
        result = await self._measure("solo", 0.0, engine, load)
        await engine.stop()
        return result

    async def stock(self, delay: float) -> Result:
        """llama.cpp's RPC over TCP."""
        async with AsyncExitStack() as stack:
            links: list[StockLink] = []
            endpoints: list[str] = []
            for number in range(self.arguments.workers):
                server = await self._rpc_server(number)
                stack.push_async_callback(server.stop)
                link = StockLink(server.address, delay)
                endpoints.append(await link.start())
                stack.push_async_callback(link.close)
                links.append(link)
            engine, load = await self._engine(tuple(endpoints))
            loaded = self._sum(links)
            await self._ask(engine, None)
            before = self._sum(links)
            result = await self._measure("stock", delay, engine, load)
            after = self._sum(links)
            await engine.stop()
        result.load_bytes, result.load_round_trips = loaded[0], loaded[1]
        return self._per_token(result, before, after)

    async def ours(self, delay: float, *, push: bool, draft: bool = False) -> Result:
        """Through the tunnel."""
        async with AsyncExitStack() as stack:
            workers: list[LabWorker] = []
            for number in range(self.arguments.workers):
                offer = DigestIndex()
                offer.add(self._digests)
                worker = LabWorker(f"w{number}", self._launcher(number), offer, delay=delay)
                await worker.start()
                stack.push_async_callback(worker.close)
                workers.append(worker)
            index = DigestIndex()
            index.add_main(self._model, self._digests)
            host = SplitHost(rpc=RPC_VERSION, weights=index, push=push)
            stack.push_async_callback(host.close)
            endpoints = await host.start([worker.target() for worker in workers])
            engine, load = await self._engine(endpoints, self._draft if draft else None)
            loaded = host.stats().total
            await self._ask(engine, None)
            start = host.stats().total
            way = "pushed+draft" if draft else "pushed" if push else "relayed"
            result = await self._measure(way, delay, engine, load)
            end = host.stats().total
            await engine.stop()
        result.load_bytes = loaded.bytes_sent + loaded.bytes_received
        result.load_round_trips = loaded.round_trips
        return self._per_token(
            result,
            (start.bytes_sent + start.bytes_received, start.round_trips),
            (end.bytes_sent + end.bytes_received, end.round_trips),
        )

    def _per_token(self, result: Result, before: tuple[int, int], after: tuple[int, int]) -> Result:
        tokens = self.arguments.tokens * self.arguments.rounds
        result.bytes_per_token = round((after[0] - before[0]) / tokens, 1)
        result.round_trips_per_token = round((after[1] - before[1]) / tokens, 2)
        return result

    @staticmethod
    def _sum(links: list[StockLink]) -> tuple[int, int]:
        return (
            sum(link.counts.bytes_sent + link.counts.bytes_received for link in links),
            sum(link.counts.round_trips for link in links),
        )

    def _launcher(self, number: int) -> Any:
        async def launch() -> EngineServer:
            return await self._rpc_server(number)

        return launch

    async def _rpc_server(self, number: int) -> EngineServer:
        spec = RpcWorkerSpec(threads=self.arguments.threads)
        return EngineServer(await self._supervisor.launch_rpc_worker(self._source, spec, f"worker{number}"))

    async def _engine(self, rpc: tuple[str, ...] = (), draft: Path | None = None) -> tuple[RunningEngine, float]:
        spec = EngineSpec(
            model=self._model,
            alias="bench",
            context=512,
            slots=1,
            threads=self.arguments.threads,
            rpc=rpc,
            tensor_split=(1.0,) * len(rpc),
            output_on_host=bool(rpc),
            draft=draft,
            draft_max=8,
            prompt_cache_mib=0,
            devices=() if rpc else ("CPU",),
        )
        began = time.perf_counter()
        engine = await self._supervisor.launch(await self._source.server(spec), "host")
        ready = await engine.ready()
        if not isinstance(ready, EngineReadyInfo):
            raise SystemExit(f"the engine ended: {ready.reason}")
        return engine, time.perf_counter() - began

    async def _ask(self, engine: RunningEngine, tokens: int | None) -> dict[str, Any]:
        assert engine.info is not None
        client = HttpClient(int(engine.info.address.rpartition(":")[2]), timeout=300)
        body = {"prompt": _PROMPT, "max_tokens": tokens or self.arguments.tokens, "temperature": 0}
        return (await client.post("/v1/completions", body)).expect().json()

    async def _measure(self, way: str, delay: float, engine: RunningEngine, load: float) -> Result:
        answers = [await self._ask(engine, None) for _ in range(self.arguments.rounds)]
        said = {answer["choices"][0]["text"] for answer in answers}
        if way == "solo":
            self._expected = answers[0]["choices"][0]["text"]
        best = min(answer["timings"]["predicted_per_token_ms"] for answer in answers)
        ring = 0.0 if way == "solo" else delay * 1000 * (self.arguments.workers + 1)
        rate = round(1000 / best, 2)
        same = said == {self._expected}
        return Result(way, delay * 1000, ring, round(load, 2), round(best, 2), rate, same_tokens=same)


async def run(arguments: argparse.Namespace) -> list[Result]:
    """All ways over all delays."""
    source = EmbeddedSource.find(Path.home() / ".mesh-llm" / "cache")
    if source is None:
        raise SystemExit("the embedded engine is not installed")
    with tempfile.TemporaryDirectory(prefix="bench-split-") as scratch:
        bench = Bench(arguments, Path(scratch), source)
        results: list[Result] = []
        try:
            for delay in (float(text) / 1000 for text in arguments.delays.split(",")):
                results.append(await bench.solo())
                results[-1].delay_ms = delay * 1000
                if "stock" in arguments.ways:
                    results.append(await bench.stock(delay))
                if "relayed" in arguments.ways:
                    results.append(await bench.ours(delay, push=False))
                if "pushed" in arguments.ways:
                    results.append(await bench.ours(delay, push=True))
                if "pushed+draft" in arguments.ways:
                    results.append(await bench.ours(delay, push=True, draft=True))
        finally:
            await bench.close()
    return results


def table(results: list[Result]) -> str:
    """For people."""
    head = (
        "delay  way           tok/s  ms/token  ring+solo   load s  load bytes  load trips  B/token  trips/token  same"
    )
    lines = [head]
    solo = 0.0
    for r in results:
        solo = r.ms_per_token if r.way == "solo" else solo
        ideal = solo + r.ring_ms
        against = r.ms_per_token / ideal
        lines.append(
            f"{r.delay_ms:4.0f}   {r.way:12} {r.tokens_per_s:6.2f} {r.ms_per_token:9.2f} {against:8.2f} x"
            f" {r.load_s:8.2f} {r.load_bytes:11,} {r.load_round_trips:11} {r.bytes_per_token:8.0f}"
            f" {r.round_trips_per_token:12.2f}  {'yes' if r.same_tokens else 'NO'}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--models", help="directory that keeps generated models")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--delays", default="0,5,10,20,30", help="one way, ms")
    parser.add_argument("--ways", default=",".join(_WAYS), type=lambda text: text.split(","))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(run(arguments))
    print(table(results))
    text = json.dumps([asdict(result) for result in results], indent=1)
    if arguments.json:
        arguments.json.write_text(text)
    else:
        print(text, file=sys.stderr)
    return 0 if all(result.same_tokens for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
