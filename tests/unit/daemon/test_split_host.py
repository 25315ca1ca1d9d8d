"""The node that a split's failure is counted against is the one that failed, whatever it says of others."""

import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from tests.support.byte_pipe import pair
from tests.support.core_values import GB, facts, node_id

from mesh_llm.core.types.effects import Notice
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, SplitFailed
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchPlan, ModelFacts, SplitLayout, SplitShare, Wire
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.daemon.split_host import (
    HostSession,
    LoadProgress,
    SplitHostService,
    WireControl,
    links_changed,
    split_spec,
)
from mesh_llm.daemon.split_worker import PartProgress, SplitDisplay, part_bytes
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.framing import ControlStream
from mesh_llm.split.host.tunnel import unlimited
from mesh_llm.split.host.worker_info import SplitStats, WorkerStats
from mesh_llm.wire.ggml_rpc.activations import ALL_FORMATS
from mesh_llm.wire.ggml_rpc.tunnel import DeviceFacts, Ended, Opened, decode_to_worker

HOST, BAD, OTHER = (NodeId(letter * 64) for letter in "abc")
MODEL = ModelName("big")
OPENED = Opened("8.0.0", (DeviceFacts(32, 1 << 40, 1, 1),))


class Net:
    """Every node answers an opened session with what the test wants."""

    def __init__(self, scope: TaskScope, answers: dict[NodeId, Opened | Ended]) -> None:
        self._scope = scope
        self._answers = answers
        self.controls: dict[NodeId, ControlStream[object]] = {}

    async def open(self, node: NodeId, *_: object, **__: object) -> ByteStream:
        here, there = pair()
        self.controls[node] = ControlStream(here, decode_to_worker)
        self._scope.spawn(self._answer(node), "worker")
        return there

    async def _answer(self, node: NodeId) -> None:
        await self.controls[node].receive()
        await self.controls[node].send(self._answers[node])


class Digests:
    async def index(self, _: Path) -> None: ...

    async def keep(self) -> None: ...


def _ignore(*_: object, **__: object) -> None: ...


async def _on_ports() -> None:
    """No directory for Unix sockets."""


def hosting(net: Net, posted: list[AnyEvent]) -> SplitHostService:
    return SplitHostService(
        cast("Any", net), cast("Any", Digests()), posted.append,
        SplitDisplay(lambda node: f"machine-{node[0]}", _ignore), unlimited, _on_ports,
    )  # fmt: skip


def plan() -> LaunchPlan:
    shares = tuple(SplitShare(node=node, layers=2, memory_bytes=1) for node in (HOST, BAD, OTHER))
    layout = SplitLayout(term=1, shares=shares, rpc_version="8.0.0")
    return LaunchPlan(model=MODEL, context=1, slots=1, memory_bytes=1, split=layout)


def split_facts() -> ModelFacts:
    return ModelFacts(
        name=MODEL, size_bytes=1, layers=6, context_train=1, embedding_length=1, vocabulary=1, kv_bytes_per_token=1
    )


LIE = f"The connection to machine-c ({OTHER[:8]}) was lost, and so was {OTHER}."


async def test_a_worker_that_does_not_open_and_names_another_is_the_one_that_failed() -> None:
    posted: list[AnyEvent] = []
    scope = TaskScope("test")
    net = Net(scope, {BAD: Ended("split_worker_failed", LIE), OTHER: OPENED})
    with pytest.raises(MeshError, match="machine-c"):
        await hosting(net, posted).open(plan(), Path("big.gguf"), split_facts(), 0)
    assert [event.node for event in posted if isinstance(event, SplitFailed)] == [BAD]
    await scope.close()


async def test_a_worker_that_ends_and_names_another_is_the_one_that_failed() -> None:
    posted: list[AnyEvent] = []
    scope = TaskScope("test")
    net = Net(scope, {BAD: OPENED, OTHER: OPENED})
    here = hosting(net, posted)
    session = await here.open(plan(), Path("big.gguf"), split_facts(), 0)
    await net.controls[BAD].send(Ended("split_worker_failed", LIE))
    async with asyncio.timeout(30):
        error = await here.broken(session, MODEL)
    assert "machine-c" in error.message
    assert [event.node for event in posted if isinstance(event, SplitFailed)] == [BAD]
    await here.close(session)
    await here.stop()
    await scope.close()


async def test_a_worker_that_gave_no_memory_and_computed_nothing_is_named() -> None:
    posted: list[AnyEvent] = []
    scope = TaskScope("test")
    here = hosting(Net(scope, {BAD: OPENED, OTHER: OPENED}), posted)
    session = await here.open(plan(), Path("big.gguf"), split_facts(), 0)
    refusing = next(link for link in session.host._links if session.names[link.name] == BAD)
    refusing.stats.refused = 1
    await here.close(session)
    share = session.layout.share(BAD)
    assert share is not None
    assert [(one.node, one.memory_bytes) for one in posted if isinstance(one, SplitFailed)] == [
        (BAD, share.memory_bytes)
    ]
    await here.stop()
    await scope.close()


@pytest.mark.parametrize(
    ("setting", "formats", "status", "header", "said"),
    [
        ("f32", ALL_FORMATS, "f32", "f32", ""),
        ("q8", ALL_FORMATS, "q8", "q8", "big: activations travel as q8. Answers may differ"),
        ("auto", ALL_FORMATS, "f16 for prompts, f32 for tokens", "f16 for prompts, f32 for tokens", "is slow: "),
        (
            "f16",
            0,
            "f16; f32 to and from machine-b (bbbbbbbb), machine-c (cccccccc): an older version",
            "f32",
            "Install the same version",
        ),
    ],
)
async def test_how_activations_travel_is_said_and_why_it_is_not_what_was_asked_for(
    setting: str, formats: int, status: str, header: str, said: str
) -> None:
    opened = msgspec.structs.replace(OPENED, formats=formats)
    scope = TaskScope("test")
    here = hosting(Net(scope, {BAD: opened, OTHER: opened}), [])
    notices: list[Notice] = []
    noticed = asyncio.Event()

    async def choose(_facts: ModelFacts, _layout: SplitLayout) -> Wire:
        return Wire(prompts="f16")

    def notify(notice: Notice) -> None:
        notices.append(notice)
        noticed.set()

    here.wire = WireControl(setting, choose, notify)
    session = await here.open(plan(), Path("big.gguf"), split_facts(), 0)
    assert session.wire_text.startswith("f32" if setting == "auto" else status)
    session.loading.ready()
    if said:
        async with asyncio.timeout(30):
            await noticed.wait()
    assert session.wire_text.startswith(status)
    assert here.wire_of(MODEL) == header
    assert here.wire_of(ModelName("other")) == ""
    # A further engine over the same split does as the first.
    another = await here.open_another(session)
    assert another.host.wire == session.host.wire
    await here.close(another)
    assert [said in notice.text for notice in notices] == [True] * bool(said)
    await here.close(session)
    assert here.wire_of(MODEL) == ""
    await here.stop()
    await scope.close()


async def test_formats_are_chosen_again_when_a_link_has_changed_and_nobody_asks() -> None:
    scope = TaskScope("test")
    opened = msgspec.structs.replace(OPENED, formats=ALL_FORMATS)
    here = hosting(Net(scope, {BAD: opened, OTHER: opened}), [])
    notices: asyncio.Queue[Notice] = asyncio.Queue()
    looks: asyncio.Queue[None] = asyncio.Queue()
    trips, chosen, asked = [1.0, 1.0], [Wire(), None, Wire(prompts="f16"), Wire(prompts="f16"), Wire()], asyncio.Event()
    asked.set()
    choices = 0

    async def choose(_facts: ModelFacts, _layout: SplitLayout) -> Wire | None:
        nonlocal choices
        choices += 1
        return chosen[choices - 1]

    async def look() -> None:
        looked.set()
        await looks.get()

    async def quiet(model: ModelName) -> None:
        assert model == MODEL
        waits.set()
        await asked.wait()

    async def looks_again() -> None:
        looked.clear()
        looks.put_nowait(None)
        await looked.wait()

    looked, waits = asyncio.Event(), asyncio.Event()
    here.wire = WireControl("auto", choose, notices.put_nowait, lambda _: tuple(trips), quiet, look)
    async with asyncio.timeout(30):
        session = await here.open(plan(), Path("big.gguf"), split_facts(), 0)
        session.loading.ready()
        await looked.wait()
        # The same links: nothing is measured.
        await looks_again()
        assert (choices, here.wire_of(MODEL)) == (1, "f32")
        # Wi-Fi now. What cannot be measured changes nothing.
        trips[1] = 6.0
        await looks_again()
        assert (choices, here.wire_of(MODEL)) == (2, "f32")
        # Somebody asks: it waits for the end of that.
        trips[1] = 1.0
        asked.clear()
        waits.clear()
        looks.put_nowait(None)
        await waits.wait()
        assert (choices, here.wire_of(MODEL)) == (2, "f32")
        looked.clear()
        asked.set()
        assert (
            "have changed: activations travel as f16 for prompts, f32 for tokens. Answers" in (await notices.get()).text
        )
        await looked.wait()
        # The engine with these tunnels ends; a further one goes on, and its formats are followed.
        another = await here.open_another(session)
        await here.close(session)
        assert here.wire_of(MODEL) == "f16 for prompts, f32 for tokens"
        for trip in (6.0, 1.0):
            trips[0] = trip
            await looks_again()
        assert "f32 again" in (await notices.get()).text
        assert here.wire_of(MODEL) == "f32"
        await here.close(another)
        await here.stop()
        await scope.close()
    assert (choices, notices.qsize()) == (5, 0)


def test_a_link_has_changed_when_its_round_trip_is_another() -> None:
    assert not links_changed((), ())
    assert not links_changed((1.0, 20.0), (1.9, 38.0))
    assert not links_changed((0.1,), (0.9,))
    assert not links_changed((0.0, 1.0), (9.0, 0.0))
    assert links_changed((1.0, 20.0), (1.0, 41.0))
    assert links_changed((5.0,), (0.4,))


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


class Lending:
    """Opened sessions with workers that lend so many devices."""

    def __init__(self, *devices: int) -> None:
        self.devices = devices


def spec_of(layers: tuple[int, ...], devices: tuple[int, ...], accelerators: int, ahead: int = 0) -> EngineSpec:
    unused: Any = None
    shares = tuple(SplitShare(node=node, layers=count) for node, count in zip((HOST, BAD, OTHER), layers, strict=False))
    session = HostSession(
        SplitLayout(term=1, shares=shares), cast("Any", Lending(*devices)), ("unix:/a", "unix:/b"), {}, 0,
        facts("big", 10.0), unused,
    )  # fmt: skip
    whole = EngineSpec(model=Path("m"), alias="m", context=512, slots=1, mtp_layers=ahead)
    return split_spec(whole, session, accelerators)


def test_the_processors_layers_come_first_and_a_gpus_last() -> None:
    processor = spec_of((6, 5, 5), (1, 2), accelerators=0)
    # The output layer counts as the last worker's, and is kept here.
    assert processor.tensor_split == (5.0, 3.0, 3.0)
    assert (processor.host_layers, processor.gpu_layers, processor.output_on_host) == (6, 11, True)
    assert processor.own_layers == tuple(range(6))
    gpu = spec_of((6, 5, 5), (1, 2), accelerators=1)
    assert gpu.tensor_split == (5.0, 3.0, 2.0, 7.0)
    assert (gpu.host_layers, gpu.gpu_layers, gpu.output_on_host) == (0, None, False)


def test_layers_that_guess_are_the_processors_after_all_others() -> None:
    one = spec_of((6, 5, 5), (1, 1), accelerators=0, ahead=1)
    assert (one.tensor_split, one.gpu_layers) == ((5.0, 4.0), 11)
    assert one.own_layers == (0, 1, 2, 3, 4, 5, 15)
    # The last worker lends two devices.
    several = spec_of((6, 5, 5), (1, 2), accelerators=0, ahead=3)
    assert (several.tensor_split, several.own_layers) == ((5.0, 2.0, 0.0), (0, 1, 2, 3, 4, 5, 13, 14, 15))
