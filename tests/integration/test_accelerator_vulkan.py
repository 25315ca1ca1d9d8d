"""The Vulkan plugin on Mesa's software device: the processor's answers, and never without being asked."""

import math
from pathlib import Path
from typing import Any

import pytest
from tests.integration.accelerator_fixtures import installed, llvmpipe
from tests.integration.engine_fixtures import client_of, small_spec, started, supervisor

from mesh_llm.engine.accelerators import build, recipe
from mesh_llm.engine.accelerators.build import Step
from mesh_llm.engine.devices import measure
from mesh_llm.engine.sources.embedded.archive import provide_archive
from mesh_llm.engine.sources.embedded.loading import VULKAN
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import CPU_DEVICE, DeviceKind
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.library.library import require_builtin

__all__ = ["llvmpipe", "supervisor"]

DEVICE = "Vulkan0"
PROMPT = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "logprobs": 4}


def source_with(llvmpipe: Path, home: Path) -> EmbeddedSource:
    installed(home, llvmpipe)
    source = EmbeddedSource.find(home)
    assert source is not None
    return source


async def test_it_is_listed_and_not_chosen_unasked(llvmpipe: Path, tmp_path: Path) -> None:
    info = await source_with(llvmpipe, tmp_path).info()
    device = next(one for one in info.devices if one.id == DEVICE)
    assert "llvmpipe" in device.name
    assert device.kind is DeviceKind.SOFTWARE
    assert not info.has_gpu
    assert measure(info).devices == (CPU_DEVICE,)
    assert measure(info, device="llvmpipe").devices == (DEVICE,)


async def test_it_is_not_even_listed_unless_it_is_named(
    llvmpipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GGML_VK_VISIBLE_DEVICES")
    info = await source_with(llvmpipe, tmp_path).info()
    assert DEVICE not in [one.id for one in info.devices]


@pytest.mark.timeout(600)
async def test_it_answers_as_the_processor_does(llvmpipe: Path, tmp_path: Path, supervisor: Supervisor) -> None:
    source = source_with(llvmpipe, tmp_path)
    answers: list[list[dict[str, Any]]] = []
    for devices in ((CPU_DEVICE,), (DEVICE,)):
        spec = small_spec(require_builtin("tiny"), devices=devices, embeddings=False, slots=1)
        engine = await started(supervisor, source, spec, devices[0])
        answer = (await client_of(engine, 500.0).post("/v1/completions", PROMPT)).expect().json()
        answers.append(answer["choices"][0]["logprobs"]["content"])
        await engine.stop()
    same_text(*answers)


def same_text(processor: list[dict[str, Any]], device: list[dict[str, Any]]) -> None:
    """The same tokens with the same probabilities, until rounding decides between two that are equally likely."""
    assert len(processor) == len(device) == PROMPT["max_tokens"]
    assert processor != device, "another device rounds otherwise: this was the processor twice"
    for right, other in zip(processor, device, strict=True):
        theirs = {one["id"]: math.exp(one["logprob"]) for one in other["top_logprobs"]}
        for one in right["top_logprobs"]:
            assert math.exp(one["logprob"]) == pytest.approx(theirs.get(one["id"], 0.0), abs=0.05)
        if right["id"] != other["id"]:
            return


@pytest.mark.timeout(600)
def test_a_real_build_goes_on_where_it_was_interrupted(
    llvmpipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other tests would leave it no time.
    monkeypatch.setattr(build, "_NICENESS", 0)
    cache = tmp_path / "cache"
    archive = provide_archive(cache, lambda _name, _text: None)
    examined = recipe.examine(VULKAN, None, cache)
    assert (examined.missing, examined.fetch) == ((), ())
    log = tmp_path / "build.log"

    def until(percent: int) -> list[Step]:
        seen: list[Step] = []

        def progress(step: Step) -> None:
            seen.append(step)
            if step.percent is not None and step.percent >= percent:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build.build(recipe.RECIPES[VULKAN], examined, archive, tmp_path / "work", log, progress)
        return seen

    first = until(5)
    assert [step.name for step in first[:2]] == ["unpack", "configure"]
    second = until(6)
    assert {step.name for step in second} == {"compile"}
    lines = [line for line in log.read_text().splitlines() if "Generate vulkan shaders for " in line]
    names = [line.rpartition(" ")[2] for line in lines]
    assert len(names) >= 4
    assert len(names) == len(set(names)), "nothing is compiled twice"
