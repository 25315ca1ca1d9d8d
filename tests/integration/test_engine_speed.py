"""How fast a GPU is that only the user's own llama.cpp can use: asked through a real RPC server, here of the CPU."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from tests.integration.engine_fixtures import CACHE, embedded, rpc_embedded

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import speed
from mesh_llm.engine.process import Command
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources.embedded.plugin import Plugin
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.engine.speed import speed_with

__all__ = ["embedded", "rpc_embedded"]


@dataclass
class Own:
    """Another engine than the wheel, as the meter sees it; `launched` are its RPC servers' commands."""

    inner: EmbeddedSource
    launched: list[Command]
    works: bool = True
    name: str = "binaries"

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        if not self.works:
            raise MeshError(code="engine_without_rpc", message="none", hint="none", status=503)
        command = await self.inner.rpc_worker(spec)
        self.launched.append(command)
        return command


def source_of(own: Own) -> EngineSource:
    return cast("EngineSource", cast("Any", own))


async def test_what_an_rpc_server_lends_is_measured_and_nothing_stays(rpc_embedded: EmbeddedSource) -> None:
    own = Own(rpc_embedded, [])
    measured = await speed_with(source_of(own), (), CACHE)
    assert measured is not None
    assert measured.cores == 0
    assert measured.full_step_ns > 0
    assert min(measured.full.f16, measured.full.q8, measured.full.q4) > 0
    # A weight that is read once serves many tokens of a prompt.
    assert measured.batch.f16 > 0
    (command,) = own.launched
    assert not [one for one in psutil.process_iter() if command.argv[-2] in _words(one)]


async def test_the_processor_is_measured_by_the_wheel(rpc_embedded: EmbeddedSource) -> None:
    own = Own(rpc_embedded, [])
    measured = await speed_with(source_of(own), ("CPU",), CACHE)
    assert measured is not None
    assert measured.cores > 0
    assert min(measured.batch.f16, measured.batch.q8, measured.batch.q4) > 0
    assert not own.launched


async def test_without_an_rpc_server_the_speed_is_not_known(rpc_embedded: EmbeddedSource) -> None:
    assert await speed_with(source_of(Own(rpc_embedded, [], works=False)), (), CACHE) is None


async def test_another_protocol_is_not_spoken_to(rpc_embedded: EmbeddedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    found = speed.find_plugin(CACHE)
    assert found is not None
    other = replace(found, rpc_version="7.0.0")

    def find(_: Path) -> Plugin:
        return other

    monkeypatch.setattr(speed, "find_plugin", find)
    own = Own(rpc_embedded, [])
    assert await speed_with(source_of(own), (), CACHE) is None
    assert len(own.launched) == 1


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
