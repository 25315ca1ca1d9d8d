"""The load of the HTTP benchmark: connections that ask for streams, all at once, and when each event came.

It reads no more of an answer than it must: where an event ends, and whether the answer was whole.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

_LAST_CHUNK = b"0\r\n\r\n"
_EVENT_END = b"\n\n"
_TIMEOUT = 120.0
ECHOES = 9
"""Round trips of a link that are measured in a row."""

Numbers = dict[str, float]
Connect = Callable[[Callable[[], "Client"]], Awaitable["Client"]]


@dataclass(frozen=True)
class Load:
    """So many connections, on each of which so many requests follow each other; `body` is that of each request."""

    streams: int
    requests: int
    body: dict[str, Any]

    def request(self) -> bytes:
        """One request, whole."""
        body = json.dumps({"stream": True, **self.body}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass
class Answer:
    """One answer's times, in seconds of `time.perf_counter`."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    events: int = 0


class Client(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._answer = Answer(0.0)
        self._begin = b""
        self._open_event = b""
        self._end = b""
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio: some of the answer."""
        if len(self._begin) < 16:
            self._begin += data[:16]
        # An event's end may lie across two reads, and none may count twice.
        text = self._open_event + data
        events = text.count(_EVENT_END)
        self._open_event = b"\n" if text.endswith(b"\n") and not text.endswith(_EVENT_END) else b""
        if events:
            now = time.perf_counter()
            if not self._answer.events:
                self._answer.first = now
            self._answer.events += events
            self._answer.last = now
        self._end = (self._end + data)[-len(_LAST_CHUNK) :]
        # A head may end as a body does (`max=100`): only what follows an event is the end.
        ended = self._end == _LAST_CHUNK and self._answer.events > 0
        if ended or not self._begin.startswith(b"HTTP/1.1 200"[: len(self._begin)]):
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the server closed."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("closed within an answer"))

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for the end of its answer. Raises ConnectionError where it is not a whole 200."""
        self._begin = self._open_event = self._end = b""
        self._done = asyncio.get_running_loop().create_future()
        answer = self._answer = Answer(time.perf_counter())
        self._transport.write(request)
        async with asyncio.timeout(_TIMEOUT):
            await self._done
        if not self._begin.startswith(b"HTTP/1.1 200") or not answer.events:
            raise ConnectionError(f"answered {self._begin!r}")
        return answer

    def close(self) -> None:
        """Let go of it."""
        self._transport.close()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Echo(asyncio.Protocol):
    """A connection to the echo server of `bench.mesh.tunnel_roles`."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._missing = 0
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self._transport = transport
        self._transport.write(b"E")

    def data_received(self, data: bytes) -> None:
        """asyncio: some of the message is back."""
        self._missing -= len(data)
        if self._missing <= 0 and self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def round_trip(self, message: bytes) -> float:
        """Milliseconds until all of a message is back."""
        self._missing = len(message)
        self._done = asyncio.get_running_loop().create_future()
        sent = time.perf_counter()
        self._transport.write(message)
        async with asyncio.timeout(_TIMEOUT):
            await self._done
        return (time.perf_counter() - sent) * 1e3

    def close(self) -> None:
        """Let go of it."""
        self._transport.close()


async def link_round_trip(connect: Callable[[Callable[[], Echo]], Awaitable[Echo]], load: Load) -> float:
    """The median round trip in ms of the load's request, by plain TCP and one at a time: what a link itself takes."""
    echo = await connect(Echo)
    times = [await echo.round_trip(load.request()) for _ in range(ECHOES)]
    echo.close()
    return median(times)


async def run(connect: Connect, load: Load) -> Numbers:
    """Carry a load out, on connections that are open before the clock starts.

    `first_ms`: from sending a request to its first whole event, the median, and `first_p95_ms`. `events_per_s`: of all
    connections together, between the first and the last event that came; 0 where all came at once. `events`: all of
    them. `lost`: answers that were not whole.
    """
    clients = [await connect(Client) for _ in range(load.streams)]
    request = load.request()
    answers: list[Answer] = []
    lost = 0

    async def series(client: Client) -> None:
        nonlocal lost
        for number in range(load.requests):
            try:
                answers.append(await client.ask(request))
            except (OSError, TimeoutError):
                lost += load.requests - number
                return

    await asyncio.gather(*map(series, clients))
    for client in clients:
        client.close()
    if not answers:
        raise RuntimeError(f"none of {lost} requests was answered")
    return {**_numbers(answers), "lost": lost}


def _numbers(answers: list[Answer]) -> Numbers:
    waits = sorted((answer.first - answer.sent) * 1e3 for answer in answers)
    seconds = max(answer.last for answer in answers) - min(answer.first for answer in answers)
    # The first event of each stream starts its clock, so it is not among those that the clock saw coming.
    events = sum(answer.events - 1 for answer in answers)
    return {
        "first_ms": median(waits),
        "first_p95_ms": waits[int(0.95 * (len(waits) - 1))],
        "events_per_s": events / seconds if seconds > 0 else 0.0,
        "events": sum(answer.events for answer in answers),
    }
