"""A model split over confined workers that compute by Vulkan, here on Mesa's software device."""

from pathlib import Path

import pytest
from tests.integration import split_fixtures
from tests.integration.accelerator_fixtures import installed, llvmpipe
from tests.integration.engine_fixtures import small_spec, started, supervisor
from tests.integration.split_fixtures import split, text
from tests.support.split_lab import EngineServer

from mesh_llm.engine.confinement import launcher
from mesh_llm.engine.confinement.policy import is_confined
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import CPU_DEVICE, RpcWorkerSpec
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.library.library import require_builtin

__all__ = ["llvmpipe", "supervisor"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not launcher.landlock_version(), reason="this kernel has no Landlock"),
]

DEVICE = "Vulkan0"
PROMPT = "Once upon a time"


async def test_two_confined_workers_say_what_the_processor_says(
    llvmpipe: Path, tmp_path: Path, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, llvmpipe)
    source = EmbeddedSource.find(tmp_path)
    assert source is not None
    # From now on it knows which devices are software.
    await source.info()
    model = require_builtin("tiny")
    solo = await started(supervisor, source, small_spec(model, devices=(CPU_DEVICE,), threads=1), "solo")
    expected = await text(solo, PROMPT, 8)
    await solo.stop()

    def on_device(supervisor: Supervisor, source: EmbeddedSource, name: str) -> split_fixtures.Launch:
        async def launch() -> EngineServer:
            spec = RpcWorkerSpec(devices=(DEVICE,), threads=1)
            worker = await supervisor.launch_rpc_worker(source, spec, name)
            assert is_confined(worker.pid)
            return EngineServer(worker)

        return launch

    monkeypatch.setattr(split_fixtures, "launcher", on_device)
    async with split(supervisor, source, model, 2) as group:
        engine = await group.start(model, devices=(CPU_DEVICE,))
        said = await text(engine, PROMPT, 8)
        await engine.stop()
    # Rounding decides only between words that are equally likely, which the first ones are not.
    assert said.split()[:4] == expected.split()[:4]
