"""Nodes and clients that look for a way around: out of a prompt's circle, out of a stranger's quota, into memory."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.api_harness import ELSEWHERE, THERE, Api, local, peer_streams, remote, route, running_api
from tests.support.fake_upstream import Call, FakeUpstream, fake_upstream

from mesh_llm.api.receipts import Notary
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.trust.circle import Owners, Privacy
from mesh_llm.core.trust.strangers import StrangerLimits
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.ids import OwnerId
from mesh_llm.core.types.receipt import Announced, Served
from mesh_llm.net.admission.credentials import SigningKey, verify
from mesh_llm.runtime.supervision import TaskScope

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MINE, OTHERS = OwnerId("1" * 64), OwnerId("2" * 64)
PLAIN = {"model": "tiny", "messages": [{"role": "user", "content": "a secret"}]}


async def answer(call: Call) -> None:
    said = {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]}
    body = {
        "id": f"resp_{len(call.body)}", "object": "response", "status": "completed", "output": [said],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "data": [{"index": 0, "embedding": [0.5]}], "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }  # fmt: skip
    await call.respond(json.dumps(body).encode(), kind=b"application/json")


def whose(api: Api, **owners: OwnerId) -> None:
    nodes = {"there": THERE, "elsewhere": ELSEWHERE}
    known = {
        nodes[name]: Ownership(owner=owner, issued=0, expires=2**40, signature=b"s" * 64)
        for name, owner in owners.items()
    }
    api.routes.current = msgspec.structs.replace(api.routes.current, owners=known)


@asynccontextmanager
async def mine_and_a_strangers(
    script: Any = answer, **config: Any
) -> AsyncGenerator[tuple[Api, FakeUpstream, FakeUpstream]]:
    """THERE is a stranger's, and the better host; ELSEWHERE is mine."""
    given: dict[str, Any] = {"resume_wait": 0.0, "owners": Owners(own=MINE), **config}
    async with (
        fake_upstream(script) as theirs,
        fake_upstream(script) as mine,
        running_api(config=ApiConfig(port=0, **given)) as api,
    ):
        api.routes.set(route("tiny", remote(THERE), msgspec.structs.replace(remote(ELSEWHERE), load=0.9)))
        api.mesh.nodes = {THERE: theirs.address, ELSEWHERE: mine.address}
        whose(api, there=OTHERS, elsewhere=MINE)
        yield api, theirs, mine


MESSAGES = PLAIN["messages"]
WAYS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES},
    "/chat/completions": {"messages": MESSAGES},
    "/api/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "a secret"},
    "/completion": {"prompt": "a secret"},
    "/infill": {"input_prefix": "a secret"},
    RESPONSES: {"input": "a secret"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/chat/completions/input_tokens": {"messages": MESSAGES},
    "/v1/responses/input_tokens": {"input": "a secret"},
    "/v1/embeddings": {"input": "a secret"},
    "/embedding": {"content": "a secret"},
    "/tokenize": {"content": "a secret"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES, "stream": False},
    "/api/generate": {"prompt": "a secret", "stream": False},
    "/api/embed": {"input": "a secret"},
    "/api/embeddings": {"prompt": "a secret"},
}


@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize("wish", ["setting", "header"])
async def test_no_path_of_any_api_leads_out_of_the_circle(path: str, wish: str) -> None:
    config = {"privacy": Privacy.OWN} if wish == "setting" else {}
    headers = {"x_mesh_llm_privacy": "own"} if wish == "header" else {}
    async with mine_and_a_strangers(**config) as (api, theirs, mine):
        for stream in (False, True):
            body = {"model": "tiny", **WAYS[path]} | ({"stream": True} if stream else {})
            await api.post(json.dumps(body).encode(), path, **headers)
        assert mine.calls
        assert not theirs.calls


async def test_a_later_request_does_not_take_a_stored_answer_out_of_its_circle(tmp_path: Path) -> None:
    """What is kept of a private turn is a private prompt, however the next turn is asked."""
    async with mine_and_a_strangers(store=tmp_path) as (api, theirs, mine):
        first = await api.post(
            json.dumps({"model": "tiny", "input": "a secret"}).encode(), RESPONSES, x_mesh_llm_privacy="own"
        )
        later = {"model": "tiny", "input": "and now?", "previous_response_id": first.json()["id"]}
        second = await api.post(json.dumps(later).encode(), RESPONSES)
        assert (second.status_code, len(mine.calls)) == (200, 2)
        assert not theirs.calls
        referred = {"model": "tiny", "input": [{"type": "item_reference", "id": "m"}]}
        assert (await api.post(json.dumps(referred).encode(), RESPONSES)).status_code == 200
        assert not theirs.calls
        # Without the host of its circle it has nowhere to go.
        whose(api, there=OTHERS)
        third = await api.post(json.dumps(later).encode(), RESPONSES)
        assert third.status_code == 403
        assert third.json()["error"]["code"] == "outside_circle"
        # What was asked of anybody goes to anybody.
        first = await api.post(json.dumps({"model": "tiny", "input": "nothing special"}).encode(), RESPONSES)
        later["previous_response_id"] = first.json()["id"]
        assert (await api.post(json.dumps(later).encode(), RESPONSES)).headers["x-mesh-llm-node"] == THERE


async def test_a_host_that_is_no_longer_in_the_circle_when_its_turn_comes_gets_nothing() -> None:
    held = asyncio.Event()

    async def slow(call: Call) -> None:
        await held.wait()
        await answer(call)

    async with (
        mine_and_a_strangers(slow, privacy=Privacy.OWN, queue_wait=30.0) as (api, _, mine),
        TaskScope("test") as scope,
    ):
        body = json.dumps(PLAIN).encode()
        api.routes.set(route("tiny", msgspec.structs.replace(remote(ELSEWHERE), slots=1)))
        whose(api, elsewhere=MINE)
        sent = [scope.spawn(api.post(body), f"{number}") for number in range(6)]
        await api.traffic.until(lambda: len(api.traffic.begun) == len(sent))
        await mine.until(lambda: len(mine.calls) > 1)
        had = len(mine.calls)
        whose(api, elsewhere=OTHERS)
        held.set()
        statuses = [(await one).status_code for one in sent]
        assert sorted(statuses) == [200] * had + [503] * (len(sent) - had)
        assert had < len(sent)
        assert len(mine.calls) == had


# Strangers, and peers in general.


async def exchange(address: str, data: bytes) -> bytes:
    name, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    writer.write(data)
    got = await reader.read()
    writer.close()
    return got


def peer_request(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: mesh", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize("named", [(), ("x-mesh-llm-model: tiny",)])
async def test_a_peers_request_is_never_passed_on_to_a_third_node(named: tuple[str, ...]) -> None:
    """A stranger would be asked for as if it were this node: without its quota, and before others."""
    async with fake_upstream(answer) as third, running_api() as api:
        api.routes.set(route("tiny", remote(ELSEWHERE)))
        api.mesh.nodes = {ELSEWHERE: third.address}
        async with peer_streams(api.server, THERE) as address:
            for body in (json.dumps(PLAIN).encode(), b'{"messages":[]}'):
                got = await exchange(address, peer_request(CHAT, body, *named))
                assert got.split(b" ", 2)[1] in (b"400", b"404", b"503"), got
        assert not third.calls


@pytest.mark.parametrize("path", ["/completion", "/infill", "/completions"])
async def test_a_stranger_cannot_choose_what_it_is_counted_for(path: str) -> None:
    """Its own node corrects nothing: it is the attacker's."""

    async def engine(call: Call) -> None:
        asked = json.loads(call.body)
        counted = (
            {"timings": {"prompt_n": 1, "predicted_n": 500}} if "timings" in asked.get("response_fields", ()) else {}
        )
        await call.respond(json.dumps({"content": "x" * 1000} | counted).encode(), kind=b"application/json")

    config = ApiConfig(port=0, resume_wait=0.0, stranger_limits=StrangerLimits())
    async with fake_upstream(engine) as one, running_api([route("tiny", local(one.address))], config=config) as api:
        api.server.strangers.source_of = lambda _: "192.0.2.7"
        body = json.dumps({"prompt": "a", "input_prefix": "a", "response_fields": ["content"]}).encode()
        async with peer_streams(api.server, THERE) as address:
            assert b" 200 " in await exchange(address, peer_request(path, body, "x-mesh-llm-model: tiny"))
        await api.traffic.all_ended(1)
        assert api.server.strangers.usage().tokens_today >= 500


async def test_a_challenge_that_is_sent_again_and_again_takes_no_memory() -> None:
    key = SigningKey.generate()
    notary = Notary(
        node=key.node_id,
        sign=key.sign,
        verify=verify,
        prepare=lambda _: None,
        served=lambda _model, _term: Served(),
        announced=lambda _model, _node: Announced(),
        name_of=lambda node: node,
    )
    async with fake_upstream(answer) as one, running_api([route("tiny", local(one.address))]) as api:
        api.server.use_notary(notary)
        body = json.dumps(PLAIN).encode()
        async with peer_streams(api.server, THERE) as address:
            for number in range(3):
                part = f"x-mesh-llm-receipt-part: {number:032x}."
                for _ in range(3):
                    got = await exchange(address, peer_request(CHAT, body, part, "x-mesh-llm-model: tiny"))
                    assert b" 200 " in got
        assert api.server._receipts._expected == {}
