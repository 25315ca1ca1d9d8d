"""OpenAI's chat completions, completions and embeddings: where llama.cpp's answers differ from what OpenAI documents.

A stream is only parsed where its request asks for probabilities, or for functions in the deprecated way.
"""

import base64
import math
import struct
from collections.abc import Callable
from typing import cast

from mesh_llm.api.dialects.corrected import Corrected, CorrectEvents, RequestEdit, edit_event, refused
from mesh_llm.api.json_values import Json, count, items, mapping, text
from mesh_llm.api.validation import Fields
from mesh_llm.core.types.errors import MeshError

_EVENT_END = b"\n\n"


def correct_chat(body: bytes, fields: Fields) -> Corrected:
    """Correct a request to `/v1/chat/completions`.

    Raises:
        MeshError: 400 for what no engine has.
    """
    edit = RequestEdit(body, fields)
    legacy = _legacy_functions(edit)
    narrow_tools(edit, name_of=_function_name)
    _check_modalities(edit)
    bare = edit.is_true("logprobs") and not count(edit.get("top_logprobs"))
    if bare:
        # Without alternatives llama.cpp gives no probabilities at all, and 20 where their number is not given.
        edit.set("top_logprobs", 1)
    if edit.is_true("stream"):
        return Corrected(edit.body, events=_chat_events(bare=bare, legacy=legacy))

    def whole(answer: Json) -> Json:
        for choice in map(mapping, items(answer.get("choices"))):
            _complete_choice(choice, bare=bare, legacy=legacy)
        return answer | {"usage": _complete_usage(answer)} if "usage" in answer else answer

    return Corrected(edit.body, whole=whole)


def correct_chat_count(body: bytes, fields: Fields) -> Corrected:
    """Correct a request to `/v1/chat/completions/input_tokens`: its prompt must be the one an answer would have."""
    edit = RequestEdit(body, fields)
    _legacy_functions(edit)
    narrow_tools(edit, name_of=_function_name)
    return Corrected(edit.body)


def correct_completion(body: bytes, fields: Fields) -> Corrected:
    """Correct a request to `/v1/completions`: its probabilities, and `echo`.

    Raises:
        MeshError: 400 for `echo` with probabilities, which llama.cpp has not for a prompt.
    """
    edit = RequestEdit(body, fields)
    wanted = count(edit.get("logprobs")) if "logprobs" in fields else None
    prompts, each = _echoed(edit, wanted), max(1, count(edit.get("n")) or 1)
    if wanted == 0:
        edit.set("logprobs", 1)
    if wanted is None and not prompts:
        return Corrected(body)
    offsets: dict[int, int] = {}

    def choices(answer: Json) -> Json:
        for choice in map(mapping, items(answer.get("choices"))):
            index, said = count(choice.get("index")) or 0, text(choice.get("text"))
            if wanted is not None:
                choice["logprobs"] = _legacy_logprobs(mapping(choice.get("logprobs")), offsets, index, wanted)
            if prompts and index not in offsets:
                choice["text"] = prompts[min(index // each, len(prompts) - 1)] + said
                offsets[index] = 0
        return answer

    def events(data: bytes) -> bytes:
        return _EVENT_END.join(edit_event(event, choices) for event in data.split(_EVENT_END))

    return Corrected(edit.body, whole=choices, events=events)


def correct_own_completion(body: bytes, fields: Fields) -> Corrected:
    """Correct a request to llama.cpp's own completions: the node counts by the timings, whatever a client wants."""
    edit = RequestEdit(body, fields)
    ask_for_counts(edit)
    return Corrected(edit.body)


def ask_for_counts(edit: RequestEdit) -> None:
    """Ask for the timings in an answer of which only some fields are wanted."""
    wanted = edit.get("response_fields")
    if isinstance(wanted, list) and wanted and "timings" not in wanted:
        edit.set("response_fields", [*items(cast("object", wanted)), "timings"])


def correct_embeddings(body: bytes, fields: Fields) -> Corrected:
    """Correct a request to `/v1/embeddings`: `dimensions`, which llama.cpp ignores."""
    wanted = RequestEdit(body, fields).get("dimensions")
    if wanted is None:
        return Corrected(body)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise refused("invalid_dimensions", "`dimensions` must be a number of at least 1.", "", "dimensions")

    def whole(answer: Json) -> Json:
        for entry in map(mapping, items(answer.get("data"))):
            entry["embedding"] = _shortened(entry.get("embedding"), wanted)
        return answer

    return Corrected(body, whole=whole)


def narrow_tools(edit: RequestEdit, name_of: Callable[[Json], str]) -> None:
    """Say by words what `tool_choice` says by an object, which llama.cpp reads as `auto`.

    Only the tools that may be called are left. `name_of`: the name of a function in the request's `tools`.
    Where a tool must be called, the format of a text is left out: llama.cpp would write such a text and call no tool.
    """
    if edit.raw("tool_choice") == b'"required"':
        edit.drop("response_format")
    if edit.raw("tool_choice")[:1] != b"{":
        return
    choice = mapping(edit.get("tool_choice"))
    kind, mode = choice.get("type"), "required"
    if kind == "allowed_tools":
        allowed = mapping(choice.get("allowed_tools")) or choice
        names = {name_of(tool) or text(tool.get("name")) for tool in map(mapping, items(allowed.get("tools")))}
        mode = text(allowed.get("mode")) or "auto"
    elif kind == "function":
        names = {name_of(choice) or text(choice.get("name"))}
    else:
        # A tool that the vendor runs itself: there is none here.
        edit.set("tool_choice", "auto")
        return
    tools = [tool for tool in items(edit.get("tools")) if name_of(mapping(tool)) in names]
    if not tools:
        raise refused(
            "no_such_tool",
            "`tool_choice` names a tool that is not in `tools`.",
            "Give the tool as well.",
            "tool_choice",
        )
    edit.set("tools", tools)
    edit.set("tool_choice", mode)
    if mode == "required":
        edit.drop("response_format")


def _function_name(tool: Json) -> str:
    return text(mapping(tool.get("function")).get("name"))


def _legacy_functions(edit: RequestEdit) -> bool:
    """Turn the deprecated `functions` and `function_call` into tools. Whether the answer must be turned back."""
    if edit.raw("functions")[:1] != b"[":
        return False
    edit.set("tools", [{"type": "function", "function": one} for one in items(edit.get("functions"))])
    called = edit.get("function_call")
    if isinstance(called, str):
        edit.set("tool_choice", called)
    elif called is not None:
        edit.set("tool_choice", {"type": "function", "function": mapping(called)})
    edit.set("parallel_tool_calls", value=False)
    edit.drop("functions")
    edit.drop("function_call")
    return True


def _check_modalities(edit: RequestEdit) -> None:
    if b"audio" in edit.raw("modalities"):
        raise refused(
            "no_audio", "No model here answers with sound.", 'Leave "audio" out of `modalities`.', "modalities"
        )


def _complete_choice(choice: Json, *, bare: bool, legacy: bool) -> None:
    message = mapping(choice.get("message"))
    message.setdefault("refusal", None)
    message.setdefault("annotations", [])
    if message.get("tool_calls") and message.get("content") == "":
        message["content"] = None
    choice["logprobs"] = _complete_logprobs(choice.get("logprobs"), bare=bare)
    if legacy:
        _turn_back(choice, message)


def _complete_logprobs(value: object, *, bare: bool) -> Json | None:
    probabilities = mapping(value)
    if not probabilities:
        return None
    if bare:
        for token in map(mapping, items(probabilities.get("content"))):
            token["top_logprobs"] = []
    return probabilities | {"refusal": None}


def _turn_back(choice: Json, message: Json) -> None:
    """A call of a tool, as the deprecated `function_call`."""
    calls = items(message.pop("tool_calls", None))
    if calls:
        message["function_call"] = mapping(mapping(calls[0]).get("function"))
    if choice.get("finish_reason") == "tool_calls":
        choice["finish_reason"] = "function_call"


def _complete_usage(answer: Json) -> Json:
    """With the details of the answer's tokens. Those of reasoning are a share by length: llama.cpp counts none."""
    usage = mapping(answer.get("usage"))
    message = mapping(mapping((items(answer.get("choices")) or [None])[0]).get("message"))
    reasoning, said = text(message.get("reasoning_content")), text(message.get("content"))
    share = reasoning_share(count(usage.get("completion_tokens")) or 0, reasoning, said)
    return usage | {
        "completion_tokens_details": {
            "reasoning_tokens": share,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        }
    }


def reasoning_share(tokens: int, reasoning: str, said: str) -> int:
    """About how many of an answer's tokens were reasoning."""
    return round(tokens * len(reasoning) / len(reasoning + said)) if reasoning else 0


def _chat_events(*, bare: bool, legacy: bool) -> CorrectEvents | None:
    if not bare and not legacy:
        return None

    def edit(chunk: Json) -> Json | None:
        for choice in map(mapping, items(chunk.get("choices"))):
            if bare and choice.get("logprobs"):
                choice["logprobs"] = _complete_logprobs(choice["logprobs"], bare=bare)
            if legacy:
                _turn_back(choice, mapping(choice.get("delta")))
        return chunk

    return lambda data: _EVENT_END.join(edit_event(event, edit) for event in data.split(_EVENT_END))


def _echoed(edit: RequestEdit, wanted: int | None) -> list[str]:
    """The prompts that the answer is to begin with, for `echo`; empty: none."""
    if not edit.is_true("echo"):
        return []
    if wanted is not None:
        raise _no_echo("with `logprobs`", "The engine gives no probabilities for the tokens of a prompt.")
    prompt = edit.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else items(prompt)
    if not all(isinstance(one, str) for one in prompts):
        raise _no_echo("with a prompt of tokens", "Give the prompt as a text.")
    edit.drop("echo")
    return prompts


def _no_echo(where: str, hint: str) -> MeshError:
    return refused("echo_not_supported", f"`echo` is not supported {where}.", hint, "echo")


def _legacy_logprobs(probabilities: Json, offsets: dict[int, int], index: int, wanted: int) -> Json | None:
    """OpenAI's lists in place of llama.cpp's objects, which have the shape of chat completions."""
    content = [mapping(token) for token in items(probabilities.get("content"))]
    if not content:
        return None
    starts: list[int] = []
    for token in content:
        starts.append(offsets.get(index, 0))
        offsets[index] = starts[-1] + len(text(token.get("token")))
    return {
        "tokens": [text(token.get("token")) for token in content],
        "token_logprobs": [token.get("logprob") for token in content],
        "top_logprobs": [
            {text(one.get("token")): one.get("logprob") for one in map(mapping, items(token.get("top_logprobs")))}
            for token in content
        ]
        if wanted
        else None,
        "text_offset": starts,
    }


def _shortened(embedding: object, wanted: int) -> object:
    """The first `wanted` numbers of an embedding, scaled to length 1 again; it may be base64 of 32-bit floats."""
    if isinstance(embedding, str):
        data = base64.b64decode(embedding)
        kept = _scaled(list(struct.unpack(f"<{len(data) // 4}f", data)), wanted)
        return base64.b64encode(struct.pack(f"<{len(kept)}f", *kept)).decode("ascii")
    return _scaled(items(embedding), wanted)


def _scaled(numbers: list[float], wanted: int) -> list[float]:
    if wanted >= len(numbers):
        return numbers
    kept = numbers[:wanted]
    length = math.sqrt(sum(number * number for number in kept))
    return [number / length for number in kept] if length else kept
