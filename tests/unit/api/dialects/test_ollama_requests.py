"""Ollama's requests, as an engine gets them."""

import base64
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.api.dialects.ollama.requests import (
    ChatBody,
    EmbedBody,
    GenerateBody,
    Message,
    chat_request,
    decode,
    decode_context,
    embed_request,
    encode_context,
    generate_request,
    keep_alive_seconds,
)
from mesh_llm.core.types.errors import MeshError

ASK = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    body = decode(json.dumps({"model": "m", "messages": ASK} | fields).encode(), ChatBody)
    asked = chat_request(body)
    assert asked.path == "/v1/chat/completions"
    return asked.body


def generate(**fields: Any) -> tuple[str, dict[str, Any], list[Message]]:
    asked, said = generate_request(
        decode(json.dumps({"model": "m", "prompt": "hello"} | fields).encode(), GenerateBody)
    )
    return asked.path, asked.body, said


def test_a_chat_is_asked_for_as_a_stream():
    assert chat() == {"model": "m", "messages": ASK, "stream": True, "stream_options": {"include_usage": True}}


def test_options_get_the_engines_names():
    same = {"temperature": 0.5, "top_k": 3, "top_p": 0.2, "min_p": 0.1, "repeat_penalty": 1.2, "repeat_last_n": 5}
    other = {"seed": 7.0, "num_predict": 9, "num_keep": 2, "stop": ["x", ""]}
    asked = chat(options={**same, **other, "num_ctx": 4096, "no_such": {}, "tfs_z": None})
    added = {name: asked[name] for name in asked.keys() - chat().keys()}
    assert added == same | {"seed": 7, "max_tokens": 9, "n_keep": 2, "stop": ["x"]}


@pytest.mark.parametrize("unlimited", [-1, -2])
def test_an_answer_without_a_limit_has_none(unlimited: int):
    assert "max_tokens" not in chat(options={"num_predict": unlimited})


@pytest.mark.parametrize(
    "options", [{"seed": "1"}, {"top_k": True}, {"temperature": "hot"}, {"stop": [1]}, {"stop": 3}, {"seed": 1e300}]
)
def test_an_option_of_a_wrong_type_is_named(options: dict[str, Any]):
    with pytest.raises(MeshError, match=f'option "{next(iter(options))}" must be') as refused:
        chat(options=options)
    assert refused.value.status == 400


def test_formats():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat(format="json")["response_format"] == {"type": "json_object"}
    assert chat(format=schema)["response_format"]["json_schema"]["schema"] == schema
    assert "response_format" not in chat(format="")
    assert "response_format" not in chat(format=None)
    assert generate(raw=True, format=schema)[1]["json_schema"] == schema
    for wrong in ("xml", 3, ["json"]):
        with pytest.raises(MeshError, match="invalid format"):
            chat(format=wrong)


def test_thinking():
    assert "chat_template_kwargs" not in chat()
    assert chat(think=False)["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat(think="max")["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "high"}
    with pytest.raises(MeshError, match="invalid think value"):
        chat(think="deeply")


def test_calls_and_their_results_are_joined_by_ids():
    def call(name: str, **arguments: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": arguments}}

    messages = [
        {"role": "User", "content": "go"},
        {"role": "assistant", "thinking": "hm", "tool_calls": [call("a", x=1), call("b"), call("a", x=2)]},
        {"role": "tool", "tool_name": "b", "content": "of b"},
        {"role": "tool", "tool_name": "a", "content": "of the first a"},
        {"role": "tool", "content": "of the second a"},
        {"role": "tool", "tool_call_id": "elsewhere", "content": "of no call"},
    ]
    asked = chat(messages=messages)["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant", "tool", "tool", "tool", "tool"]
    assert asked[1]["reasoning_content"] == "hm"
    calls = [
        (one["id"], one["type"], one["function"]["name"], one["function"]["arguments"])
        for one in asked[1]["tool_calls"]
    ]
    of_a = ("function", "a")
    assert calls == [
        ("call_0", *of_a, '{"x":1}'),
        ("call_1", "function", "b", "{}"),
        ("call_2", *of_a, '{"x":2}'),
    ]
    answered = [(message["tool_call_id"], message.get("name")) for message in asked[2:]]
    assert answered == [("call_1", "b"), ("call_0", "a"), ("call_2", "a"), ("elsewhere", None)]


def test_tools_are_passed_on():
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": ["string", "null"]}}}}
    assert chat(tools=[{"function": function, "items": None}])["tools"] == [{"type": "function", "function": function}]
    with pytest.raises(MeshError, match="function"):
        chat(tools=[{"type": "function"}])


@pytest.mark.parametrize(
    ("start", "kind", "name"),
    [
        (b"\x89PNG\r\n\x1a\n", "image_url", "data:image/png;"),
        (b"\xff\xd8\xff\xe0", "image_url", "data:image/jpeg;"),
        (b"RIFF\0\0\0\0WEBP", "image_url", "data:image/webp;"),
        (b"RIFF\0\0\0\0WAVE", "input_audio", "wav"),
        (b"ID3\4", "input_audio", "mp3"),
    ],
)
def test_pictures_and_sounds_become_parts(start: bytes, kind: str, name: str):
    data = base64.b64encode(start + b"rest").decode()
    for sent in (data, f"data:any/thing;base64,{data}"):
        first, text = chat(messages=[{"role": "user", "content": "what?", "images": [sent]}])["messages"][0]["content"]
        assert text == {"type": "text", "text": "what?"}
        assert first["type"] == kind
        held = first[kind]
        assert (
            held == {"data": data, "format": name} if kind == "input_audio" else held["url"] == f"{name}base64,{data}"
        )


@pytest.mark.parametrize("image", ["http://127.0.0.1/a.png", "file:///etc/passwd", "not base64!", "data:image/png,xx"])
def test_a_picture_is_no_url(image: str):
    with pytest.raises(MeshError, match="illegal base64"):
        chat(messages=[{"role": "user", "images": [image]}])


def test_prompts():
    path, body, said = generate(system="be brief", images=None)
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "be brief"}, *ASK]
    assert [message.role for message in said] == ["system", "user"]

    path, body, said = generate(raw=True, options={"num_predict": 3}, logprobs=True)
    assert (path, body["prompt"], body["max_tokens"], body["logprobs"], said) == ("/v1/completions", "hello", 3, 1, [])

    path, body, said = generate(suffix="end", options={"num_predict": 3})
    assert (path, body["input_prefix"], body["input_suffix"], body["n_predict"]) == ("/infill", "hello", "end", 3)
    assert "max_tokens" not in body
    assert not said


@pytest.mark.parametrize("fields", [{"system": "x"}, {"template": "x"}, {"context": [1]}, {"images": ["aGk="]}])
def test_a_raw_prompt_takes_nothing_beside_it(fields: dict[str, Any]):
    with pytest.raises(MeshError, match=r"raw|Raw"):
        generate(raw=True, **fields)


def test_a_template_in_a_request_is_refused():
    with pytest.raises(MeshError, match="template"):
        generate(template="{{ .Prompt }}")


def test_a_context_continues_the_conversation():
    context = encode_context([Message("system", "old"), Message("user", "hi"), Message("assistant", "héllo")])
    _, body, said = generate(context=context, system="new")
    assert [message["content"] for message in body["messages"]] == ["new", "hi", "héllo", "hello"]
    assert len(said) == 4


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=60)), min_size=1, max_size=6)
)
def test_a_context_is_read_as_it_was_written(conversation: list[tuple[str, str]]):
    messages = [Message(role, content) for role, content in conversation]
    numbers = encode_context(messages)
    assert all(0 <= number < 2**31 for number in numbers)
    assert decode_context(numbers) == messages


@given(st.lists(st.integers(-(2**70), 2**70), max_size=40), st.booleans())
def test_other_numbers_are_no_context(numbers: list[int], marked: bool):
    known = encode_context([Message("user", "hi")])
    with pytest.raises(MeshError, match="not made by this API"):
        decode_context([known[0], *numbers] if marked else numbers)


def test_a_context_that_unpacks_to_too_much_is_refused():
    bomb = encode_context([Message("user", "a" * (5 * 1024 * 1024))])
    assert len(bomb) < 10_000
    with pytest.raises(MeshError, match="not made by this API"):
        decode_context(bomb)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), (0, 0.0), ("0", 0.0), ("0s", 0.0), (-1, math.inf), ("-1m", math.inf), (300, 300.0), ("5m", 300.0),
     ("1h30m", 5400.0), ("1.5s", 1.5), ("250ms", 0.25), ("30", 30.0)],
)  # fmt: skip
def test_spans_of_keep_alive(given: float | str | None, seconds: float | None):
    assert keep_alive_seconds(given) == seconds


@pytest.mark.parametrize("given", ["soon", "", "5 minutes", "5x", "nan"])
def test_what_is_no_span_is_refused(given: str):
    with pytest.raises(MeshError, match=r"invalid duration|not a number"):
        keep_alive_seconds(given)


def test_vectors():
    asked = embed_request(EmbedBody(model="m"), ["a", "b"])
    assert (asked.path, asked.body["input"]) == ("/v1/embeddings", ["a", "b"])


@pytest.mark.parametrize("body", [b"", b"  ", b"xx", b"[]", b'{"messages": 3}', b"\xff", b'{"messages":' + b"[" * 5000])
def test_a_body_that_is_not_understood_is_a_400(body: bytes):
    with pytest.raises(MeshError) as refused:
        decode(body, ChatBody)
    assert refused.value.status == 400


KEYS = ["role", "content", "images", "tool_calls", "function", "name", "arguments", "x"]
FIELDS = ["messages", "options", "tools", "format", "think", "keep_alive", "images", "context", "prompt"]
plain = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False)
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(nested, st.sampled_from(FIELDS))
def test_any_json_is_translated_or_refused(value: Any, field: str):
    body = json.dumps({"model": "m", field: value}).encode()
    for translate in (
        lambda: chat_request(decode(body, ChatBody)),
        lambda: generate_request(decode(body, GenerateBody)),
    ):
        status = 400
        try:
            translate()
        except MeshError as error:
            status = error.status
        assert status == 400
