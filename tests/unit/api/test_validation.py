"""Validation: what a request may ask of an engine beside its prompt is limited, with errors in each dialect's shape."""

import json
from typing import Any

import pytest
from tests.support.api_harness import THERE, local, peer_streams, route, running_api
from tests.support.fake_upstream import fake_upstream
from tests.support.http import HttpClient

from mesh_llm.api import validation
from mesh_llm.api.request import Request, json_fields
from mesh_llm.api.validation import check_request
from mesh_llm.core.types.errors import MeshError

PARENTHESES = "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000
CIRCLE = {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}


async def nothing() -> bytes:
    return b""


def check(body: dict[str, Any] | bytes) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    check_request(data, json_fields(Request("POST", "/v1/chat/completions", "", (), nothing), data))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "hi"}], "stop": "x", "n": 1, "logprobs": True, "top_logprobs": 20},
        {"messages": [{"role": "user", "content": [IMAGE] * validation.MAX_MEDIA}]},
        {"prompt": list(range(100_000))},
        {"prompt": [1, 2, "three"], "n_probs": 10, "samplers": "kt", "repeat_last_n": 64},
        {"prompt": ["a"] * validation.MAX_PROMPTS, "stop": None},
        {"input": [{"role": "user", "content": "x"}] * (validation.MAX_PROMPTS + 1)},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}] * 200},
        {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "grammar": "", "logit_bias": {"5": -100}},
        {"tools": "nonsense", "response_format": 7, "stop": 5, "grammar": {"a": 1}, "messages": "x", "input": None},
        {"grammar_triggers": [{"type": 1, "value": "<tool>"}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_what_clients_send_passes(body: dict[str, Any]) -> None:
    check(body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("grammar", PARENTHESES),
        ("json_schema", CIRCLE),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": CIRCLE}}),
        ("response_format", {"type": "json_object", "schema": CIRCLE}),
        ("text", {"format": {"schema": CIRCLE}}),
        ("output_config", {"format": {"schema": CIRCLE}}),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": CIRCLE}}]),
        ("tools", [{"type": "function", "name": "f", "parameters": CIRCLE}]),
        ("tools", [{"name": "f", "input_schema": CIRCLE}]),
        ("tools", [{}] * (validation.MAX_TOOLS + 1)),
        ("functions", [{"parameters": CIRCLE}]),
        ("stop", ["x"] * (validation.MAX_STOPS + 1)),
        ("stop", "x" * 100_000),
        ("stop_sequences", ["x"] * (validation.MAX_STOPS + 1)),
        ("logit_bias", {str(i): 1 for i in range(validation.MAX_BIASES + 1)}),
        ("logit_bias", [[i, 1] for i in range(validation.MAX_BIASES + 1)]),
        ("samplers", ["top_k"] * 65),
        ("samplers", "k" * 65),
        ("lora", [{"id": 0, "scale": 1}] * 65),
        ("dry_sequence_breakers", ["x"] * 65),
        ("grammar_triggers", [{"type": 2, "value": "(a|a)*$"}]),
        ("grammar_triggers", [{"type": "pattern", "value": "(a|a)*$"}]),
        ("chat_template", "x" * 300_000),
        ("chat_template_kwargs", {"x": "y" * 70_000}),
        ("n", 129),
        ("n_cmpl", 129),
        ("best_of", 10**9),
        ("n_probs", 10**6),
        ("logprobs", 1e6),
        ("top_logprobs", 129),
        ("repeat_last_n", 2**31 - 1),
        ("dry_penalty_last_n", 2**31 - 1),
        ("messages", [{}] * (validation.MAX_MESSAGES + 1)),
        ("messages", [{"content": [IMAGE] * 40}, {"content": [IMAGE] * 40}]),
        ("messages", [{"content": [{"type": "tool_result", "content": [{"type": "image"}] * 65}]}]),
        ("input", ["x"] * (validation.MAX_PROMPTS + 1)),
        ("input", [{"content": [{"type": "input_image"}] * 65}]),
        ("prompt", ["x"] * (validation.MAX_PROMPTS + 1)),
        ("prompt", {"prompt_string": "x", "multimodal_data": ["AA"] * 65}),
        ("prompt", ["x", {"prompt_string": "x", "multimodal_data": ["AA"] * 65}]),
        ("documents", ["x"] * (validation.MAX_PROMPTS + 1)),
        ("unknown", json.loads("[" * 200 + "]" * 200)),
    ],
)
def test_what_costs_an_engine_too_much_is_refused(field: str, value: object) -> None:
    with pytest.raises(MeshError) as caught:
        check({"model": "tiny", field: value})
    error = caught.value
    assert (error.code, error.status) == ("request_too_complex", 400)
    assert error.param == (field if field != "unknown" else None)
    assert len(str(error)) < 400
    assert error.hint


def test_no_spelling_of_a_field_gets_past_validation() -> None:
    escaped = json.dumps({"content": [IMAGE] * 65}).replace("image", "im\\u0061ge")
    for body in (
        b'{"grammar": "", "gr\\u0061mmar": %b}' % json.dumps(PARENTHESES).encode(),
        b'{"messages": [%b]}' % escaped.encode(),
        b'{"json_schema": {"$r\\u0065f": "#/a", "a": {"$ref": "#/a"}}}',
        b'{"repeat_last_n": 2.1e9}',
    ):
        with pytest.raises(MeshError):
            check(body)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_a_grammar_that_ends_engines_is_400_in_the_dialects_shape_and_reaches_none(path: str) -> None:
    body = json.dumps({"model": "tiny", "grammar": PARENTHESES}).encode()
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post(body, path)
        told = answer.json()
        assert answer.status_code == 400
        assert "`grammar`" in told["error"]["message"]
        if path == "/v1/messages":
            assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
        else:
            assert (told["error"]["code"], told["error"]["param"]) == ("request_too_complex", "grammar")
        # A node that passes such a request on is refused as well.
        async with peer_streams(api.server, THERE) as address:
            client = HttpClient(int(address.rpartition(":")[2]))
            refused = await client.post(path, json.loads(body), headers={"x-mesh-llm-model": "tiny"})
            assert refused.status == 400
            assert refused.headers["x-mesh-llm-error"] == "request_too_complex"
        assert engine.calls == []


URL = "http://127.0.0.1:1/secret.png"
DATA = "data:image/png;base64,iVBORw0KGgo="
MP3 = "//uQxAAAAAAAAAAAAAAAAAAAAAAA"
"""The base64 of a sound: begins like the authority of a URL."""


def in_chat(part: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}]}


def image_of(place: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": place}}


def source_of(place: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": place}}


ELSEWHERE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", in_chat(image_of(URL))),
    ("/v1/chat/completions", in_chat(image_of("HTTPS://example.org/a"))),
    ("/v1/chat/completions", in_chat(image_of("  http:127.0.0.1"))),
    ("/v1/chat/completions", in_chat(image_of("httpx"))),
    ("/v1/chat/completions", in_chat(image_of("file:///etc/passwd"))),
    ("/v1/chat/completions", in_chat(image_of("gopher://127.0.0.1/"))),
    ("/v1/chat/completions", in_chat({"type": "image_url", "image_url": URL})),
    ("/v1/chat/completions", in_chat({"image_url": {"url": URL}})),
    ("/v1/chat/completions", in_chat({"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}})),
    ("/v1/chat/completions", in_chat({"type": "input_audio", "input_audio": {"url": URL}})),
    ("/v1/chat/completions", in_chat({"type": "audio_url", "audio_url": {"url": URL}})),
    ("/v1/chat/completions", in_chat({"type": "video_url", "video_url": {"url": URL}})),
    ("/v1/chat/completions", in_chat({"type": "input_video", "input_video": {"data": URL}})),
    ("/v1/chat/completions", in_chat({"type": "file", "file": {"file_data": URL}})),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "tool_call_id": "1", "content": [image_of(URL)]}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": image_of(URL)}]}),
    ("/v1/messages", in_chat(source_of(URL))),
    ("/v1/messages", in_chat({"type": "tool_result", "tool_use_id": "1", "content": [source_of(URL)]})),
    ("/v1/messages/count_tokens", in_chat(source_of(URL))),
    ("/apply-template", in_chat(image_of(URL))),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]}),
    ("/v1/responses", {"input": [{"type": "input_image", "image_url": URL}]}),
    ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "1",
                                  "output": [{"type": "input_image", "image_url": URL}]}]}),
    ("/v1/responses", {"input": [{"type": "computer_call_output", "call_id": "1",
                                  "output": {"type": "computer_screenshot", "image_url": URL}}]}),
    ("/v1/embeddings", {"input": {"content": [image_of(URL)]}}),
    ("/v1/embeddings", {"input": ["x", {"content": [image_of(URL)]}]}),
    ("/v1/embeddings", {"input": [1, {"content": [image_of(URL)]}]}),
    ("/v1/embeddings", {"input": [[{"content": [image_of(URL)]}]]}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), ELSEWHERE)
async def test_what_an_engine_would_have_to_fetch_is_400_in_the_dialects_shape(path: str, body: dict[str, Any]) -> None:
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post(json.dumps({"model": "tiny"} | body).encode(), path)
        told = answer.json()["error"]
        assert answer.status_code == 400
        assert "data: URL" in told["message"]
        field = next(iter(body))
        if path.startswith("/v1/messages"):
            assert (answer.json()["type"], told["type"]) == ("error", "invalid_request_error")
            assert f"`{field}`" in told["message"]
        else:
            assert (told["code"], told["param"]) == ("media_not_in_request", field)
        async with peer_streams(api.server, THERE) as address:
            client = HttpClient(int(address.rpartition(":")[2]))
            refused = await client.post(path, body, headers={"x-mesh-llm-model": "tiny"})
            assert (refused.status, refused.headers["x-mesh-llm-error"]) == (400, "media_not_in_request")
        assert engine.calls == []


@pytest.mark.parametrize(
    "body",
    [
        in_chat(image_of(DATA)),
        in_chat({"type": "image_url", "image_url": DATA}),
        in_chat(image_of("iVBORw0KGgo=")),
        in_chat({"type": "input_audio", "input_audio": {"data": MP3, "format": "mp3"}}),
        in_chat({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}),
        in_chat({"type": "text", "text": URL}),
        in_chat({"type": "tool_use", "id": "1", "name": "look", "input": {"type": "image", "url": URL}}),
        in_chat({"type": "search_result", "source": URL, "content": [{"type": "text", "text": URL}]}),
        {"messages": [{"role": "user", "content": URL}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": '{"image_url": "http://x"}'}}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": DATA}]}]},
        {"input": URL},
        {"input": [URL, URL]},
        {"prompt": {"prompt_string": URL, "multimodal_data": ["iVBORw0KGgo="]}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "properties": {"image_url": {"type": "string", "default": URL}}}}}]},
    ],
)  # fmt: skip
def test_what_is_in_the_request_itself_and_addresses_in_its_text_pass(body: dict[str, Any]) -> None:
    check(body)


def test_no_spelling_of_a_url_gets_past_validation() -> None:
    body = json.dumps(in_chat(image_of(URL)))
    for spelled in (
        body.replace("http:", "h\\u0074tp:"),
        body.replace("image_url", "image\\u005furl"),
        body.replace('"url": ', '"url": "data:,", "url": '),
        body.replace('"content": ', '"content": "x", "content": '),
    ):
        assert spelled != body
        with pytest.raises(MeshError) as caught:
            check(spelled.encode())
        assert caught.value.code == "media_not_in_request"


PICTURE = image_of(DATA)
WORD, NO_WORD = {"type": "text", "text": "x"}, {"type": "text", "text": " "}
MARKED = {"prompt_string": "x<__media_aOptoQwx__>", "multimodal_data": ["AA"]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": {"content": [PICTURE]}}),
        ("/v1/embeddings", {"input": {"role": "user", "content": [WORD, PICTURE]}}),
        ("/v1/embeddings", {"input": ["x", {"content": [PICTURE, NO_WORD]}]}),
        ("/v1/embeddings", {"content": [{"content": [PICTURE]}]}),
        ("/v1/embeddings", {"input": [WORD, MARKED]}),
        ("/v1/completions", {"prompt": [MARKED]}),
        ("/v1/chat/completions", {"messages": [{"content": [WORD, PICTURE]}], "add_generation_prompt": False}),
        ("/v1/chat/completions", {"messages": [{"content": [PICTURE]}], "continue_final_message": True}),
    ],
)
async def test_a_prompt_that_ends_with_a_picture_would_end_the_engine(path: str, body: dict[str, Any]) -> None:
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post(json.dumps({"model": "tiny"} | body).encode(), path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_complex")
        assert engine.calls == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": {"content": [PICTURE, WORD]}}),
        ("/v1/embeddings", {"input": [{"content": [WORD]}, {"content": "x"}, "x<__media_aOptoQwx__>"]}),
        ("/v1/embeddings", {"input": MARKED | {"prompt_string": "x<__media_aOptoQwx__> y"}}),
        ("/v1/chat/completions", in_chat(PICTURE)),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": DATA}]}]}),
        ("/v1/chat/completions", {"messages": [{"content": [PICTURE]}, {"content": "x"}], "add_generation_prompt": 0}),
    ],
)
async def test_a_picture_with_a_text_or_a_template_behind_it_passes(path: str, body: dict[str, Any]) -> None:
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        assert (await api.post(json.dumps({"model": "tiny"} | body).encode(), path)).status_code == 200
        assert len(engine.calls) == 1
