"""The console of real nodes: the models through its own origin, why requests went where, events that resume."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

from tests.integration.daemon_support import chat, until
from tests.support.fixtures import StartNode
from tests.support.http import HttpClient
from tests.support.node import NodeProcess

from mesh_llm.console.events import MOST_READERS


async def notices(node: NodeProcess, last: str | None) -> tuple[list[str], str]:
    """The codes of the notices that a reader gets who has seen `last`, up to the first status; and the last id."""
    headers = {"last-event-id": last} if last is not None else {}
    codes: list[str] = []
    async with asyncio.timeout(30), node.console.stream("GET", "/api/events", headers=headers) as answer:
        async for event in answer.events():
            if event.event == "notice":
                codes.append(json.loads(event.data)["code"])
            if event.event == "status":
                return codes, event.id
    raise AssertionError("the events ended")


async def test_chat_through_the_console_and_why_it_went_there(start_node: StartNode) -> None:
    host = await start_node("a", models=["tiny"], arguments=["--name", "desk"])
    asker = await start_node("b", join=[await host.invite()], client=True, arguments=["--name", "lap", "--headless"])
    await until(asker, lambda status: bool(status["peers"]))
    identity = (await host.status())["node_id"]
    body = chat(stream=True, model="tiny", stream_options={"include_usage": True})
    async with asker.console.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert (answer.status, answer.headers["x-mesh-llm-node"]) == (200, identity)
        events = [event async for event in answer.events()]
    assert events[-1].data == "[DONE]"
    (decision,) = (await asker.console.get("/api/routing")).expect().json()["decisions"]
    assert (decision["model"], decision["chosen"], decision["outcome"]) == ("tiny", identity, "answered")
    (target,) = decision["targets"]
    assert (target["node_id"], target["local"]) == (identity, False)
    assert "ms away" in target["why"]
    assert decision["tokens"] > 0
    assert decision["ttfb_ms"] > 0
    buckets = (await asker.console.get("/api/history")).expect().json()["buckets"]
    assert sum(bucket["requests"] for bucket in buckets) == 1
    assert sum(bucket["tokens"] for bucket in buckets) == decision["tokens"]
    (served,) = (await host.console.get("/api/routing")).expect().json()["decisions"]
    assert (served["via"], served["chosen"], served["targets"][0]["name"]) == ("peer", identity, "desk")
    refused = (await asker.console.post("/v1/chat/completions", chat(model="nothing"))).expect(404).json()
    assert refused["error"]["code"] == "model_not_found"
    last = (await asker.console.get(f"/api/routing?after={decision['id']}")).expect().json()["decisions"]
    assert [(one["outcome"], one["status"]) for one in last] == [("refused", 404)]
    (await asker.console.get("/")).expect(404)


async def test_another_page_gets_nothing_of_a_real_node(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"])
    port = node.console.port
    before = (await node.console.get("/api/invites")).expect().json()
    foreign = HttpClient(port, headers={"origin": "http://evil.example"})
    rebound = HttpClient(port, headers={"host": "evil.example"})
    simple = HttpClient(port, headers={"content-type": "text/plain"})
    for client, status in ((foreign, 403), (rebound, 403)):
        for path in ("/", "/api/status", "/api/events", "/v1/models"):
            (await client.get(path)).expect(status)
    for path in ("/api/stop", "/api/drop", "/api/load", "/api/invites", "/v1/chat/completions"):
        (await foreign.post(path, {"model": "tiny"})).expect(403)
        (await simple.post(path, {"model": "tiny"})).expect(401)
    assert (await node.status())["models"][0]["status"] == "warm"
    assert (await node.console.get("/api/invites")).expect().json() == before


async def test_events_go_on_where_a_reader_was_and_begin_anew_after_a_restart(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"])
    first, last = await notices(node, None)
    assert "model_ready" in first
    assert await notices(node, last) == ([], last)
    (await node.console.post("/api/drop", {"model": "tiny", "drain_seconds": 0})).expect(202)
    await until(node, lambda status: status["models"][0]["status"] == "cold")
    later, _ = await notices(node, last)
    assert later
    assert "model_ready" not in later
    await node.stop()
    await node.restart()
    anew, fresh = await notices(node, last)
    assert "model_ready" in anew
    assert fresh.partition(".")[0] != last.partition(".")[0]


async def test_a_console_for_others_wants_a_key_and_the_command_line_goes_on(start_node: StartNode) -> None:
    node = await start_node(
        "a", models=["tiny"], arguments=["--console-listen", "0.0.0.0"], env={"MESH_LLM_API_KEY": "sesame"}
    )
    stranger = HttpClient(node.console.port)
    (await stranger.get("/api/status")).expect(401)
    (await stranger.get("/")).expect(401)
    keyed = HttpClient(node.console.port, headers={"authorization": "Bearer sesame"})
    status: dict[str, Any] = (await keyed.get("/api/status")).expect().json()
    assert status["ready"]
    code, text = await node.cli("status")
    assert (code, "tiny" in text) == (0, True)


async def test_readers_that_leave_make_room_for_others(start_node: StartNode) -> None:
    node = await start_node("a", models=["tiny"])
    async with AsyncExitStack() as readers:
        for _ in range(MOST_READERS):
            answer = await readers.enter_async_context(node.console.stream("GET", "/api/events"))
            assert answer.status == 200
            await anext(answer.events())
        refused = (await node.console.get("/api/events")).expect(429).json()
        assert refused["error"]["code"] == "too_many_readers"
    async with asyncio.timeout(30):
        while True:
            async with node.console.stream("GET", "/api/events") as answer:
                if answer.status == 200:
                    break
                await answer.read()
    codes, _ = await notices(node, None)
    assert "model_ready" in codes
