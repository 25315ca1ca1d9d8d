"""How a daemon ends, and what it leaves: nothing."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.daemon_support import chat, engines
from tests.support.fixtures import StartNode

from mesh_llm.daemon.journal import replay

RandomModel = Callable[[str], Path]


async def test_sigterm_ends_all_in_good_order(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")])
    (await node.api.post("/v1/chat/completions", chat())).expect()
    api = node.api
    assert await node.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        await api.connect()
    left = {path.name for path in node.options.home.iterdir()}
    assert not left & {"daemon.json", "control-token"}


async def test_sigterm_does_not_wait_for_an_endless_answer(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small-slow")], arguments=["--drain", "1"])
    body = chat(max_tokens=100_000, stream=True)
    async with node.api.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = answer.events()
        await anext(events)
        begun = time.monotonic()
        assert await node.stop() == 0
        assert time.monotonic() - begun > 0.9


async def test_sigterm_lets_an_answer_end_and_ctrl_c_does_not(start_node: StartNode, random_model: RandomModel) -> None:
    # Its text repeats itself, so guesses make it fast: an answer that is to be cut must be long, and the model slow.
    for number, tokens in ((signal.SIGTERM, 300), (signal.SIGINT, 3500)):
        node = await start_node("a", models=[random_model("small-slow")])
        body = chat(max_tokens=tokens, stream=True, ignore_eos=True)
        async with node.api.stream("POST", "/v1/chat/completions", json=body) as answer:
            events = answer.events()
            await anext(events)
            node.process.signal(number)
            try:
                rest = [event async for event in events]
            except (OSError, AssertionError):
                rest = []
        assert (bool(rest) and rest[-1].data == "[DONE]") is (number == signal.SIGTERM)
        assert await node.process.ended() == 0


async def test_a_killed_daemon_leaves_no_child(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")])
    assert engines(node)
    await node.kill()
    await node.process.gone()


async def test_a_home_left_by_a_killed_daemon_is_used_again(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")])
    before = (await node.status())["node_id"]
    await node.kill()
    await node.restart()
    assert (await node.status())["node_id"] == before
    (await node.api.post("/v1/chat/completions", chat())).expect()


async def test_ctrl_c_while_it_starts(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")], ready=False)
    await node.process.line("^api: ")
    node.process.signal(signal.SIGINT)
    assert await node.process.ended() == 128 + signal.SIGINT
    await node.process.gone()


async def test_ctrl_c_while_a_model_loads(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")], ready=False)
    await node.process.line("^mesh: ")
    node.process.signal(signal.SIGINT)
    assert await node.process.ended() in {0, 128 + signal.SIGINT}
    await node.process.gone()


async def test_the_second_ctrl_c_ends_it_at_once(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")])
    body = chat(max_tokens=100_000, stream=True)
    async with node.api.stream("POST", "/v1/chat/completions", json=body) as answer:
        await anext(answer.events())
        # The answer shall not end meanwhile.
        for process in engines(node):
            process.suspend()
        (await node.console.post("/api/stop", {"drain_seconds": 600})).expect(202)
        refused = (await node.api.post("/v1/chat/completions", chat())).expect(503)
        assert refused.json()["error"]["code"] == "node_stopping"
        # Two of the same that come together reach a process that has no core just now as one.
        node.process.signal(signal.SIGTERM)
        node.process.signal(signal.SIGINT)
        assert await node.process.ended() in {128 + signal.SIGINT, 128 + signal.SIGTERM, 0}
    await node.process.gone()


async def test_stopping_with_patience_lets_an_answer_end(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")])
    body = chat(max_tokens=300, stream=True, ignore_eos=True)
    async with node.api.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = answer.events()
        await anext(events)
        (await node.console.post("/api/stop", {"drain_seconds": 60})).expect(202)
        rest = [event async for event in events]
    assert rest[-1].data == "[DONE]"
    assert await node.process.ended() == 0
    await node.process.gone()


async def test_one_home_one_daemon(start_node: StartNode, random_model: RandomModel, tmp_path: Path) -> None:
    node = await start_node("a", models=[random_model("small")])
    second = await start_node("a", models=[random_model("small")], ready=False)
    assert await second.process.ended() == 1
    assert f"is held by the daemon with pid {node.process.pid}" in second.process.text
    assert "MESH_LLM_HOME" in second.process.text
    (await node.api.post("/v1/chat/completions", chat())).expect()


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("nonsense", [], "No model called nonsense"),
        ("small", ["--join", "nonsense"], "invite"),
    ],
)
async def test_what_cannot_work_is_said_at_the_start(
    start_node: StartNode, random_model: RandomModel, model: str, arguments: list[str], says: str
) -> None:
    spec = random_model("small") if model == "small" else model
    node = await start_node("a", models=[spec], arguments=arguments, ready=False)
    assert await node.process.ended(30.0) == 1
    assert says in node.process.text
    assert "Traceback" not in node.process.text
    await node.process.gone()


async def test_a_taken_port_is_said(start_node: StartNode, random_model: RandomModel) -> None:
    holder = socket.create_server(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    for option in ("--port", "--console"):
        node = await start_node(option[2:], models=[random_model("small")], arguments=[option, str(port)], ready=False)
        assert await node.process.ended() == 1
        assert f"Port {port} is used by python" in node.process.text
    holder.close()


async def test_a_journal_of_a_real_life_can_be_replayed(
    start_node: StartNode, random_model: RandomModel, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    node = await start_node("a", models=[random_model("small")], arguments=["--journal", str(journal)])
    (await node.api.post("/v1/chat/completions", chat())).expect()
    await node.stop()
    outcome = await asyncio.to_thread(replay, journal)
    assert outcome.difference is None
    assert outcome.events >= 4
