"""Which engine is chosen, and an engine that uses a fraction of the machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from tests.unit.engine.fake_binaries import write_server

from mesh_llm.core.placement.fit import plan_solo
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts
from mesh_llm.engine.devices import Machine, measure
from mesh_llm.engine.process import Command
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources import choice as choice_module
from mesh_llm.engine.sources.choice import LimitedSource, choose, engines_report, find_sources, thread_limit
from mesh_llm.engine.spec import DeviceInfo, DeviceKind, EngineInfo, EngineSpec, RpcWorkerSpec

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
    monkeypatch.setattr(choice_module.EmbeddedSource, "find", nothing)
    assert [source.name for source in find_sources(None, tmp_path)] == ["binaries"]


async def test_report_marks_the_chosen_and_lists_what_the_system_has() -> None:
    report = await engines_report([EMBEDDED, CUDA, BROKEN], machine=lambda: Machine(cpu=CPU, nvidia=(GPU,)))
    assert [engine.chosen for engine in report.engines] == [False, True, False]
    assert report.engines[2].problems == ("It is broken.",)
    assert [(gpu.id, gpu.kind, gpu.memory_total) for gpu in report.system_gpus] == [("CUDA0", "gpu", 10)]


GIB = 2**30


class Recorder:
    """An engine source that remembers what it was asked for."""

    name = "recorder"
    path = Path("/recorder")

    def __init__(self) -> None:
        self.threads: list[int | None] = []

    async def info(self) -> EngineInfo:
        return EngineInfo(source="recorder")

    async def server(self, spec: EngineSpec) -> Command:
        self.threads.append(spec.threads)
        return Command(argv=("server",))

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        self.threads.append(spec.threads)
        return Command(argv=("worker",))


def test_threads_of_a_part() -> None:
    assert [thread_limit(share, 16) for share in (1.0, 0.5, 0.3, 0.01)] == [16, 8, 4, 1]


async def test_engines_get_no_more_threads_than_their_part(tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    small.write_bytes(b"GGUF")
    recorder = Recorder()
    source = LimitedSource(cast("EngineSource", recorder), 8)
    assert (source.name, source.path, (await source.info()).source) == ("recorder", Path("/recorder"), "recorder")
    missing = EngineSpec(model=tmp_path / "gone.gguf", alias="m", context=1, slots=1)
    await source.server(missing)
    await source.server(EngineSpec(model=small, alias="m", context=1, slots=1, threads=12))
    await source.server(EngineSpec(model=small, alias="m", context=1, slots=1, threads=2))
    await source.rpc_worker(RpcWorkerSpec())
    await source.rpc_worker(RpcWorkerSpec(threads=1))
    assert recorder.threads == [8, 8, 2, 8, 1]


@pytest.mark.parametrize(("share", "expected"), [(1.0, 20.0 - 3.2), (0.5, 16.0), (0.25, 8.0)])
def test_memory_is_capped_by_its_part_of_all(share: float, expected: float) -> None:
    cpu = DeviceInfo(id="CPU", name="CPU", kind=DeviceKind.CPU, memory_total=32 * GIB, memory_free=20 * GIB)
    info = EngineInfo(source="embedded", devices=(cpu,))
    measured = measure(info, fraction=share, machine=lambda: Machine(cpu=cpu))
    assert measured.capacity.memory_bytes == pytest.approx(expected * GIB)


def test_fewer_slots_are_planned_unasked_and_what_is_asked_for_is_kept() -> None:
    facts = ModelFacts(
        name=ModelName("m"), size_bytes=GIB, layers=8, context_train=4096, embedding_length=512, vocabulary=1000,
        kv_bytes_per_token=1024,
    )  # fmt: skip
    for options, slots in (
        (LaunchOptions(), 4),
        (LaunchOptions(most_slots=2), 2),
        (LaunchOptions(most_slots=1), 1),
        (LaunchOptions(most_slots=1, slots=8), 8),
    ):
        plan = plan_solo(facts, 64 * GIB, options)
        assert isinstance(plan, LaunchPlan)
        assert plan.slots == slots
