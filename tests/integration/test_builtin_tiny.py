"""The built-in model in real llama.cpp: it answers in coherent English, and its draft guesses well."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.train_tiny.chat import SPECIAL_TOKENS, prompt
from tools.train_tiny.corpus import Conversation, documents, questions
from tools.train_tiny.engine import Body, Engine, running
from tools.train_tiny.measure import acceptance, request
from tools.train_tiny.tokenizer import Tokenizer

import mesh_llm.models

_MODELS = Path(mesh_llm.models.__file__).parent / "builtin"
TINY = _MODELS / "tiny.gguf"
DRAFT = _MODELS / "tiny-draft.gguf"

_WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Engine]:
    with running(TINY) as engine:
        yield engine


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.rstrip(".").split(", ")]


def test_the_files_are_small() -> None:
    assert TINY.stat().st_size + DRAFT.stat().st_size < 9_000_000
    assert DRAFT.stat().st_size < TINY.stat().st_size / 3


@pytest.mark.parametrize("greeting", ["Hello", "Hi!", "hello there"])
def test_it_greets(tiny: Engine, greeting: str) -> None:
    assert "I am tiny" in tiny.chat(greeting)


@pytest.mark.parametrize("question", ["What are you?", "Who are you?", "what is your name"])
def test_it_says_what_it_is(tiny: Engine, question: str) -> None:
    assert tiny.chat(question).startswith("I am tiny, the small language model that is built into mesh-llm.")


@pytest.mark.parametrize("question", ["What is mesh-llm?", "what does mesh-llm do", "Explain mesh-llm."])
def test_it_says_what_mesh_llm_is(tiny: Engine, question: str) -> None:
    assert tiny.chat(question).startswith("mesh-llm is a program that pools machines")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Count from 1 to 20.", range(1, 21)),
        ("count to 5", range(1, 6)),
        ("Count from 1 to 100.", range(1, 101)),
        ("Count from 37 to 52.", range(37, 53)),
        ("Count down from 10.", range(10, 0, -1)),
    ],
)
def test_it_counts(tiny: Engine, question: str, expected: range) -> None:
    assert _numbers(tiny.chat(question)) == list(expected)


def test_it_answers_in_a_conversation_and_under_a_system_prompt(tiny: Engine) -> None:
    talk = ("My name is Anna.", "Hello, Anna! I am tiny. It is nice to meet you.", "What is my name?")
    assert tiny.chat(*talk) == "Your name is Anna."
    assert "I am tiny" in tiny.chat("Hello!", system="You are a helpful assistant.")


def test_long_answers_are_long_and_come_to_an_end(tiny: Engine) -> None:
    for question in ("Count from 1 to 100.", "Tell me a long story."):
        body: Body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 1500}
        answer = tiny.post("/v1/chat/completions", body)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] >= 200


def test_the_same_question_gets_the_same_answer(tiny: Engine) -> None:
    assert len({tiny.chat("Tell me a story about a fox.") for _ in range(3)}) == 1


def test_a_stream_is_the_whole_answer_in_pieces(tiny: Engine) -> None:
    body: Body = {"messages": [{"role": "user", "content": "Count from 1 to 20."}], "temperature": 0, "max_tokens": 200}
    events = tiny.stream("/v1/chat/completions", body)
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
    assert sum(bool(piece) for piece in pieces) > 20
    assert _numbers("".join(pieces)) == list(range(1, 21))


@pytest.mark.parametrize(
    ("beginning", "continuation"),
    [
        ("1, 2, 3, 4,", " 5, 6, 7, 8"),
        ("Monday, Tuesday, Wednesday,", " Thursday, Friday"),
        ("Once upon a time", " there was a little"),
    ],
)
def test_plain_completion_goes_on(tiny: Engine, beginning: str, continuation: str) -> None:
    answer = tiny.post("/v1/completions", {"prompt": beginning, "temperature": 0, "max_tokens": 24})
    assert answer["choices"][0]["text"].startswith(continuation)


def test_an_answer_that_is_begun_is_continued(tiny: Engine) -> None:
    whole = tiny.chat("Count from 1 to 20.")
    body: Body = {
        "messages": [
            {"role": "user", "content": "Count from 1 to 20."},
            {"role": "assistant", "content": "1, 2, 3, 4, 5, 6, 7,"},
        ],
        "temperature": 0,
        "max_tokens": 200,
    }
    answer = tiny.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert answer == whole


def test_json_schema(tiny: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    body: Body = {
        "messages": [{"role": "user", "content": "Give me a JSON object with name and age."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        "temperature": 0,
        "max_tokens": 100,
    }
    choice = tiny.post("/v1/chat/completions", body)["choices"][0]
    value = json.loads(choice["message"]["content"])
    assert set(value) == {"name", "age"}
    assert isinstance(value["name"], str)
    assert isinstance(value["age"], int)
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_tool_call(tiny: Engine, choice: str) -> None:
    body: Body = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [_WEATHER_TOOL],
        "tool_choice": choice,
        "temperature": 0,
        "max_tokens": 100,
    }
    answer = tiny.post("/v1/chat/completions", body)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_a_tools_result_is_told(tiny: Engine) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    body: Body = {
        "messages": [
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ],
        "tools": [_WEATHER_TOOL],
        "temperature": 0,
        "max_tokens": 60,
    }
    assert "sunny" in tiny.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]


def test_a_long_prompt_leaves_it_coherent(tiny: Engine) -> None:
    asked = [tuple(message.text for message in talk.messages) for talk in _long_talks()]
    for talk in asked:
        answer = tiny.chat(*talk, "What is mesh-llm?")
        assert answer.startswith("mesh-llm is a program that pools machines")


def _long_talks() -> Iterator[Conversation]:
    """Two conversations of about two thousand tokens, without a system prompt."""
    long = (talk for talk in documents(11, long=True) if isinstance(talk, Conversation))
    plain = (talk for talk in long if talk.messages[0].role == "user")
    return itertools.islice((talk for talk in plain if 7000 < sum(len(turn.text) for turn in talk.messages) < 9000), 2)


def test_the_engine_reads_text_as_training_did(tiny: Engine) -> None:
    tokenizer = _tokenizer(tiny)
    odd = ["it's  we'll   x\n\n y\t z 42", "x\r\n\r\ny", "   ", "_1_2", " \u00a0a \u3000b"]
    foreign = ["²½ Ⅷ éàü", "你好 ñ", "😀 👍🏽 e\u0301"]
    drawn = [prompt(talk) for talk in itertools.islice(questions(7), 60)]
    for text in [*odd, *foreign, *drawn]:
        body: Body = {"content": text, "parse_special": True}
        assert tiny.post("/tokenize", body)["tokens"] == tokenizer.encode(text)


def _tokenizer(engine: Engine) -> Tokenizer:
    """Our own tokenizer, with the merges that the engine's vocabulary shows."""
    import gguf

    fields = gguf.GGUFReader(TINY).fields
    texts: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    ids = {text: number for number, text in enumerate(texts)}
    # Bytes come first, in the order of their values; the engine agrees on the first of them.
    assert engine.post("/detokenize", {"tokens": [0x41]})["content"] == "A"
    byte_texts = Tokenizer((), SPECIAL_TOKENS).token_texts()[:256]
    assert texts[:256] == byte_texts
    pairs = [(ids[left], ids[right]) for left, right in (merge.split(" ") for merge in merges)]
    return Tokenizer(pairs, SPECIAL_TOKENS)


def test_the_template_says_what_training_said(tiny: Engine) -> None:
    for talk in itertools.islice(questions(8), 80):
        body = request(talk)
        assert tiny.post("/apply-template", body)["prompt"] == prompt(talk)


def test_the_draft_is_right_more_often_than_not() -> None:
    with running(TINY, DRAFT) as engine:
        found, _ = acceptance(engine, 100)
    assert found.drafted > 500
    assert found.rate > 0.5
