"""What tests of finding and being found share."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.support.node import NodeProcess
from tests.support.nostr_relays import Contents, TestRelay

SOON = {"MESH_LLM_LISTING_PERIOD": "4"}
"""Listings are renewed every 4 seconds here, and expire after 8, instead of 60 and 120."""


def listed(count: int = 1) -> Callable[[Contents], bool]:
    def holds(contents: Contents) -> bool:
        return len(contents) == count

    return holds


def serving(model: str) -> Callable[[Contents], bool]:
    """One mesh is listed, with a model: one that loads slowly is listed before that serves anything."""

    def holds(contents: Contents) -> bool:
        return len(contents) == 1 and model in [name for name, _ in contents[0].get("serving", [])]

    return holds


def urls(which: Sequence[TestRelay]) -> list[str]:
    return [word for relay in which for word in ("--nostr-relay", relay.url)]


def publishing(which: Sequence[TestRelay], *more: str, name: str = "Sydney Lab") -> dict[str, Any]:
    """How to start a node that lists its mesh, which grows by that."""
    words = ["--publish", "--yes", "--publish-scope", "serve", "--mesh-name", name]
    return {"arguments": [*words, *more, *urls(which)], "env": SOON}


async def moved(node: NodeProcess, life: int) -> None:
    """Wait until a node lives in another mesh; `life`: how much it had said before. In between it has no ports."""
    await node.process.line("^ready$", 90.0, after=life)


async def discover(node: NodeProcess, relay: TestRelay, *words: str) -> tuple[int, str]:
    return await node.cli("discover", "--relay", relay.url, *words)
