"""An engine's answers, as Ollama's clients get them."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.api.dialects.ollama.answers import AnswerTranslator, Sum, embeddings, encode_lines
from mesh_llm.api.dialects.ollama.requests import Message, decode_context
from mesh_llm.core.types.errors import MeshError
from mesh_llm.wire.http.sse import SseEvent

TIMINGS = {"prompt_ms": 2.0, "predicted_ms": 3.5}
USAGE = {"prompt_tokens": 9, "completion_tokens": 4}


def translator(*, chat: bool = True, said: Sequence[Message] = ()) -> AnswerTranslator:
    clock = iter([10.0, 10.5, 11.0])
    return AnswerTranslator("m:latest", chat=chat, now=lambda: "T", clock=lambda: next(clock), said=said)


def delta(finish: str | None = None, **fields: Any) -> SseEvent:
    return SseEvent(json.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}))


def call(index: int, **function: Any) -> dict[str, Any]:
    return {"index": index, "function": function} | ({"id": f"id{index}"} if "name" in function else {})


LAST = SseEvent(json.dumps({"choices": [], "usage": USAGE, "timings": TIMINGS}))
DONE = SseEvent("[DONE]")
HEAD = {"model": "m:latest", "created_at": "T"}


def test_each_piece_is_a_chunk_and_the_last_has_the_numbers():
    answer = translator()
    assert answer.translate(delta(role="assistant", content=None)) == []
    assert answer.translate(delta(reasoning_content="hm")) == [
        HEAD | {"message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False}
    ]
    [piece] = answer.translate(delta(content="Hi"))
    assert piece["message"] == {"role": "assistant", "content": "Hi"}
    assert answer.translate(delta("length")) == []
    assert answer.translate(LAST) == []
    assert answer.translate(DONE) == [
        {
            **HEAD,
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "length",
            "total_duration": 500_000_000,
            "load_duration": 494_500_000,
            "prompt_eval_count": 9,
            "prompt_eval_duration": 2_000_000,
            "eval_count": 4,
            "eval_duration": 3_500_000,
        }
    ]
    assert answer.end() == []


def test_calls_come_whole_with_arguments_as_objects():
    answer = translator()
    assert answer.translate(delta(tool_calls=[call(0, name="f", arguments="")])) == []
    assert answer.translate(delta(tool_calls=[call(0, arguments='{"a": {"b"')])) == []
    assert answer.translate(delta(tool_calls=[call(0, arguments=": 1}}")])) == []
    [first] = answer.translate(delta(tool_calls=[call(1, name="g", arguments="")]))
    assert first["message"]["tool_calls"] == [
        {"id": "id0", "function": {"index": 0, "name": "f", "arguments": {"a": {"b": 1}}}}
    ]
    answer.translate(delta("tool_calls"))
    second, last = answer.translate(DONE)
    assert second["message"]["tool_calls"][0]["function"] == {"index": 1, "name": "g", "arguments": {}}
    assert (last["done"], last["done_reason"]) == (True, "stop")


def test_a_call_that_was_cut_off_is_left_out():
    answer = translator()
    answer.translate(delta(tool_calls=[call(0, name="f", arguments='{"a": ')]))
    answer.translate(delta("length"))
    [last] = answer.translate(DONE)
    assert "tool_calls" not in last["message"]


def test_a_prompt_gets_the_conversation_back():
    answer = translator(chat=False, said=[Message("user", "hello")])
    answer.translate(delta(reasoning_content="hm"))
    answer.translate(delta(content="Hi"))
    [piece] = answer.translate(delta("stop", content=" there"))
    assert (piece["response"], piece["done"]) == (" there", False)
    [last] = answer.translate(DONE)
    assert decode_context(last["context"]) == [Message("user", "hello"), Message("assistant", "Hi there")]


def test_llama_cpps_own_form():
    answer = translator(chat=False)
    [piece] = answer.translate(SseEvent('{"content": "x", "stop": false}'))
    assert piece["response"] == "x"
    fields = {"content": "", "stop": True, "stop_type": "limit", "tokens_evaluated": 5, "tokens_predicted": 1}
    [last] = answer.translate(SseEvent(json.dumps(fields | {"timings": TIMINGS})))
    assert (last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == ("length", 5, 1)
    assert "context" not in last


def test_an_error_ends_the_answer():
    answer = translator()
    answer.translate(delta(content="Hi"))
    [line] = answer.translate(SseEvent('{"error": {"message": "Lost.", "code": 503}}'))
    assert line == {"error": "Lost."}
    assert answer.error is not None
    assert answer.error.status == 503
    assert answer.translate(delta(content="more")) == answer.end() == []


def test_an_answer_that_is_not_complete_has_no_last_chunk():
    answer = translator()
    answer.translate(delta(content="Hi"))
    assert answer.end() == []
    assert not answer.over


def test_probabilities():
    token = {"id": 3, "token": "Hi", "bytes": [72, 105], "logprob": -0.5}
    event = {"choices": [{"delta": {"content": "Hi"}, "logprobs": {"content": [token | {"top_logprobs": [token]}]}}]}
    [piece] = translator().translate(SseEvent(json.dumps(event)))
    shown = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
    assert piece["logprobs"] == [shown | {"top_logprobs": [shown]}]


@pytest.mark.parametrize("chat", [True, False])
def test_without_a_stream_everything_is_summed_up(chat: bool):
    answer, total = translator(chat=chat), Sum()
    events = [delta(reasoning_content="h"), delta(reasoning_content="m"), delta(content="H"), delta(content="i"),
              delta(tool_calls=[call(0, name="f", arguments='{"a":1}')]), delta("tool_calls"), LAST, DONE]  # fmt: skip
    for event in events:
        assert total.answer is None
        for chunk in answer.translate(event):
            total.add(chunk)
    assert total.answer is not None
    part = total.answer["message"] if chat else total.answer
    assert (part["content" if chat else "response"], part["thinking"]) == ("Hi", "hm")
    assert part["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert (total.answer["done"], total.answer["eval_count"]) == (True, 4)


def test_lines():
    assert encode_lines([{"a": "é\n"}, {"b": 1}]) == '{"a":"é\\n"}\n{"b":1}\n'.encode()


def test_vectors_come_in_order_and_shortened_ones_have_the_length_1():
    body = json.dumps(
        {
            "data": [{"index": 1, "embedding": [0, 1, 0]}, {"index": 0, "embedding": [3, 4, 9]}],
            "usage": {"prompt_tokens": 5},
        }
    ).encode()
    assert embeddings(body, 0) == ([[3, 4, 9], [0, 1, 0]], 5)
    assert embeddings(body, 2)[0] == [[0.6, 0.8], [0, 1]]
    with pytest.raises(MeshError):
        embeddings(b'{"data": 3}', 0)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "delta", "content", "tool_calls", "function", "arguments", "name", "index", "error",
                         "usage", "timings", "prompt_ms", "stop", "logprobs", "top_logprobs", "finish_reason", "text"]),
        inner, max_size=5),
    max_leaves=15,
)  # fmt: skip


@given(st.lists(nested, max_size=6), st.booleans())
def test_any_events_become_lines_of_json(values: list[Any], chat: bool):
    answer = AnswerTranslator("m", chat=chat, now=lambda: "T", clock=lambda: 1.0)
    total = Sum()
    for value in values:
        chunks = answer.translate(SseEvent(json.dumps(value)))
        for line in encode_lines(chunks).splitlines():
            assert isinstance(json.loads(line), dict)
        for chunk in chunks:
            total.add(chunk)
    answer.end()
