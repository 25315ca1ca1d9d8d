"""A receipt of real nodes: an answer whose first host is killed, resumed by a second, asked for through a client."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.pool import named, until, warm

pytestmark = pytest.mark.timeout(240)

MODEL = "story"
SIZE = ("--ctx-size", "4096", "--parallel", "2")
BODY = {
    "model": MODEL,
    "stream": True,
    "temperature": 0,
    "max_tokens": 1200,
    "messages": [{"role": "user", "content": "Tell me a long story"}],
}


async def test_a_receipt_names_who_saw_the_prompt_and_no_other_fits(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    model = named(random_model("small-slow"), MODEL, tmp_path / "m")
    first = await start_node("a", models=[model], lab=lab, host=0, arguments=SIZE)
    token = await first.invite()
    second, asked = await asyncio.gather(
        start_node("b", models=[model], join=[token], lab=lab, host=1, arguments=SIZE),
        start_node("c", client=True, join=[token], lab=lab, host=2),
    )
    await until(asked, warm(MODEL, nodes=2), "served by two nodes")
    hosts = {(await node.status())["node_id"]: node for node in (first, second)}
    request = json.dumps(BODY).encode()

    async def ask(*, kill: bool) -> tuple[bytes, str]:
        """The content as it came, and the host that began to answer."""
        pieces: list[bytes] = []
        headers = {"content-type": "application/json", "x-mesh-llm-receipt": "on"}
        async with asked.api.stream("POST", "/v1/chat/completions", body=request, headers=headers) as answer:
            assert answer.status == 200
            async for piece in answer.chunks():
                pieces.append(piece)
                if kill and len(pieces) == 20:
                    await hosts[answer.headers["x-mesh-llm-node"]].crash()
        return b"".join(pieces), answer.headers["x-mesh-llm-node"]

    (tmp_path / "request.json").write_bytes(request)
    whole, _ = await ask(kill=False)
    resumed, killed = await ask(kill=True)
    assert f"continued by {next(one for one in hosts if one != killed)}".encode() in resumed
    (tmp_path / "whole.txt").write_bytes(whole)
    (tmp_path / "resumed.txt").write_bytes(resumed)

    async def verify(receipt: str, answer: str) -> tuple[int, Any]:
        words = ("--request", str(tmp_path / "request.json"), "--answer", str(tmp_path / answer), "--json")
        status, text = await asked.cli("receipt", "verify", str(tmp_path / receipt), *words)
        return status, text

    status, text = await verify("resumed.txt", "resumed.txt")
    assert status == 0, text
    # A receipt fits no other answer; what was cut or changed does not hold.
    assert (await verify("whole.txt", "resumed.txt"))[0] == 1
    (tmp_path / "cut.txt").write_bytes(whole[:-40])
    assert (await verify("cut.txt", "whole.txt"))[0] == 1

    status, text = await asked.cli("receipt", "show", str(tmp_path / "resumed.txt"), "--json")
    shown = json.loads(text)
    assert status == 0, text
    assert shown["holds"]
    assert shown["content"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert shown["model"] == MODEL
    assert shown["context"] > 0
    assert shown["tokens"] > 0
    client = (await asked.status())["node_id"]
    survivor = next(one for one in hosts if one != killed)
    assert [(one["node"], one["part"], one["signed"]) for one in shown["seen"]] == [
        (client, "asked", True),
        (killed, "lost", True),
        (survivor, "host", True),
    ]
    # It was killed in the middle: it signed what it took, and nothing about the end. The receipt proves the one, and
    # says the other.
    assert [one["node"] for one in shown["seen"] if one["first_only"]] == [killed]
    found = [(one["mark"], one["text"]) for one in shown["findings"]]
    assert ("note", f"Node {killed[:10]} did not sign how its answer ended: it was lost before.") in found
    took = f"Node {killed[:10]} signed that it took the prompt, to answer it with {MODEL}"
    assert any(mark == "holds" and text.startswith(took) for mark, text in found)
    _, text = await asked.cli("receipt", "show", str(tmp_path / "resumed.txt"))
    assert "that it took the prompt; not how its answer ended" in text
    kept = (await asked.api.get(f"/v1/receipts/{shown['id']}")).expect().json()
    assert kept["receipt"] == shown["receipt"]
