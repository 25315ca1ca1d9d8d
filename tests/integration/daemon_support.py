"""What tests of whole daemons share: waiting for a state, and finding the engine among the processes."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import psutil
from tests.support.node import NodeProcess
from tests.support.process import words_of

Status = dict[str, Any]


async def until(node: NodeProcess, condition: Callable[[Status], bool], timeout: float = 60.0) -> Status:
    """Follow the daemon's own events until its status fulfils `condition`; that status."""
    last: Status = {}
    try:
        async with asyncio.timeout(timeout), node.console.stream("GET", "/api/events") as answer:
            async for event in answer.events():
                if event.event == "status":
                    last = json.loads(event.data)
                    if condition(last):
                        return last
    except TimeoutError:
        raise AssertionError(f"{timeout:g} s passed; the last status was {last}") from None
    raise AssertionError(f"the events ended; the last status was {last}")


def state(status: Status, model: str) -> str:
    """The state of a model in a status; empty if it is not known."""
    return next((entry["status"] for entry in status["models"] if entry["name"] == model), "")


def engines(node: NodeProcess) -> list[psutil.Process]:
    """The processes of a node that serve a model by llama.cpp."""
    family = node.process.family()
    return [process for process in family if process.pid != node.process.pid and _serves(process)]


def _serves(process: psutil.Process) -> bool:
    """Whether a process neither watches another one, nor measures this machine, nor has ended."""
    words = words_of(process)
    return bool(words) and not any(word.endswith(("guard.py", ".probe_main")) for word in words)


def chat(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
