import json
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.api_harness import ELSEWHERE, THERE, Api, remote, route, running_api
from tests.support.fake_upstream import Call, Script, fake_upstream

from mesh_llm.api.announced import overstated
from mesh_llm.api.errors import CONTEXT_EXCEEDED, ContextExceededError, upstream_error
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.corrections import Kind
from mesh_llm.core.types.ids import NodeId


def with_context(context: int, node: NodeId = THERE, speed: float = 0.0) -> Target:
    return msgspec.structs.replace(remote(node), context=context, tokens_per_second=speed)


def refusal(tokens: int = 0, context: int = 0) -> ContextExceededError:
    return ContextExceededError(CONTEXT_EXCEEDED, "", prompt_tokens=tokens, context=context)


def said_by_engine(tokens: int, context: int) -> bytes:
    error = {
        "code": 400, "message": "too long", "type": "exceed_context_size_error", "n_prompt_tokens": tokens,
        "n_ctx": context,
    }  # fmt: skip
    return json.dumps({"error": error}).encode()


BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "word " * 8000}]}).encode()


def test_what_a_refusal_says_of_a_host() -> None:
    target = with_context(32768)
    assert overstated(target, refusal(9000, 4096), BODY) == 4096
    assert overstated(target, refusal(9000, 32768), BODY) == 9000
    assert overstated(target, refusal(9000), BODY) == 9000
    # It does not fit what is announced: an honest refusal.
    assert overstated(target, refusal(32768, 32768), BODY) is None
    assert overstated(target, refusal(40000, 32768), BODY) is None
    # So short a request has no such prompt: it is the host that does not take it.
    assert overstated(target, refusal(10**9, 32768), b"x" * 4000) == 1000
    # The host does not say how long the prompt is.
    assert overstated(target, refusal(), BODY) is None
    assert overstated(target, refusal(), b"x" * 4000) == 1000
    assert overstated(target, refusal(0, 4096), BODY) == 4096


def test_pictures_and_this_nodes_own_engine_are_not_judged() -> None:
    body = b'{"messages":[{"content":[{"type":"image_url","image_url":{"url":"http://localhost/a"}}]}]}'
    assert overstated(with_context(32768), refusal(9000, 4096), body) is None
    own = msgspec.structs.replace(with_context(32768), local=True)
    assert overstated(own, refusal(9000, 4096), BODY) is None


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 200_000), st.integers(0, 10**6))
def test_a_context_is_only_ever_lowered(tokens: int, context: int, announced: int, size: int) -> None:
    found = overstated(with_context(announced), refusal(tokens, context), b"x" * size)
    assert found is None or 0 < found < announced


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "the request exceeds the available context size. try increasing the context size"),
        (500, "Context size has been exceeded."),
    ],
)
def test_refusals_without_numbers_are_known(status: int, message: str) -> None:
    body = json.dumps({"error": {"code": status, "message": message, "type": "server_error"}}).encode()
    assert isinstance(upstream_error(body, status, ()), ContextExceededError)


def refuses(tokens: int, context: int, status: int = 400) -> Script:
    async def script(call: Call) -> None:
        await call.respond(said_by_engine(tokens, context), status, kind=b"application/json")

    return script


async def asked_both(api: Api, *scripts: Script, contexts: Sequence[int]) -> tuple[int, int, int]:
    """The status of an answer, and how often each of two hosts was asked. The first one is the fastest."""
    async with fake_upstream(scripts[0]) as first, fake_upstream(scripts[1]) as second:
        api.mesh.nodes |= {THERE: first.address, ELSEWHERE: second.address}
        targets = (with_context(contexts[0], THERE, 900.0), with_context(contexts[1], ELSEWHERE, 9.0))
        api.routes.set(route("m", *targets))
        answer = await api.post(BODY)
        return answer.status_code, len(first.calls), len(second.calls)


async def fine(call: Call) -> None:
    await call.respond(b'{"choices":[]}', kind=b"application/json")


async def test_the_next_host_answers_where_the_first_refuses_what_it_announces_to_take() -> None:
    """The second one announces less than the first, which would not be asked where the first were right."""
    async with running_api() as api:
        assert await asked_both(api, refuses(9000, 4096), fine, contexts=(32768, 16384)) == (200, 1, 1)
        assert api.traffic.contexts == [(THERE, 4096)]


async def test_a_host_cannot_talk_a_prompt_out_of_the_others() -> None:
    async with running_api() as api:
        assert await asked_both(api, refuses(10**9, 4096), fine, contexts=(90000, 60000)) == (200, 1, 1)
        assert api.traffic.contexts == [(THERE, 4096)]


async def test_an_honest_refusal_leads_to_larger_contexts_only() -> None:
    async with running_api() as api:
        assert await asked_both(api, refuses(9000, 8192), fine, contexts=(8192, 8192)) == (400, 1, 0)
        assert api.traffic.contexts == []


async def test_where_all_refuse_the_client_hears_it() -> None:
    async with running_api() as api:
        lies = refuses(9000, 4096)
        assert await asked_both(api, lies, lies, contexts=(32768, 32768)) == (400, 1, 1)
        assert api.traffic.contexts == [(THERE, 4096), (ELSEWHERE, 4096)]


def ended(reason: str, prompt: int, generated: int) -> Script:
    timings = {"prompt_n": prompt, "predicted_n": generated, "predicted_ms": 1000.0, "prompt_ms": 10.0}

    async def script(call: Call) -> None:
        body = {"choices": [{"finish_reason": reason}], "timings": timings}
        await call.respond(msgspec.json.encode(body), kind=b"application/json")

    return script


async def contexts_seen(*scripts: Script, body: bytes = BODY) -> list[tuple[NodeId, int]]:
    async with running_api() as api, fake_upstream() as host:
        api.mesh.nodes[THERE] = host.address
        api.routes.set(route("m", with_context(32768)))
        for script in scripts:
            host.script = script
            assert (await api.post(body)).status_code == 200
        await api.traffic.all_ended(len(scripts))
        return api.traffic.contexts


async def test_answers_that_all_end_at_one_length_show_the_context() -> None:
    assert await contexts_seen(ended("length", 3000, 1096)) == []
    assert await contexts_seen(ended("length", 3000, 1096), ended("length", 2900, 1196)) == [(THERE, 4096)]


async def test_answers_that_were_to_end_there_show_nothing() -> None:
    # An engine may be told how many tokens an answer has.
    assert await contexts_seen(ended("length", 3000, 512), ended("length", 2900, 512)) == []
    assert await contexts_seen(ended("stop", 3000, 1096), ended("stop", 2900, 1196)) == []
    limited = BODY[:-1] + b',"max_tokens":1000}'
    assert await contexts_seen(ended("length", 3000, 1096), ended("length", 2900, 1196), body=limited) == []


async def test_a_prompt_longer_than_the_known_context_is_reported() -> None:
    async with running_api() as api, fake_upstream(ended("stop", 9000, 5)) as host:
        api.mesh.nodes[THERE] = host.address
        api.routes.set(route("m", with_context(4096)))
        assert (await api.post(BODY)).status_code == 200
        assert api.traffic.taken == [(THERE, 9000)]


async def test_streams_are_timed_by_what_came_and_not_by_what_is_said() -> None:
    async def script(call: Call) -> None:
        await call.begin_stream()
        for _ in range(40):
            await call.event(b'{"choices":[{"delta":{"content":"x"}}]}')
        timings = {"prompt_n": 8000, "prompt_ms": 1e-3, "predicted_n": 10**6, "predicted_ms": 1000.0}
        await call.event(msgspec.json.encode({"choices": [{"finish_reason": "stop"}], "timings": timings}))
        await call.event(b"[DONE]")
        await call.end_stream()

    async with running_api() as api, fake_upstream(script) as host:
        api.mesh.nodes[THERE] = host.address
        api.routes.set(route("m", with_context(32768)))
        assert (await api.post(BODY)).status_code == 200
        await api.traffic.until(lambda: len(api.traffic.times) == 2)
        speed, prompts = api.traffic.times
        assert (speed.kind, speed.node) == (Kind.SPEED, THERE)
        # The bytes of an answer bound what its host says that it generated.
        assert speed.tokens <= 42
        assert speed.said > 42
        assert (prompts.kind, prompts.tokens, prompts.said) == (Kind.PROMPTS, 8000, 8e9)
        assert 0.0 < prompts.seen < 8e9
