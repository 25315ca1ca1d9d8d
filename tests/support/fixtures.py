"""Fixtures that start nodes and make models."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.gguf_models import cached_model
from tests.support.node import NodeProcess

StartNode = Callable[..., Awaitable[NodeProcess]]
"""`await start_node("a", models=["tiny"], lab=lab, host=0)`; see `NodeOptions`. The name is that of its home."""


@pytest.fixture
async def start_node(tmp_path: Path) -> AsyncGenerator[StartNode]:
    """Starts nodes; at the end of the test they are killed, and what they said is in the report if it failed."""
    nodes: list[NodeProcess] = []

    async def start(name: str, *, ready: bool = True, timeout: float = 120.0, **options: Any) -> NodeProcess:
        node = await NodeProcess.start(tmp_path / name, ready=False, **options)
        nodes.append(node)
        if ready:
            await node.ready(timeout)
        return node

    yield start
    for node in nodes:
        await node.close()
        print(f"--- {node.process.name}, exit status {node.process.status}\n{node.process.text}")


@pytest.fixture(scope="session")
def random_model(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`random_model("small")`: the path of a generated model, kept from run to run; presets in `gguf_models`."""
    assert request.config.cache is not None
    directory = request.config.cache.mkdir("models")
    return lambda preset: cached_model(directory, preset)
