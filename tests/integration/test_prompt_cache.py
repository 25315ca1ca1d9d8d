"""Prompt caches outlive the engine and the node: a long conversation goes on without being read again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.daemon_support import state, until
from tests.integration.engine_fixtures import CACHE
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess

from mesh_llm.engine.sources.embedded import slot_library

pytestmark = pytest.mark.skipif(slot_library.find(CACHE) is None, reason="what saves slots is not built")

RandomModel = Callable[[str], Path]
LONG = " ".join(f"w{number % 97}" for number in range(300))
TURN = [{"role": "user", "content": LONG}]


async def ask(node: NodeProcess, messages: list[dict[str, str]], path: str = "/v1/chat/completions") -> dict[str, Any]:
    body = {"model": "random-small", "messages": messages, "max_tokens": 12, "temperature": 0}
    return (await node.api.post(path, body)).expect().json()


async def next_turn(node: NodeProcess) -> tuple[list[dict[str, str]], str]:
    """A first turn, and what a client sends as the second; with the first answer."""
    text = (await ask(node, TURN))["choices"][0]["message"]["content"]
    return [*TURN, {"role": "assistant", "content": text}, {"role": "user", "content": "go on"}], text


def saved(node: NodeProcess) -> list[Path]:
    return list((node.home / "cache" / "prompts").glob("*"))


async def test_a_conversation_goes_on_after_a_restart_and_an_eviction(
    start_node: StartNode, random_model: RandomModel
) -> None:
    node = await start_node("a", models=[random_model("small-slow")])
    messages, first = await next_turn(node)
    assert await node.stop() == 0
    files = saved(node)
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o077 == 0
    assert LONG[:40].encode() not in files[0].read_bytes()

    await node.restart()
    answer = await ask(node, messages)
    assert answer["timings"]["cache_n"] > 850
    assert answer["timings"]["prompt_n"] < 60
    assert (await node.status())["prompt_caches"]["count"] == 1
    assert "prompts  1 saved" in (await node.cli("status"))[1]

    await node.cli("drop", "random-small-slow")
    await until(node, lambda status: state(status, "random-small-slow") in {"", "cold"})
    # The second turn is in the place of the first.
    assert len(saved(node)) == 1
    await node.cli("load", "random-small-slow")
    await until(node, lambda status: state(status, "random-small-slow") == "warm")
    again = await ask(node, TURN)
    assert again["timings"]["cache_n"] > 850
    assert again["choices"][0]["message"]["content"] == first

    for path in ("/slots/0?action=save", "/v1/slots/0?action=restore", "/slots/0", "/slots/../slots/0?action=erase"):
        assert (await node.api.post(path, {"filename": "x", "model": "random-small-slow"})).status == 404
    assert (await node.cli("cache", "show"))[1].startswith("Saved prompt caches: 1,")
    code, text = await node.cli("cache", "clear", "--json")
    assert (code, json.loads(text)["count"], saved(node)) == (0, 1, [])
    assert (await node.status())["prompt_caches"]["count"] == 0


async def test_a_killed_node_has_what_it_saved_and_bad_files_are_deleted(
    start_node: StartNode, random_model: RandomModel
) -> None:
    node = await start_node("a", models=[random_model("small")])
    messages, _ = await next_turn(node)
    await until(node, lambda status: status["prompt_caches"]["count"] == 1)
    await node.kill()
    (file,) = saved(node)
    file.with_name("foreign.cache").write_bytes(b"MLPC0001" + bytes(5000))
    file.with_name("left.part").write_bytes(b"half")

    await node.restart()
    assert (await ask(node, messages))["timings"]["cache_n"] > 850
    assert not file.with_name("foreign.cache").exists()
    assert not file.with_name("left.part").exists()
    await node.kill()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    await node.restart()
    answer = await ask(node, messages)
    assert answer["timings"]["cache_n"] == 0
    assert answer["choices"][0]["message"]["content"]
    assert "prompt cache not used" in node.log()
    assert file not in saved(node)


async def test_off_saves_nothing(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")], arguments=["--prompt-cache", "off"])
    await next_turn(node)
    assert (await node.status())["prompt_caches"] is None
    assert "saves no prompt caches" in (await node.cli("cache", "show"))[1]
    assert await node.stop() == 0
    assert not (node.home / "cache" / "prompts").exists()
