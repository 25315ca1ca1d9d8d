"""Real llama.cpp for tests: random models, the embedded engine, and children that can be waited for."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.support.gguf_models import cached_model
from tests.support.http import HttpClient
from watchfiles import awatch

from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources.embedded import plugin
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, RunningEngine, Supervisor

Model = Callable[[str], Path]

CACHE = Path(os.environ.get("MESH_LLM_HOME") or Path.home() / ".mesh-llm") / "cache"
"""Where `make setup` leaves the RPC plugin when this environment cannot be written to. Only looked into."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The path of a generated model by its preset's name."""
    directory = tmp_path_factory.getbasetemp() / "models"
    return lambda preset: cached_model(directory, preset)


@pytest.fixture(scope="session")
def embedded() -> EmbeddedSource:
    """The embedded engine, with the plugin of this environment where it was built."""
    source = EmbeddedSource.find(CACHE)
    if source is None:
        pytest.skip("there is no xllamacpp wheel for this system")
    return source


@pytest.fixture(scope="session")
def rpc_embedded(embedded: EmbeddedSource) -> EmbeddedSource:
    """The same, and its RPC plugin is there."""
    if plugin.find(CACHE) is None:
        pytest.skip("the RPC plugin is not built: run `mesh-llm engine install` (as `make setup` does)")
    return embedded


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    """Closed after the test, whatever happened in it."""
    supervisor = Supervisor(tmp_path / "logs")
    try:
        yield supervisor
    finally:
        await supervisor.close()


def small_spec(model: Path, **changes: object) -> EngineSpec:
    """A spec for a small model; any field can be given."""
    fields: dict[str, object] = {"model": model, "alias": "small", "context": 512, "slots": 2}
    return EngineSpec(**(fields | changes))  # pyright: ignore[reportArgumentType]


async def started(supervisor: Supervisor, source: EngineSource, spec: EngineSpec, name: str) -> RunningEngine:
    """An engine that is ready, or a failed test with its last lines."""
    engine = await supervisor.launch(await supervisor.server_command(source, spec), name)
    ready = await engine.ready()
    assert isinstance(ready, EngineReadyInfo), ready
    return engine


def client_of(engine: RunningEngine, timeout: float = 60.0) -> HttpClient:
    """An HTTP client for an engine that is ready, with its key. `timeout`: of each wait."""
    assert engine.info is not None
    kind, _, place = engine.info.address.rpartition(":")
    headers = {"authorization": f"Bearer {engine.info.key}"}
    if kind == "unix":
        return HttpClient(0, path=place, headers=headers, timeout=timeout)
    return HttpClient(int(place), headers=headers, timeout=timeout)


async def has_ended(pid: int, seconds: float = 20.0) -> None:
    """Wait for the end of any process, child or not, also where nobody collects its status."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def logged(engine: RunningEngine, text: str, seconds: float = 20.0) -> None:
    """Wait until an engine's log says something: llama.cpp logs from a thread of its own, after it has answered."""
    path = engine.log_path
    async with asyncio.timeout(seconds):
        async for _ in awatch(path.parent, yield_on_timeout=True, rust_timeout=200):
            if text in path.read_text():
                return


def is_open(address: str) -> bool:
    """Whether somebody listens there."""
    host, _, place = address.rpartition(":")
    with socket.socket(socket.AF_UNIX if host == "unix" else socket.AF_INET) as client:
        client.settimeout(2)
        try:
            client.connect(place if host == "unix" else (host, int(place)))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True
