"""Output that cannot be written, or cannot show every character: no node ends for it, and no verb in a traceback."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.support.fixtures import StartNode
from tests.support.node import NodeOptions, NodeProcess
from tests.support.pool import chat, content, until, warm
from tests.support.terminal import on_terminal

COMMAND = (sys.executable, "-m", "mesh_llm")
VERBS = (
    ("--help",),
    ("--version",),
    ("status",),
    ("status", "--json"),
    ("models", "list"),
    ("models", "show", "tiny"),
    ("invite", "create"),
    ("invite", "list"),
    ("logs",),
    ("logs", "--list"),
    ("plan", "tiny"),
    ("download",),
    ("doctor",),
    ("engine", "list"),
    ("completion", "bash"),
    ("simulate", "--nodes", "2", "--duration", "1"),
)


def shell(words: tuple[str, ...], redirection: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    script = f'set -o pipefail; "$@" {redirection}'
    return subprocess.run(
        ["/bin/bash", "-c", script, "sh", *COMMAND, *words],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


async def served(node: NodeProcess) -> None:
    """It answers, it can take up a model, and it says what its output lost."""
    await node.answering()
    assert "tiny" in content(await chat(node, "tiny", tokens=60, text="Who are you?")).lower()
    await node.console.post("/api/load", {"model": "second"})
    await until(node, warm("second"), "serving the second model")
    assert node.log().count("output dropped stream=stdout") == 1
    assert await node.stop() == 0


def second_model(tmp_path: Path, random_model: Path) -> Path:
    directory = tmp_path / "models"
    directory.mkdir()
    shutil.copy(random_model, directory / "second.gguf")
    return directory


@pytest.mark.parametrize("where", ["/dev/full", "&-"])
async def test_a_node_serves_where_its_output_cannot_be_written(
    start_node: StartNode, tmp_path: Path, random_model: Callable[[str], Path], where: str
) -> None:
    models = second_model(tmp_path, random_model("small"))
    node = await start_node("a", models=["tiny"], ready=False, shell=f'exec "$@" >{where} 2>{where}', models_dir=models)
    await served(node)


async def test_a_node_outlives_the_reader_of_its_output(
    start_node: StartNode, tmp_path: Path, random_model: Callable[[str], Path]
) -> None:
    models = second_model(tmp_path, random_model("small"))
    node = await start_node("a", models=["tiny"], models_dir=models)
    node.process.stop_reading()
    await served(node)


async def test_a_node_does_not_wait_for_a_reader_that_stands_still(
    start_node: StartNode, tmp_path: Path, random_model: Callable[[str], Path]
) -> None:
    models = second_model(tmp_path, random_model("small"))
    # A full pipe with a reader that never reads.
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.close(writer)
    node = await start_node("a", models=["tiny"], ready=False, shell=f'exec "$@" >{fifo} 2>&1', models_dir=models)
    await served(node)
    os.close(reader)


@pytest.mark.timeout(600)
async def test_every_verb_ends_with_a_status_where_its_output_cannot_be_written(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"])
    env = {**node.options.environment(), "PYTHONUNBUFFERED": ""}
    unbuffered = {**env, "PYTHONUNBUFFERED": "1"}
    for words in VERBS:
        for redirection, variables in ((">/dev/full", env), (">/dev/full", unbuffered), (">&-", env)):
            done = await asyncio.to_thread(shell, words, redirection, variables)
            assert done.returncode == 1, (words, redirection, done)
            assert "Standard output cannot be written" in done.stderr, (words, redirection, done)
            assert "Traceback" not in done.stderr
        done = await asyncio.to_thread(shell, words, "| true", env)
        # The reader may have ended before the first word, or not.
        assert done.returncode in {0, 141}, (words, done)
        assert done.stderr == ""
        done = await asyncio.to_thread(shell, words, ">&- 2>&- <&-", env)
        assert done.returncode == 1, (words, done)
    assert (await node.api.get("/health")).status == 200


async def test_a_verb_that_follows_ends_with_its_reader(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"])
    for words in (("status", "--watch"), ("logs", "-f")):
        done = await asyncio.to_thread(shell, words, "| head -1", node.options.environment())
        assert done.returncode == 141
        assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "ascii"])
async def test_terminals_that_are_not_utf8(tmp_path: Path, encoding: str) -> None:
    env = {**NodeOptions(tmp_path / "home").environment(), "PYTHONIOENCODING": encoding}
    (tmp_path / "home").mkdir()
    async with on_terminal([*COMMAND, "doctor"], env=env) as terminal:
        assert await terminal.ended() in {0, 1}
        assert "Traceback" not in terminal.text
        assert "->" in terminal.text if encoding != "gbk" else terminal.text.count("network") >= 1
    argv = NodeOptions(tmp_path / "home", models=["tiny"]).argv()
    async with on_terminal(argv, env=env) as terminal:
        await terminal.until("Ctrl-C stops this node")
        assert "+ model" in terminal.text
        terminal.type("\x03")
        await terminal.ended()
        assert "Traceback" not in terminal.text


@pytest.mark.parametrize("variable", ["NO_COLOR=1", "TERM=dumb"])
async def test_plain_terminals(tmp_path: Path, start_node: StartNode, variable: str) -> None:
    env = NodeOptions(tmp_path / "nobody").environment()
    argv = ["/usr/bin/env", variable, *COMMAND]
    async with on_terminal([*argv, "status"], env=env) as terminal:
        assert await terminal.ended() == 3
        assert "error: No node is running" in terminal.raw
    node = await start_node("a", models=["tiny"])
    async with on_terminal([*argv, "chat"], env=node.options.environment()) as terminal:
        await terminal.until("/help.*> ")
        assert "\x1b[2m" not in terminal.raw
        terminal.type("\x04")
        await terminal.ended()
    async with on_terminal([*argv, "doctor"], env=node.options.environment()) as terminal:
        await terminal.ended()
        assert "\x1b[3" not in terminal.raw
