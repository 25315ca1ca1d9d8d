"""The least that a Python relay can do: `python -m bench.proxy.bare_relay PORT ENGINE_PORT`.

uvicorn, httptools, asyncio's streams, no check of anything. What mesh-llm's API adds is measured against it.
"""

import asyncio
import sys
from typing import Any

import httptools
import uvicorn

_Idle = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]


class _Answer:
    """What httptools tells of an answer."""

    def __init__(self) -> None:
        self.kind = b""
        self.pieces: list[bytes] = []
        self.done = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.kind = value

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        self.done = True


def relay(port: int) -> Any:
    """The ASGI application."""
    idle: _Idle = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        while idle and idle[-1][0].at_eof():
            idle.pop()[1].close()
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {scope['path']} HTTP/1.1\r\nhost: engine\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        started = False
        while not answer.done:
            data = await reader.read(65536)
            if not data:
                raise ConnectionResetError("the engine closed")
            parser.feed_data(data)
            if not started:
                started = True
                headers = [(b"content-type", answer.kind)]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            data = b"".join(answer.pieces)
            answer.pieces.clear()
            await send({"type": "http.response.body", "body": data, "more_body": not answer.done})
        idle.append((reader, writer))

    return application


if __name__ == "__main__":
    uvicorn.run(
        relay(int(sys.argv[2])),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="error",
        access_log=False,
        lifespan="off",
        loop="uvloop",
        http="httptools",
        ws="none",
    )
