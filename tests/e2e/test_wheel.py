"""What `hatch build` makes, installed where there was no mesh-llm: the page and the RPC plugin come with it."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.environments import build_wheel, install_wheel, new_environment
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, named, until, warm

from mesh_llm.engine.sources.embedded.plugin import RPC_VERSION

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SIZES = ("--parallel", "1", "--ctx-size", "512", "--no-draft")


async def test_a_node_from_the_wheel_has_the_page_and_splits(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    wheel = build_wheel(tmp_path / "dist")
    python = new_environment(tmp_path / "environment")
    install_wheel(python, wheel)
    lab = netlab(2, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    kept = {"lab": lab, "python": python, "models_dir": model.parent}
    first = await start_node("a", models=[model], arguments=(*SIZES, "--split"), host=0, **kept)
    whole = content(await chat(first, "red", tokens=12))
    status, text = await first.cli("engine", "list", "--json")
    assert status == 0, text
    (embedded,) = [one for one in json.loads(text)["engines"] if one["source"] == "embedded"]
    assert embedded["problems"] == []
    assert embedded["rpc_version"] == RPC_VERSION
    part = next(one for one in embedded["parts"] if one["name"] == "rpc")
    assert part["state"] == "ready"
    assert Path(part["path"]).is_relative_to(tmp_path / "environment")
    assert "in the wheel of mesh-llm" in part["text"]
    built = (tmp_path / "environment" / "share" / "mesh-llm").rglob("*")
    assert [path for path in built if path.is_file()] == [], "it needed to build nothing; it only watches the place"
    page = (await first.console.get("/")).expect().text
    assert 'id="app"' in page or "/assets/" in page, page[:400]

    status, text = await first.cli("invite", "create", "--scope", "split", "--json")
    assert status == 0, text
    await start_node("b", join=[json.loads(text)["token"]], arguments=SIZES, host=1, **kept)
    await until(first, lambda status: warm("red")(status) and status["split"] is not None, "split", 60.0)
    assert content(await chat(first, "red", tokens=12)) == whole


def test_a_wheel_without_the_plugin_is_for_all_systems(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, MESH_LLM_WITHOUT_PLUGIN="1", MESH_LLM_WITHOUT_PAGE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "bundled" in name]


def test_without_a_compiler_the_wheel_is_made_without_the_plugin(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX="no-such-compiler", MESH_LLM_WITHOUT_PAGE="1")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_setup_goes_on_without_a_compiler_and_says_what_is_missing(tmp_path: Path) -> None:
    python = new_environment(tmp_path / "environment")
    root = Path(__file__).resolve().parents[2]
    command = [str(python), str(root / "tools" / "build_plugin.py"), "--optional"]
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(root / "src"), "MESH_LLM_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stderr
    assert "Install" in done.stderr
    assert subprocess.run(command[:-1], env=env, capture_output=True, check=False).returncode == 1
    assert sys.executable != str(python)
