"""A daemon's models: engines that die and come back, models that come and go while it runs."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.integration.daemon_support import chat, engines, state, until
from tests.support.fixtures import StartNode

RandomModel = Callable[[str], Path]
NAME, DRAFT = "random-small", "random-draft"


async def test_a_killed_engine_is_started_again_and_requests_wait_for_it(
    start_node: StartNode, random_model: RandomModel
) -> None:
    node = await start_node("a", models=[random_model("small")])
    (old,) = engines(node)
    old.send_signal(signal.SIGKILL)
    await until(node, lambda status: state(status, NAME) == "loading")
    assert (await node.api.get("/health")).status == 503
    (await node.api.post("/v1/chat/completions", chat())).expect()
    await until(node, lambda status: state(status, NAME) == "warm")
    (new,) = engines(node)
    assert new.pid != old.pid
    notices = (await node.console.get("/api/notices")).json()
    assert [notice["code"] for notice in notices if notice["code"].startswith("model_re")] == [
        "model_ready",
        "model_restarting",
        "model_ready",
    ]


async def test_a_crash_loop_ends_as_failed_with_the_reason_and_load_tries_again(
    start_node: StartNode, random_model: RandomModel
) -> None:
    node = await start_node("a", models=[random_model("small")])
    for death in range(4):
        await until(node, lambda status: state(status, NAME) == "warm")
        (engine,) = engines(node)
        engine.send_signal(signal.SIGABRT if death == 3 else signal.SIGKILL)
        await until(node, lambda status: state(status, NAME) != "warm")
    status = await until(node, lambda status: state(status, NAME) == "failed")
    reason = status["models"][0]["reason"]
    assert reason.startswith("it ended 4 times within 120 seconds")
    assert "SIGABRT" in reason
    health = (await node.api.get("/health")).expect(503).json()
    assert health["state"] == "failed"
    (await node.console.post("/api/load", {"model": NAME})).expect(202)
    await until(node, lambda status: state(status, NAME) == "warm")


async def test_models_are_loaded_and_dropped_while_it_runs(
    start_node: StartNode, random_model: RandomModel, tmp_path: Path
) -> None:
    node = await start_node("a", models=[random_model("small")])
    loaded = (await node.console.post("/api/load", {"model": str(random_model("small-draft"))})).expect(202)
    assert loaded.json() == {"model": DRAFT, "waiting": ""}
    await until(node, lambda status: state(status, DRAFT) == "warm")
    for name in (NAME, DRAFT):
        answer = (await node.api.post("/v1/chat/completions", chat(model=name))).expect()
        assert answer.json()["model"] == name
    assert len(engines(node)) == 2
    status, said = await node.cli("drop", "random-d")
    assert (status, DRAFT in said) == (0, True), said
    await until(node, lambda status: state(status, DRAFT) in {"cold", ""})
    assert len(engines(node)) == 1
    gone = (await node.api.post("/v1/chat/completions", chat(model=DRAFT))).status
    assert gone in {404, 503}
    (await node.api.post("/v1/chat/completions", chat(model=NAME))).expect()
    missing = (await node.console.post("/api/drop", {"model": "nonsense"})).expect(404).json()
    assert NAME in missing["error"]["hint"]
    missing = (await node.console.post("/api/load", {"model": "nonsense"})).expect(404).json()
    assert missing["error"]["code"] == "model_not_found"


async def test_dropping_lets_answers_end(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")])
    body = chat(max_tokens=300, stream=True)
    async with node.api.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = answer.events()
        await anext(events)
        (await node.console.post("/api/drop", {"model": NAME})).expect(202)
        rest = [event async for event in events]
    assert rest[-1].data == "[DONE]"
    await until(node, lambda status: state(status, NAME) in {"cold", ""})


async def test_new_files_are_seen(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")])
    shelf = node.options.home / "models"
    unfinished = shelf / "second.gguf.part"
    shutil.copy(random_model("small-draft"), unfinished)
    unfinished.rename(shelf / "second.gguf")
    await until(node, lambda status: state(status, "second") == "cold")
    (await node.console.post("/api/load", {"model": "second"})).expect(202)
    await until(node, lambda status: state(status, "second") == "warm")


async def test_a_draft_is_used(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node(
        "a", models=[random_model("small")], arguments=["--draft", str(random_model("small-draft"))]
    )
    answer = (await node.api.post("/v1/chat/completions", chat(max_tokens=32, temperature=0))).expect()
    assert answer.json()["timings"]["draft_n"] > 0
