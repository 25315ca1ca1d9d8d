"""`mesh-llm engine install --index URL`: downloaded, tested, listed, removed, as a user types it; and refused."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.integration.accelerator_fixtures import NO_FAULT, WRONG_OPERATOR, StandIn, stand_in
from tests.support.environments import new_environment, use_checkout
from tests.support.wheel_index import WheelIndex, engine_files, wheel_name, write_wheel
from tools.engine_source import KEPT

from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION

__all__ = ["stand_in"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Machine:
    """An environment with this checkout where nothing was built, and a home."""

    def __init__(self, place: Path) -> None:
        self._python = new_environment(place / "environment")
        use_checkout(self._python)
        source = self._python.parents[1] / "share" / "mesh-llm" / "source" / KEPT.name
        source.parent.mkdir(parents=True)
        shutil.copyfile(KEPT, source)
        self._home = place / "home"

    def ran(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [str(self._python), "-m", "mesh_llm", "engine", *arguments],
            env=os.environ | {"MESH_LLM_HOME": str(self._home)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def gpus(self) -> list[str]:
        """The devices of the embedded engine that are no processors."""
        code, text = self.ran("list", "--json")
        assert code == 0, text
        engine = next(one for one in json.loads(text)["engines"] if one["source"] == "embedded")
        return [device["id"] for device in engine["devices"] if device["kind"] != "cpu"]


def test_a_prebuilt_engine_is_installed_listed_and_removed(tmp_path: Path, stand_in: StandIn) -> None:
    machine = Machine(tmp_path)
    files = engine_files()
    with WheelIndex() as index:
        files[f"{PACKAGE}/libggml-vulkan.so"] = stand_in(WRONG_OPERATOR)
        index.add("vulkan", write_wheel(tmp_path / wheel_name(), files))
        code, text = machine.ran("install", "--gpu", "vulkan", "--index", index.address)
        assert code != 0
        assert "it computes wrong results: ROPE on StandIn0" in text
        assert machine.gpus() == []
        code, text = machine.ran("install", "--gpu", "vulkan", "--index", index.address)
        assert code != 0
        assert "--force" in text, "what failed is not downloaded again"

        index.answers.clear()
        files[f"{PACKAGE}/libggml-vulkan.so"] = stand_in(NO_FAULT)
        index.add("vulkan", write_wheel(tmp_path / wheel_name(f"{VERSION}+vulkan"), files))
        code, text = machine.ran("install", "--gpu", "vulkan", "--force", "--index", index.address)
        assert code == 0, text
        assert "A prebuilt engine with Vulkan for this machine" in text
        assert "done: The prebuilt engine is ready: tested on StandIn0: 20 operators, 24 tokens of text, RPC 8" in text
    assert machine.gpus() == ["StandIn0"]
    assert f"prebuilt: {wheel_name(f'{VERSION}+vulkan')}" in machine.ran("list")[1]
    code, text = machine.ran("install", "--gpu", "vulkan")
    assert "The vulkan plugin is installed" in text, "without the index, which is gone"
    assert "is removed" in machine.ran("remove", "vulkan")[1]
    assert machine.gpus() == []
