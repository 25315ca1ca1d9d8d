"""A node without the RPC plugin builds it in the background, and can then split models; or it says why not."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.environments import new_environment, use_checkout
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, named, until, warm
from tests.support.process import Process
from tools.engine_source import KEPT

from mesh_llm.engine.installation import MANIFEST
from mesh_llm.engine.sources.embedded import plugin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Status = dict[str, Any]
SIZES = ("--parallel", "1", "--ctx-size", "512", "--no-draft")
TOO_LITTLE = ("--max-vram", "0.02", "--no-draft")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The interpreter of an environment with this checkout and its packages, where nothing was built."""
    python = new_environment(tmp_path / "environment")
    use_checkout(python)
    return python


def keep_archive(python: Path) -> None:
    """Put the source archive where an earlier download would have kept it."""
    place = python.parents[1] / "share" / "mesh-llm" / "source" / KEPT.name
    place.parent.mkdir(parents=True)
    shutil.copyfile(KEPT, place)


def part_is(state: str) -> Callable[[Status], bool]:
    return lambda status: [part["state"] for part in status["engine_parts"] if part["name"] == "rpc"] == [state]


async def test_it_is_built_once_and_the_model_is_split_without_a_restart(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], bare: Path, tmp_path: Path
) -> None:
    keep_archive(bare)
    lab = netlab(2, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    kept = {"lab": lab, "python": bare, "models_dir": model.parent}
    # Both start with nothing built, in one environment, as two nodes of one machine do.
    first = await start_node("a", models=[model], arguments=(*SIZES, "--split"), host=0, ready=False, **kept)
    await first.process.line("ready|plugin:", 60.0)
    await until(first, part_is("ready"), "the plugin", 90.0)
    assert "plugin: Compiling the RPC plugin" in first.process.text
    assert "plugin: The RPC plugin is built" in first.process.text
    status, text = await first.cli("invite", "create", "--scope", "split", "--json")
    assert status == 0, text
    second = await start_node("b", join=[json.loads(text)["token"]], arguments=SIZES, host=1, **kept)
    await until(first, lambda status: warm("red")(status) and status["split"] is not None, "split", 90.0)
    assert content(await chat(first, "red", tokens=12))
    assert "plugin:" not in second.process.text, "it was there already"
    assert (await first.status())["problems"] == []
    assert "confined" in (await first.status())["lending"]


async def test_two_nodes_at_once_build_one_and_what_fits_neither_waits_for_it(
    start_node: StartNode, random_model: Callable[[str], Path], bare: Path, tmp_path: Path
) -> None:
    keep_archive(bare)
    model = named(random_model("small"), "red", tmp_path / "m")
    first = await start_node("a", models=["tiny"], ready=False, python=bare)
    second = await start_node("b", models=[model], arguments=TOO_LITTLE, ready=False, python=bare)
    await second.process.line("red: waiting for more memory: .* but is still building its RPC plugin", 60.0)
    await first.ready()
    for node in (first, second):
        await until(node, part_is("ready"), "the plugin", 90.0)
    await second.process.line("red: waiting for more memory: .* Add a machine", 30.0)
    built = sum("plugin: Compiling" in node.process.text for node in (first, second))
    assert built == 1, [node.process.text for node in (first, second)]


async def test_without_a_compiler_what_does_not_fit_is_refused_with_both_reasons(
    start_node: StartNode, random_model: Callable[[str], Path], bare: Path, tmp_path: Path
) -> None:
    model = named(random_model("small"), "red", tmp_path / "m")
    without = {"CXX": "no-such-compiler"}
    node = await start_node("a", models=[model], arguments=TOO_LITTLE, ready=False, python=bare, env=without)
    assert await node.process.ended(60.0) == 1
    assert "red does not fit" in node.process.text
    assert "It cannot be split over machines either" in node.process.text
    assert "no C++ compiler" in node.process.text


async def test_without_a_compiler_it_says_what_is_missing_and_takes_up_what_is_built_later(
    start_node: StartNode, bare: Path, tmp_path: Path
) -> None:
    keep_archive(bare)
    node = await start_node("a", models=["tiny"], python=bare, env={"CXX": "no-such-compiler"})
    await until(node, lambda status: len(status["problems"]) == 1, "the problem", 30.0)
    assert part_is("failed")(await node.status())
    assert "no C++ compiler" in node.process.text
    for verb in ("doctor", "status"):
        _, text = await node.cli(verb)
        assert "no C++ compiler" in text, (verb, text)
    _, text = await node.cli("engine", "list")
    assert "failed: There is no C++ compiler to build the RPC plugin with" in text
    # Its user installs a compiler and types what the message says.
    options = node.options
    env = {**options.environment(), "CXX": os.environ.get("CXX", "c++")}
    argv = [str(bare), "-m", "mesh_llm", "engine", "install"]
    async with await Process.start(argv, env=env) as command:
        assert await command.ended(240.0) == 0, command.text
    await until(node, part_is("ready"), "the plugin", 30.0)
    status = await node.status()
    assert status["problems"] == []
    assert "confined" in status["lending"]


async def test_without_a_network_the_build_fails_soon_and_the_reason_is_remembered(
    start_node: StartNode, bare: Path
) -> None:
    node = await start_node("a", models=["tiny"], python=bare)
    await until(node, lambda status: len(status["problems"]) == 1, "the problem", 60.0)
    (problem,) = (await node.status())["problems"]
    assert "could not be downloaded" in problem["text"]
    assert "--archive FILE" in problem["text"]
    assert await node.stop() == 0
    manifest = next((bare.parents[1] / "share" / "mesh-llm" / "engine").glob("*/installation.json"))
    (failure,) = json.loads(manifest.read_text())["failures"]
    assert failure["code"] == "plugin_download_failed"


async def test_a_damaged_plugin_is_set_aside_and_built_again(start_node: StartNode, bare: Path) -> None:
    keep_archive(bare)
    built = Path(sys.prefix) / "share" / "mesh-llm" / "engine" / plugin.key()
    library = bare.parents[1] / "share" / "mesh-llm" / "engine" / plugin.key() / plugin.library_name()
    library.parent.mkdir(parents=True)
    for name in (MANIFEST, library.name):
        shutil.copyfile(built / name, library.with_name(name))
    good = library.read_bytes()
    library.write_bytes(good[:1000])
    node = await start_node("a", models=["tiny"], python=bare, ready=False)
    await node.process.line("plugin: Compiling", 60.0)
    await node.ready()
    await until(node, part_is("ready"), "the plugin", 90.0)
    assert len(library.read_bytes()) == len(good)
