"""Prebuilt engines among the sources of an accelerator: which comes first, and what becomes of failures."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.engine.accelerators.test_installation import AMD, INTEL, NVIDIA, Workshop

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import prebuilt, selftest
from mesh_llm.engine.accelerators.cards import Card
from mesh_llm.engine.accelerators.index import Index, Wheel
from mesh_llm.engine.accelerators.installation import AUTO, Offer, install, interrupted, offer, remove
from mesh_llm.engine.accelerators.recipe import Examined
from mesh_llm.engine.installation import Part, digest
from mesh_llm.engine.sources.embedded import backends, loading
from mesh_llm.engine.sources.embedded.loading import CUDA, VULKAN

ASKED = Index(address="https://host.example/whl")
STRICT = Index(address="https://host.example/whl", strict=True)
UNREACHABLE = MeshError(code="index_unreachable", message="The index cannot be fetched.", hint="")
ABSENT = MeshError(code="index_without_wheel", message="The index has none.", hint="")
WRONG = MeshError(code="wheel_wrong", message="The wheel is damaged.", hint="")


class Shelf:
    """An index that has wheels of some kinds, beside a workshop that can build some."""

    def __init__(self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workshop = workshop
        self.kinds: set[str] = set()
        self.asked: list[str] = []
        self.failure: MeshError | None = None
        self.installed = 0
        monkeypatch.setattr(prebuilt, "find", self._find)
        monkeypatch.setattr(prebuilt, "install", self._install)

    def _find(self, index: Index, kind: str, _card: Card | None, agree: Callable[[Wheel], bool] | None) -> Wheel:
        self.asked.append(kind)
        if not self.kinds:
            raise UNREACHABLE
        if kind not in self.kinds:
            raise ABSENT
        return Wheel(kind=kind, flavour=kind, filename="x.whl", url="https://host.example/x", index="", size=5)

    def _install(
        self, _cache: Path, directory: Path, wheel: Wheel, card: Card | None, _model: Path | None, _say: object
    ) -> Part:
        self.installed += 1
        if self.failure is not None:
            raise self.failure
        place = directory / f"wheel-{wheel.kind}-{self.installed}"
        place.mkdir()
        (place / "library.so").write_text("prebuilt")
        return Part(name=wheel.kind, file=place.name, sha256=digest(place), tested="all right")

    def offer(self, gpu: str, *cards: Card, index: Index = ASKED, force: bool = False) -> Offer:
        return offer(self.workshop.cache, gpu, cards=cards, index=index, force=force)

    def install(self, wanted: Offer, *, force: bool = False) -> Part:
        return install(self.workshop.cache, wanted, self.workshop.steps.append, force=force)

    def texts(self, name: str) -> list[str]:
        return [step.text for step in self.workshop.steps if step.name == name]

    def there(self) -> list[str]:
        return sorted(one.name for one in self.workshop.directory.iterdir() if one.suffix not in {".json", ".log"})


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return Shelf(Workshop(tmp_path, monkeypatch), monkeypatch)


def test_a_prebuilt_engine_comes_before_a_build_of_its_kind(shelf: Shelf) -> None:
    shelf.kinds = {CUDA, VULKAN}
    found = shelf.offer(AUTO, NVIDIA)
    assert (found.kind, found.wheel is not None, found.refused) == (CUDA, True, None)
    assert found.text == "A prebuilt engine with CUDA for RTX 4090: x.whl, 5 B, from host.example."
    shelf.kinds = {VULKAN}
    shelf.workshop.examined[CUDA] = Examined()
    found = shelf.offer(AUTO, NVIDIA)
    assert (found.kind, found.wheel) == (CUDA, None)
    assert found.refused is ABSENT
    shelf.workshop.examined[CUDA] = Examined(missing=("nvcc",))
    assert shelf.offer(AUTO, NVIDIA).wheel is not None
    assert shelf.offer(AUTO, AMD).wheel is not None


def test_an_index_that_cannot_be_reached_is_asked_once(shelf: Shelf) -> None:
    found = shelf.offer(AUTO, NVIDIA)
    assert (found.kind, found.wheel, found.refused) == (VULKAN, None, UNREACHABLE)
    assert shelf.asked == [CUDA]


def test_without_an_index_none_is_asked(shelf: Shelf) -> None:
    shelf.kinds = {VULKAN}
    assert offer(shelf.workshop.cache, AUTO, cards=[INTEL]).wheel is None
    assert shelf.asked == []


def test_where_neither_works_both_reasons_are_told(shelf: Shelf) -> None:
    with pytest.raises(
        MeshError, match=r"nvcc.*Nor is a prebuilt engine taken: The index cannot be fetched\."
    ) as caught:
        shelf.offer(CUDA, NVIDIA)
    assert caught.value.code == "accelerator_needs"


def test_an_index_that_was_named_just_now_is_not_passed_over(shelf: Shelf) -> None:
    with pytest.raises(MeshError) as caught:
        shelf.offer(AUTO, INTEL, index=STRICT)
    assert caught.value is UNREACHABLE
    shelf.kinds = {VULKAN}
    shelf.failure = WRONG
    with pytest.raises(MeshError) as caught:
        shelf.install(shelf.offer(AUTO, INTEL, index=STRICT))
    assert caught.value is WRONG
    assert shelf.workshop.builds == 0


def test_what_was_installed_is_loaded_and_takes_the_place_of_a_build(shelf: Shelf) -> None:
    shelf.install(shelf.offer(VULKAN, INTEL))
    assert shelf.there() == ["libggml-vulkan.so"]
    shelf.kinds = {VULKAN}
    assert shelf.offer(VULKAN, INTEL).ready
    part = shelf.install(shelf.offer(VULKAN, INTEL, force=True), force=True)
    assert shelf.there() == [part.file]
    assert backends.load_arguments(shelf.workshop.cache) == (loading.LOAD, str(shelf.workshop.directory / part.file))
    assert shelf.texts("done")[-1] == "The prebuilt engine is ready: all right."
    again = shelf.install(shelf.offer(VULKAN, INTEL, force=True), force=True)
    assert shelf.there() == [again.file]
    shelf.kinds = set()
    shelf.install(shelf.offer(VULKAN, INTEL, force=True), force=True)
    assert shelf.there() == ["libggml-vulkan.so"]


@pytest.mark.parametrize("code", ["wheel_wrong", selftest.CODE])
def test_after_a_failure_it_is_built_and_not_tried_again(shelf: Shelf, code: str) -> None:
    shelf.kinds = {VULKAN}
    shelf.failure = MeshError(code=code, message="It is set aside.", hint="")
    shelf.install(shelf.offer(VULKAN, INTEL))
    assert shelf.texts("build") == ["It is set aside. It is built here instead."]
    assert (shelf.installed, shelf.workshop.builds) == (1, 1)
    (part,) = backends.parts(shelf.workshop.cache)
    assert "the prebuilt engine was not taken: It is set aside." in part.text
    assert remove_build(shelf) == ["libggml-vulkan.so"]
    found = shelf.offer(VULKAN, INTEL)
    assert found.wheel is None
    assert found.refused is not None
    assert found.refused.message == "It is set aside."
    assert "--force" in found.refused.hint
    assert shelf.offer(VULKAN, INTEL, force=True).wheel is not None


def remove_build(shelf: Shelf) -> list[str]:
    """Lose the plugin, as by hand."""
    there = shelf.there()
    for name in there:
        (shelf.workshop.directory / name).unlink()
    return there


def test_a_lost_connection_is_tried_again(shelf: Shelf) -> None:
    shelf.kinds = {VULKAN}
    shelf.failure = MeshError(code="download_failed", message="It cannot be fetched.", hint="")
    shelf.install(shelf.offer(VULKAN, INTEL))
    remove_build(shelf)
    assert shelf.offer(VULKAN, INTEL).wheel is not None


def test_where_it_cannot_be_built_either_both_reasons_are_told(shelf: Shelf) -> None:
    shelf.kinds = {CUDA}
    shelf.failure = WRONG
    with pytest.raises(MeshError, match=r"The wheel is damaged\. Nor can it be built: .*nvcc"):
        shelf.install(shelf.offer(CUDA, NVIDIA))
    assert interrupted(shelf.workshop.cache) is None


def test_what_is_removed_is_gone(shelf: Shelf) -> None:
    shelf.kinds = {VULKAN}
    shelf.install(shelf.offer(VULKAN, INTEL))
    directory = shelf.workshop.directory
    (directory / ".vulkan-0123.partial").touch()
    (directory / "xllamacpp-1-x.whl").touch()
    assert remove(shelf.workshop.cache, VULKAN)
    assert shelf.there() == []
    shelf.failure = WRONG
    shelf.install(shelf.offer(VULKAN, INTEL))
    assert remove(shelf.workshop.cache, VULKAN)
    shelf.failure = None
    assert shelf.offer(VULKAN, INTEL).wheel is not None


def test_a_full_disk_is_a_sentence(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.kinds = {VULKAN}
    wanted = shelf.offer(VULKAN, INTEL, index=STRICT)

    def full(*_: object) -> Part:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prebuilt, "install", full)
    with pytest.raises(MeshError) as caught:
        shelf.install(wanted)
    assert caught.value.code == "disk_full"
