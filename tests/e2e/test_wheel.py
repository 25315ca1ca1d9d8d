"""What `hatch build` makes, installed where there was no mesh-llm: the page and the RPC plugin come with it."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.environments import build_wheel, install_wheel, make_wheels, new_environment
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, named, until, warm

from mesh_llm.engine.sources.embedded.plugin import RPC_VERSION

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SIZES = ("--parallel", "1", "--ctx-size", "512", "--no-draft")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheels(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel, and with those of all that it requires."""
    directory = tmp_path_factory.mktemp("wheels") / "all"
    make_wheels(directory)
    shutil.copy(wheel, directory)
    return directory


@pytest.mark.parametrize("tool", ["pip", "uv tool", "pipx"])
def test_users_can_install_it_and_its_service_keeps_its_path(tool: str, wheels: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "systemctl").write_text("#!/bin/sh\n")
    (programs / "systemctl").chmod(0o755)
    env = {
        "HOME": str(tmp_path),
        "PATH": f"{programs}:/usr/bin:/bin",
        "MESH_LLM_HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "UV_CACHE_DIR": str(tmp_path / "cache" / "uv"),
        "UV_TOOL_DIR": str(tmp_path / "tools"),
        "UV_TOOL_BIN_DIR": str(programs),
        "PIPX_HOME": str(tmp_path / "tools"),
        "PIPX_BIN_DIR": str(programs),
    }
    without_registry = f"--no-index --find-links {wheels}"
    commands = {
        # Compiling to bytecode takes a minute, and changes nothing here.
        "pip": f"{sys.executable} -m venv {tmp_path}/tools/v && "
        f"{tmp_path}/tools/v/bin/pip install --no-compile {without_registry} mesh-llm && "
        f"ln -s {tmp_path}/tools/v/bin/mesh-llm {programs}/",
        "uv tool": f"{Path(sys.executable).with_name('uv')} tool install --offline --python {sys.executable} "
        f"{without_registry} mesh-llm",
        "pipx": f"{sys.executable} -m pipx install --python {sys.executable} '--pip-args={without_registry}' mesh-llm",
    }

    def run(*argv: str) -> str:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("/bin/sh", "-c", commands[tool])
    program = str(programs / "mesh-llm")
    (package,) = (tmp_path / "tools").rglob("site-packages/mesh_llm")
    assert (package / "console" / "built" / "index.html").is_file()
    (embedded,) = [one for one in json.loads(run(program, "engine", "list", "--json"))["engines"] if one["usable"]]
    part = next(one for one in embedded["parts"] if one["name"] == "rpc")
    assert (part["state"], Path(part["path"]).is_relative_to(package)) == ("ready", True)
    # The link, not the place in the tool's own directory, which may change with an update.
    run(program, "service", "install", "--no-start")
    assert f'ExecStart="{program}" "serve"' in (tmp_path / "config/systemd/user/mesh-llm.service").read_text()


async def test_a_node_from_the_wheel_has_the_page_and_splits(
    wheel: Path, netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
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
