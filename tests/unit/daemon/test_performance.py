"""The speed meter: when it probes, what it tells the core, and what it keeps for the next start."""

from pathlib import Path
from typing import cast

from tests.property.test_experience import SPEED, expected, model

from mesh_llm.core.performance.calibration import FRESH_SECONDS
from mesh_llm.core.types.events import AnyEvent, SpeedMeasured
from mesh_llm.core.types.model import Capacity, Speed
from mesh_llm.daemon.model_registry import Machine, ModelRegistry
from mesh_llm.daemon.speed_meter import SpeedMeter
from mesh_llm.engine.devices import Measured
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.spec import EngineInfo
from mesh_llm.models.library.library import FactsCache, Library
from mesh_llm.runtime.home import Home


class Lab:
    """A machine whose speed, clock and work are told."""

    def __init__(self, root: Path, *, engine: bool = True) -> None:
        self.home = Home(root)
        self.now, self.probes, self.is_busy = 1e9, 0, False
        self.truth: Speed | None = SPEED
        self.events: list[AnyEvent] = []
        self.probed: list[tuple[str, ...]] = []
        cache = FactsCache(self.home.cache / "models.json")
        source = cast("EngineSource", object()) if engine else None
        self.machine = Machine(
            source=source, devices=("CPU",), capacity=Capacity(), registry=ModelRegistry(Library(), cache), cache=cache
        )

    async def probe(self, devices: tuple[str, ...]) -> Speed | None:
        self.probed.append(devices)
        self.probes += 1
        return self.truth

    def meter(self) -> SpeedMeter:
        meter = SpeedMeter(self.home, self.machine, self.events.append, probe=self.probe, clock=lambda: self.now)
        meter.begin(lambda: self.is_busy)
        return meter

    @property
    def told(self) -> list[Speed]:
        return [event.speed for event in self.events if isinstance(event, SpeedMeasured)]


async def test_it_probes_once_and_keeps_that_over_a_restart(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    meter = lab.meter()
    assert await meter.speed() == await meter.speed() == SPEED
    await meter.close()
    again = lab.meter()
    assert await again.speed() == SPEED
    await again.close()
    assert lab.probes == 1
    assert lab.told == [SPEED, SPEED], "once in each life"


async def test_an_old_probe_is_taken_again_unless_requests_are_answered(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    meter = lab.meter()
    await meter.speed()
    lab.now += FRESH_SECONDS + 1
    lab.truth, lab.is_busy = SPEED.slowed(2.0), True
    assert await meter.speed() == SPEED
    lab.is_busy = False
    assert await meter.speed() == SPEED.slowed(2.0)
    assert lab.probes == 2
    await meter.close()


async def test_what_came_is_told_where_it_makes_a_difference_and_is_kept(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    meter = lab.meter()
    await meter.speed()
    meter.observed(model("red"), expected("red", 1.01), drafted=False)
    assert lab.told == [SPEED]
    for _ in range(5):
        meter.observed(model("red"), expected("red", 3.0), drafted=False)
    assert lab.told[-1].full.f16 < 0.8 * SPEED.full.f16
    learned = meter.experience
    await meter.close()
    again = lab.meter()
    assert again.experience == learned
    await again.close()


async def test_a_node_without_an_engine_has_no_speed(tmp_path: Path) -> None:
    lab = Lab(tmp_path, engine=False)
    meter = lab.meter()
    assert await meter.speed() is None
    meter.observed(model("red"), 0.1, drafted=False)
    await meter.close()
    assert (lab.probes, lab.told) == (0, [])


async def test_a_probe_that_fails_leaves_what_was_known(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    meter = lab.meter()
    await meter.speed()
    lab.now += FRESH_SECONDS + 1

    lab.truth = None
    assert await meter.speed() == SPEED
    await meter.close()


async def test_with_other_devices_it_is_measured_anew(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    meter = lab.meter()
    await meter.speed()
    lab.machine.use(EngineInfo(source="embedded"), Measured(capacity=Capacity(devices=("Card",)), devices=("GPU0",)))
    await meter.devices_changed()
    assert meter.experience is None
    lab.truth = SPEED.slowed(0.1)
    assert await meter.speed() == SPEED.slowed(0.1)
    assert lab.probed == [("CPU",), ("GPU0",)]
    assert lab.told == [SPEED, SPEED.slowed(0.1)]
    await meter.close()


async def test_the_processor_beside_a_gpu_is_measured_too(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.machine.use(
        EngineInfo(source="embedded"), Measured(capacity=Capacity(devices=("Card",), host_bytes=1), devices=("GPU0",))
    )
    meter = lab.meter()
    await meter.speed()
    await meter.close()
    assert lab.probed == [("GPU0",), ("CPU",)]
    assert [event.host_speed for event in lab.events if isinstance(event, SpeedMeasured)] == [SPEED]
    again = lab.meter()
    assert again.experience is not None
    assert again.experience.host == SPEED
    await again.close()
