"""What tests of canaries between real nodes share: clients that work, and what a node then says of its hosts."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.node import NodeProcess
from tests.support.pool import Status, chat, chat_body, until

from mesh_llm.core.types.ids import NodeId, OwnerId
from mesh_llm.daemon.ownership import create_owner, owner_key, sign_for
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope

CHECKS = ("--canary-share", "100")
"""Canaries add as much work as clients: the schedule is the usual one, only denser."""


async def trust(node: NodeProcess) -> dict[str, Any]:
    """What a node says of the nodes that it checked, by their ids."""
    status, text = await node.cli("trust", "list", "--json")
    assert status == 0, text
    return {one["node_id"]: one for one in json.loads(text)["hosts"]}


SHORT = ("--ctx-size", "512", "--parallel", "1")
"""A copy with so little context gets none of the long requests below: they go to other hosts, and it is free."""
LONG = " It is a long story." * 110


async def works(node: NodeProcess, model: str, *, stream: bool = False, more: str = "") -> None:
    """A client uses a model without end; its requests go to all hosts in turn that have the context."""
    for number in itertools.count():
        text = f"Tell me about number {number}{more}"
        if not stream:
            await chat(node, model, tokens=250, text=text)
            continue
        body = {**chat_body(model, tokens=250, stream=True, text=text), "temperature": 0.8}
        async with node.api.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.chunks():
                pass


async def found_while_used(
    node: NodeProcess,
    model: str,
    found: Callable[[Status], bool],
    *,
    stream: bool = False,
    more: str = "",
    timeout: float = 400.0,
) -> dict[str, Any]:
    """Use a model until a node's status says that something is found; what the node then says of its hosts."""
    async with TaskScope("clients") as scope:
        scope.spawn(works(node, model, stream=stream, more=more), "works")
        try:
            await until(node, found, "found", timeout)
        finally:
            known = await trust(node)
            print(json.dumps(known, indent=1))
    return known


async def honest_while_used(
    node: NodeProcess, model: str, host: str, *, more: str = "", timeout: float = 400.0
) -> dict[str, Any]:
    """Use a model until a host has passed a test; what the node then says of it."""
    async with TaskScope("clients") as scope:
        scope.spawn(works(node, model, more=more), "works")
        known: dict[str, Any] = {}

        def passed(_: Status) -> bool:
            # The status does not say it; the file does, which is written after each canary.
            file = node.options.home / "trust.json"
            hosts = json.loads(file.read_text())["hosts"] if file.exists() else []
            known.update({one["node"]: one for one in hosts})
            return known.get(host, {}).get("tests", 0) > 0

        await until(node, passed, "honest", timeout)
    return known[host]


def problem_with(node_id: str) -> Callable[[Status], bool]:
    """A node's status names another one as distrusted."""
    return lambda status: any(node_id[:10] in one["what"] for one in status["problems"])


def owner_in(home: Path) -> OwnerId:
    """Make an owner's key in the home of a node that has not begun yet."""
    home.mkdir(parents=True, exist_ok=True)
    return create_owner(Home(home))


async def owned_by(home: Path, node: NodeProcess) -> None:
    """A running node becomes one of the owner's whose key is in a home; it starts again."""
    statement = sign_for(owner_key(Home(home)), NodeId((await node.status())["node_id"]))
    status, text = await node.cli("owner", "accept", statement)
    assert status == 0, text
    await node.restart()
