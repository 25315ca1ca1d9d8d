"""Where the clients are tried: the engine alone, a node that serves, and a passive client of that node."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.gguf_models import cached_model
from tests.support.gguf_tool_caller import write_agents_model, write_tool_caller
from tests.support.node import NodeProcess

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, Supervisor
from mesh_llm.runtime.supervision import TaskScope

ENGINE, NODE, CLIENT = "engine", "node", "client node"
CONTEXT, AGENT_CONTEXT = 2048, 65_536
SLOTS = 4


@dataclass(frozen=True)
class Place:
    """A server. `url` and `tool_url` differ where an engine has one model only."""

    name: str
    url: str
    tool_url: str
    model: str
    tool_model: str
    key: str = "none"
    context: int = CONTEXT

    @property
    def environment(self) -> dict[str, str]:
        """What a suite's program is told."""
        return {
            "CONFORM_URL": self.url,
            "CONFORM_MODEL": self.model,
            "CONFORM_TOOL_URL": self.tool_url,
            "CONFORM_TOOL_MODEL": self.tool_model,
            "CONFORM_KEY": self.key,
            "CONFORM_CONTEXT": str(self.context),
        }


@asynccontextmanager
async def places(directory: Path) -> AsyncGenerator[list[Place]]:
    """All places, with two small models that the project makes: one writes words, one calls a tool.

    The node serves the first one; another node of its mesh serves the second.
    """
    words = cached_model(directory / "models", "small")
    caller = directory / "caller.gguf"
    write_tool_caller(caller)
    async with AsyncExitStack() as stack:
        first, second = await _engines(stack, directory, {"small": words, "caller": caller}, CONTEXT)
        engine = Place(ENGINE, first, second, "small", "caller")
        arguments = ["--ctx-size", str(CONTEXT), "--parallel", str(SLOTS)]
        node = await NodeProcess.start(directory / "node", models=[words], arguments=arguments)
        stack.push_async_callback(node.close)
        invite = await node.invite()
        other = await NodeProcess.start(directory / "other", models=[caller], join=[invite], arguments=arguments)
        stack.push_async_callback(other.close)
        passive = await NodeProcess.start(directory / "client", join=[invite], client=True)
        stack.push_async_callback(passive.close)
        listed = await _warm(node, 2)
        caller_name = next(name for name in listed if "caller" in name)
        names = (next(name for name in listed if name != caller_name), caller_name)
        yield [engine, *[_of(name, one, names) for name, one in ((NODE, node), (CLIENT, passive))]]


def _of(name: str, node: NodeProcess, models: tuple[str, str]) -> Place:
    url = f"http://127.0.0.1:{node.api.port}"
    return Place(name, url, url, *models)


@asynccontextmanager
async def agent_places(directory: Path) -> AsyncGenerator[list[Place]]:
    """All places, with a model that the project makes: it lets an agent run one command, and says a sentence."""
    model = directory / "agents.gguf"
    write_agents_model(model)
    async with AsyncExitStack() as stack:
        [url] = await _engines(stack, directory, {"agents": model}, AGENT_CONTEXT)
        arguments = ["--ctx-size", str(AGENT_CONTEXT), "--parallel", "2"]
        node = await NodeProcess.start(directory / "node", models=[model], arguments=arguments)
        stack.push_async_callback(node.close)
        passive = await NodeProcess.start(directory / "client", join=[await node.invite()], client=True)
        stack.push_async_callback(passive.close)
        there = [Place(ENGINE, url, url, "agents", "agents", context=AGENT_CONTEXT)]
        for name, one in ((NODE, node), (CLIENT, passive)):
            [served] = await _warm(one, 1)
            there.append(replace(_of(name, one, (served, served)), context=AGENT_CONTEXT))
        yield there


async def _warm(node: NodeProcess, count: int) -> list[str]:
    """The names of the models there, once so many answer."""
    async with asyncio.timeout(120):
        while True:
            listed = (await node.api.get("/v1/models")).expect().json()["data"]
            names = sorted(model["id"] for model in listed if model["status"] == "warm")
            if len(names) >= count:
                return names
            await asyncio.sleep(0.2)


async def _engines(stack: AsyncExitStack, directory: Path, models: Mapping[str, Path], context: int) -> list[str]:
    """Start an engine for each model; their addresses."""
    source = EmbeddedSource.find(directory / "cache")
    if source is None:
        raise SystemExit("there is no embedded engine for this system")
    supervisor = Supervisor(directory / "logs")
    stack.push_async_callback(supervisor.close)
    urls: list[str] = []
    for name, path in models.items():
        spec = EngineSpec(model=path, alias=name, context=context, slots=SLOTS)
        engine = await supervisor.launch(await supervisor.server_command(source, spec), name)
        ready = await engine.ready()
        if not isinstance(ready, EngineReadyInfo):
            raise SystemExit(f"the engine did not start: {ready}")
        urls.append(await stack.enter_async_context(_port(ready.address, ready.key)))
    return urls


@asynccontextmanager
async def _port(address: str, key: str) -> AsyncGenerator[str]:
    """An address on loopback for an engine on a local socket, which needs no key of its clients.

    One request a connection: the key goes into its head.
    """
    kind, _, place = address.rpartition(":")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = [
                line
                for line in head.split(b"\r\n")[:-2]
                if not line.lower().startswith((b"authorization:", b"x-api-key:", b"connection:"))
            ]
            lines += [b"Authorization: Bearer " + key.encode(), b"Connection: close", b"", b""]
            if kind == "unix":
                there, back = await asyncio.open_unix_connection(place)
            else:
                there, back = await asyncio.open_connection(kind or "127.0.0.1", int(place))
            back.write(b"\r\n".join(lines))
            async with TaskScope("engine port") as scope:
                scope.spawn(_pour(reader, back), "send")
                await _pour(there, writer)
            back.close()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024 * 1024)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _pour(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
