"""What is told while a split model is loaded."""

import asyncio

import msgspec
from tests.support.core_values import GB, facts, node_id

from mesh_llm.core.types.model import SplitLayout, SplitShare
from mesh_llm.daemon.split_host import LoadProgress
from mesh_llm.daemon.split_worker import PartProgress, SplitDisplay, part_bytes
from mesh_llm.split.host.worker_info import SplitStats, WorkerStats

BIG = msgspec.structs.replace(facts("big", 10.0), output_bytes=2 * GB)
LAYOUT = SplitLayout(
    term=1, shares=tuple(SplitShare(node=node_id(n), layers=layers) for n, layers in ((1, 4), (2, 8), (3, 4)))
)


async def test_each_worker_has_its_percentage_until_the_engine_answers() -> None:
    told: list[tuple[str, bool]] = []
    more = asyncio.Event()

    def tell(line: str, ended: bool) -> None:
        told.append((line, ended))
        more.set()

    names = {"b (2)": node_id(2), "c (3)": node_id(3)}
    shown = {node_id(2): "b", node_id(3): "c"}
    group = LoadProgress(BIG, LAYOUT, names, SplitDisplay(lambda node: shown[node], tell))
    group.opening()
    stats = SplitStats({"b (2)": WorkerStats(), "c (3)": WorkerStats()})
    assert not group.ended
    more.clear()
    watching = asyncio.get_running_loop().create_task(group.watch(lambda: stats))
    await more.wait()
    stats.workers["b (2)"].weight_bytes_filled = GB
    stats.workers["b (2)"].weight_bytes_sent = GB
    stats.workers["c (3)"].weight_bytes_filled = 3 * GB
    async with asyncio.timeout(10.0):
        while ("loading big: b 50 %, c 100 %", False) not in told:
            more.clear()
            await more.wait()
    group.ready()
    await watching
    assert told[:2] == [("big: asking b, c", False), ("loading big: b 0 %, c 0 %", False)]
    assert told[-1] == ("big is loaded: here 4 layers, b 8, c 4", True)
    assert group.ended


def test_a_worker_tells_each_percent_once() -> None:
    told: list[tuple[str, bool]] = []
    part = PartProgress("8 layers of big for a", part_bytes(BIG, 8), lambda line, ended: told.append((line, ended)))
    for megabytes in (0, 10, 20, 2000, 4000, 4000):
        part.filled(megabytes * 10**6)
    assert told == [
        ("8 layers of big for a: 0 % read", False),
        ("8 layers of big for a: 50 % read", False),
        ("8 layers of big for a: 100 % read", True),
    ]
