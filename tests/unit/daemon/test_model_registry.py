import asyncio
from pathlib import Path

import pytest
from tests.support.gguf_models import PRESETS, write_model

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import LaunchOptions
from mesh_llm.daemon.model_registry import ModelRegistry
from mesh_llm.models.library.library import FactsCache, scan


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "library").mkdir()
    (root / "elsewhere").mkdir()
    write_model(root / "library" / "inside.gguf", PRESETS["small-draft"])
    write_model(root / "elsewhere" / "outside.gguf", PRESETS["small-draft"])
    return root


@pytest.fixture
def shelf(directory: Path) -> ModelRegistry:
    cache = FactsCache()
    return ModelRegistry(scan([directory / "library"], cache, builtin=False), cache)


def test_names_and_paths(shelf: ModelRegistry, directory: Path) -> None:
    assert shelf.resolve("INSIDE").name == "inside"
    assert shelf.find(ModelName("outside")) is None
    model = shelf.resolve(str(directory / "elsewhere" / "outside.gguf"))
    assert model.name == "outside"
    assert shelf.find(ModelName("outside")) == model
    assert shelf.resolve("outside") == model
    assert [facts.name for facts in shelf.facts()] == ["inside", "outside"]


def test_a_path_inside_of_the_library_is_the_librarys(shelf: ModelRegistry, directory: Path) -> None:
    assert shelf.resolve(str(directory / "library" / "inside.gguf")).name == "inside"
    assert [facts.name for facts in shelf.facts()] == ["inside"]


def test_wanted_models_must_be_here(shelf: ModelRegistry) -> None:
    assert shelf.wanted(("inside", "insid")) == ("inside",)
    with pytest.raises(MeshError, match="No model called"):
        shelf.wanted(("inside", "Qwen3-8B"))
    with pytest.raises(MeshError, match="There is no file"):
        shelf.wanted(("inside", "/nowhere/x.gguf"))


async def test_drafts_are_found_by_vocabulary(tmp_path: Path) -> None:
    write_model(tmp_path / "large.gguf", PRESETS["small"])
    write_model(tmp_path / "little.gguf", PRESETS["small-draft"])
    shelf = ModelRegistry(scan([tmp_path], builtin=False), FactsCache())
    model = shelf.resolve("large")

    await shelf.find_drafts([model])
    assert shelf.drafts == {"large": "little"}
    shelf.library = scan([tmp_path / "none"], builtin=True)
    await shelf.find_drafts()
    assert shelf.drafts == {"tiny": "tiny-draft"}


def test_a_draft_becomes_a_path_and_must_match(shelf: ModelRegistry, directory: Path) -> None:
    model = shelf.resolve("inside")
    options = shelf.with_draft(LaunchOptions(draft="inside"), model)
    assert options.draft == str(directory / "library" / "inside.gguf")
    unused = LaunchOptions(draft="inside", use_draft=False)
    assert shelf.with_draft(unused, model) is unused
    with pytest.raises(MeshError, match="No model called nonsense"):
        shelf.with_draft(LaunchOptions(draft="nonsense"), model)


async def test_two_searches_for_drafts_at_once_lose_nothing(tmp_path: Path) -> None:
    for name in ("large", "second"):
        write_model(tmp_path / f"{name}.gguf", PRESETS["small"])
    write_model(tmp_path / "little.gguf", PRESETS["small-draft"])
    shelf = ModelRegistry(scan([tmp_path], builtin=False), FactsCache())
    await asyncio.gather(*(shelf.find_drafts([shelf.resolve(name)]) for name in ("large", "second")))
    assert shelf.drafts == {"large": "little", "second": "little"}
