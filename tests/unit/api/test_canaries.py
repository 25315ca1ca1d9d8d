"""Canaries look like the requests of clients, are left like them, and read what a host says of probabilities."""

import asyncio
import json
from typing import Any

import msgspec
import pytest
from tests.support.api_harness import ELSEWHERE, HERE, THERE, Api, local, remote, route, running_api
from tests.support.core_values import node_id
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api import canaries as module
from mesh_llm.api.canaries import GaveWayError
from mesh_llm.api.canary_shapes import CHAT, COMPLETIONS, Question, RequestShape, canary_body
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.trust.canary_plan import CANARY_TOKENS
from mesh_llm.core.trust.readback import Reading
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.runtime.supervision import TaskScope

MODEL = ModelName("tiny")
RAIN = Question(MODEL, CHAT, "You are a gardener.", "What is rain?")
SECRET = "my secret"
ASKED = {
    "model": "tiny",
    "stream": True,
    "messages": [{"role": "user", "content": SECRET}],
    "temperature": 0.7,
    "max_tokens": 900,
    "stream_options": {"include_usage": True},
    "metadata": {"about": SECRET},
    "stop": [SECRET],
    "user": SECRET,
}


def never() -> bool:
    return False


def event(text: str, logprob: float = -0.1) -> bytes:
    top = [{"token": text, "logprob": logprob}, {"token": "other", "logprob": -3.0}]
    content = [{"token": text, "logprob": logprob, "top_logprobs": top}]
    choice = {"delta": {"content": text}, "logprobs": {"content": content}}
    return json.dumps({"choices": [choice]}).encode()


async def streamed(call: Call) -> None:
    await call.begin_stream()
    for number in range(1000):
        await call.event(event(f"t{number}"))
    await call.gone()


async def in_one_piece(call: Call) -> None:
    tokens = [json.loads(event(f"t{number}"))["choices"][0]["logprobs"]["content"][0] for number in range(40)]
    body = {"choices": [{"message": {"content": "text"}, "logprobs": {"content": tokens}}]}
    await call.respond(json.dumps(body).encode(), kind=b"application/json")


def canaries(api: Api) -> Any:
    api.server.use_canaries(lambda _model, _node, _usage: None)
    return api.server.canaries


async def shape_of(api: Api, body: bytes, path: str = CHAT, **headers: str) -> RequestShape | None:
    found = canaries(api).shapes
    await api.post(body, path, **headers)
    return found.pick(0.0)


async def test_a_canary_looks_on_the_wire_like_the_request_of_a_client() -> None:
    async with fake_upstream(streamed) as host, running_api() as api:
        api.routes.set(route("tiny", remote(THERE)))
        api.mesh.nodes = {THERE: host.address}
        client = canaries(api)
        async with api.client.stream("POST", CHAT, json=ASKED, headers={"user-agent": "some-app/1.2"}):
            await host.until(lambda: bool(host.calls))
        shape = client.shapes.pick(0.0)
        answer = await client.ask(remote(THERE), shape, RAIN, never)
        first, second = host.calls
        assert (first.method, first.target, list(first.headers)) == (second.method, second.target, list(second.headers))
        assert first.headers[b"user-agent"] == second.headers[b"user-agent"]
        sent, asked = json.loads(second.body), json.loads(first.body)
        # The same fields in the same order, without what only the client's content could explain.
        assert list(sent)[:6] == list(asked)[:6]
        assert sent["max_tokens"] == 900
        assert sent["stream_options"] == {"include_usage": True}
        assert sent["temperature"] == 0
        assert sent["messages"] == [
            {"role": "system", "content": "You are a gardener."},
            {"role": "user", "content": "What is rain?"},
        ]
        assert SECRET.encode() not in second.body
        # It is left once enough has come.
        assert len(answer.tokens) == CANARY_TOKENS
        await host.until(lambda: host.open == 0)


async def test_a_shape_is_noted_only_where_another_node_could_answer() -> None:
    async with fake_upstream() as host, running_api() as api:
        api.routes.set(route("tiny", local(host.address)))
        assert await shape_of(api, json.dumps(ASKED).encode()) is None
        api.routes.set(route("tiny", local(host.address), remote(THERE)))
        assert await shape_of(api, json.dumps(ASKED).encode()) is not None


async def test_an_ordinary_canary_has_nothing_that_a_clients_request_has_not() -> None:
    async with fake_upstream(streamed) as host, running_api() as api:
        api.routes.set(route("tiny", remote(THERE)))
        api.mesh.nodes = {THERE: host.address}
        client = canaries(api)
        plain = {name: value for name, value in ASKED.items() if name not in ("metadata", "stop", "user")}
        async with api.client.stream("POST", CHAT, json=plain):
            await host.until(lambda: bool(host.calls))
        pieces = await client.ask_ordinarily(remote(THERE), client.shapes.pick(0.0), RAIN, never)
        first, second = host.calls
        assert first.headers | {b"content-length": b""} == second.headers | {b"content-length": b""}
        sent, asked = json.loads(second.body), json.loads(first.body)
        assert list(sent) == list(asked)
        assert {**sent, "messages": 0} == {**asked, "messages": 0}
        assert pieces == [f"t{number}" for number in range(CANARY_TOKENS)]


async def test_an_answer_is_read_back_token_by_token() -> None:
    asked: list[Any] = []

    async def copy(call: Call) -> None:
        body = json.loads(call.body)
        if call.target == "/apply-template":
            answer: Any = {"prompt": "rendered"}
        elif call.target == "/tokenize":
            assert body["content"] == "rendered"
            answer = {"tokens": [1, 2]}
        else:
            asked.append(body["prompt"])
            likely = [{"id": 10 + len(asked), "token": f"t{len(asked)}", "logprob": -0.1}]
            answer = {"completion_probabilities": [{"top_logprobs": [*likely, {"id": 9, "token": "z", "logprob": -9}]}]}
        await call.respond(json.dumps(answer).encode(), kind=b"application/json")

    async with fake_upstream(copy) as host, running_api() as api:
        api.mesh.nodes = {THERE: host.address}
        client = canaries(api)
        assert await client.read_back(remote(THERE), RAIN, ["t1", "t2"], never) == Reading(2)
        assert asked == [[1, 2], [1, 2, 11]]
        asked.clear()
        assert await client.read_back(remote(THERE), RAIN, ["t1", "z", "t3"], never) == Reading(1, misfit=True)
        with pytest.raises(GaveWayError):
            await client.read_back(remote(THERE), RAIN, ["t1"], lambda: True)
        assert await client.read_back(remote(ELSEWHERE), RAIN, ["t1"], never) is None
        assert client.in_flight(MODEL) == {}


@pytest.mark.parametrize("spaced", [True, False])
def test_the_spacing_is_the_clients(spaced: bool) -> None:
    shape = RequestShape(path=CHAT, fields=(("model", None), ("messages", None)), spaced=spaced)
    body = canary_body(shape, RAIN._replace(path=shape.path))
    separators = (", ", ": ") if spaced else (",", ":")
    assert body == json.dumps(json.loads(body), separators=separators).encode()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_answer_in_one_piece_is_kept_short(path: str) -> None:
    shape = RequestShape(path=path, fields=(("max_completion_tokens", b"4000"), ("temperature", b"1")))
    fields = json.loads(canary_body(shape, RAIN._replace(path=shape.path)))
    assert fields["max_completion_tokens"] == CANARY_TOKENS
    assert "max_tokens" not in fields
    assert fields["temperature"] == 0
    assert fields["model"] == "tiny"
    assert fields["logprobs"] == (True if path == CHAT else 5)
    assert ("messages" if path == CHAT else "prompt") in fields


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "tiny", "input": "x"}),
        (CHAT, {**ASKED, "stream": False, "n": 2}),
    ],
)
async def test_requests_that_no_canary_can_look_like_have_no_shape(path: str, body: dict[str, Any]) -> None:
    async with fake_upstream() as host, running_api() as api:
        api.routes.set(route("tiny", remote(THERE)))
        api.mesh.nodes = {THERE: host.address}
        assert await shape_of(api, json.dumps(body).encode(), path) is None


async def test_with_receipts_for_clients_a_canary_asks_for_one_too() -> None:
    async with fake_upstream(in_one_piece) as host, running_api(config=ApiConfig(port=0)) as api:
        api.mesh.nodes = {THERE: host.address}
        shape = RequestShape(path=CHAT, fields=(("model", None), ("messages", None)), receipt=True)
        # Without a key of the node no receipts are made: then a client's request would have none either.
        await canaries(api).ask(remote(THERE), shape, RAIN, never)
        assert b"x-mesh-llm-receipt-part" not in host.calls[0].headers


async def test_probabilities_are_read_and_bounded() -> None:
    async def odd(call: Call) -> None:
        tokens = [
            {"token": "a" * 9999, "logprob": -1e300, "top_logprobs": [{"token": "b", "logprob": 7.0}]},
            {
                "token": "c",
                "logprob": None,
                "top_logprobs": [{"token": "x", "logprob": -9}, {"token": "y", "logprob": -1}],
            },
        ]
        body = {"choices": [{"logprobs": {"content": tokens}}]}
        await call.respond(json.dumps(body).encode(), kind=b"application/json")

    async with fake_upstream(odd) as host, running_api() as api:
        api.mesh.nodes = {THERE: host.address}
        answer = await canaries(api).reference(remote(THERE), RAIN, never)
        first, second = answer.tokens
        assert (len(first.text), first.logprob, first.top) == (256, -100.0, (("b", 7.0),))
        assert (second.logprob, second.top) == (-100.0, (("y", -1.0), ("x", -9.0)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b'{"choices":[]}',
        b'{"choices":[{"logprobs":null}]}',
        b'{"choices":[{"logprobs":{"content":"x"}}]}',
    ],
)
async def test_a_host_without_probabilities_gives_no_answer(body: bytes) -> None:
    async def script(call: Call) -> None:
        await call.respond(body, kind=b"application/json")

    async with fake_upstream(script) as host, running_api() as api:
        api.mesh.nodes = {THERE: host.address}
        client = canaries(api)
        assert await client.reference(remote(THERE), RAIN, never) is None
        assert await client.reference(remote(ELSEWHERE), RAIN, never) is None
        assert client.in_flight(MODEL) == {}


async def test_a_canary_makes_way_for_a_client() -> None:
    async with fake_upstream(streamed) as host, running_api() as api:
        api.mesh.nodes = {THERE: host.address}
        shape = RequestShape(path=CHAT, fields=(("stream", b"true"),))
        client = canaries(api)
        for ask in (client.ask, client.ask_ordinarily):
            with pytest.raises(GaveWayError):
                await ask(remote(THERE), shape, RAIN, lambda: True)
            await host.until(lambda: host.open == 0)
            assert client.in_flight(MODEL) == {}


async def never_ends(call: Call) -> None:
    await call.begin_stream()
    await call.event(event("t0"))
    await call.gone()


async def never_begins(call: Call) -> None:
    await call.gone()


@pytest.mark.parametrize("script", [never_ends, never_begins])
@pytest.mark.parametrize("way", ["probabilities", "ordinary", "reference", "writing", "reading"])
async def test_a_host_that_lets_a_canary_wait_is_left(script: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_SECONDS", 0.2)
    shape = RequestShape(path=CHAT, fields=(("stream", b"true"),))
    async with fake_upstream(script) as host, running_api() as api, asyncio.timeout(60):
        api.mesh.nodes = {THERE: host.address}
        client, there = canaries(api), remote(THERE)
        ways = {
            "probabilities": lambda: client.ask(there, shape, RAIN, never),
            "ordinary": lambda: client.ask_ordinarily(there, shape, RAIN, never),
            "reference": lambda: client.reference(there, RAIN, never),
            "writing": lambda: client.write(there, MODEL, "Write.", never),
            "reading": lambda: client.read_back(there, RAIN, ["It"], never),
        }
        assert not await ways[way]()
        await host.until(lambda: host.open == 0)
        assert client.in_flight(MODEL) == {}


async def test_a_trusted_copy_writes_the_prompt() -> None:
    async def script(call: Call) -> None:
        await call.respond(json.dumps({"choices": [{"message": {"content": ' "What is rain?" '}}]}).encode(),
                           kind=b"application/json")  # fmt: skip

    async with fake_upstream(script) as host, running_api() as api:
        api.mesh.nodes = {THERE: host.address}
        assert await canaries(api).write(remote(THERE), MODEL, "Write.", never) == "What is rain?"


async def test_work_of_clients_is_told_and_canaries_are_none() -> None:
    async with fake_upstream(in_one_piece) as host, running_api() as api:
        api.routes.set(route("tiny", remote(THERE)))
        api.mesh.nodes = {THERE: host.address}
        told: list[tuple[str, str]] = []
        api.server.use_canaries(lambda model, node, _: told.append((model, node)))
        await api.post(json.dumps({**ASKED, "stream": False}).encode(), CHAT)
        await api.traffic.all_ended(1)
        assert told == [("tiny", THERE)]
        shape = RequestShape(path=CHAT, fields=())
        await api.server.canaries.ask(remote(THERE), shape, RAIN, never)
        assert told == [("tiny", THERE)]


# What follows from distrust.


def distrust(api: Api, *nodes: Any) -> None:
    api.routes.current = msgspec.structs.replace(
        api.routes.current, distrusted=frozenset((MODEL, node) for node in nodes)
    )


PLAIN = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}).encode()


async def answered(call: Call) -> None:
    await call.respond(b'{"choices":[]}', kind=b"application/json")


async def test_requests_avoid_a_distrusted_host_and_say_so_where_there_is_no_other() -> None:
    async with fake_upstream(answered) as one, fake_upstream(answered) as two, running_api() as api:
        worse = msgspec.structs.replace(remote(ELSEWHERE), load=0.9)
        api.routes.set(route("tiny", remote(THERE), worse))
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: two.address}
        distrust(api, THERE)
        assert (await api.post(PLAIN, CHAT)).headers["x-mesh-llm-node"] == ELSEWHERE
        assert not one.calls
        distrust(api, THERE, ELSEWHERE)
        refused = await api.post(PLAIN, CHAT)
        assert refused.status_code == 403
        error = refused.json()["error"]
        assert error["code"] == "host_distrusted"
        assert "mesh-llm trust forget" in error["message"] + json.dumps(error)
        assert not one.calls


async def test_a_split_in_which_a_distrusted_node_computes_gets_no_requests() -> None:
    worker = node_id(9)
    async with fake_upstream(answered) as one, fake_upstream(answered) as two, running_api() as api:
        worse = msgspec.structs.replace(remote(ELSEWHERE), load=0.9)
        split = msgspec.structs.replace(remote(THERE), workers=(worker,))
        api.routes.set(route("tiny", split, worse))
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: two.address}
        distrust(api, worker)
        assert (await api.post(PLAIN, CHAT)).headers["x-mesh-llm-node"] == ELSEWHERE
        distrust(api, worker, ELSEWHERE)
        refused = await api.post(PLAIN, CHAT)
        assert refused.status_code == 403
        message = refused.json()["error"]["message"]
        assert worker[:10] in message
        assert THERE[:10] not in message
        assert not one.calls


async def test_a_model_that_only_distrusted_hosts_serve_is_waited_for_while_another_node_loads_it() -> None:
    async with fake_upstream(answered) as one, fake_upstream(answered) as two, running_api() as api:
        loading = msgspec.structs.replace(remote(ELSEWHERE), status=ModelStatus.LOADING)
        api.routes.set(route("tiny", remote(THERE), loading))
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: two.address}
        distrust(api, THERE)
        async with TaskScope("client") as scope:
            answer = scope.spawn(api.post(PLAIN, CHAT), "asks")
            await asyncio.sleep(0)
            api.routes.set(route("tiny", remote(THERE), remote(ELSEWHERE)))
            distrust(api, THERE)
            assert (await answer).headers["x-mesh-llm-node"] == ELSEWHERE
        assert not one.calls


async def test_an_answer_is_not_resumed_on_a_distrusted_host() -> None:
    async def dies(call: Call) -> None:
        await call.begin_stream()
        await call.event(b'{"choices":[{"index":0,"delta":{"content":"one "}}]}')
        call.die()

    body = json.dumps({**json.loads(PLAIN), "stream": True, "temperature": 0}).encode()
    config = ApiConfig(port=0, resume_wait=0.0)
    async with fake_upstream(dies) as one, fake_upstream(answered) as two, running_api(config=config) as api:
        worse = msgspec.structs.replace(remote(ELSEWHERE), load=0.9)
        api.routes.set(route("tiny", remote(THERE), worse))
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: two.address}
        distrust(api, ELSEWHERE)
        async with asyncio.timeout(20):
            await api.post(body, CHAT)
        assert len(one.calls) == 1
        assert not two.calls
        assert HERE not in api.mesh.nodes
