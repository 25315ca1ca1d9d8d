"""`mesh-llm chat` as a person has it, and with input piped in."""

import asyncio
import sys
from contextlib import AbstractAsyncContextManager

import pytest
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.terminal import Terminal, on_terminal

CHAT = [sys.executable, "-m", "mesh_llm", "chat"]


@pytest.fixture
async def node(start_node: StartNode) -> NodeProcess:
    return await start_node("a", models=["tiny"], arguments=["--name", "desk"])


def talking(node: NodeProcess, *arguments: str) -> AbstractAsyncContextManager[Terminal]:
    environment = {**node.options.environment(), "NO_COLOR": "1"}
    return on_terminal([*CHAT, *arguments], env=environment)


async def say(terminal: Terminal, line: str, pattern: str) -> None:
    """Type a line, and wait until what comes after it matches."""
    mark = terminal.mark()
    terminal.type(line + "\r")
    await terminal.until(pattern, after=mark)


async def test_turns_commands_and_leaving(node: NodeProcess) -> None:
    async with talking(node, "tiny", "-t", "0", "-n", "60") as terminal:
        await terminal.until(r"tiny, through desk.*> ")
        await say(terminal, "Who are you?", r"tiny.*tiny, \d+ tokens, .*first after .*by desk.*> ")
        await say(terminal, "/again", r"tiny.*tiny, \d+ tokens, .*> ")
        await say(terminal, "/model", r"tiny +warm.*> ")
        await say(terminal, "/model nothing", r"Now using nothing.*> ")
        await say(terminal, "Hello", r"error: .*nothing.*> ")
        await say(terminal, "/model tiny", r"Now using tiny.*> ")
        await say(terminal, "Hello \\\rthere", r"tiny, \d+ tokens.*> ")
        await say(terminal, "/new", r"New conversation.*> ")
        await say(terminal, "/again", r"There is no question to answer again.*> ")
        await say(terminal, "/nonsense", r"/quit +quit.*> ")
        terminal.type("/quit\r")
        assert await terminal.ended() == 0


async def test_ctrl_c_stops_an_answer_and_then_leaves(start_node: StartNode, random_model: object) -> None:
    assert callable(random_model)
    node = await start_node("a", models=[random_model("small")], arguments=["--parallel", "1"])
    async with talking(node, "-t", "0") as terminal:
        await terminal.until("> ")
        mark = terminal.mark()
        terminal.type("Tell me everything\r")
        await terminal.until(r"everything\r\n.{40}", after=mark)
        terminal.type("\x03")
        await terminal.until(r"\[stopped\].*> ", after=mark)
        async with asyncio.timeout(30):
            # The one slot is free again: it would answer for minutes more.
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
            (await node.api.post("/v1/chat/completions", body)).expect()
        terminal.type("\x03")
        assert await terminal.ended() == 0


async def piped(node: NodeProcess, text: str | bytes, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *CHAT,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=node.options.environment(),
    )
    output, _ = await asyncio.wait_for(process.communicate(text if isinstance(text, bytes) else text.encode()), 60)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_what_is_piped_in_is_answered(node: NodeProcess) -> None:
    code, text = await piped(node, "Who are you?", "tiny", "-t", "0", "-n", "60")
    assert code == 0
    assert "tiny" in text.lower()
    assert "\x1b" not in text
    assert "tokens/s" not in text
    code, text = await piped(node, "Hello", "nothing")
    assert (code, "nothing" in text) == (1, True)
    code, text = await piped(node, "  \n")
    assert (code, "No text was piped in" in text) == (1, True)
    code, text = await piped(node, b"Qu\xe9 tal?", "-n", "3")
    assert code == 0, text
    code, text = await piped(node, b"\x7fELF\0\xff")
    assert (code, "is not text" in text, "Traceback" in text) == (1, True, False)
    await node.stop()
    code, text = await piped(node, "Hello")
    assert (code, "No node is running" in text) == (3, True)
