"""What a host may leave on a worker's disk, however often it comes."""

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from blake3 import blake3
from msgspec.structs import replace
from tests.support.core_values import facts

from mesh_llm.core.types.ids import ModelName
from mesh_llm.daemon import split_worker as lent_weights
from mesh_llm.daemon.split_worker import WorkerPart, WorkerWeights
from mesh_llm.models.tensor_cache.store import TensorCache
from mesh_llm.split.worker.weights import WeightCache

PART, SLACK, TENSOR = 1 << 20, 256 << 10, 100_000


class Usage(NamedTuple):
    """As shutil.disk_usage gives it."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much of the disk is free."""
    free = [1 << 40]
    monkeypatch.setattr(lent_weights, "_SLACK_BYTES", SLACK)

    def usage(_: Path) -> Usage:
        return Usage(1 << 40, 0, free[0])

    monkeypatch.setattr("shutil.disk_usage", usage)
    return free


async def session(lent: WorkerWeights) -> WeightCache | None:
    part = WorkerPart(ModelName("m"), 3, PART)
    model = replace(facts("m"), fingerprint="ab" * 16)
    _, keep = await lent.of(None, model, part, "the host")
    return keep


def fill(keep: WeightCache | None, first: int) -> int:
    """Have tensors kept until no more are; how many."""
    count = 0
    while keep is not None and (arriving := keep.begin(TENSOR)) is not None:
        content = (first + count).to_bytes(8, "big") + bytes(TENSOR - 8)
        arriving.write(content)
        arriving.keep(blake3(content).digest())
        count += 1
    return count


def on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def lent_weights_of(path: Path) -> WorkerWeights:
    weights: Any = None
    return WorkerWeights(weights, TensorCache(path), lambda _line, _begins: None)


async def test_many_sessions_leave_no_more_than_one(tmp_path: Path) -> None:
    lent = lent_weights_of(tmp_path)
    kept = 0
    for _ in range(6):
        kept += fill(await session(lent), kept)
    await lent.close()
    assert PART <= on_disk(tmp_path) <= PART + PART // 4 + SLACK + TENSOR
    # Those that are open at once neither.
    keeps = [await session(lent) for _ in range(4)]
    assert sum(fill(keep, 1000) for keep in keeps) == 0


async def test_the_last_room_of_a_disk_stays_free_while_a_session_sends(tmp_path: Path, disk: list[int]) -> None:
    lent = lent_weights_of(tmp_path)
    keep = await session(lent)
    assert keep is not None
    arriving = keep.begin(TENSOR)
    assert arriving is not None
    await asyncio.to_thread(arriving.drop)
    disk[0] = 1 << 30
    assert keep.begin(TENSOR) is None
    await lent.close()
