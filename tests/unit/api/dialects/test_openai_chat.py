"""The corrections of chat completions, completions and embeddings, on the bytes of a real engine."""

import base64
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh_llm.api.dialects.corrected import Corrected
from mesh_llm.api.dialects.openai_chat import correct_chat, correct_completion, correct_embeddings
from mesh_llm.api.validation import Fields
from mesh_llm.core.types.errors import MeshError

DATA = Path(__file__).parents[3] / "data" / "dialects"
FUNCTION = {"name": "weather", "parameters": {}}


def corrected(correct: Callable[[bytes, Fields], Corrected], **fields: object) -> Corrected:
    body = msgspec.json.encode(fields)
    return correct(body, msgspec.json.decode(body, type=dict[str, msgspec.Raw]))


def answer(recording: str, correct: Callable[[bytes, Fields], Corrected], **fields: object) -> dict[str, Any]:
    whole = corrected(correct, **fields).whole
    assert whole is not None
    return whole(json.loads((DATA / recording).read_bytes()))


def chunks(recording: str, correct: Callable[[bytes, Fields], Corrected], **fields: object) -> list[dict[str, Any]]:
    events = corrected(correct, stream=True, **fields).events
    assert events is not None
    found = events((DATA / recording).read_bytes()).decode().split("\n\n")
    return [json.loads(one.removeprefix("data: ")) for one in found if one.strip() and "[DONE]" not in one]


def test_a_plain_stream_is_not_touched() -> None:
    plain = corrected(correct_chat, messages=[], stream=True, logprobs=True, top_logprobs=2)
    assert (plain.events, plain.whole) == (None, None)


def test_an_answer_has_all_its_fields() -> None:
    told = answer("chat_whole.txt", correct_chat, messages=[])
    choice = told["choices"][0]
    assert (choice["logprobs"], choice["message"]["refusal"], choice["message"]["annotations"]) == (None, None, [])
    assert told["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    assert answer("chat_tool.txt", correct_chat, messages=[])["choices"][0]["message"]["content"] is None


def test_probabilities_without_alternatives() -> None:
    assert json.loads(corrected(correct_chat, logprobs=True, messages=[]).body)["top_logprobs"] == 1
    told = chunks("chat_logprobs_stream.txt", correct_chat, messages=[], logprobs=True)
    content = [one["choices"][0]["logprobs"]["content"][0] for one in told if one["choices"][0].get("logprobs")]
    assert [token["token"] for token in content] == [" which", ","]
    assert all(token["top_logprobs"] == [] for token in content)


def test_completions_list_their_probabilities() -> None:
    lists = {
        "tokens": [" by", " host"],
        "token_logprobs": [0.0, 0.0],
        "top_logprobs": [{" by": 0.0}, {" host": 0.0}],
        "text_offset": [0, 3],
    }
    told = answer("cmpl_logprobs.txt", correct_completion, prompt="the mesh", logprobs=1)
    assert told["choices"][0]["logprobs"] == lists
    streamed = chunks("cmpl_logprobs_stream.txt", correct_completion, prompt="the mesh", logprobs=1)
    told = [one["choices"][0]["logprobs"] for one in streamed]
    assert [one["text_offset"] for one in told[:2]] == [[0], [3]]
    assert told[2] is None
    without = answer("cmpl_logprobs.txt", correct_completion, prompt="the mesh", logprobs=0)
    assert without["choices"][0]["logprobs"]["top_logprobs"] is None


def test_completions_echo_their_prompt() -> None:
    assert "echo" not in json.loads(corrected(correct_completion, prompt="the mesh", echo=True).body)
    told = answer("cmpl_logprobs.txt", correct_completion, prompt="the mesh", echo=True)
    assert told["choices"][0]["text"] == "the mesh by host"
    streamed = chunks("cmpl_logprobs_stream.txt", correct_completion, prompt="the mesh", echo=True)
    assert "".join(one["choices"][0]["text"] for one in streamed) == "the mesh by host"
    for fields in ({"prompt": "a", "logprobs": 1}, {"prompt": [1, 2]}):
        with pytest.raises(MeshError) as caught:
            corrected(correct_completion, echo=True, **fields)
        assert caught.value.code == "echo_not_supported"


def test_functions_in_the_deprecated_way() -> None:
    told = json.loads(
        corrected(correct_chat, messages=[], functions=[FUNCTION], function_call={"name": "weather"}).body
    )
    assert (told["tools"], told["tool_choice"]) == ([{"type": "function", "function": FUNCTION}], "required")
    assert "functions" not in told
    choice = answer("chat_tool.txt", correct_chat, messages=[], functions=[FUNCTION])["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert "tool_calls" not in choice["message"]


def test_a_named_tool_is_the_only_one_left() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    choice = {"type": "function", "function": {"name": "b"}}
    told = json.loads(corrected(correct_chat, messages=[], tools=tools, tool_choice=choice).body)
    assert (told["tools"], told["tool_choice"]) == (tools[1:], "required")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}, "auto"])
def test_a_tool_that_must_be_called_leaves_no_room_for_a_format(choice: object) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    wanted = {"type": "json_object"}
    request = corrected(correct_chat, messages=[], tools=tools, tool_choice=choice, response_format=wanted)
    assert json.loads(request.body).get("response_format") == (wanted if choice == "auto" else None)


def test_sound_is_refused() -> None:
    with pytest.raises(MeshError, match="answers with sound"):
        corrected(correct_chat, messages=[], modalities=["text", "audio"])


def test_embeddings_have_the_dimensions_that_are_asked_for() -> None:
    whole = corrected(correct_embeddings, input="a", dimensions=2).whole
    assert whole is not None
    told = whole({"data": [{"embedding": [3.0, 4.0, 12.0]}]})["data"][0]["embedding"]
    assert told == [0.6, 0.8]
    packed = base64.b64encode(struct.pack("<3f", 3.0, 4.0, 12.0)).decode()
    told = whole({"data": [{"embedding": packed}]})["data"][0]["embedding"]
    assert [round(one, 6) for one in struct.unpack("<2f", base64.b64decode(told))] == [0.6, 0.8]
    assert math.hypot(*whole({"data": [{"embedding": [3.0, 4.0]}]})["data"][0]["embedding"]) == 5
    assert corrected(correct_embeddings, input="a").whole is None
    with pytest.raises(MeshError, match="at least 1"):
        corrected(correct_embeddings, input="a", dimensions=0)
