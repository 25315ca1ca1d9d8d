"""Machines as one pool: real nodes, real llama.cpp, real QUIC, each node on a host of its own."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.pool import alive, chat, chat_body, content, named, until, warm

pytestmark = pytest.mark.timeout(240)


async def test_two_models_on_two_nodes_are_one_api_for_all_three(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    small = random_model("small")
    first = await start_node("a", models=[named(small, "red", tmp_path / "m")], lab=lab, host=0)
    token = await first.invite()
    second, client = await asyncio.gather(
        start_node("b", models=[named(small, "blue", tmp_path / "m")], join=[token], lab=lab, host=1),
        start_node("c", client=True, join=[token], lab=lab, host=2),
    )
    for node in (first, second, client):
        await until(node, lambda status: warm("red")(status) and warm("blue")(status), "serving both models")
        known = (await node.api.get("/v1/models")).expect().json()["data"]
        listed = [model for model in known if model["status"] == "warm"]
        assert [model["id"] for model in listed] == ["blue", "red"]
        assert all(model["context_length"] > 0 for model in listed)
        for model, host in (("red", first), ("blue", second)):
            answer = await chat(node, model)
            assert content(answer)
            assert answer.headers["x-mesh-llm-model"] == model
            assert answer.headers["x-mesh-llm-node"] == (await host.status())["node_id"]
            async with node.api.stream(
                "POST", "/v1/chat/completions", json=chat_body(model, tokens=6, stream=True)
            ) as stream:
                events = [event.data async for event in stream.events()]
            assert events[-1] == "[DONE]"
            assert len(events) > 6
            body = {"model": model, "input": "some words"}
            embedded = (await node.api.request("POST", "/v1/embeddings", json=body)).expect().json()
            assert len(embedded["data"][0]["embedding"]) > 10
    assert (await chat(client, "green")).status == 404


async def test_two_nodes_with_the_same_model_share_the_load(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    slots = ("--parallel", "2", "--ctx-size", "512")
    first = await start_node("a", models=[model], arguments=slots, lab=lab, host=0)
    token = await first.invite()
    await start_node("b", models=[model], arguments=slots, join=[token], lab=lab, host=1)
    client = await start_node("c", client=True, join=[token], lab=lab, host=2)
    await until(client, warm("red", nodes=2), "served by two nodes")
    answers = await asyncio.gather(
        *(chat(client, "red", tokens=64, text=f"{number} is another conversation") for number in range(24))
    )
    assert {answer.status for answer in answers} == {200}
    share = Counter(answer.headers["x-mesh-llm-node"] for answer in answers)
    assert len(share) == 2
    assert min(share.values()) >= 6, f"24 requests went {sorted(share.values())} to two equal nodes"


async def test_a_conversation_comes_back_to_its_warm_host(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    first = await start_node("a", models=[model], lab=lab, host=0)
    token = await first.invite()
    await start_node("b", models=[model], join=[token], lab=lab, host=1)
    client = await start_node("c", client=True, join=[token], lab=lab, host=2)
    await until(client, warm("red", nodes=2), "served by two nodes")
    for conversation in range(4):
        messages = [{"role": "user", "content": f"{conversation} begins a long talk about many different things"}]
        hosts: set[str] = set()
        for _ in range(4):
            body = {"model": "red", "max_tokens": 8, "temperature": 0, "messages": messages}
            answer = (await client.api.request("POST", "/v1/chat/completions", json=body)).expect()
            hosts.add(answer.headers["x-mesh-llm-node"])
            messages = [*messages, answer.json()["choices"][0]["message"], {"role": "user", "content": "and then?"}]
        assert len(hosts) == 1, f"conversation {conversation} wandered"
    metrics = (await client.api.get("/metrics")).expect().text
    assert "prefix" in metrics


async def test_a_joiner_without_a_model_takes_the_wanted_one_that_nobody_serves(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2)
    small = random_model("small")
    disk = tmp_path / "disk"
    red, blue = named(small, "red", disk), named(small, "blue", disk)
    first = await start_node("a", models=[red, blue], models_dir=disk, lab=lab, host=0)
    second = await start_node("b", join=[await first.invite()], models_dir=disk, lab=lab, host=1)
    await until(second, lambda status: warm("red")(status) and warm("blue")(status), "serving what was missing")
    here = [model["name"] for model in (await second.status())["models"] if model["here"]]
    assert here == ["blue"]
    notices = (await second.console.get("/api/notices")).expect().json()
    assert any(notice["code"] == "model_assigned" and "blue" in notice["text"] for notice in notices)


async def test_dropping_a_model_leaves_the_others_alone(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2)
    small = random_model("small")
    first = await start_node("a", models=[named(small, "red", tmp_path / "m")], lab=lab, host=0)
    second = await start_node(
        "b", models=[named(small, "blue", tmp_path / "m")], join=[await first.invite()], lab=lab, host=1
    )
    await until(first, warm("blue"), "seeing the other's model")
    status, output = await second.cli("drop", "blue", "--drain", "5")
    assert status == 0, output
    await until(first, lambda seen: not warm("blue")(seen) and warm("red")(seen), "without the dropped model")
    assert (await chat(first, "red")).status == 200
    status, output = await second.cli("load", str(tmp_path / "m" / "blue.gguf"))
    assert status == 0, output
    await until(first, warm("blue"), "seeing it again")
    assert content(await chat(first, "blue"))


async def test_a_client_beside_a_serving_node_of_the_same_machine(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path]
) -> None:
    lab = netlab(1)
    server = await start_node("a", models=[random_model("small")], lab=lab, host=0)
    client = await start_node(
        "c",
        client=True,
        join=[await server.invite()],
        arguments=["--port", "9400", "--console", "9401"],
        lab=lab,
        host=0,
    )
    name = (await server.status())["models"][0]["name"]
    await until(client, warm(name), "seeing the model")
    assert content(await chat(client, name))
    await until(server, alive(0), "keeping no member for a client")
