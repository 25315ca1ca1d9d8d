"""What is offered for the cards that are here, and what becomes of an installation."""

import stat
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import installation, recipe, selftest, toolbox
from mesh_llm.engine.accelerators.build import Step
from mesh_llm.engine.accelerators.cards import Card, Vendor
from mesh_llm.engine.accelerators.installation import AUTO, Offer, install, interrupted, offer, remove
from mesh_llm.engine.accelerators.recipe import Examined
from mesh_llm.engine.accelerators.selftest import Passed
from mesh_llm.engine.installation import Part
from mesh_llm.engine.sources.embedded import backends, loading, plugin
from mesh_llm.engine.sources.embedded.loading import CUDA, ROCM, VULKAN
from mesh_llm.engine.spec import PartState

NVIDIA = Card(vendor=Vendor.NVIDIA, name="RTX 4090", architecture="89", driver="NVIDIA 580", cuda=(13, 0))
AMD = Card(vendor=Vendor.AMD, name="RX 7900", architecture="gfx1100", driver="amdgpu")
INTEL = Card(vendor=Vendor.INTEL, name="Arc", driver="xe")


class Workshop:
    """A machine where builds and tests end as a test wants."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = cache
        self.examined = {CUDA: Examined(missing=("nvcc",)), ROCM: Examined(missing=("hipcc",)), VULKAN: Examined()}
        self.builds = 0
        self.steps: list[Step] = []
        self.fetched: list[str] = []
        self.gate: Callable[[], object] = lambda: None
        self.failure: BaseException | None = None
        self.test_failure: MeshError | None = None
        self.directory = cache / "engine" / plugin.key()
        monkeypatch.setattr(sys, "prefix", sys.base_prefix)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(recipe, "examine", self._examine)
        monkeypatch.setattr(installation, "find_archive", self._no_archive)
        monkeypatch.setattr(installation, "provide_archive", self._archive)
        monkeypatch.setattr(toolbox, "provide", self._fetch)
        monkeypatch.setattr(installation.build, "build", self._build)
        monkeypatch.setattr(selftest, "self_test", self._test)
        monkeypatch.setattr(installation, "render_nodes_closed", tuple[Path, ...])

    def _examine(self, kind: str, _card: Card | None, _cache: Path) -> Examined:
        return self.examined[kind]

    def _no_archive(self, _: Path) -> None:
        """It is to be downloaded."""

    def _archive(self, _cache: Path, _say: object, _given: Path | None) -> Path:
        return Path("archive")

    def _fetch(self, _cache: Path, name: str, _say: object) -> None:
        self.fetched.append(name)
        self.examined = {kind: Examined() for kind in self.examined}

    def _build(self, steps: recipe.Recipe, _found: object, _archive: Path, work: Path, log: Path, _: object) -> Path:
        self.builds += 1
        self.gate()
        work.mkdir(exist_ok=True)
        (work / "state.json").write_text('{"archive": "", "options": []}')
        log.write_text("compiling")
        if self.failure is not None:
            raise self.failure
        library = work / "library.so"
        library.write_text(f"{steps.kind} {self.builds}")
        return library

    def _test(self, _library: Path, _model: Path | None, _say: object) -> Passed:
        if self.test_failure is not None:
            raise self.test_failure
        return Passed(devices=("Vulkan0",), operators=20, tokens=24)

    def offer(self, gpu: str = AUTO, *cards: Card, force: bool = False) -> Offer:
        return offer(self.cache, gpu, force=force, cards=cards)

    def install(self, gpu: str = VULKAN, *, force: bool = False) -> Part:
        return install(self.cache, self.offer(gpu, INTEL, force=force), self.steps.append, force=force)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


def test_the_best_kind_that_can_be_built_is_offered(workshop: Workshop) -> None:
    found = workshop.offer(AUTO, INTEL, NVIDIA)
    assert (found.kind, found.card) == (VULKAN, NVIDIA)
    assert found.better is not None
    assert "nvcc" in found.better.message
    workshop.examined[CUDA] = Examined(fetch=(toolbox.CUDA,))
    found = workshop.offer(AUTO, INTEL, NVIDIA)
    assert (found.kind, found.better) == (CUDA, None)
    assert found.download == toolbox.TOOLS_BY_NAME[toolbox.CUDA].download + 38_000_000
    assert found.seconds > 60
    assert "RTX 4090: 658 MB to download" in found.text
    assert workshop.offer(AUTO, AMD, INTEL).kind == VULKAN
    workshop.examined[ROCM] = Examined()
    assert workshop.offer(AUTO, INTEL, AMD).kind == ROCM


def test_where_nothing_can_be_built_the_packages_are_named(workshop: Workshop) -> None:
    workshop.examined[VULKAN] = Examined(missing=("glslc",))
    with pytest.raises(MeshError, match="glslc") as caught:
        workshop.offer(AUTO, NVIDIA)
    assert caught.value.code == "accelerator_needs"


def test_without_a_card_only_what_was_asked_for_is_offered(workshop: Workshop) -> None:
    with pytest.raises(MeshError) as caught:
        workshop.offer(AUTO)
    assert caught.value.code == "no_gpu"
    assert workshop.offer(VULKAN).card is None


def test_what_was_built_and_tested_is_loaded(workshop: Workshop) -> None:
    part = workshop.install()
    assert (part.card, part.driver, part.tested) == ("Arc", "xe", "tested on Vulkan0: 20 operators, 24 tokens of text")
    library = workshop.directory / "libggml-vulkan.so"
    assert library.read_text() == "vulkan 1"
    assert backends.load_arguments(workshop.cache) == (loading.LOAD, str(library))
    assert interrupted(workshop.cache) is None
    assert workshop.steps[-1].name == "done"
    workshop.install()
    assert workshop.builds == 1
    workshop.install(force=True)
    assert workshop.builds == 2
    assert library.read_text() == "vulkan 2"


def test_what_is_lacking_is_fetched_first(workshop: Workshop) -> None:
    workshop.examined[VULKAN] = Examined(fetch=(toolbox.TOOLS, toolbox.VULKAN))
    workshop.install()
    assert workshop.fetched == [toolbox.TOOLS, toolbox.VULKAN]


WRONG = MeshError(code=selftest.CODE, message="It is set aside: wrong results.", hint="Update the driver.")


def test_what_fails_its_test_is_set_aside_until_it_is_forced(workshop: Workshop) -> None:
    workshop.test_failure = WRONG
    with pytest.raises(MeshError, match="wrong results"):
        workshop.install()
    assert backends.load_arguments(workshop.cache) == ()
    (part,) = backends.parts(workshop.cache)
    assert part.state is PartState.FAILED
    assert "wrong results" in part.text
    with pytest.raises(MeshError, match="wrong results") as caught:
        workshop.install()
    assert caught.value.code == "accelerator_set_aside"
    with pytest.raises(MeshError) as caught:
        workshop.offer(AUTO, INTEL)
    assert caught.value.code == "accelerator_set_aside"
    workshop.test_failure = None
    workshop.install(force=True)
    assert backends.load_arguments(workshop.cache) != ()


def test_a_failed_build_is_noted_and_kept_for_the_next_start(workshop: Workshop) -> None:
    workshop.failure = MeshError(code="accelerator_build_failed", message="No such header.", hint="See the log.")
    with pytest.raises(MeshError, match="No such header"):
        workshop.install()
    (part,) = backends.parts(workshop.cache)
    assert (part.state, part.text, part.hint) == (PartState.FAILED, "No such header.", "See the log.")
    assert interrupted(workshop.cache) == VULKAN
    workshop.failure = None
    workshop.install()
    (part,) = backends.parts(workshop.cache)
    assert part.state is PartState.READY


def test_an_interrupted_build_is_no_failure(workshop: Workshop) -> None:
    workshop.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        workshop.install()
    assert interrupted(workshop.cache) == VULKAN
    assert backends.parts(workshop.cache) == ()


def test_a_full_disk_is_a_sentence(workshop: Workshop) -> None:
    workshop.failure = OSError(28, "No space left on device")
    with pytest.raises(MeshError) as caught:
        workshop.install()
    assert caught.value.code == "disk_full"


def test_two_at_once_build_one(workshop: Workshop) -> None:
    waiting = threading.Event()
    workshop.gate = waiting.wait
    first_step = threading.Event()

    def show(step: Step) -> None:
        workshop.steps.append(step)
        if step.name == "wait":
            first_step.set()

    found = workshop.offer(VULKAN)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(install, workshop.cache, found, show) for _ in range(2)]
        assert first_step.wait(60)
        waiting.set()
        first, second = (one.result(60) for one in both)
    assert first == second
    assert workshop.builds == 1


def test_the_last_that_was_asked_for_is_loaded(workshop: Workshop) -> None:
    workshop.examined[CUDA] = Examined()
    workshop.install(VULKAN)
    workshop.install(CUDA)
    assert backends.load_arguments(workshop.cache)[1].endswith("cuda.so")
    workshop.install(VULKAN)
    assert workshop.builds == 2
    assert backends.load_arguments(workshop.cache)[1].endswith("vulkan.so")


def test_what_is_removed_is_gone_with_its_builds(workshop: Workshop) -> None:
    workshop.install()
    (workshop.directory / "work-cuda").mkdir()
    assert remove(workshop.cache, VULKAN)
    assert backends.parts(workshop.cache) == ()
    assert not remove(workshop.cache, VULKAN)
    assert remove(workshop.cache, CUDA)
    assert sorted(path.name for path in workshop.directory.iterdir()) == ["installation.json"]


def test_no_driver_is_noted_and_nothing_is_set_aside(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.test_failure = MeshError(code=selftest.NO_DEVICE, message="No GPU.", hint="Install the driver.")
    monkeypatch.setattr(installation, "render_nodes_closed", lambda: (Path("/dev/dri/renderD128"),))
    with pytest.raises(MeshError, match="cannot open /dev/dri/renderD128") as caught:
        workshop.install()
    assert "usermod -aG render,video" in caught.value.hint
    workshop.test_failure = None
    workshop.install()


def test_the_lock_of_a_build_lies_where_no_other_user_can_make_it(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    seen: list[list[Path]] = []
    workshop.gate = lambda: seen.append(list((tmp_path / "own").rglob("*.lock")))
    workshop.install()
    folder = tmp_path / "own" / "mesh-llm"
    assert seen == [[folder / "accelerator-build.lock"]]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
