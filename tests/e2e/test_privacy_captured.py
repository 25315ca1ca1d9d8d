"""What an outsider sees of private prompts, captured on it: its streams, what its engines get, and its network."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.netlab.lab import NetLab
from tests.support import wiretap
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, chat_body, named, until, warm

pytestmark = pytest.mark.timeout(400)

SECRET, PUBLIC = "the vault opens with plum nine zero", "anybody may read this one"
ALL_PROTOCOLS = 3
ONE_TOKEN = 4 * 256
"""Bytes of what one machine hands on to the next for one token of the model."""


class Packets:
    """All that passes a host's network interface, both ways, for as long as the lab is open."""

    def __init__(self, lab: NetLab, host: int) -> None:
        self._socket = lab.call(host, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)))
        self._socket.bind(("lan0", ALL_PROTOCOLS))
        self._socket.settimeout(0.2)
        self._ended = threading.Event()
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._ended.is_set():
            try:
                self._parts.append(self._socket.recv(65536))
            except TimeoutError:
                continue

    def close(self) -> bytes:
        """Stop, and return all bytes that passed."""
        self._ended.set()
        self._thread.join()
        self._socket.close()
        return b"\n".join(self._parts)


async def owned(mine: NodeProcess, *others: NodeProcess) -> None:
    """Let these nodes be one person's."""
    assert (await mine.cli("owner", "create"))[0] == 0
    assert (await mine.cli("owner", "add"))[0] == 0
    for other in others:
        node = (await other.status())["node_id"]
        status, text = await mine.cli("owner", "add", node, "--json")
        assert status == 0, text
        assert (await other.cli("owner", "accept", json.loads(text)["statement"]))[0] == 0
        await until(
            mine,
            lambda status, node=node: any(one["node_id"] == node and one["owner"] for one in status["peers"]),
            "its owner",
        )


def here(model: str, *, warm: bool = True) -> Callable[[dict[str, Any]], bool]:
    """Whether a model answers on the node itself."""
    return lambda status: (
        any(one["name"] == model and one["here"] and one["status"] == "warm" for one in status["models"]) == warm
    )


async def ask(node: NodeProcess, model: str, text: str = SECRET, **headers: str) -> Any:
    body = chat_body(model, text=text)
    return await node.api.request(
        "POST", "/v1/chat/completions", json=body, headers={"x-mesh-llm-privacy": "own", **headers}
    )


async def test_nothing_of_a_private_prompt_reaches_an_outsider_whatever_fails(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab, tap = netlab(3, delay_ms=1), tmp_path / "tap"
    small = random_model("small")
    own, story, _ = (named(small, name, tmp_path / "m") for name in ("own", "story", "spare"))
    for name in ("common", "spare"):
        named(small, name, tmp_path / "theirs")
    packets = Packets(lab, 2)
    try:
        stranger = await start_node(
            "stranger",
            models=[story],
            models_dir=tmp_path / "theirs",
            lab=lab,
            host=2,
            shell=wiretap.shell(tap),
            env=wiretap.ENV,
        )
        for model in ("common", "spare"):
            assert (await stranger.cli("load", model))[0] == 0
        token = await stranger.invite()
        mine, second = await asyncio.gather(
            start_node(
                "mine",
                models=[own],
                models_dir=tmp_path / "m",
                join=[token],
                lab=lab,
                host=0,
                arguments=("--no-fetch",),
            ),
            start_node("second", models=[story], join=[token], lab=lab, host=1),
        )
        await until(
            mine,
            lambda status: all((warm("story", 2)(status), warm("common")(status), warm("spare")(status))),
            "seeing the hosts",
            60,
        )
        await owned(mine, second)
        ours = {name: (await node.status())["node_id"] for name, node in (("mine", mine), ("second", second))}

        # The captures work: a prompt that may go anywhere is seen on the outsider.
        (await chat(mine, "common", text=PUBLIC)).expect()
        before = wiretap.read(tap)
        assert ("HTTP", ours["mine"]) in wiretap.streams(before)
        assert PUBLIC in wiretap.to_engines(before)

        # Both hosts answer: only the own one is asked.
        answers = await asyncio.gather(*(ask(mine, "story") for _ in range(6)))
        assert {one.expect().headers["x-mesh-llm-node"] for one in answers} == {ours["second"]}

        # The own host unloads it, and the next turn of a long conversation comes: loaded here, with no cache of others.
        long = f"{SECRET} " * 40
        (await ask(mine, "story", long)).expect()
        assert (await second.cli("unload", "story"))[0] == 0
        await until(mine, warm("story", 1), "only the outsider's")
        assert (await ask(mine, "story", f"{long} and then")).expect().headers["x-mesh-llm-node"] == ours["mine"]

        # A model that only the outsider answers for is loaded here on demand.
        assert (await ask(mine, "spare")).expect().headers["x-mesh-llm-node"] == ours["mine"]

        # The own host is killed in the middle of an answer: it goes on here, where the model is loaded for it.
        assert (await second.cli("load", "story"))[0] == 0
        await until(second, here("story"), "loaded again")
        assert (await mine.cli("unload", "story"))[0] == 0
        await until(mine, lambda status: not here("story")(status) and warm("story", 2)(status), "only at the others")
        body = chat_body("story", tokens=1000, stream=True, text=SECRET)
        headers = {"x-mesh-llm-privacy": "own"}
        async with mine.api.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            assert answer.headers["x-mesh-llm-node"] == ours["second"]
            pieces: list[bytes] = []
            async for piece in answer.chunks():
                pieces.append(piece)
                if len(pieces) == 5:
                    await second.crash()
        assert f"continued by {ours['mine']}".encode() in b"".join(pieces)

        heard = wiretap.read(tap)[len(before) :]
        assert not wiretap.streams(heard)
        assert not wiretap.to_engines(heard)
    finally:
        seen = packets.close()
    assert len(seen) > 10_000
    assert SECRET.encode() not in seen


def split_over(*nodes: str) -> Callable[[dict[str, Any]], bool]:
    """Whether the model is split here, with these workers, and answers."""

    def holds(status: dict[str, Any]) -> bool:
        workers = (status["split"] or {"workers": []})["workers"]
        ready = here("red")(status) and all(one["loaded"] == 1.0 for one in workers)
        return ready and {one["node_id"] for one in workers} == set(nodes)

    return holds


async def test_a_split_with_a_worker_outside_computes_no_private_prompt_and_its_receipt_names_all_workers(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab, tap = netlab(3, delay_ms=1), tmp_path / "tap"
    model = named(random_model("small"), "red", tmp_path / "m")

    async def start(name: str, host: int, gigabytes: str, **how: Any) -> NodeProcess:
        words = ("--parallel", "2", "--ctx-size", "512", "--no-draft", "--split", "--max-vram", gigabytes)
        return await start_node(name, arguments=words, lab=lab, host=host, models_dir=model.parent, **how)

    mine = await start("mine", 0, "0.5", models=[model])
    token = await mine.invite()
    second, stranger = await asyncio.gather(
        start("second", 1, "0.4", join=[token]),
        start("stranger", 2, "0.3", join=[token], shell=wiretap.shell(tap), env=wiretap.ENV),
    )
    own, other = [(await node.status())["node_id"] for node in (second, stranger)]
    await owned(mine, second)
    await until(mine, split_over(own, other), "split over all", 120)

    async def private() -> int:
        """Ask privately; what reached the outsider's RPC server meanwhile is its business only if it was answered."""
        before = len(wiretap.read(tap))
        answer = await ask(mine, "red")
        if answer.status == 200:
            assert split_over(own)(await mine.status())
            return 200
        assert answer.json()["error"]["code"] == "outside_circle"
        assert other[:10] in answer.json()["error"]["message"]
        heard = wiretap.read(tap)[before:]
        assert not wiretap.streams(heard)
        assert not wiretap.to_engines(heard)
        assert wiretap.to_rpc_servers(heard) < ONE_TOKEN
        return answer.status

    assert await private() == 403
    before = len(wiretap.read(tap))
    answer = await ask(mine, "red", PUBLIC, **{"x-mesh-llm-privacy": "any", "x-mesh-llm-receipt": "on"})
    assert wiretap.to_rpc_servers(wiretap.read(tap)[before:]) > ONE_TOKEN
    receipt = (await mine.api.get(f"/v1/receipts/{answer.expect().headers['x-mesh-llm-receipt-id']}")).expect().json()
    assert receipt["holds"]
    assert {one["node"] for one in receipt["seen"] if one["part"] == "worker"} == {own, other}

    # Without the outsider the prompt may be computed; with it again, it may not.
    await stranger.crash()
    await until(mine, split_over(own), "split over the own nodes", 90)
    assert await private() == 200
    await stranger.restart()
    await until(mine, split_over(own, other), "split over all again", 120)
    assert await private() == 403
