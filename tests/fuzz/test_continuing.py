"""Random streams and requests: resuming never raises, and passes on whole events only."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.answering_engine import AnsweringEngine

from mesh_llm.api.resume.resume import RESUMABLE, initial_state
from mesh_llm.api.resume.state import CannotResume, ResumeState
from mesh_llm.wire.http.sse import SseEvent, SseParser

NAMES = [
    "id", "choices", "delta", "content", "role", "finish_reason", "usage", "index", "text", "type", "item", "item_id",
    "response", "output", "content_block", "message", "error", "tool_calls", "reasoning_content", "thinking",
    "completion_tokens", "prompt_tokens", "output_tokens", "input_tokens", "stop_reason",
]  # fmt: skip
KINDS = [
    "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
    "message_stop", "text_delta", "thinking_delta", "input_json_delta", "tool_use", "text", "thinking", "message",
    "reasoning", "function_call", "response.created", "response.in_progress", "response.output_item.added",
    "response.content_part.added", "response.output_text.delta", "response.reasoning_text.delta",
    "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
]  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(KINDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=6,
)  # fmt: skip
events = st.builds(
    SseEvent,
    data=st.one_of(
        st.dictionaries(st.sampled_from(NAMES), values, max_size=6).map(json.dumps), st.text(max_size=10),
        st.just("[DONE]"),
    ),
    event=st.sampled_from(["", *KINDS]),
)  # fmt: skip
requests = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("messages", "prompt", "input", "max_tokens", "n", "seed", "temperature", "stream_options", "stop"), values
    ),
)


@pytest.mark.parametrize("path", sorted(RESUMABLE))
@given(
    request=requests, seen=st.lists(events, max_size=4), told=st.lists(events, max_size=4), counted=st.integers(0, 99)
)
def test_any_events_are_resumed_or_refused(
    path: str, request: dict[str, Any], seen: list[SseEvent], told: list[SseEvent], counted: int
) -> None:
    story = initial_state(path, json.dumps(request).encode())
    if isinstance(story, CannotResume):
        assert story.reason
        return
    for event in seen:
        story.see(event)
    for _ in range(2):
        assert isinstance(msgspec.json.decode(story.request(counted)), dict)
        for event in told:
            given_on = story.splice(event)
            parser = SseParser()
            parser.feed(given_on)
            assert not parser.inside
    assert story.tail() is None or story.over


@pytest.mark.parametrize("path", sorted(RESUMABLE))
@settings(max_examples=40)
@given(body=st.binary(max_size=60))
def test_any_request_body_is_resumed_or_refused(path: str, body: bytes) -> None:
    story = initial_state(path, body)
    assert isinstance(story, CannotResume | ResumeState)


@pytest.mark.parametrize("path", sorted(RESUMABLE))
@settings(max_examples=60)
@given(data=st.data())
def test_a_real_stream_with_events_lost_duplicated_or_swapped(path: str, data: st.DataObject) -> None:
    request = {"messages": [{"role": "user", "content": "x"}], "prompt": "x|", "input": "x", "stream": True}
    told = AnsweringEngine("a", reasoning="" if path == "/v1/completions" else "well now").stream(path, request)
    order = data.draw(st.lists(st.sampled_from(told), max_size=len(told)))
    story = initial_state(path, json.dumps(request).encode())
    assert isinstance(story, ResumeState)
    parsed = SseParser().feed(b"".join(order))
    cut = data.draw(st.integers(0, len(parsed)))
    for event in parsed[:cut]:
        story.see(event)
    story.request(None)
    for event in parsed[cut:]:
        story.splice(event)
    assert story.tail() is None or story.over
