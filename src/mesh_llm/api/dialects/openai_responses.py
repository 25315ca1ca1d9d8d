"""OpenAI's Responses: where llama.cpp's answers and events differ from what OpenAI documents.

llama.cpp turns such a request into one for chat completions. What it does not turn is turned here: the format of the
text, a tool that must be called, messages of the assistant without a type. Of an answer it gives what it knows; here
the fields are added that OpenAI documents, most of which repeat the request.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from mesh_llm.api.dialects.corrected import Corrected, RequestEdit, format_request, refused
from mesh_llm.api.dialects.openai_chat import narrow_tools, reasoning_share
from mesh_llm.api.json_values import Json, count, items, mapping, text
from mesh_llm.api.validation import Fields
from mesh_llm.core.trust.circle import Circle
from mesh_llm.core.types.errors import UNREADABLE

Keep = Callable[[Json, list[Any]], None]
"""Takes an answer that is over, and the items of its request."""

_EVENT_END = b"\n\n"
_DELTA = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
_THOUGHT = b'event: response.reasoning_text.delta\ndata: {"type":"response.reasoning_text.delta",'
_PARSED_INPUT = (b'"assistant"', b'"reasoning"')
_NOT_HERE = {
    "conversation": ("Conversations are not kept here.", "Send previous_response_id, or the whole conversation."),
    "prompt": ("Prompt templates are not kept here.", "Send the prompt as `input` and `instructions`."),
}
_DEFAULTS: Mapping[str, object] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""Fields of an answer that repeat the request's, and their values where the request has none."""


_EMPTY_PART: Json = {"annotations": [], "logprobs": []}


@dataclass(frozen=True, slots=True)
class ResponsesContext:
    """What is known of a request beside its body.

    Attributes:
        model: the name of the model that answers.
        context: tokens of prompt and answer together that the model takes; 0: not known.
        now: the time, UNIX seconds.
        stored: the answer is kept.
        keep: takes it when it is over; None: it is not kept.
        before: the items of the conversation that the request continues.
        referred: the items that the request only refers to, by their ids.
        circle: of the request, and of all stored answers that are sent with it.
    """

    model: str
    context: int
    now: int
    stored: bool = False
    keep: Keep | None = None
    before: Sequence[Any] = ()
    referred: Mapping[str, Json] = field(default_factory=dict[str, Json])
    circle: Circle = None


def correct_responses(body: bytes, fields: Fields, known: ResponsesContext) -> Corrected:
    """Correct a request to `/v1/responses`.

    Raises:
        MeshError: 400 for what is not there: conversations, prompt templates, answers in the background.
    """
    edit = RequestEdit(body, fields)
    edit.drop_nulls()
    _check(edit)
    echoed = {name: edit.get(name) if edit.raw(name) else default for name, default in _DEFAULTS.items()}
    echoed["store"] = echoed["store"] is not False and known.stored
    echoed["text"] = _DEFAULTS["text"] | mapping(echoed["text"])  # pyright: ignore[reportOperatorIssue, reportUnknownVariableType]
    reasoning = mapping(edit.get("reasoning"))
    echoed["reasoning"] = {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")}
    given = _continue(edit, known)
    _turn_input(edit)
    narrow_tools(edit, name_of=lambda tool: text(tool.get("name")))
    _turn_format(edit)
    # llama.cpp refuses it without `logprobs`, and has no probabilities in these answers.
    edit.drop("top_logprobs")
    # The conversation is in the body now: it must not be held for as long as the answer takes.
    answer = _Answer(echoed, replace(known, before=(), referred={}), given)
    if edit.is_true("stream"):
        return Corrected(edit.body, events=_Events(answer).correct)
    return Corrected(edit.body, whole=answer.complete)


def correct_responses_count(body: bytes, fields: Fields) -> Corrected:
    """Correct a request to `/v1/responses/input_tokens`: its prompt must be the one that an answer would have."""
    edit = RequestEdit(body, fields)
    edit.drop_nulls()
    _turn_input(edit)
    narrow_tools(edit, name_of=lambda tool: text(tool.get("name")))
    _turn_format(edit)
    edit.drop("top_logprobs")
    return Corrected(edit.body)


def _check(edit: RequestEdit) -> None:
    if edit.is_true("background"):
        raise refused(
            "no_background", "Answers in the background are not supported here.",
            "Leave `background` out, and stream the answer.", "background",
        )  # fmt: skip
    for name, (message, hint) in _NOT_HERE.items():
        if edit.raw(name):
            raise refused(f"no_{name}", message, hint, name)


def _continue(edit: RequestEdit, known: ResponsesContext) -> list[Any]:
    """Put the conversation so far before the input, and items in the place of references. The request's own items."""
    given: list[Any] = []
    if known.keep is not None or known.before or known.referred:
        given = input_items(edit.get("input"))
    if known.referred:
        given = [known.referred.get(text(mapping(item).get("id")), item) for item in given]
    if known.before or known.referred:
        edit.set("input", [*known.before, *given])
    edit.drop("previous_response_id")
    return given


def input_items(given: object) -> list[Any]:
    """A request's input as items with ids, in the form in which they are listed."""
    listed: list[Any] = [{"role": "user", "content": given}] if isinstance(given, str) else items(given)
    return [_named(mapping(item)) for item in listed]


def _named(item: Json) -> Json:
    named = dict(item)
    if "type" not in named and "role" in named:
        named["type"] = "message"
    if named.get("type") == "message" and isinstance(named.get("content"), str):
        said = named["content"]
        answered: Json = {"type": "output_text", "text": said, "annotations": []}
        named["content"] = [answered if named.get("role") == "assistant" else {"type": "input_text", "text": said}]
    if "id" in named:
        return named
    beginning = _ID_BEGINNINGS.get(text(named.get("type")), "item")
    return {"id": f"{beginning}_{secrets.token_hex(16)}"} | named


_ID_BEGINNINGS = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def _turn_format(edit: RequestEdit) -> None:
    """`text.format`, by the name that chat completions have for it; a request in the prompt beside tools.

    With a format the engine calls no tool, so one that may be called comes first.
    """
    wanted = mapping(mapping(edit.get("text")).get("format"))
    kind = wanted.get("type")
    choice = edit.get("tool_choice")
    callable_tools = any(mapping(tool).get("type") == "function" for tool in items(edit.get("tools")))
    if kind not in ("json_schema", "json_object") or (callable_tools and choice == "required"):
        return
    if callable_tools and choice != "none":
        asked = format_request(wanted.get("schema"))
        given = text(edit.get("instructions"))
        edit.set("instructions", f"{given}\n\n{asked}" if given else asked)
    elif kind == "json_schema":
        schema = {name: wanted[name] for name in ("name", "schema", "strict") if name in wanted}
        edit.set("response_format", {"type": kind, "json_schema": schema})
    else:
        edit.set("response_format", {"type": kind})


def _turn_input(edit: RequestEdit) -> None:
    """Items of the conversation that llama.cpp does not take as they may be sent."""
    raw = edit.raw("input")
    if raw[:1] != b"[" or not any(sign in raw for sign in _PARSED_INPUT):
        return
    turned: list[object] = []
    changed = False
    for item in items(edit.get("input")):
        fields = mapping(item)
        if fields.get("type") == "reasoning" and not items(fields.get("content")):
            # Reasoning that only its maker can read.
            changed = True
        elif fields.get("role") == "assistant" and "type" not in fields:
            changed = True
            turned.append(fields | {"type": "message"})
        else:
            turned.append(item)
    if changed:
        edit.set("input", turned)


class _Answer:
    """Completes the answer to one request."""

    def __init__(self, echoed: Json, known: ResponsesContext, given: list[Any]) -> None:
        self._echoed = echoed
        self._given = given
        self._known = known
        self._created = 0

    def begun(self, response: Json) -> Json:
        """The answer before its end, of which the engine gives an id."""
        self._created = self._created or count(response.get("created_at")) or self._known.now
        beginning: Json = {
            "id": response.get("id"),
            "object": "response",
            "created_at": self._created,
            "status": text(response.get("status")) or "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": self._known.model,
            "output": [],
            "service_tier": "default",
            "usage": None,
        }
        return beginning | self._echoed

    def cut_short(self, response: Json) -> bool:
        """Whether a limit ended it. llama.cpp does not say so in this dialect, but it counts."""
        usage = mapping(response.get("usage"))
        generated, total = (count(usage.get(name)) or 0 for name in ("output_tokens", "total_tokens"))
        limit = count(self._echoed.get("max_output_tokens")) or 0
        return (0 < limit <= generated) or (0 < self._known.context <= total)

    def complete(self, response: Json) -> Json:
        """The whole answer, when it is over."""
        whole = self.begun(response) | {name: response[name] for name in ("output", "status") if name in response}
        whole["completed_at"] = count(response.get("completed_at")) or self._known.now
        output = items(whole["output"])
        if self.cut_short(response):
            whole |= {
                "status": "incomplete",
                "completed_at": None,
                "incomplete_details": {"reason": "max_output_tokens"},
            }
            if output:
                output[-1] = mapping(output[-1]) | {"status": "incomplete"}
        whole["usage"] = _usage(mapping(response.get("usage")), output)
        if self._known.keep is not None:
            self._known.keep(whole, self._given)
        return whole


def _usage(usage: Json, output: list[object]) -> Json:
    reasoning = said = ""
    for item in map(mapping, output):
        shown = "".join(text(mapping(part).get("text")) for part in items(item.get("content")))
        if item.get("type") == "reasoning":
            reasoning += shown
        else:
            said += shown + text(item.get("arguments"))
    share = reasoning_share(count(usage.get("output_tokens")) or 0, reasoning, said)
    return usage | {"output_tokens_details": {"reasoning_tokens": share}}


class _Events:
    """Completes the events of one stream: numbers, the places of items, and events that llama.cpp leaves out."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._sequence = 0
        self._places: dict[str, int] = {}
        self._message = self._thought = 0
        self._waiting: Json | None = None
        """The end of an item, until the next event tells whether the answer was cut short there."""

    def correct(self, data: bytes) -> bytes:
        """Correct whole events. Those of text and reasoning are not parsed: they come by the thousand."""
        corrected: list[bytes] = []
        for event in data.split(_EVENT_END):
            if event.startswith(_DELTA):
                corrected.append(
                    b'%b"sequence_number":%d,"output_index":%d,"content_index":0,"logprobs":[],%b'
                    % (_DELTA, self._sequence, self._message, event[len(_DELTA) :])
                )
                self._sequence += 1
            elif event.startswith(_THOUGHT):
                corrected.append(
                    b'%b"sequence_number":%d,"output_index":%d,"content_index":0,%b'
                    % (_THOUGHT, self._sequence, self._thought, event[len(_THOUGHT) :])
                )
                self._sequence += 1
            else:
                corrected.extend(self._parsed(event))
        return _EVENT_END.join(corrected)

    def _parsed(self, event: bytes) -> list[bytes]:
        decoded = _decode(event)
        kind = text(decoded.get("type")) if decoded is not None else ""
        if decoded is None or not kind.startswith(("response.", "error")):
            return [event]
        return [
            b"event: %b\ndata: %b" % (text(one.get("type")).encode(), msgspec.json.encode(one))
            for one in map(self._numbered, [*self._released(kind, decoded), *self._edit(kind, decoded)])
        ]

    def _released(self, kind: str, data: Json) -> list[Json]:
        """The end of an item that waits for this event."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return []
        cut_short = kind == "response.completed" and self._answer.cut_short(mapping(data.get("response")))
        status = "incomplete" if cut_short else "completed"
        return [waiting | {"item": mapping(waiting.get("item")) | {"status": status}}]

    def _numbered(self, data: Json) -> Json:
        number, self._sequence = self._sequence, self._sequence + 1
        return {"type": data.get("type"), "sequence_number": number} | data

    def _edit(self, kind: str, data: Json) -> list[Json]:
        item = mapping(data.get("item"))
        match kind:
            case "response.created" | "response.in_progress":
                return [data | {"response": self._answer.begun(mapping(data.get("response")))}]
            case "response.output_item.added":
                place = self._places[text(item.get("id"))] = len(self._places)
                if item.get("type") == "message":
                    self._message = place
                elif item.get("type") == "reasoning":
                    self._thought = place
                return [data | {"output_index": place}]
            case "response.content_part.added" | "response.content_part.done":
                part = _EMPTY_PART | mapping(data.get("part"))
                return [self._placed(data) | {"content_index": 0, "part": part}]
            case "response.output_text.delta" | "response.output_text.done":
                return [self._placed(data) | {"content_index": 0, "logprobs": []}]
            case "response.reasoning_text.delta":
                return [self._placed(data) | {"content_index": 0}]
            case "response.function_call_arguments.delta":
                return [self._placed(data)]
            case "response.output_item.done":
                return self._item_done(data, item)
            case "response.completed":
                whole = self._answer.complete(mapping(data.get("response")))
                name = "response.incomplete" if whole["status"] == "incomplete" else kind
                return [data | {"type": name, "response": whole}]
            case _:
                return [data]

    def _placed(self, data: Json) -> Json:
        return data | {"output_index": self._places.get(text(data.get("item_id")), 0)}

    def _item_done(self, data: Json, item: Json) -> list[Json]:
        """The end of an item, after the end of its content where llama.cpp gives none."""
        place = self._places.setdefault(text(item.get("id")), len(self._places))
        where = {"item_id": item.get("id"), "output_index": place}
        self._waiting = data | {"output_index": place}
        if item.get("type") == "function_call":
            said = {"arguments": item.get("arguments"), "name": item.get("name")}
            return [{"type": "response.function_call_arguments.done"} | where | said]
        if item.get("type") == "reasoning":
            thought = "".join(text(mapping(part).get("text")) for part in items(item.get("content")))
            return [{"type": "response.reasoning_text.done"} | where | {"content_index": 0, "text": thought}]
        return []


def _decode(event: bytes) -> Json | None:
    """The data of an event that names its type; None for a comment, and for what is not understood."""
    _, found, data = event.partition(b"data: ")
    if not found or not event.startswith(b"event: "):
        return None
    try:
        return msgspec.json.decode(data, type=Json)
    except UNREADABLE:
        return None
