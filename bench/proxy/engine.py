"""A stand-in for llama-server that is never the bottleneck: `python -m bench.proxy.engine PORT`.

Streams `events` events, `rate` a second (0: as fast as they are taken), each written on its own. The body's fields
say how much: {"events": 100, "rate": 50, ...}.
"""

import asyncio
import json
import sys
from typing import Any

import uvloop

_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Keep-Alive: timeout=5, max=100\r\n\r\n"
)
_LAST_CHUNK = b"0\r\n\r\n"


def _event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """One event of llama-server's chat stream, framed as a chunk; about 230 bytes."""
    told = {
        "choices": [{"finish_reason": finish, "index": 0, "delta": delta}],
        "created": 1795397323,
        "id": "chatcmpl-vXd0jKlFThAqEl0KlrjCFOFbcUAbnttF",
        "model": "tiny",
        "system_fingerprint": "b11549",
        "object": "chat.completion.chunk",
    }
    return _chunk(json.dumps(told, separators=(",", ":")).encode())


def _chunk(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


_FIRST = _event({"role": "assistant", "content": None})
_TOKEN = _event({"content": " token"})
_ENDING = _event({}, "stop") + _chunk(b"[DONE]") + _LAST_CHUNK


class Engine(asyncio.Protocol):
    """One connection; requests one after another."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._received = b""
        self._left = 0
        self._rate = 0.0
        self._next = 0.0
        self._paused = False
        self._timer: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: a client."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """asyncio: it left."""
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """asyncio: some of a request."""
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        length = int(lengths[0].partition(b":")[2]) if lengths else 0
        if len(rest) < length:
            return
        self._received = rest[length:]
        asked = json.loads(rest[:length] or b"{}")
        self._left, self._rate = int(asked.get("events", 1)), float(asked.get("rate", 0))
        self._transport.write(_HEAD + _FIRST)
        self._next = self._loop.time()
        self._step()

    def pause_writing(self) -> None:
        """asyncio: the client is slow."""
        self._paused = True

    def resume_writing(self) -> None:
        """asyncio: no longer."""
        self._paused = False
        if self._timer is None and self._left > 0:
            self._step()

    def _step(self) -> None:
        self._timer = None
        if self._left <= 1:
            self._left = 0
            self._transport.write(_ENDING)
            return
        if self._paused:
            return
        self._left -= 1
        self._transport.write(_TOKEN)
        if self._rate:
            self._next += 1.0 / self._rate
            self._timer = self._loop.call_at(self._next, self._step)
        else:
            self._timer = self._loop.call_soon(self._step)


async def main() -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
