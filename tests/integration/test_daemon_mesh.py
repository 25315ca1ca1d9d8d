"""Daemons that are one pool: on a lab's hosts, with real iroh and real engines."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.daemon_support import chat, engines, state, until
from tests.netlab.lab import NetLab
from tests.support.fixtures import StartNode

RandomModel = Callable[[str], Path]
ONE, TWO = "random-small", "second"


@pytest.fixture
def second(random_model: RandomModel, tmp_path: Path) -> Path:
    """The same model under another name."""
    path = tmp_path / "second" / "second.gguf"
    path.parent.mkdir()
    shutil.copy(random_model("small"), path)
    return path


async def test_two_models_two_nodes_and_a_client(
    start_node: StartNode, random_model: RandomModel, second: Path, netlab: Callable[..., NetLab]
) -> None:
    lab = netlab(3)
    first = await start_node("a", models=[random_model("small")], lab=lab, host=0)
    token = await first.invite()
    other = await start_node("b", models=[second], join=[token], lab=lab, host=1)
    client = await start_node("c", client=True, join=[token], lab=lab, host=2)
    for node in (first, other, client):
        await until(node, lambda status: state(status, ONE) == "warm" and state(status, TWO) == "warm")
        for model in (ONE, TWO):
            answer = (await node.api.post("/v1/chat/completions", chat(model=model))).expect()
            assert answer.json()["model"] == model
            async with node.api.stream("POST", "/v1/chat/completions", json=chat(model=model, stream=True)) as stream:
                assert [event async for event in stream.events()][-1].data == "[DONE]"
    assert engines(client) == []


async def test_a_killed_node_is_not_routed_to_and_comes_back(
    start_node: StartNode, random_model: RandomModel, second: Path, netlab: Callable[..., NetLab]
) -> None:
    lab = netlab(2)
    first = await start_node("a", models=[random_model("small")], lab=lab, host=0)
    other = await start_node("b", models=[second], join=[await first.invite()], lab=lab, host=1)
    await until(first, lambda status: state(status, TWO) == "warm")
    (await first.api.post("/v1/chat/completions", chat(model=TWO))).expect()
    await other.kill()
    await until(first, lambda status: state(status, TWO) != "warm")
    assert (await first.api.post("/v1/chat/completions", chat(model=TWO))).status in {404, 503}
    await other.restart()
    await until(first, lambda status: state(status, TWO) == "warm")
    (await first.api.post("/v1/chat/completions", chat(model=TWO))).expect()


async def test_a_node_that_leaves_is_gone_at_once(
    start_node: StartNode, random_model: RandomModel, second: Path, netlab: Callable[..., NetLab]
) -> None:
    lab = netlab(2)
    first = await start_node("a", models=[random_model("small")], lab=lab, host=0)
    other = await start_node("b", models=[second], join=[await first.invite()], lab=lab, host=1)
    await until(first, lambda status: state(status, TWO) == "warm")
    who = (await other.status())["node_id"]
    assert await other.stop() == 0
    await until(first, lambda status: not status["peers"])
    # It said so: nobody had to find out.
    notices = (await first.console.get("/api/notices")).expect().json()
    assert [one["code"] for one in notices if one["about"] == who and one["code"].startswith("peer_")] == [
        "peer_joined",
        "peer_left",
    ]


async def test_a_joiner_without_a_model_takes_what_nobody_serves(
    start_node: StartNode, random_model: RandomModel, second: Path, netlab: Callable[..., NetLab]
) -> None:
    lab = netlab(2)
    first = await start_node("a", models=[random_model("small"), "second"], lab=lab, host=0)
    joiner = await start_node("b", join=[await first.invite()], models_dir=second.parent, lab=lab, host=1, ready=False)
    await joiner.process.line("Serving second, because nobody serves it")
    await until(first, lambda status: state(status, TWO) == "warm")
    (await first.api.post("/v1/chat/completions", chat(model=TWO))).expect()


async def test_a_standby_node_takes_over_the_model_of_a_dead_one(
    start_node: StartNode, random_model: RandomModel, second: Path, netlab: Callable[..., NetLab]
) -> None:
    lab = netlab(3)
    first = await start_node("a", models=[random_model("small")], lab=lab, host=0)
    token = await first.invite()
    host = await start_node("b", models=[second], join=[token], lab=lab, host=1)
    await until(first, lambda status: state(status, TWO) == "warm")
    spare = await start_node(
        "c", models=[random_model("small")], join=[token], lab=lab, host=2, models_dir=second.parent
    )
    (await spare.console.post("/api/drop", {"model": ONE})).expect(202)
    await until(spare, lambda status: status["role"] == "standby")
    await until(spare, lambda status: len(status["peers"]) == 2)
    await host.kill()
    await until(spare, lambda status: state(status, TWO) == "warm" and status["role"] == "serve")
    await until(first, lambda status: state(status, TWO) == "warm")
    (await first.api.post("/v1/chat/completions", chat(model=TWO))).expect()


async def test_requests_go_on_while_one_of_two_hosts_dies(
    start_node: StartNode, random_model: RandomModel, netlab: Callable[..., NetLab]
) -> None:
    lab = netlab(3)
    first = await start_node("a", models=[random_model("small")], lab=lab, host=0)
    token = await first.invite()
    other = await start_node("b", models=[random_model("small")], join=[token], lab=lab, host=1)
    client = await start_node("c", client=True, join=[token], lab=lab, host=2)
    await until(client, lambda status: any(model["nodes"] == 2 for model in status["models"]))
    await other.kill()
    answers = await asyncio.gather(
        *(client.api.post("/v1/chat/completions", chat(f"Hello {number}")) for number in range(8))
    )
    assert [answer.status for answer in answers] == [200] * 8
