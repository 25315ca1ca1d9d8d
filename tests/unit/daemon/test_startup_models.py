"""Which of several `--model` can be had, and that one that cannot be is in nobody's way."""

from pathlib import Path

import pytest
from tests.support.gguf_models import PRESETS, write_model

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import Capacity
from mesh_llm.daemon.model_registry import Machine, ModelRegistry, choose_models
from mesh_llm.daemon.published_state import ignore_progress
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.startup_models import provide_models
from mesh_llm.models.library.library import FactsCache, scan

GB = 10**9


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "library").mkdir()
    write_model(tmp_path / "library" / "inside.gguf", PRESETS["small-draft"])
    write_model(tmp_path / "outside.gguf", PRESETS["small-draft"])
    whole = (tmp_path / "outside.gguf").read_bytes()
    (tmp_path / "damaged.gguf").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def machine(directory: Path, memory: int = 8 * GB) -> Machine:
    cache = FactsCache()
    registry = ModelRegistry(scan([directory / "library"], cache, builtin=False), cache)
    return Machine(source=None, devices=(), capacity=Capacity(memory_bytes=memory), registry=registry, cache=cache)


async def provided(directory: Path, *models: str, joins: bool = False, memory: int = 8 * GB) -> Settings:
    settings = Settings(home=directory, models=models)
    return await provide_models(settings, machine(directory, memory), ignore_progress, joins=joins)


async def test_those_that_can_be_had_are_served_in_order(directory: Path) -> None:
    outside, damaged = str(directory / "outside.gguf"), str(directory / "damaged.gguf")
    settings = await provided(directory, "nope", str(directory / "missing.gguf"), damaged, outside, "inside")
    assert settings.models == (outside, "inside")
    found = {one.name: one for one in settings.unavailable}
    assert list(found) == ["nope", "missing", "damaged"]
    assert "No model called nope is on this machine." in found["nope"].reason
    assert "Put GGUF files into ~/.models" in found["nope"].reason
    assert found["missing"].reason.startswith("There is no file ")
    assert "damaged.gguf" in found["damaged"].reason
    # Other nodes may have what is known by its name.
    assert choose_models(settings, machine(directory), joins=False).wanted == ("outside", "inside", "nope")
    # The next life tries all of them again.
    again = await provide_models(settings, machine(directory), ignore_progress, joins=False)
    assert [one.name for one in again.unavailable] == ["nope", "missing", "damaged"]


async def test_where_none_can_be_had_the_first_error_is_raised(directory: Path) -> None:
    with pytest.raises(MeshError, match="No model called nope"):
        await provided(directory, "nope")
    with pytest.raises(MeshError, match="No model called nope"):
        await provided(directory, "nope", "/nowhere/x.gguf")
    with pytest.raises(MeshError, match=r"There is no file /nowhere/x\.gguf"):
        await provided(directory, "/nowhere/x.gguf", joins=True)


async def test_what_does_not_fit_leaves_its_place_to_the_next(directory: Path) -> None:
    write_model(directory / "large.gguf", PRESETS["small"])
    large, small = str(directory / "large.gguf"), "inside"
    needs = [await least(directory, name) for name in (large, small)]
    assert needs[1] < needs[0]
    settings = await provided(directory, large, small, memory=needs[1])
    assert settings.models == (small,)
    (out,) = settings.unavailable
    assert out.lasting
    assert out.reason.startswith("large does not fit: need ")
    with pytest.raises(MeshError, match="large does not fit"):
        await provided(directory, large, memory=needs[1])


async def least(directory: Path, model: str) -> int:
    """The least memory, to a megabyte, in which a model fits."""
    low, high = 0, 8 * GB
    while high - low > 10**6:
        middle = (low + high) // 2
        try:
            await provided(directory, model, memory=middle)
        except MeshError:
            low = middle
        else:
            high = middle
    return high


async def test_a_joiner_fetches_what_it_lacks_later(directory: Path) -> None:
    settings = await provided(directory, "nope", "/nowhere/x.gguf", "inside", joins=True)
    assert settings.models == ("inside",)
    assert settings.later == ("nope",)
    assert [one.name for one in settings.unavailable] == ["x"]
