"""A small HTTP/1.1 client for tests: sees each chunk as it comes, can break off anywhere, and can be on a lab's host.

It is strict where a real client would be lenient: an answer that ends early is an error, never a short answer. It
shares no code with the product, so that both cannot be wrong together.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.netlab.lab import NetLab

Headers = Mapping[str, str]

_LINE_LIMIT = 1024 * 1024
_READ_SIZE = 256 * 1024


class TruncatedError(ConnectionError):
    """The connection ended before the answer did."""


@dataclass(frozen=True)
class ServerSentEvent:
    """One event of a stream; `data` lines are joined by newlines."""

    data: str
    event: str = "message"
    id: str = ""

    def json(self) -> Any:
        """The data, decoded."""
        return json.loads(self.data)


@dataclass(frozen=True)
class Response:
    """A whole answer. Header names are in lower case; a repeated header's values are joined by ", "."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode()

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)

    def expect(self, status: int = 200) -> "Response":
        """This response, or AssertionError with its text if it has another status."""
        assert self.status == status, f"status {self.status}, not {status}: {self.body[:2000]!r}"
        return self


class Answer:
    """An answer whose head has arrived; the body is read as it comes, once."""

    def __init__(self, status: int, headers: dict[str, str], body: AsyncIterator[bytes]) -> None:
        self.status = status
        self.headers = headers
        self._body = body

    async def chunks(self) -> AsyncIterator[bytes]:
        """Pieces of the body as they arrive: chunks where the transfer is chunked."""
        async for chunk in self._body:
            yield chunk

    async def events(self) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events, up to and including `[DONE]` where there is one. Comments are skipped."""
        async for event in _events(_lines(self._body)):
            yield event

    async def read(self) -> Response:
        """The rest of the body, and the answer as a whole."""
        return Response(self.status, self.headers, b"".join([chunk async for chunk in self._body]))


@dataclass
class Connection:
    """One TCP connection, for tests of keep-alive, pipelining and of what should never be sent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    timeout: float = 60.0
    host: str = "localhost"
    _closed: bool = field(default=False, init=False)

    async def send(
        self, method: str, path: str, *, body: bytes = b"", headers: Headers | None = None, json: Any = None
    ) -> None:
        """Send a request. `json` is encoded as the body; Host and Content-Length are added unless given."""
        import json as json_module

        merged = {"host": self.host, **{name.lower(): value for name, value in (headers or {}).items()}}
        if json is not None:
            body = json_module.dumps(json).encode()
            merged.setdefault("content-type", "application/json")
        if (body or method in {"POST", "PUT", "PATCH"}) and "transfer-encoding" not in merged:
            merged.setdefault("content-length", str(len(body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in merged.items())
        await self.send_raw(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        async with asyncio.timeout(self.timeout):
            await self.writer.drain()

    async def receive(self, method: str = "GET") -> Answer:
        """Wait for the head of the next answer; `method` is that of its request. Informational ones are skipped."""
        while True:
            status, headers = await self._head()
            if status >= 200:
                return Answer(status, headers, self._body(method, status, headers))

    async def at_end(self) -> bool:
        """Wait until the peer sends something or ends; whether it ended."""
        try:
            async with asyncio.timeout(self.timeout):
                return await self.reader.read(1) == b""
        except ConnectionError:
            return True

    def abort(self) -> None:
        """Break off at once, as a client that is killed."""
        self._closed = True
        self.writer.transport.abort()

    async def close(self) -> None:
        """Close in order. Doing it twice, or after `abort`, is allowed."""
        if not self._closed:
            self._closed = True
            self.writer.close()
        try:
            async with asyncio.timeout(self.timeout):
                await self.writer.wait_closed()
        except ConnectionError:
            pass  # the peer was faster

    async def _head(self) -> tuple[int, dict[str, str]]:
        version, _, rest = (await self._line()).partition(" ")
        assert version in {"HTTP/1.1", "HTTP/1.0"}, f"not an HTTP answer: {version!r}"
        status = int(rest[:3])
        headers: dict[str, str] = {}
        while line := await self._line():
            name, colon, value = line.partition(":")
            assert colon, f"a header line without a colon: {line!r}"
            assert name == name.strip(), f"white space around a header's name: {line!r}"
            name = name.lower()
            headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
        return status, headers

    async def _body(self, method: str, status: int, headers: dict[str, str]) -> AsyncIterator[bytes]:
        if method == "HEAD" or status in {204, 304}:
            return
        if headers.get("transfer-encoding", "").lower() == "chunked":
            assert "content-length" not in headers, "both a length and chunks"
            while size := int((await self._line()).partition(";")[0], 16):
                yield await self._exactly(size)
                assert await self._line() == "", "a chunk is longer than it says"
            while await self._line():
                pass  # trailers
        elif "content-length" in headers:
            remaining = int(headers["content-length"])
            while remaining:
                yield (data := await self._some(min(remaining, _READ_SIZE)))
                remaining -= len(data)
        else:
            while data := await self._read(_READ_SIZE):
                yield data

    async def _line(self) -> str:
        try:
            async with asyncio.timeout(self.timeout):
                line = await self.reader.readuntil(b"\r\n")
        except asyncio.IncompleteReadError as ended:
            raise TruncatedError(f"the connection ended after {ended.partial!r}") from ended
        return line[:-2].decode("latin-1")

    async def _exactly(self, size: int) -> bytes:
        try:
            async with asyncio.timeout(self.timeout):
                return await self.reader.readexactly(size)
        except asyncio.IncompleteReadError as ended:
            raise TruncatedError(
                f"the connection ended {size - len(ended.partial)} bytes before a chunk did"
            ) from ended

    async def _some(self, limit: int) -> bytes:
        data = await self._read(limit)
        if not data:
            raise TruncatedError("the connection ended before the body did")
        return data

    async def _read(self, limit: int) -> bytes:
        async with asyncio.timeout(self.timeout):
            return await self.reader.read(limit)


class HttpClient:
    """A client of one port or Unix socket, here or on a lab's host. A new connection for each request."""

    def __init__(
        self,
        port: int,
        *,
        lab: NetLab | None = None,
        host: int = 0,
        address: str = "127.0.0.1",
        headers: Headers | None = None,
        timeout: float = 60.0,
        path: str = "",
    ) -> None:
        """`headers` go with every request; `timeout` bounds each wait for the peer, not the whole answer.

        `path`: of a Unix socket, which takes the port's place.
        """
        self.port = port
        self._lab = lab
        self._host = host
        self._address = address
        self._headers = dict(headers or {})
        self._timeout = timeout
        self._path = path

    @property
    def url(self) -> str:
        """The address as a URL, without a path."""
        return f"http://{self._address}:{self.port}"

    async def connect(self) -> Connection:
        """Open a connection. Raises OSError, of which ConnectionRefusedError when nobody listens."""
        async with asyncio.timeout(self._timeout):
            if self._path:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_LINE_LIMIT)
            elif self._lab is None:
                reader, writer = await asyncio.open_connection(self._address, self.port, limit=_LINE_LIMIT)
            else:
                reader, writer = await self._lab.connect(self._host, self.port, self._address, limit=_LINE_LIMIT)
        return Connection(reader, writer, self._timeout, f"{self._address}:{self.port}")

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, *, json: Any = None, body: bytes = b"", headers: Headers | None = None
    ) -> AsyncGenerator[Answer]:
        """Send a request and give the answer as soon as its head is there; leaving the block breaks it off."""
        connection = await self.connect()
        try:
            await connection.send(method, path, json=json, body=body, headers={**self._headers, **(headers or {})})
            yield await connection.receive(method)
        finally:
            connection.abort()
            await connection.close()

    async def request(
        self, method: str, path: str, *, json: Any = None, body: bytes = b"", headers: Headers | None = None
    ) -> Response:
        """Send a request and wait for the whole answer."""
        async with self.stream(method, path, json=json, body=body, headers=headers) as answer:
            return await answer.read()

    async def get(self, path: str, *, headers: Headers | None = None) -> Response:
        """GET."""
        return await self.request("GET", path, headers=headers)

    async def post(self, path: str, json: Any, *, headers: Headers | None = None) -> Response:
        """POST of JSON."""
        return await self.request("POST", path, json=json, headers=headers)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Lines of a body, ended by LF or CRLF; a last line without an end is a truncated one."""
    pending = b""
    async for chunk in chunks:
        *complete, pending = (pending + chunk).split(b"\n")
        for line in complete:
            yield line.removesuffix(b"\r").decode()
    if pending:
        raise TruncatedError(f"the stream ended within a line: {pending!r}")


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[ServerSentEvent]:
    """Events as the WHATWG's HTML standard, section 9.2.6, interprets a stream's lines."""
    fields: list[tuple[str, str]] = []
    async for line in lines:
        if line:
            if not line.startswith(":"):
                name, _, value = line.partition(":")
                fields.append((name, value.removeprefix(" ")))
            continue
        event = _event_of(fields)
        fields.clear()
        if event is not None:
            yield event
    if fields:
        raise TruncatedError(f"the stream ended within an event: {fields!r}")


def _event_of(fields: Iterable[tuple[str, str]]) -> ServerSentEvent | None:
    data = [value for name, value in fields if name == "data"]
    if not data:
        return None
    others = {name: value for name, value in fields if name in {"event", "id"}}
    return ServerSentEvent("\n".join(data), **others)
