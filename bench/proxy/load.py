"""The load: `python -m bench.proxy.load JSON`, a process of its own that counts events and little else.

The argument: {"port", "streams", "requests", "body", "key", "headers"}. On each of `streams` connections `requests`
requests one after another. Prints JSON: seconds, events, first_ms (time to each request's first whole event), lost.
"""

import asyncio
import json
import sys
import time
from typing import Any

import uvloop

_OK = b"HTTP/1.1 200 "
_END = b"0\r\n\r\n"


class Client(asyncio.Protocol):
    """One client; it connects again where the server closes after an answer, as llama-server does after streams."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: Any | None = None
        self._tail = b""
        self._sent = 0.0
        self._first = 0.0
        self._done: asyncio.Future[None] | None = None
        self._answered = False
        self.events = 0
        self.first_ms: list[float] = []

    async def connect(self) -> Any:
        """Open a connection."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        return self._transport

    def data_received(self, data: bytes) -> None:
        """asyncio: some of the answer."""
        if not self._answered:
            self._answered = True
            if not data.startswith(_OK):
                self._end(ConnectionError(f"refused: {data[:60]!r}"))
                if self._transport is not None:
                    self._transport.abort()
                return
        whole = self._tail + data
        count = whole.count(b"\n\n")
        if count:
            if not self._first:
                self._first = time.perf_counter() - self._sent
            self.events += count
        # An event's end, or the body's, may lie across two reads; what has been counted must not be again.
        self._tail = whole[max(whole.rfind(b"\n\n") + 2, len(whole) - 4) :] if count else whole[-4:]
        # A head may end like a body (`max=100`): only what follows an event is the end.
        if self._first and whole.endswith(_END):
            self._tail = b""
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the server closed."""
        self._transport = None
        self._end(exc or ConnectionError("closed"))

    def _end(self, error: Exception | None) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    async def ask(self, request: bytes) -> None:
        """Send a request and wait for the end of its answer."""
        self._first = 0.0
        self._sent = time.perf_counter()
        try:
            await self._exchange(request)
        except OSError:
            if self._answered:
                raise
            await self._exchange(request)
        self.first_ms.append(self._first * 1e3)

    async def _exchange(self, request: bytes) -> None:
        transport = self._transport or await self.connect()
        done = self._done = asyncio.get_running_loop().create_future()
        self._answered = False
        transport.write(request)
        await done


async def main(plan: dict[str, Any]) -> dict[str, Any]:
    """Carry the plan out."""
    body = json.dumps(plan["body"]).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {plan['key']}\r\nContent-Length: {len(body)}\r\n"
    )
    head += "".join(f"{name}: {value}\r\n" for name, value in plan["headers"].items()) + "\r\n"
    request = head.encode() + body
    clients = [Client(plan["port"]) for _ in range(plan["streams"])]
    for client in clients:
        await client.connect()

    async def series(client: Client) -> bool:
        try:
            for _ in range(plan["requests"]):
                await client.ask(request)
        except OSError:
            return False
        return True

    begun = time.perf_counter()
    well = await asyncio.gather(*map(series, clients))
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "events": sum(client.events for client in clients),
        "first_ms": [first for client in clients for first in client.first_ms],
        "lost": well.count(False),
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(main(json.loads(sys.argv[1])))))
