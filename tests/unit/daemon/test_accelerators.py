"""Whether a node builds a plugin for its GPU, whom it asks, and what models use when devices come and go."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import pytest

from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.events import AnyEvent, CapacityChanged
from mesh_llm.core.types.model import Capacity
from mesh_llm.daemon import accelerators, model_registry
from mesh_llm.daemon.accelerators import Devices, GpuPlan, decide
from mesh_llm.daemon.model_registry import Machine, ModelRegistry
from mesh_llm.daemon.published_state import Progress, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.engine import devices
from mesh_llm.engine.accelerators.cards import Card, Vendor
from mesh_llm.engine.accelerators.install_main import FAILED, OFFER, InstallStep
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.spec import DeviceInfo, DeviceKind, EngineInfo
from mesh_llm.models.library.library import FactsCache, Library
from mesh_llm.runtime.home import Home

GB = 10**9
CARD = Card(vendor=Vendor.NVIDIA, name="NVIDIA RTX 4090", architecture="89")
SMALL = InstallStep(step=OFFER, part="vulkan", text="The Vulkan plugin for it.", seconds_left=210, download=38_000_000)
LARGE = InstallStep(step=OFFER, part="cuda", text="The CUDA plugin for it.", seconds_left=900, download=900_000_000)
CPU = DeviceInfo(id="CPU", name="A processor", kind=DeviceKind.CPU, memory_total=32 * GB, memory_free=30 * GB)
GPU = DeviceInfo(id="CUDA0", name="A card", kind=DeviceKind.GPU, memory_total=24 * GB, memory_free=23 * GB)


class Source:
    name = "embedded"
    path = Path("library")


class Desk:
    """A machine with a card that no engine can use, and a user who answers."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, offer: InstallStep) -> None:
        self.home = Home(root)
        self.offer = offer
        self.offered: list[str] = []
        self.asked: list[str] = []
        self.answer: bool | None = None
        self.shown: list[Progress] = []
        self.cards: tuple[Card, ...] = (CARD,)
        cache = FactsCache()
        source = cast("EngineSource", Source())
        self.machine = Machine(
            source=source,
            devices=("CPU",),
            capacity=Capacity(devices=(CPU.name,), rpc_version="8.0.0"),
            registry=ModelRegistry(Library(), cache),
            cache=cache,
        )

        async def offered(_: Home, wanted: str) -> InstallStep:
            self.offered.append(wanted)
            return self.offer

        monkeypatch.setattr(accelerators, "_offer", offered)
        monkeypatch.setattr(accelerators, "find_cards", lambda: self.cards)

    def ask(self, question: str) -> bool | None:
        self.asked.append(question)
        return self.answer

    async def decided(self, **settings: object) -> GpuPlan:
        chosen = msgspec.structs.replace(Settings(home=self.home.root), **settings)
        return await decide(chosen, self.home, self.machine, self.shown.append, self.ask)


async def test_what_is_small_is_built_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch, SMALL)
    assert await desk.decided() == GpuPlan(part="vulkan")
    assert (desk.offered, desk.asked) == (["auto"], [])
    assert Stage(name="gpu", text=SMALL.text, done=True) in desk.shown


@pytest.mark.parametrize("agreed", [True, False])
async def test_what_is_large_is_asked_once_for_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, agreed: bool
) -> None:
    desk = Desk(tmp_path, monkeypatch, LARGE)
    desk.answer = agreed
    for _ in range(2):
        plan = await desk.decided()
        assert plan.part == ("cuda" if agreed else "")
        assert ("not agreed to" in plan.problem) is not agreed
    (question,) = desk.asked
    assert LARGE.text in question
    # Another kind is another question.
    desk.offer = msgspec.structs.replace(LARGE, part="rocm")
    await desk.decided()
    assert len(desk.asked) == 2


async def test_without_a_terminal_what_is_large_is_not_done_but_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, monkeypatch, LARGE)
    plan = await desk.decided()
    assert plan.part == ""
    assert "mesh-llm engine install" in plan.problem
    assert "--yes" in plan.problem
    assert (await desk.decided(yes=True)).part == "cuda"
    desk.answer = True
    assert (await desk.decided()).part == "cuda", "nobody had answered"


@pytest.mark.parametrize(
    ("download", "seconds", "asks"),
    [(200_000_000, 600, False), (200_000_001, 1, True), (1, 601, True)],
)
async def test_much_is_more_than_200_mb_or_ten_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: int, seconds: int, *, asks: bool
) -> None:
    desk = Desk(tmp_path, monkeypatch, msgspec.structs.replace(SMALL, download=download, seconds_left=seconds))
    await desk.decided()
    assert bool(desk.asked) is asks


async def test_nothing_is_built_where_it_is_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch, SMALL)
    assert await desk.decided(gpu="none") == GpuPlan()
    assert await desk.decided(devices=("cpu",)) == GpuPlan()
    desk.machine.sees_gpu = True
    assert await desk.decided() == GpuPlan()
    desk.machine.sees_gpu, desk.cards = False, ()
    assert await desk.decided() == GpuPlan()
    desk.machine.source = None
    assert await desk.decided(client=True) == GpuPlan()
    assert desk.offered == []


async def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = InstallStep(step=FAILED, text="Missing: glslc.", hint="sudo apt install glslc.", code="accelerator_needs")
    desk = Desk(tmp_path, monkeypatch, failed)
    plan = await desk.decided(gpu="vulkan")
    assert plan.problem == "The GPU is not used. Missing: glslc. sudo apt install glslc."
    assert desk.offered == ["vulkan"]
    desk.offer = InstallStep(step=FAILED, text="This machine has no GPU.", code="no_gpu")
    assert await desk.decided() == GpuPlan()


class Used:
    """The devices of a machine whose engine lists what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
        self.events: list[AnyEvent] = []
        self.measured_anew = 0
        cache = FactsCache()
        self.machine = Machine(
            source=cast("EngineSource", Source()),
            devices=("CPU",),
            capacity=Capacity(devices=(CPU.name,)),
            registry=ModelRegistry(Library(), cache),
            cache=cache,
        )
        here = devices.Machine(cpu=CPU)
        real = devices.measure
        monkeypatch.setattr(model_registry, "measure", partial(real, machine=lambda: here))

        async def changed() -> None:
            self.measured_anew += 1

        chosen = msgspec.structs.replace(Settings(home=Path()), **settings)
        self.devices = Devices(chosen, self.machine, self.events.append, changed)


def info(*listed: DeviceInfo) -> EngineInfo:
    return EngineInfo(source="embedded", devices=(*listed, CPU), rpc_version="8.0.0")


async def test_models_move_to_a_gpu_that_the_engine_can_use_now(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Used(monkeypatch)
    assert await used.devices.use(info()) is None
    assert used.events == []
    notice = await used.devices.use(info(GPU))
    assert notice is not None
    assert (notice.code, notice.level) == ("device_used", NoticeLevel.INFO)
    (event,) = used.events
    assert isinstance(event, CapacityChanged)
    assert event.capacity.devices == ("A card",)
    assert event.reason == "it moves to A card"
    assert (used.machine.devices, used.machine.accelerators, used.measured_anew) == ((), 1, 1)
    # The engine's own models fill the card: that is no change.
    assert await used.devices.use(info(replace(GPU, memory_free=0))) is None
    assert used.machine.capacity.memory_bytes > 20 * GB


async def test_a_gpu_that_is_lost_is_looked_for_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Used(monkeypatch)
    await used.devices.use(info(GPU))
    notice = await used.devices.use(info())
    assert notice is not None
    assert (notice.code, notice.level) == ("device_lost", NoticeLevel.WARNING)
    assert "A card is not there any more" in notice.text
    assert used.devices.lost == ("A card",)
    assert used.machine.devices == ("CPU",)
    await used.devices.use(info())
    assert used.devices.lost == ("A card",)
    assert (await used.devices.use(info(GPU))) is not None
    assert used.devices.lost == ()


async def test_one_card_of_two_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Used(monkeypatch)
    other = replace(GPU, id="CUDA1", name="Another card")
    await used.devices.use(info(GPU, other))
    notice = await used.devices.use(info(other))
    assert notice is not None
    assert "Models start again on Another card" in notice.text
    assert used.machine.accelerators == 1
    assert used.devices.lost == ("A card",)


async def test_a_device_that_the_user_named_and_that_is_gone_is_replaced_by_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = Used(monkeypatch, devices=("CUDA0",))
    await used.devices.use(info(GPU))
    assert used.machine.devices == ("CUDA0",)
    await used.devices.use(info())
    assert used.machine.devices == ("CPU",)
