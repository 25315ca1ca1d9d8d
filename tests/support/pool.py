"""What tests of whole meshes share: waiting for what a node sees, asking it, and timing from a fault to its effect."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.http import Response
from tests.support.node import NodeProcess

Status = dict[str, Any]


async def statuses(node: NodeProcess) -> AsyncGenerator[Status]:
    """A node's status now, and again on each change, as the console's event stream tells it."""
    async with node.console.stream("GET", "/api/events") as answer:
        assert answer.status == 200
        async for event in answer.events():
            if event.event == "status":
                yield event.json()


async def until(node: NodeProcess, holds: Callable[[Status], bool], what: str, timeout: float = 30.0) -> float:
    """Wait until a node's status is as wanted; returns the seconds it took. AssertionError with the last status."""
    began = time.monotonic()
    last: Status = {}
    try:
        async with asyncio.timeout(timeout):
            async for last in statuses(node):
                if holds(last):
                    return time.monotonic() - began
    except TimeoutError:
        pass
    raise AssertionError(f"{node.process.name}: not {what} within {timeout} s; last seen: {json.dumps(last)[:3000]}")


def warm(model: str, nodes: int = 1) -> Callable[[Status], bool]:
    """A model can be asked for, at this many nodes."""
    return lambda status: any(
        m["name"] == model and m["status"] == "warm" and m["nodes"] == nodes for m in status["models"]
    )


def not_routed(model: str) -> Callable[[Status], bool]:
    """No request for the model would be sent anywhere."""
    return lambda status: all(m["name"] != model or m["status"] != "warm" for m in status["models"])


def alive(count: int) -> Callable[[Status], bool]:
    """So many other nodes are seen alive, and none is suspected."""
    return lambda status: [p["state"] for p in status["peers"]] == ["alive"] * count


def chat_body(model: str, *, tokens: int = 4, stream: bool = False, text: str = "Hello") -> dict[str, Any]:
    """A chat request, greedy."""
    return {
        "model": model,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
        "messages": [{"role": "user", "content": text}],
    }


async def chat(node: NodeProcess, model: str, **options: Any) -> Response:
    """Ask through a node's own API."""
    return await node.api.request("POST", "/v1/chat/completions", json=chat_body(model, **options))


def content(response: Response) -> str:
    """The text of an answered chat."""
    return response.expect().json()["choices"][0]["message"]["content"]


def named(model: Path, name: str, directory: Path) -> Path:
    """A copy of a model under another name, which makes it another model."""
    directory.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(model, directory / f"{name}.gguf"))


@asynccontextmanager
async def streaming(node: NodeProcess, model: str, tokens: int = 2000) -> AsyncGenerator[Any]:
    """A chat whose answer has begun to arrive: gives its events; leaving the block breaks it off."""
    body = chat_body(model, tokens=tokens, stream=True)
    async with node.api.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        events = answer.events()
        await anext(events)
        yield events
