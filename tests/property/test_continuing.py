"""An answer that is cut anywhere, any number of times, and resumed equals the answer that was never cut."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.answering_engine import AnsweringEngine, joined, tokens_of

from mesh_llm.api.resume.resume import RESUMABLE, initial_state
from mesh_llm.api.resume.state import ResumeState
from mesh_llm.wire.http.sse import SseEvent, SseParser

USER = {"role": "user", "content": "Tell me a story"}


def request_for(path: str, most: int | None, *, usage: bool = True) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "tiny", "stream": True, "temperature": 0}
    if path == "/v1/completions":
        asked["prompt"] = "Tell me |"
    elif path == "/v1/responses":
        asked["input"] = "Tell me a story"
    else:
        asked["messages"] = [USER]
    if path == "/v1/chat/completions" and usage:
        asked["stream_options"] = {"include_usage": True}
    if most is not None:
        asked["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = most
    return asked


def parsed(data: bytes) -> list[SseEvent]:
    return SseParser().feed(data)


def whole_events(data: bytes, cut: int) -> bytes:
    """What the client gets of a stream whose source dies after `cut` bytes: only whole events."""
    return data[: data.rfind(b"\n\n", 0, cut) + 2] if b"\n\n" in data[:cut] else b""


def go_on(story: ResumeState, path: str, engine: AnsweringEngine, cut: int | None) -> bytes:
    """Resume on another engine, until it dies too."""
    if (tail := story.tail()) is not None:
        return tail
    assert not story.blocked
    asked = json.loads(story.request(sum(len(tokens_of(text)) for text in story.texts)))
    data = joined(engine.stream(path, asked))
    data = data if cut is None else whole_events(data, cut % (len(data) + 1))
    return b"".join(story.splice(event) for event in parsed(data))


def told_of(data: bytes) -> list[tuple[str, Any]]:
    """The events. An item that a later engine began keeps the id of that engine."""
    names = {name for kind in (b"msg", b"rs") for name in re.findall(kind + rb"_[a-z0-9-]+", data)}
    assert len(names) == len({name.partition(b"_")[0] for name in names})
    for name in names:
        data = data.replace(name, name.partition(b"_")[0])
    return [(e.event, e.data if e.data == "[DONE]" else json.loads(e.data)) for e in parsed(data)]


@pytest.mark.parametrize("path", sorted(RESUMABLE))
@pytest.mark.parametrize("reasoning", ["", "Let me think : a hedgehog ."])
@given(
    cuts=st.lists(st.integers(0, 20_000), min_size=1, max_size=4),
    most=st.none() | st.integers(1, 25),
    usage=st.booleans(),
)
def test_the_joined_answer_is_the_undisturbed_one(
    path: str, reasoning: str, cuts: list[int], most: int | None, *, usage: bool
) -> None:
    if path == "/v1/completions":
        reasoning = ""
    asked = request_for(path, most, usage=usage)
    first = AnsweringEngine("first", reasoning=reasoning)
    undisturbed = joined(first.stream(path, asked))
    got = whole_events(undisturbed, cuts[0] % (len(undisturbed) + 1))
    story = initial_state(path, json.dumps(asked).encode())
    assert isinstance(story, ResumeState)
    for event in parsed(got):
        story.see(event)
    # Before the first event, the next engine's answer is passed on unchanged, so it must be the same engine here.
    for number, cut in enumerate([*cuts[1:], None]):
        life = f"life-{number}" if story.begun else "first"
        got += go_on(story, path, AnsweringEngine(life, reasoning=reasoning), cut)
    assert told_of(got) == told_of(undisturbed)
    assert story.over
    assert story.tail() == b""
