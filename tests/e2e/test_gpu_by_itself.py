"""A node whose GPU no engine can use builds the plugin in the background, and moves to the GPU without a restart.

The compilers are stand-ins, and so is the GPU: a plugin whose device is the processor under another name.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.integration.accelerator_fixtures import CRASH_AT_LOAD, NO_FAULT, StandIn, installed, stand_in
from tests.support.environments import new_environment, use_checkout
from tests.support.fixtures import StartNode
from tests.support.node import NodeOptions
from tests.support.pool import chat, content, named, streaming, until, warm
from tests.support.terminal import on_terminal
from tests.support.wheel_index import WheelIndex, small_files, wheel_name, write_wheel
from tools.engine_source import KEPT

from mesh_llm.engine.accelerators.index import VARIABLE
from mesh_llm.engine.installation import MANIFEST
from mesh_llm.engine.sources.embedded import plugin
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.runtime.home import Home

__all__ = ["stand_in"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Status = dict[str, Any]
CARD = "stand-in GPU"

CMAKE = """#!/bin/sh
# Tells its progress as ninja does. The library is there once the test allows it.
case "$1" in
--version) echo "cmake version 3.30.0" ;;
--build)
  echo begun >>"$BUILDS"
  echo "[1/4] Building"
  echo "[2/4] Building"
  while [ ! -e "$ALLOWED" ]; do sleep 0.1; done
  cp "$STAND_IN" "$2/libggml-vulkan.so"
  echo "[4/4] Linking" ;;
*) mkdir -p "$4" ;;
esac
"""


def computes_on(device: str, model: str = "tiny") -> Callable[[Status], bool]:
    return lambda status: status["devices"] == [device] and warm(model)(status)


def part_is(state: str, name: str = "vulkan") -> Callable[[Status], bool]:
    return lambda status: [part["state"] for part in status["engine_parts"] if part["name"] == name] == [state]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The interpreter of an environment with this checkout, its packages, and the RPC plugin."""
    python = new_environment(tmp_path / "environment")
    use_checkout(python)
    built = Path(sys.prefix) / "share" / "mesh-llm" / "engine" / plugin.key()
    place = python.parents[1] / "share" / "mesh-llm"
    (place / "engine" / plugin.key()).mkdir(parents=True)
    for name in (MANIFEST, plugin.library_name()):
        shutil.copyfile(built / name, place / "engine" / plugin.key() / name)
    for sockets in built.parent.glob("rpc-sockets-*.so"):
        shutil.copyfile(sockets, place / "engine" / sockets.name)
    (place / "source").mkdir()
    shutil.copyfile(KEPT, place / "source" / KEPT.name)
    return python


@pytest.fixture
def tools(tmp_path: Path, stand_in: StandIn) -> dict[str, str]:
    """Variables of a node that finds stand-ins for cmake, ninja and the compilers."""
    place = tmp_path / "tools"
    place.mkdir()
    for name, text in (("cmake", CMAKE), ("ninja", "#!/bin/sh\n"), ("glslc", "#!/bin/sh\n"), ("c++", "#!/bin/sh\n")):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    (place / "c++").write_text('#!/bin/sh\ncase "$1" in -print-file-name=*) echo /dev/null ;; esac\n')
    return {
        "PATH": f"{place}:/usr/bin:/bin",
        "CXX": str(place / "c++"),
        "STAND_IN": str(stand_in(NO_FAULT)),
        "ALLOWED": str(tmp_path / "allowed"),
        "BUILDS": str(tmp_path / "builds"),
    }


async def test_it_is_built_beside_requests_resumed_after_a_restart_and_used_without_one(
    start_node: StartNode, bare: Path, tools: dict[str, str], tmp_path: Path
) -> None:
    node = await start_node("a", models=["tiny"], arguments=("--gpu", "vulkan"), python=bare, env=tools)
    await node.process.line("gpu: The Vulkan plugin for .* compiling in the background", 60.0)
    await node.process.line("gpu: Compiling the Vulkan plugin: 25 %", 60.0)
    await until(node, part_is("building"), "building", 30.0)
    assert "25 %" in next(part["text"] for part in (await node.status())["engine_parts"] if part["name"] == "vulkan")
    assert content(await chat(node, "tiny")), "the processor serves meanwhile"
    _, text = await node.cli("status")
    assert "Compiling the Vulkan plugin: 25 %" in text
    assert await node.stop(20.0) == 0, "its compilers ended too"
    await node.restart()
    await node.process.line("gpu: Compiling the Vulkan plugin: 25 %", 60.0)
    assert "configure" not in node.process.text
    (tmp_path / "allowed").touch()
    await node.process.line(f"gpu: Models compute on {CARD} from now on", 60.0)
    await until(node, computes_on(CARD), "on the GPU", 60.0)
    assert content(await chat(node, "tiny"))
    assert part_is("ready")(await node.status())
    assert (await node.status())["problems"] == []
    assert (tmp_path / "builds").read_text().split() == ["begun", "begun"]
    _, text = await node.cli("engine", "list")
    assert "StandIn0" in text


async def test_a_gpu_that_is_lost_is_replaced_by_the_processor_until_it_is_back_and_no_answer_is_lost(
    start_node: StartNode, bare: Path, stand_in: StandIn, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = named(random_model("middle"), "red", tmp_path / "m")
    cache = bare.parents[1] / "share" / "mesh-llm"
    installed(cache, stand_in(NO_FAULT))
    node = await start_node("a", models=[model], python=bare)
    await until(node, computes_on(CARD, "red"), "on the GPU", 30.0)
    # The driver is broken, and takes the engine with it.
    installed(cache, stand_in(CRASH_AT_LOAD))
    for engine in _engines(node.process.pid):
        engine.kill()
    await until(node, lambda status: CARD not in status["devices"] and warm("red")(status), "on the processor", 60.0)
    assert content(await chat(node, "red"))
    (problem,) = (await node.status())["problems"]
    assert f"{CARD} is not there any more, and the processor serves" in problem["text"]
    assert "Did the GPU's driver change?" in problem["text"]
    for verb in ("status", "doctor"):
        _, text = await node.cli(verb)
        assert f"{CARD} is not there any more" in text
    before = _engines(node.process.pid)
    async with streaming(node, "red", tokens=400) as events:
        installed(cache, stand_in(NO_FAULT))
        await node.process.line(f"gpu: Models compute on {CARD} from now on", 60.0)
        # The answer goes on to its end on the processor, and the engine starts again after that.
        assert (await node.status())["requests"]["in_flight"] == 1
        assert _engines(node.process.pid) == before
        lines = len(node.process.lines)
        pieces = [event.data async for event in events]
    assert pieces[-1] == "[DONE]"
    assert not any('"error"' in piece for piece in pieces)
    await node.process.line("model: red is ready", 60.0, after=lines)
    await until(node, computes_on(CARD, "red"), "on the GPU again", 60.0)
    assert _engines(node.process.pid) != before
    assert (await node.status())["problems"] == []


async def test_without_a_terminal_what_takes_long_is_said_and_not_done(
    start_node: StartNode, bare: Path, tools: dict[str, str]
) -> None:
    # One processor needs seven minutes for Vulkan, and an hour for CUDA; this machine has no nvcc that is found.
    node = await start_node("a", models=["tiny"], arguments=("--gpu", "none"), python=bare, env=tools)
    assert "gpu:" not in node.process.text
    assert (await node.status())["problems"] == []
    other = await start_node("b", models=["tiny"], arguments=("--gpu", "rocm"), python=bare, env=tools)
    await until(other, lambda status: len(status["problems"]) == 1, "the problem", 60.0)
    (problem,) = (await other.status())["problems"]
    assert "The GPU is not used." in problem["text"]
    assert "Missing: hipcc" in problem["text"]
    assert content(await chat(other, "tiny"))


async def test_before_a_large_download_the_user_is_asked_on_a_terminal_once_for_a_home(
    bare: Path, tools: dict[str, str], tmp_path: Path
) -> None:
    with WheelIndex() as index:
        wheel = write_wheel(tmp_path / wheel_name(f"{VERSION}+vulkan"), small_files(f"{VERSION}+vulkan"))
        index.add("vulkan", wheel).claims = 300_000_000
        env = tools | {VARIABLE: index.address}
        options = NodeOptions(tmp_path / "a", models=["tiny"], arguments=("--gpu", "vulkan"), python=bare, env=env)
        options.home.mkdir()
        # Ctrl-C is no answer.
        async with on_terminal(options.argv(), env=options.environment(), columns=200) as terminal:
            await terminal.until(r"Install it\? \[Y/n\]")
            terminal.type("\x03")
            assert await terminal.ended() in {0, 130}
            assert "Traceback" not in terminal.text
        async with on_terminal(options.argv(), env=options.environment(), columns=200) as terminal:
            await terminal.until(r"Install it\? \[Y/n\]")
            shown = " ".join(terminal.text.split())
            assert "No engine here can use the GPU yet. A prebuilt engine with Vulkan for this machine" in shown
            assert "300.0 MB, from 127.0.0.1" in shown
            terminal.type("n\r")
            await terminal.until("The GPU is not used, because its plugin was not agreed to")
            await terminal.until("Ctrl-C stops this node")
            terminal.type("\x03")
            assert await terminal.ended() == 0
        assert Home(options.home).gpu_answer.exists(), "and it is not asked again"
        assert set(index.requested(wheel.name)) == {"bytes=0-0"}, "only its size was asked for"
        # Enter is a yes.
        other = dataclasses.replace(options, home=tmp_path / "b")
        other.home.mkdir()
        async with on_terminal(other.argv(), env=other.environment(), columns=200) as terminal:
            await terminal.until(r"Install it\? \[Y/n\]")
            terminal.type("\r")
            await terminal.until("Ctrl-C stops this node")
            await terminal.until("Downloading")
            terminal.type("\x03")
            assert await terminal.ended() == 0


def _engines(daemon: int) -> list[psutil.Process]:
    children = psutil.Process(daemon).children(recursive=True)
    return [child for child in children if "server_main" in " ".join(child.cmdline())]
