from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.engine.fake_binaries import write_server

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.devices import Machine
from mesh_llm.engine.process import Command
from mesh_llm.engine.sources import choice as sources
from mesh_llm.engine.sources.base import DeviceInfo, DeviceKind, EngineInfo
from mesh_llm.engine.sources.choice import choose, engines_report, find_sources
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec

CPU = DeviceInfo(id="CPU", name="cpu", kind=DeviceKind.CPU)
GPU = DeviceInfo(id="CUDA0", name="gpu", kind=DeviceKind.GPU, memory_total=10, memory_free=5)


@dataclass
class Fake:
    answer: EngineInfo
    path: Path = Path("/x")

    @property
    def name(self) -> str:
        return self.answer.source

    async def info(self) -> EngineInfo:
        return self.answer

    async def server(self, spec: EngineSpec) -> Command:
        raise AssertionError(spec)

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        raise AssertionError(spec)


def nothing(*_: object, **__: object) -> None:
    """Finds no engine."""


EMBEDDED = Fake(EngineInfo(source="embedded", devices=(CPU,)))
CUDA = Fake(EngineInfo(source="binaries", devices=(GPU, CPU)))
PLAIN = Fake(EngineInfo(source="binaries", devices=(CPU,)))
BROKEN = Fake(EngineInfo(source="binaries", devices=(GPU,), usable=False, problems=("It is broken.",)))


async def test_a_gpu_decides_then_the_order() -> None:
    assert (await choose([EMBEDDED, CUDA]))[0] is CUDA
    assert (await choose([EMBEDDED, PLAIN]))[0] is EMBEDDED
    assert (await choose([EMBEDDED, BROKEN]))[0] is EMBEDDED


async def test_nothing_that_works_is_an_error_that_says_why() -> None:
    with pytest.raises(MeshError) as caught:
        await choose([BROKEN])
    assert "It is broken." in caught.value.message
    with pytest.raises(MeshError) as caught:
        await choose([])
    assert caught.value.code == "engine_missing"


def test_a_named_directory_is_the_only_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = write_server(tmp_path / "bin")
    assert [source.path for source in find_sources(tmp_path / "bin", tmp_path)] == [server]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert [source.name for source in find_sources(None, tmp_path)] == ["embedded", "binaries"]
    monkeypatch.setattr(sources.EmbeddedSource, "find", nothing)
    assert [source.name for source in find_sources(None, tmp_path)] == ["binaries"]


async def test_report_marks_the_chosen_and_lists_what_the_system_has() -> None:
    report = await engines_report([EMBEDDED, CUDA, BROKEN], machine=lambda: Machine(cpu=CPU, nvidia=(GPU,)))
    assert [engine.chosen for engine in report.engines] == [False, True, False]
    assert report.engines[2].problems == ("It is broken.",)
    assert [(gpu.id, gpu.kind, gpu.memory_total) for gpu in report.system_gpus] == [("CUDA0", "gpu", 10)]
