"""`mesh-llm status --watch` as a person sees it, on a terminal of its own."""

import signal
import sys
from contextlib import AbstractAsyncContextManager

from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.process import Process
from tests.support.terminal import Terminal, on_terminal

WATCH = [sys.executable, "-m", "mesh_llm", "status", "--watch"]


def watching(node: NodeProcess) -> AbstractAsyncContextManager[Terminal]:
    return on_terminal(WATCH, env=node.options.environment())


async def test_it_follows_the_mesh_and_q_leaves_the_terminal_as_it_was(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"], arguments=["--name", "desk"])
    async with watching(node) as terminal:
        await terminal.until(r"desk.*ready.*tiny.*warm")
        assert "\x1b[?1049h" in terminal.raw
        joiner = await start_node("b", join=[await node.invite()], models=["tiny"], arguments=["--name", "shelf"])
        await terminal.until(r"NODE.*shelf.*alive")
        await node.cli("drop", "tiny", "--drain", "0")
        await terminal.until(r"tiny.*was dropped")
        mark = terminal.mark()
        await joiner.crash()
        await terminal.until(r"shelf.{0,80}(lost|gone|dead|not answer|suspect)", 30.0, after=mark)
        terminal.resize(60, 12)
        await terminal.until(r"desk", after=terminal.mark())
        assert not terminal.echoes()
        terminal.type("q")
        assert await terminal.ended() == 0
        assert "\x1b[?1049l" in terminal.raw


async def test_it_outlives_the_node_and_ctrl_c_leaves(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"], arguments=["--name", "desk"])
    async with watching(node) as terminal:
        await terminal.until(r"desk.*warm")
        await node.stop()
        await terminal.until(r"Waiting for it|Trying again")
        mark = terminal.mark()
        await node.restart()
        await terminal.until(r"desk.*ready.*warm", after=mark)
        terminal.type("\x03")
        assert await terminal.ended() == 0


async def test_into_a_pipe_it_prints_what_changes(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"], arguments=["--name", "desk"])
    async with await Process.start(WATCH, env=node.options.environment()) as command:
        await command.line("desk: serve, ready")
        await node.cli("drop", "tiny", "--drain", "0")
        await command.line("tiny .*cold")
        command.signal(signal.SIGINT)
        assert await command.ended() == 0
        assert "\x1b" not in command.text


async def test_without_a_node_it_says_so(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"])
    await node.stop()
    async with watching(node) as terminal:
        await terminal.until("No node is running")
        assert await terminal.ended() == 3
