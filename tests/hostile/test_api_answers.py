"""Clients, and nodes that answer for others, that mean harm by what the API keeps, turns and counts."""

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.api_harness import local, route, running_api
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.auth import Auth
from mesh_llm.api.dialects.messages_over_chat import MessageEvents, message
from mesh_llm.api.dialects.ollama import replies
from mesh_llm.api.dialects.ollama.requests import ChatBody, chat_request, decode
from mesh_llm.api.dialects.stored_responses import StoredResponses, StoreLimits
from mesh_llm.api.request import Request
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.types import ApiConfig, Usage
from mesh_llm.core.types.errors import MeshError

RESPONSES = "/v1/responses"


class Engine:
    """Answers Responses with these fields, one answer after the other; the last one again and again."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self._left = list(answers)
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, call: Call) -> None:
        self.asked.append(json.loads(call.body))
        one = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        body = {"object": "response", "status": "completed", "output": [], "usage": {}} | one
        await call.respond(json.dumps(body).encode(), kind=b"application/json")


def said(text: str) -> list[dict[str, Any]]:
    return [{"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": text}]}]


async def ask(api: Any, **fields: object) -> Any:
    return await api.post(json.dumps({"model": "tiny", "input": "go on"} | fields).encode(), RESPONSES)


async def test_an_answer_cannot_take_the_id_of_an_earlier_one_and_make_a_circle(tmp_path: Path) -> None:
    """Each round of the circle was read again, up to a thousand times 16 MiB."""
    circle = Engine({"id": "resp_1", "output": said("first")}, {"id": "resp_1", "output": said("second")})
    async with (
        fake_upstream(circle) as one,
        running_api([route("tiny", local(one.address))], config=ApiConfig(port=0, store=tmp_path / "kept")) as api,
    ):
        assert (await ask(api)).status_code == 200
        assert (await ask(api, previous_response_id="resp_1")).status_code == 200
        assert (await ask(api, previous_response_id="resp_1")).status_code == 200
        kept = (await api.get(f"{RESPONSES}/resp_1")).json()
        assert kept["output"][0]["content"][0]["text"] == "first"
        assert kept["previous_response_id"] is None
        assert len(circle.asked[-1]["input"]) == 3


async def test_a_stored_answer_of_another_node_is_checked_before_an_engine_gets_it(tmp_path: Path) -> None:
    """An engine would fetch the address from its host's network."""
    picture = {"role": "user", "type": "message", "id": "msg_2",
               "content": [{"type": "input_image", "image_url": "http://192.168.0.1/admin"}]}  # fmt: skip
    lying = Engine({"id": "resp_1", "output": [picture]})
    async with (
        fake_upstream(lying) as one,
        running_api([route("tiny", local(one.address))], config=ApiConfig(port=0, store=tmp_path / "kept")) as api,
    ):
        assert (await ask(api)).status_code == 200
        refused = await ask(api, previous_response_id="resp_1")
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "media_not_in_request"
        assert len(lying.asked) == 1


async def test_a_small_request_that_continues_a_large_conversation_counts_with_all_of_it(tmp_path: Path) -> None:
    config = ApiConfig(port=0, store=tmp_path / "kept", body_bytes=300_000, buffered_bytes=400_000)
    talking = Engine(*({"id": f"resp_{number}", "output": said("x" * 150_000)} for number in (1, 2, 3)))
    async with (
        fake_upstream(talking) as one,
        running_api([route("tiny", local(one.address))], config=config) as api,
    ):
        assert (await ask(api)).status_code == 200
        assert (await ask(api, previous_response_id="resp_1")).status_code == 200
        refused = await ask(api, previous_response_id="resp_2")
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        # What was refused is not counted for ever.
        for _ in range(5):
            assert (await ask(api, previous_response_id="resp_1")).status_code == 200


async def test_a_conversation_beyond_the_limit_is_not_put_together(tmp_path: Path) -> None:
    store = StoredResponses(tmp_path, StoreLimits(conversation_bytes=3000))
    fields = {"input": msgspec.Raw(b'"a"')}
    for number in range(4):
        known = await store.context("a" * 64, fields, "tiny", 0)
        assert known.keep is not None
        known.keep({"id": f"resp_{number}", "output": said("x" * 800)}, [])
        fields = {"input": msgspec.Raw(b'"a"'), "previous_response_id": msgspec.Raw(b'"resp_%d"' % number)}
        await store.write()
        if number == 3:
            with pytest.raises(MeshError, match="conversation has more than") as refused:
                await store.context("a" * 64, fields, "tiny", 0)
            assert refused.value.status == 413
    await store.close()


async def test_one_key_cannot_push_out_what_the_others_have_stored(tmp_path: Path) -> None:
    store = StoredResponses(tmp_path, StoreLimits(count=10))
    victim, greedy = "a" * 64, "b" * 64

    async def keep(owner: str, number: int) -> None:
        known = await store.context(owner, {}, "tiny", 0)
        assert known.keep is not None
        known.keep({"id": f"resp_{number}", "output": said("x")}, [])
        await store.write()

    for number in range(3):
        await keep(victim, number)
    for number in range(100, 150):
        await keep(greedy, number)
    folders = Counter(path.parent.name for path in await asyncio.to_thread(lambda: list(tmp_path.glob("*/*"))))
    assert folders == {victim[:32]: 3, greedy[:32]: 7}
    await store.close()


async def test_too_many_fields_in_a_query_are_refused(tmp_path: Path) -> None:
    talking = Engine({"id": "resp_1", "output": said("x")})
    query = "&".join(f"a{number}=1" for number in range(40))
    async with (
        fake_upstream(talking) as one,
        running_api([route("tiny", local(one.address))], config=ApiConfig(port=0, store=tmp_path / "kept")) as api,
    ):
        assert (await ask(api)).status_code == 200
        for path in (f"{RESPONSES}/resp_1", f"{RESPONSES}/resp_1/input_items", "/v1/models"):
            refused = await api.get(f"{path}?{query}", anthropic_version="2023-06-01")
            assert (refused.status_code, "too many fields" in refused.text) == (400, True)


async def test_a_client_is_one_owner_whatever_it_shows_beside_its_key() -> None:
    """Else it would have the turns, the places and the stored answers of as many clients as it likes."""
    auth = Auth(ApiConfig(keys=("laptop:long-secret", "another-secret")))

    async def nothing() -> bytes:
        return b""

    def owner(*headers: tuple[bytes, bytes]) -> str:
        request = Request("GET", "/v1/models", "", ((b"host", b"localhost"), *headers), nothing, address="127.0.0.1")
        auth.check(request)
        return auth.owner(request)

    shown = (b"authorization", b"Bearer long-secret")
    plain = owner(shown)
    assert owner((b"x-api-key", b"junk-1"), shown) == owner((b"x-api-key", b"junk-2"), shown) == plain
    assert owner((b"x-api-key", b"laptop:long-secret")) == plain
    assert owner((b"x-api-key", b"another-secret")) not in {plain, "127.0.0.1"}


@pytest.mark.parametrize("result", [{"tool_call_id": "none"}, {"tool_name": "none"}, {}], ids=str)
def test_a_conversation_of_many_calls_and_results_holds_up_nobody(result: dict[str, str]) -> None:
    """One request of 2 MB kept the whole node busy for minutes."""
    count = 50_000
    messages = [{"role": "assistant", "tool_calls": [{"function": {}}] * count}]
    messages += [{"role": "tool"} | result] * count
    body = json.dumps({"model": "tiny", "messages": messages}).encode()
    began = time.process_time()
    translated = chat_request(msgspec.json.decode(body, type=ChatBody)).body["messages"]
    assert time.process_time() - began < 10
    assert len(translated) == count + 1
    with pytest.raises(MeshError, match="more than 65536 keys"):
        decode(body, ChatBody)


async def test_an_endless_answer_is_not_summed_up_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_WHOLE", 10_000)
    piece = b'{"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}' % (b"x" * 500)

    async def endless(call: Call) -> None:
        await call.begin_stream()
        for _ in range(100):
            await call.event(piece)
        await call.event(b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}')
        await call.event(b"[DONE]")
        await call.end_stream()

    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    async with fake_upstream(endless) as one, running_api([route("tiny", local(one.address))]) as api:
        answer = await api.post(json.dumps(body).encode(), "/api/chat")
        assert (answer.status_code, answer.json()["error"]) == (413, "The answer is too large. Stream it.")


def test_another_nodes_word_on_its_tokens_is_bounded() -> None:
    """A false number would use up the tokens of a key's day, or end what saves the counts."""
    transcript = Transcript()
    transcript.add(b'{"timings":{"prompt_n":%b,"predicted_n":%b}}' % (b"9" * 400, b"9" * 30))
    usage = transcript.usage()
    assert usage == Usage(prompt=1 << 26, generated=16 * transcript.size)


def test_arguments_that_nest_without_end_are_no_fault_of_the_node() -> None:
    deep = "[" * 100_000
    call = {"id": "c", "function": {"name": "f", "arguments": deep}}
    answered = message({"id": "chatcmpl-1", "choices": [{"message": {"tool_calls": [call]}}]})
    assert answered["content"][0]["input"] == {}
    assert MessageEvents().correct(b"data: " + deep.encode() + b"\n\n") == b""


@pytest.mark.parametrize(
    ("path", "fields", "answer", "tokens"),
    [
        ("/v1/chat/completions", {"messages": [], "n": 4}, {"usage": {"prompt_tokens": 2, "completion_tokens": 5}}, 20),
        ("/completion", {"prompt": "a", "response_fields": ["content"]}, {}, 5),
        ("/infill", {"input_prefix": "a", "response_fields": ["content"]}, {}, 5),
    ],
    ids=["several choices", "chosen fields", "chosen fields to fill in"],
)
async def test_a_client_cannot_choose_what_its_key_is_counted_for(
    path: str, fields: dict[str, Any], answer: dict[str, Any], tokens: int
) -> None:
    """llama.cpp counts the first choice only, and its own completions give the fields that a client asks for."""

    async def engine(call: Call) -> None:
        asked = json.loads(call.body)
        counted = {"timings": {"predicted_n": 5}} if "timings" in asked.get("response_fields", ()) else {}
        await call.respond(json.dumps({"content": "x"} | answer | counted).encode(), kind=b"application/json")

    config = ApiConfig(port=0, keys=("laptop:long-secret",))
    async with fake_upstream(engine) as one, running_api([route("tiny", local(one.address))], config=config) as api:
        body = json.dumps({"model": "tiny"} | fields).encode()
        assert (await api.post(body, path, authorization="Bearer long-secret")).status_code == 200
        [usage] = api.server.summary().keys
        assert usage.tokens == tokens
