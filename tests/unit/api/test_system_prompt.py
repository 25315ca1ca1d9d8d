"""The system prompt of a model's settings."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.api.system_prompt import with_system_prompt

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
USER = {"role": "user", "content": "Hi"}


def sent(path: str, body: dict[str, Any]) -> Any:
    return json.loads(with_system_prompt(path, json.dumps(body).encode(), "Be brief."))


@pytest.mark.parametrize("path", [CHAT, "/apply-template", "/v1/chat/completions/input_tokens"])
def test_it_is_the_first_message_of_a_chat(path: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert sent(path, {"model": "m", "messages": [USER]}) == {"model": "m", "messages": [system, USER]}


def test_it_is_the_field_that_other_dialects_have_for_it() -> None:
    assert sent(MESSAGES, {"messages": [USER]})["system"] == "Be brief."
    assert sent(MESSAGES, {"messages": [USER], "system": ""})["system"] == "Be brief."
    assert sent(RESPONSES, {"input": "Hi"})["instructions"] == "Be brief."
    assert sent(RESPONSES, {"input": [USER], "instructions": None})["instructions"] == "Be brief."


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "system", "content": "Mine."}, USER]}),
        (CHAT, {"messages": [USER, {"role": "developer", "content": "Mine."}]}),
        (CHAT, {"messages": []}),
        (MESSAGES, {"messages": [USER], "system": "Mine."}),
        (MESSAGES, {"messages": [USER], "system": [{"type": "text", "text": "Mine."}]}),
        (RESPONSES, {"input": "Hi", "instructions": "Mine."}),
        (RESPONSES, {"input": [{"role": "developer", "content": "Mine."}]}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/embeddings", {"input": "Hi"}),
    ],
)
def test_a_request_with_its_own_stays_as_it_is(path: str, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    assert with_system_prompt(path, data, "Be brief.") == data


@given(st.one_of(st.binary(max_size=50), st.recursive(st.none() | st.text(), st.lists, max_leaves=5).map(
    lambda value: json.dumps({"messages": value, "input": value}).encode())))  # fmt: skip
def test_what_makes_no_sense_is_left_to_the_engine(body: bytes) -> None:
    for path in (CHAT, MESSAGES, RESPONSES):
        changed = with_system_prompt(path, body, "x")
        assert changed == body or json.loads(changed)
