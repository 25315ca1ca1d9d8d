"""A part of the machine: threads, memory, slots."""

from pathlib import Path
from typing import cast

import pytest

from mesh_llm.core.placement.fit import plan_solo
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts
from mesh_llm.engine.devices import Machine, measure
from mesh_llm.engine.process import Command
from mesh_llm.engine.sources.base import DeviceInfo, DeviceKind, EngineInfo, EngineSource
from mesh_llm.engine.sources.choice import SharedSource, shared_threads
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec

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
    assert [shared_threads(share, 16) for share in (1.0, 0.5, 0.3, 0.01)] == [16, 8, 4, 1]


async def test_engines_get_no_more_threads_than_their_part(tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    small.write_bytes(b"GGUF")
    recorder = Recorder()
    source = SharedSource(cast("EngineSource", recorder), 8)
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
    measured = measure(info, share=share, machine=lambda: Machine(cpu=cpu))
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
