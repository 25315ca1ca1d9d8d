"""An API with everything around it faked: routes, traffic, the mesh, engines."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
from msgspec.structs import replace

from mesh_llm.api.server import ApiServer
from mesh_llm.api.slots import EngineSlots, asked_slot
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.upstream import Place
from mesh_llm.core.routing.ranking import Awaited, ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.trust.corrections import TimedAnswer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelKind, ModelStatus
from mesh_llm.core.types.ports import ByteStream, EngineEnd, LoadAsker
from mesh_llm.runtime.network import TcpStream

HERE = NodeId("a" * 64)
THERE = NodeId("b" * 64)
ELSEWHERE = NodeId("c" * 64)


def local(address: str, *, node: NodeId = HERE, status: ModelStatus = ModelStatus.WARM) -> Target:
    return Target(node=node, local=True, address=address, status=status, slots=256)


def remote(node: NodeId = THERE) -> Target:
    return Target(node=node, local=False, slots=4)


def route(
    name: str,
    *targets: Target,
    status: ModelStatus = ModelStatus.WARM,
    reason: str = "",
    kind: ModelKind = ModelKind.CHAT,
) -> ModelRoute:
    return ModelRoute(
        name=ModelName(name),
        status=status,
        targets=targets,
        reason=reason,
        context=2048,
        size_bytes=10**6,
        created=7,
        kind=kind,
    )


def alive(routes: Iterable[ModelRoute]) -> frozenset[NodeId]:
    """The other nodes among the targets."""
    return frozenset(target.node for route in routes for target in route.targets if not target.local)


def snapshot(*routes: ModelRoute, default: str | None = None, accepting: bool = True) -> RoutingSnapshot:
    return RoutingSnapshot(
        alive=alive(routes),
        version=1,
        node=HERE,
        default=ModelName(default) if default else None,
        models={r.name: r for r in routes},
        accepting=accepting,
    )


@dataclass
class FakeRoutes:
    current: RoutingSnapshot
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    heard: asyncio.Event | None = None
    """Set once the node has heard of its mesh; None: it has."""

    def set(
        self, *routes: ModelRoute, also_alive: Iterable[NodeId] = (), awaited: Mapping[ModelName, Awaited] | None = None
    ) -> None:
        """Replace the routes by newer ones, and wake who waits for them. Who is no target is dead, or `also_alive`."""
        replaced = {route.name: route for route in routes}
        version = self.current.version + 1
        self.current = replace(
            self.current,
            models=replaced,
            version=version,
            alive=alive(routes) | frozenset(also_alive),
            awaited=awaited or {},
        )
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    async def newer(self, version: int) -> None:
        while self.current.version <= version:
            await self.changed.wait()

    async def settled(self) -> None:
        if self.heard is not None:
            await self.heard.wait()


@dataclass
class FakeTraffic:
    """Records what the API reports."""

    asked: list[str] = field(default_factory=list[str])
    awaited: list[tuple[str, LoadAsker, int]] = field(default_factory=list[tuple[str, LoadAsker, int]])
    begun: list[tuple[str, NodeId]] = field(default_factory=list[tuple[str, NodeId]])
    ended: list[tuple[str, NodeId, bool, int]] = field(default_factory=list[tuple[str, NodeId, bool, int]])
    dead: list[tuple[str, NodeId]] = field(default_factory=list[tuple[str, NodeId]])
    prompts: list[tuple[str, int, float]] = field(default_factory=list[tuple[str, int, float]])
    contexts: list[tuple[NodeId, int]] = field(default_factory=list[tuple[NodeId, int]])
    taken: list[tuple[NodeId, int]] = field(default_factory=list[tuple[NodeId, int]])
    times: list[TimedAnswer] = field(default_factory=list[TimedAnswer])
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def started(self, model: str, target: Target) -> None:
        self.begun.append((model, target.node))
        self.changed.set()

    def finished(
        self, model: str, target: Target, *, ok: bool, tokens: int, seconds: float, guessed: int = 0, prompt: int = 0
    ) -> None:
        self.ended.append((model, target.node, ok, tokens))
        self.changed.set()

    def read(self, model: str, target: Target, tokens: int, seconds: float, cached: int = 0) -> None:
        self.prompts.append((model, tokens, seconds))

    def unreachable(self, model: str, target: Target, reason: str) -> None:
        self.dead.append((model, target.node))
        self.changed.set()

    def refused_context(self, model: str, target: Target, tokens: int) -> None:
        self.contexts.append((target.node, tokens))
        self.changed.set()

    def took_prompt(self, model: str, target: Target, tokens: int) -> None:
        self.taken.append((target.node, tokens))
        self.changed.set()

    def timed(self, answer: TimedAnswer) -> None:
        self.times.append(answer)
        self.changed.set()

    def wanted(self, model: str) -> None:
        self.asked.append(model)
        self.changed.set()

    def awaiting(self, model: str, asker: LoadAsker, change: int) -> None:
        self.awaited.append((model, asker, change))
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that was told here makes the condition true."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def all_ended(self, count: int) -> None:
        await self.until(lambda: len(self.ended) >= count)


@dataclass
class Mesh:
    """Opens streams to made-up nodes: each is a TCP address, or an error."""

    nodes: dict[NodeId, str] = field(default_factory=dict[NodeId, str])

    async def open_stream(self, target: Target) -> ByteStream:
        address = self.nodes.get(target.node)
        if address is None:
            raise MeshError("target_unreachable", "no path to the node")
        host, _, port = address.partition(":")
        return TcpStream(*await asyncio.open_connection(host, int(port)))


@dataclass
class FakeEngines:
    """Engines that all ended in one way, and all demand one key."""

    end: EngineEnd = EngineEnd.EXPLAINED
    key: str = ""
    members: Sequence[EngineSlots] = ()

    async def end_of(self, model: str, term: int) -> EngineEnd:
        return self.end

    def key_of(self, address: str) -> str:
        return self.key

    def place(self, address: str, path: str, body: bytes) -> Place:
        asked = asked_slot(body)
        having = (one.address for one in self.members if asked is not None and one.has(asked))
        return Place(next(having, address), lambda: None)

    def slots(self, address: str) -> Sequence[EngineSlots]:
        return self.members


@dataclass
class Api:
    """A running API."""

    server: ApiServer
    port: int
    routes: FakeRoutes
    traffic: FakeTraffic
    mesh: Mesh
    client: httpx.AsyncClient

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(path, headers={name.replace("_", "-"): v for name, v in headers.items()})

    async def post(self, body: bytes = b"{}", path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        return await self.client.post(
            path, content=body, headers={name.replace("_", "-"): v for name, v in headers.items()}
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def raw(self, data: bytes) -> bytes:
        """Send bytes on a connection of their own; return everything until the server closes it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


@asynccontextmanager
async def running_api(
    routes: Iterable[ModelRoute] = (),
    *,
    default: str | None = None,
    config: ApiConfig | None = None,
    ends: EngineEnd = EngineEnd.EXPLAINED,
    key: str = "",
) -> AsyncGenerator[Api]:
    """Start an API on a free loopback port; the first route is the default unless `default` names one.

    `ends`: how every engine of its own ended that it is asked about; `key`: what its engines demand.
    """

    routes = list(routes)
    default = default or (routes[0].name if routes else None)
    view, traffic, mesh = FakeRoutes(snapshot(*routes, default=default)), FakeTraffic(), Mesh()
    server = ApiServer(
        config or ApiConfig(port=0, resume_wait=0.0, queue_wait=0.0),
        view,
        traffic,
    )
    server.use_mesh(mesh.open_stream)
    server.use_engines(FakeEngines(ends, key))
    port = await server.start()
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", verify=False, trust_env=False, timeout=30.0)
    try:
        yield Api(server, port, view, traffic, mesh, client)
    finally:
        await client.aclose()
        await server.stop()


class PeerPipe(TcpStream):
    """A core.types.ports.RequestStream over TCP, as a stream of the mesh is one."""

    _watcher: asyncio.Task[None] | None = None

    async def finish(self, data: bytes = b"") -> None:
        if data:
            await self.write(data)
        await super().finish()

    def watch(self, gone: Callable[[], None]) -> None:
        async def watching() -> None:
            with suppress(OSError):
                await self.read(1)
            gone()

        self._watcher = asyncio.get_running_loop().create_task(watching())

    def unwatch(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None


@asynccontextmanager
async def peer_streams(server: ApiServer, peer: NodeId) -> AsyncGenerator[str]:
    """Give the API's transport for peers a TCP address: every connection is a stream of that peer."""
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(server.serve_peer(PeerPipe(reader, writer), peer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        # Also where it is cancelled, before it has begun even.
        task.add_done_callback(lambda _: writer.close())

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield "{}:{}".format(*listener.sockets[0].getsockname())
    finally:
        listener.close()
        for task in list(tasks):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await listener.wait_closed()
        assert not [r for r in results if isinstance(r, Exception)]
