"""A scripted HTTP/1.1 server in the place of llama-server: it streams, stalls, dies or says nonsense as told."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

_OF_NODES = "/mesh/"
"""What nodes ask each other: a fake in the place of one does not know it, as an earlier version would not."""

SSE_HEADERS = ((b"content-type", b"text/event-stream"), (b"transfer-encoding", b"chunked"))


@dataclass
class Call:
    """One request that came in, and the means to answer it."""

    method: str
    target: str
    headers: dict[bytes, bytes]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def respond(
        self, body: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = (), kind: bytes = b"text/plain"
    ) -> None:
        lines = [b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ncontent-length: %d\r\n" % (status, kind, len(body))]
        lines += [b"%b: %b\r\n" % header for header in headers]
        await self.send(b"".join(lines) + b"\r\n" + body)

    async def begin_stream(self) -> None:
        head = b"".join(b"%b: %b\r\n" % header for header in SSE_HEADERS)
        await self.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")

    async def event(self, data: bytes) -> None:
        event = b"data: " + data + b"\n\n"
        await self.send(b"%x\r\n%b\r\n" % (len(event), event))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def gone(self) -> None:
        """Wait until the other side has gone."""
        with suppress(ConnectionError):
            await self.reader.read()

    def die(self) -> None:
        self.writer.transport.abort()


Script = Callable[[Call], Awaitable[None]]


async def echo(call: Call) -> None:
    """The default script: answer with what was asked."""
    await call.respond(call.body or call.target.encode())


@dataclass
class FakeUpstream:
    """The server. `calls` are the requests so far; `script` answers the next ones."""

    script: Script = echo
    answers_nodes: bool = False
    """It is asked also what nodes ask each other."""
    calls: list[Call] = field(default_factory=list[Call])
    connections: int = 0
    open: int = 0
    address: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that happened here makes the condition true."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.changed.set()
        # What was sent is on its way: whoever dies after it does not take it back out of a buffer of this process.
        writer.transport.set_write_buffer_limits(0)
        try:
            while (call := await _read_call(reader, writer)) is not None:
                if call.target.startswith(_OF_NODES) and not self.answers_nodes:
                    await call.respond(b"", status=404)
                    continue
                self.calls.append(call)
                self.changed.set()
                await self.script(call)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self.changed.set()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def _read_call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Call | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head[:-4].split(b"\r\n")
    method, target, _ = first.decode().split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    body = await reader.readexactly(int(headers.get(b"content-length", b"0")))
    return Call(method, target, headers, body, reader, writer)


@asynccontextmanager
async def fake_upstream(script: Script = echo, *, answers_nodes: bool = False) -> AsyncGenerator[FakeUpstream]:
    """A running fake on a loopback port of its own."""
    fake = FakeUpstream(script, answers_nodes)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(fake._serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        # Also where it is cancelled before it has begun.
        task.add_done_callback(lambda _: writer.close())

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    fake.address = "{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield fake
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
