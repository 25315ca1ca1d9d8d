"""The generated corpus: the same for the same seed, well-formed, and true where truth can be worked out."""

from __future__ import annotations

import itertools
import json
import re
from random import Random

import pytest
from tools.train_tiny.corpus import Conversation, PlainText, counting, documents, echo, knowledge, questions, structured
from tools.train_tiny.corpus.facts import about, about_at_length
from tools.train_tiny.corpus.topics import TOPICS


def _many(count: int = 400) -> list[Conversation | PlainText]:
    return list(itertools.islice(documents(3), count))


def test_the_same_seed_gives_the_same_text() -> None:
    assert _many() == _many()
    assert _many() != list(itertools.islice(documents(4), 400))


def test_conversations_end_with_the_assistant_and_take_turns() -> None:
    for document in _many():
        if isinstance(document, PlainText):
            assert document.text
            continue
        roles = [message.role for message in document.messages if message.role != "system"]
        assert roles[-1] == "assistant"
        asking = roles[0::2]
        assert set(roles[1::2]) == {"assistant"}
        assert set(asking) <= {"user", "tool"}
        assert all(message.text or message.tool_call for message in document.messages)


def test_both_kinds_tools_and_system_prompts_occur() -> None:
    drawn = _many(1500)
    conversations = [document for document in drawn if isinstance(document, Conversation)]
    assert len(conversations) < len(drawn)
    assert any(conversation.tools for conversation in conversations)
    assert any(conversation.messages[0].role == "system" for conversation in conversations)
    assert any(len(conversation.messages) > 5 for conversation in conversations)


def test_no_slot_is_left_unfilled() -> None:
    pattern = re.compile(r"\{[a-zA-Z_]{1,8}\}")
    for document in _many(1500):
        texts = [document.text] if isinstance(document, PlainText) else [turn.text for turn in document.messages]
        assert not [text for text in texts if pattern.search(text)]


def test_questions_leave_the_answer_open() -> None:
    for conversation in itertools.islice(questions(5), 100):
        assert conversation.messages[-1].role in {"user", "tool"}


def test_long_documents_are_long() -> None:
    lengths: list[int] = []
    for document in itertools.islice(documents(6, long=True), 30):
        assert isinstance(document, Conversation)
        lengths.append(sum(len(message.text) for message in document.messages))
    assert sorted(lengths)[15] > 2000


@pytest.mark.parametrize("seed", range(40))
def test_counting_counts(seed: int) -> None:
    question, answer = counting.count_up(Random(seed))
    numbers = [int(number) for number in answer.rstrip(".").split(", ")]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert numbers[-1] <= counting.LARGEST
    assert str(numbers[-1]) in question or counting.in_words(numbers[-1]) in question


@pytest.mark.parametrize("seed", range(40))
def test_counting_down_counts_down(seed: int) -> None:
    _, answer = counting.count_down(Random(seed))
    numbers = [int(number) for number in answer.rstrip(".").split(", ")]
    assert numbers == list(range(numbers[0], numbers[-1] - 1, -1))
    assert len(numbers) > 1


def test_numbers_in_words() -> None:
    named = [counting.in_words(number) for number in (0, 7, 13, 20, 21, 99, 100)]
    assert named == ["zero", "seven", "thirteen", "twenty", "twenty-one", "ninety-nine", "one hundred"]


@pytest.mark.parametrize("seed", range(40))
def test_sums_are_right(seed: int) -> None:
    _, answer = knowledge.sums(Random(seed))
    found = re.fullmatch(r"(\d+) (plus|minus) (\d+) is (\d+)\.", answer)
    assert found
    a, sign, b, result = found.groups()
    assert int(result) == (int(a) + int(b) if sign == "plus" else int(a) - int(b))


@pytest.mark.parametrize("seed", range(40))
def test_an_echo_was_said(seed: int) -> None:
    question, answer = echo.repeat(Random(seed))
    assert answer in question


@pytest.mark.parametrize("seed", range(40))
def test_json_answers_are_json(seed: int) -> None:
    conversation = structured.json_object(Random(seed))
    assert isinstance(json.loads(conversation.messages[-1].text), dict)


@pytest.mark.parametrize("seed", range(40))
def test_tool_calls_fit_an_offered_tool(seed: int) -> None:
    conversation = structured.tool_call(Random(seed))
    offered = json.loads(json.dumps(conversation.tools))
    required = {tool["function"]["name"]: set(tool["function"]["parameters"]["required"]) for tool in offered}
    call = next(message.tool_call for message in conversation.messages if message.tool_call)
    arguments = call["arguments"]
    assert isinstance(arguments, dict)
    assert required[str(call["name"])] == set(arguments)


def test_every_topic_can_be_asked_about() -> None:
    assert all(topic.names or topic.questions for topic in TOPICS)
    answers = {about(Random(seed))[1] for seed in range(3000)}
    assert answers == {topic.answer for topic in TOPICS}


def test_long_answers_are_long() -> None:
    assert all(len(about_at_length(Random(seed))[1]) > 800 for seed in range(20))
