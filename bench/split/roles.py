"""The machines of the split benchmark: `python -m bench.split.roles host|worker ...`; each runs on a lab's host.

They take commands as lines of JSON and answer each with one. The host founds a mesh, drives workers through it and asks
the engine; a worker lends rpc-servers to the mesh, and, when told so, a stock one on the lab's own network.
"""

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog
import uvloop
from bench.mesh.nodes import make_node
from bench.split.requests import ask_all, ask_in_turns, read_prompt, write_on
from bench.split.stand_in import StandInSource
from bench.split.stock import StockCounter
from tests.support.http import HttpClient
from tests.support.split_lab import EngineServer

from mesh_llm.core.types.gossip import Ping
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import Speed, SplitLayout, SplitShare
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.daemon.dispatch import Dispatch, DispatchedEngine
from mesh_llm.daemon.link_meter import LinkMeter
from mesh_llm.daemon.split_host import HostSession, split_spec
from mesh_llm.engine.process import Command, Readiness, python_module
from mesh_llm.engine.sources.embedded.plugin import RPC_VERSION
from mesh_llm.engine.sources.embedded.plugin import find as find_plugin
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import NGRAM, EngineSpec, RpcWorkerSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, RunningEngine, Supervisor
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.models.tensor_cache.digests import DigestIndex, DigestStore
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.process import wake_promptly
from mesh_llm.split.host.session import OpenStream, SplitHost, WorkerTarget
from mesh_llm.split.worker.session import RpcServer, SplitWorker, WorkerServices
from mesh_llm.wire.ggml_rpc.activations import Format, WireFormats
from mesh_llm.wire.ggml_rpc.tunnel import SESSION_BYTES
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.streams import Facts

Answer = dict[str, Any]
_NOT_SHOWN: Any = None
"""What would show a load's progress to a user."""
PROMPT = "the mesh of all the nodes"
GREETING = Ping(nonce=1)

# Standard output is for answers alone; what logs and libraries print goes beside it.
_ANSWERS = os.dup(1)


class _NoSpeed:
    """The lab's machines are one machine, whose speed is measured once, by the benchmark."""

    async def speed(self) -> Speed | None:
        return None


_KINDS = {"ngram": NGRAM, "mtp": "draft-mtp", "eagle3": "draft-eagle3"}


class Role:
    """What both have. `scratch` holds logs, digests and caches."""

    def __init__(self, scratch: str, model: str, draft: str, threads: str) -> None:
        self.scratch, self.model, self.draft = Path(scratch), Path(model), Path(draft)
        self.threads = int(threads)
        source = EmbeddedSource.find(Path.home() / ".mesh-llm" / "cache")
        plugin = find_plugin(Path.home() / ".mesh-llm" / "cache")
        if source is None or plugin is None:
            raise SystemExit("the embedded engine is not installed: mesh-llm engine install")
        self.source = source
        self.plugin = str(plugin.path)
        self._stand_in: StandInSource | None = None
        self.supervisor = Supervisor(self.scratch / "logs")
        self.digests = DigestStore(self.scratch.parent / "digests")

    net: MeshNet

    def be_measured(self) -> None:
        """Let others take the time of the way here."""
        LinkMeter(self.net, _NoSpeed(), lambda speed: Facts(speed=speed)).register()

    async def link(self, words: Answer) -> Answer:
        """The way to a node, measured now."""
        meter = LinkMeter(self.net, _NoSpeed(), lambda speed: Facts(speed=speed))
        link = (await meter.measure(NodeId(words["node"]))).link
        return {"one_way_seconds": link.one_way_seconds, "bytes_per_second": link.bytes_per_second}

    async def stand_in(self, words: Answer) -> Answer:
        """From now on engines take a set time instead of computing."""
        cache = Path.home() / ".mesh-llm" / "cache"
        self.source = self._stand_in = StandInSource(cache, Path(words["library"]), words["settings"])
        return {}

    async def serve_stock(self, words: Answer) -> Answer:
        """llama.cpp's own rpc-server, at an address of the lab."""
        address = words["address"]
        arguments = ["server", address, str(self.threads), self.plugin]
        if words["cache"]:
            cache = self.scratch / "rpc-cache"
            cache.mkdir(parents=True, exist_ok=True)
            arguments.append(str(cache) + "/")
        command = replace(self.stock(*arguments), readiness=Readiness.RPC, address=address)
        self._server = await self.supervisor.launch(command, "stock-rpc-server")
        await self._server.ready()
        return {}

    async def end_stock(self, _: Answer) -> Answer:
        """End it."""
        await self._server.stop(0.2)
        return {}

    def stock(self, *arguments: str) -> Command:
        """The command of one of llama.cpp's own programs."""
        argv, env = python_module("bench.split.stock", *arguments)
        # A module of this checkout, beside `mesh_llm`: found by the working directory.
        command = Command(argv=tuple(word for word in argv if word != "-P"), env=env)
        return command if self._stand_in is None else self._stand_in.loading(command)

    async def answer(self, commands: dict[str, Callable[[Answer], Awaitable[Answer]]]) -> None:
        """Serve standard input until it ends."""
        loop = asyncio.get_running_loop()
        gc.collect()
        gc.freeze()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            words: Answer = json.loads(line)
            say(await commands[words.pop("do")](words))
        await self.supervisor.close()


class Worker(Role):
    """Lends."""

    async def run(self, token: str) -> None:
        """Join, and serve."""
        net = self.net = make_node(token)
        worker = SplitWorker()
        offer = DigestIndex()
        offer.add(self.digests.get(self.model))
        services = WorkerServices(launch=self._launch, weights=offer, open_push=self._open_push, limit=1 << 40)

        async def rpc(stream: PeerStream, _peer: Peer, parameters: bytes) -> None:
            await worker.serve_rpc(stream, parameters, services)

        async def push(stream: PeerStream, _peer: Peer, parameters: bytes) -> None:
            await worker.serve_push(stream, parameters)

        net.streams.register(StreamType.RPC, rpc, scope=Scope.SPLIT, per_peer=64)
        net.streams.register(StreamType.PUSH, push, scope=Scope.SPLIT, per_peer=64)
        self.be_measured()
        await net.start()
        (await net.joiner.join()).raise_for_user()
        say({"node": net.node_id, "addresses": net.reachable().addresses})
        await self.answer({
            "link": self.link, "meet": self._meet, "stand_in": self.stand_in,
            "serve": self.serve_stock, "end_serving": self.end_stock,
        })  # fmt: skip

    async def _meet(self, words: Answer) -> Answer:
        for node, addresses in words["others"]:
            # A mesh's gossip tells addresses; here a first message does.
            if node != self.net.node_id:
                self.net.send(NodeId(node), GREETING, tuple(addresses))
        return {}

    async def _launch(self) -> RpcServer:
        spec = RpcWorkerSpec(threads=self.threads)
        return EngineServer(await self.supervisor.launch_rpc_worker(self.source, spec, "rpc-server"))

    async def _open_push(self, address: str, tunnel: bytes) -> ByteStream:
        stream = await self.net.open(NodeId(address), StreamType.PUSH, tunnel, scope=Scope.SPLIT)
        await stream.flush()
        return stream


class Host(Role):
    """Drives."""

    async def run(self) -> None:
        """Found a mesh, and do as told."""
        net = self.net = make_node()
        self.be_measured()
        await net.start()
        self.index = DigestIndex(self.digests)
        self.index.add_main(self.model, self.digests.get(self.model))
        self.splits: list[SplitHost] = []
        self._starts = 0
        self.counters: list[StockCounter] = []
        self.engines: list[RunningEngine] = []
        self.clients: list[HttpClient] = []
        say({"token": net.create_invite("split", 3600.0, None).token, "node": net.node_id})
        await self.answer({
            "link": self.link, "solo": self._solo, "stock": self._stock, "ours": self._ours, "stand_in": self.stand_in,
            "serve": self.serve_stock, "end_serving": self.end_stock,
            "ask": self._ask, "prompt": self._prompt, "clients": self._clients, "in_turns": self._in_turns,
            "write": self._write, "stats": self._stats, "end": self._end,
        })  # fmt: skip

    def _spec(self, words: Answer) -> EngineSpec:
        # How it guesses: as `--spec`; empty for not at all.
        kind: str = words.get("spec", "draft" if words.get("draft") else "")
        guessing = bool(words.get("spec"))
        draft = self.draft if kind in {"draft", "eagle3"} else None
        usual = 4 if kind in {"mtp", "eagle3"} else 16 if guessing else 8
        most = words.get("most") or usual
        shares: list[float] = words.get("shares", [])
        # llama.cpp pipelines prompts over devices where it offloads all layers, overrides no tensor and gives no
        # embeddings.
        pipelined: bool = words.get("pipelined", False)
        self._starts += 1
        return EngineSpec(
            model=self.model, alias="bench", context=words.get("context", 512), slots=words.get("slots", 1),
            threads=self.threads, draft=draft, draft_max=most, prompt_cache_mib=0,
            devices=() if shares else ("CPU",), tensor_split=tuple(shares),
            output_on_host=bool(shares) and not pipelined, embeddings=not pipelined,
            gpu_layers=int(sum(shares)) if shares and not pipelined else None,
            micro_batch=words.get("micro_batch", 512), speculation=_KINDS.get(kind, ""),
            while_it_pays=guessing and not words.get("always"),
            slot_socket=self.supervisor.private() / f"{self._starts}.slots" if guessing else None,
        )  # fmt: skip

    async def _solo(self, words: Answer) -> Answer:
        return await self._start(await self.source.server(self._spec(words)))

    async def _stock(self, words: Answer) -> Answer:
        addresses: list[str] = words["addresses"]
        if words.get("count"):
            self.counters = [StockCounter(address) for address in addresses]
            addresses = [await counter.start() for counter in self.counters]
        return await self._start(self.stock("engine", self._spec(words).to_json(), self.plugin, *addresses))

    async def _ours(self, words: Answer) -> Answer:
        groups: int = words.get("groups", 1)
        pool = os.urandom(SESSION_BYTES) if groups > 1 else b""
        answers: list[Answer] = []
        for number in range(groups):
            # As many slots as clients: llama.cpp computes two slots that have a free one between them in two passes.
            slots = (words.get("slots", 1) + groups - 1 - number) // groups
            answers.append(await self._one_of_ours({**words, "slots": slots}, pool))
            if "error" in answers[-1]:
                return answers[-1]
        return {**answers[0], "load_s": sum(answer["load_s"] for answer in answers)}

    async def _one_of_ours(self, words: Answer, pool: bytes) -> Answer:
        began = time.perf_counter()
        kind = Format[words.get("wire", "f32").upper()]
        wire = WireFormats(kind, kind)
        split = SplitHost(rpc=RPC_VERSION, weights=self.index, push=words["push"], pool=pool, wire=wire)
        self.splits.append(split)
        targets = [
            WorkerTarget(name=f"w{number}", address=node, open_stream=self._opener(NodeId(node)))
            for number, node in enumerate(words["workers"])
        ]
        endpoints = await split.start(targets, sockets=self.supervisor.private())
        opened = time.perf_counter() - began
        spec = self._split_spec(words, split, endpoints)
        return {**await self._start(await self.source.server(spec)), "open_s": opened}

    def _split_spec(self, words: Answer, split: SplitHost, endpoints: tuple[str, ...]) -> EngineSpec:
        """The engine as a node would start it: its layers and devices are the daemon's decision."""
        facts = read_facts([read_header(self.model)], self.model.stem)
        counts = [int(share) for share in words["shares"]]
        # llama.cpp counts the output layer as the last worker's.
        counts[-1] -= 1
        workers = [NodeId(node) for node in words["workers"]]
        shares = [SplitShare(node=node, layers=count) for node, count in zip(workers, counts, strict=True)]
        here = SplitShare(node=NodeId(self.net.node_id), layers=facts.layers - sum(counts))
        layout = SplitLayout(term=1, shares=(here, *shares))
        names = {f"w{number}": node for number, node in enumerate(workers)}
        session = HostSession(layout, split, endpoints, names, 0, facts, _NOT_SHOWN)
        whole = replace(self._spec({name: value for name, value in words.items() if name != "shares"}), devices=())
        whole = replace(whole, mtp_layers=facts.mtp_layers if words.get("spec") == "mtp" else 0)
        return split_spec(whole, session, accelerators=0)

    def _opener(self, node: NodeId) -> OpenStream:
        async def open_stream(tunnel: bytes) -> ByteStream:
            return await self.net.open(node, StreamType.RPC, tunnel, scope=Scope.SPLIT)

        return open_stream

    async def _start(self, command: Command) -> Answer:
        began = time.perf_counter()
        engine: RunningEngine = await self.supervisor.launch(command, "engine")
        ready = await engine.ready()
        if not isinstance(ready, EngineReadyInfo):
            return {"error": ready.reason}
        self.engines.append(engine)
        self.clients.append(HttpClient(int(ready.address.rpartition(":")[2]), timeout=1800))
        return {"load_s": time.perf_counter() - began}

    async def _ask(self, words: Answer) -> Answer:
        body = {"prompt": PROMPT, "max_tokens": words["tokens"], "temperature": 0}
        answer = (await self.clients[0].post("/v1/completions", body)).expect().json()
        timings = answer["timings"]
        return {"text": answer["choices"][0]["text"], "ms_per_token": timings["predicted_per_token_ms"]}

    async def _prompt(self, words: Answer) -> Answer:
        return await read_prompt(self.clients[0], words["tokens"], words["seed"])

    async def _clients(self, words: Answer) -> Answer:
        return await ask_all(self.clients, words["streams"], words["tokens"], words["seed"])

    async def _in_turns(self, words: Answer) -> Answer:
        info = self.engines[0].info
        assert info is not None
        named = Dispatch(ModelName("bench"), [DispatchedEngine(info)]) if words.pop("named") else None
        before = (await self._stats({}))["round_trips"]
        found = await ask_in_turns(self.clients[0], named, **words)
        return {**found, "round_trips": (await self._stats({}))["round_trips"] - before}

    async def _write(self, words: Answer) -> Answer:
        return await write_on(self.clients[0], words["prompts"], words["tokens"])

    async def _stats(self, _: Answer) -> Answer:
        if self.splits:
            return asdict(self.splits[0].stats().total)
        return {
            "requests": sum(counter.counts.requests for counter in self.counters),
            "round_trips": sum(counter.counts.round_trips for counter in self.counters),
        }

    async def _end(self, _: Answer) -> Answer:
        for engine in self.engines:
            await engine.stop(0.5)
        for split in self.splits:
            await split.close()
        self.engines, self.clients, self.splits = [], [], []
        for counter in self.counters:
            await counter.close()
        self.counters = []
        return {}


def say(answer: Answer) -> None:
    """One line."""
    os.write(_ANSWERS, json.dumps(answer).encode() + b"\n")


def main(arguments: list[str]) -> None:
    """Be one of them."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    os.dup2(2, 1)
    wake_promptly()
    kind, *rest = arguments
    if kind == "host":
        uvloop.run(Host(*rest).run())
    else:
        token, *rest = rest
        uvloop.run(Worker(*rest).run(token))


if __name__ == "__main__":
    main(sys.argv[1:])
