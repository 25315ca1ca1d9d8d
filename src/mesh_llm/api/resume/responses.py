"""Resuming `/v1/responses`: an answer in items; its last events repeat the whole text."""

from typing import ClassVar

from mesh_llm.api.json_values import Json, count, items, last, mapping, text
from mesh_llm.api.resume.state import Event, ResumeState

_TEXT = ("message", "reasoning")
_ONCE = frozenset({"response.created", "response.in_progress"})
_ENDS = frozenset({"response.output_text.done", "response.content_part.done", "response.output_item.done"})
_LAST = frozenset({"response.completed", "response.incomplete"})
_DELTAS = frozenset({"response.output_text.delta", "response.reasoning_text.delta"})


class ResponsesState(ResumeState):
    """Items of the next engine get the ids that the client knows; final events are made from the whole text."""

    LIMITS: ClassVar[tuple[str, ...]] = ("max_output_tokens", "max_tokens", "n_predict")

    def __init__(self, request: Json) -> None:
        super().__init__(request)
        self._id = ""
        self._ids: dict[str, str] = {}
        self._sent: set[str] = set()

    @classmethod
    def forbidden(cls, request: Json) -> str:
        """A last message that cannot be extended."""
        given = request.get("input")
        item = last(items(given))
        if item.get("role") == "assistant" or item.get("type") in ("reasoning", "function_call"):
            return "it already continues a message"
        return "" if isinstance(given, str | list) else "its input is not understood"

    def _tail(self) -> bytes | None:
        return None

    def _note(self, name: str, data: Json) -> None:
        kind = text(data.get("type")) or name
        item = mapping(data.get("item"))
        if not self._id:
            self._id = text(mapping(data.get("response")).get("id"))
        if kind == "response.output_item.added":
            self._note_item(item)
        elif kind in _DELTAS:
            said = text(data.get("delta"))
            self.pieces += bool(said)
            if kind == "response.output_text.delta":
                self.given += said
            else:
                self.reasoning += said
        elif kind == "response.output_item.done":
            self._sent.add(f"{kind} {item.get('type')}")
        elif kind in _LAST or kind in ("response.failed", "error"):
            self.over = True
        self._sent.add(kind)
        if kind in _ENDS:
            self.finished = True

    def _note_item(self, item: Json) -> None:
        kind = text(item.get("type"))
        self._ids.setdefault(kind, text(item.get("id")))
        if kind not in _TEXT:
            self.blocked = "a tool call was incomplete"

    def _edit(self, name: str, data: Json) -> list[Event]:
        kind = text(data.get("type")) or name
        item = mapping(data.get("item"))
        ours = item.get("type") in _TEXT
        if kind in _ONCE and self._id:
            response = mapping(data.get("response"))
            return [] if kind in self._sent else [(name, data | {"response": response | {"id": self._id}})]
        if kind == "response.output_item.added":
            return [] if self._muted or item.get("type") in self._ids else [(name, data)]
        if kind == "response.content_part.added":
            return [] if self._muted or kind in self._sent else [(name, self._named(data, "message"))]
        if kind in _DELTAS:
            self._fresh = True
            return [] if self._muted else [(name, self._named(data, _owner(kind)))]
        if kind in _ENDS and (ours or "item" not in data):
            return []
        if kind == "response.output_item.done" or kind in _LAST:
            return [*self._ends(), (name, self._edit_end(data) if kind in _LAST else data)]
        return [(name, data)]

    def _named(self, data: Json, kind: str) -> Json:
        return data | {"item_id": self._ids.get(kind) or data.get("item_id")}

    def _items(self) -> list[Json]:
        """The reasoning and the message, whole."""
        found: list[Json] = []
        if "reasoning" in self._ids:
            content = [{"text": self.reasoning, "type": "reasoning_text"}]
            thought: Json = {"id": self._ids["reasoning"], "summary": [], "type": "reasoning"}
            found.append(thought | {"content": content, "encrypted_content": ""})
        if "message" in self._ids:
            said: Json = {"type": "message", "status": "completed", "id": self._ids["message"]}
            found.append(said | {"content": [self._part()], "role": "assistant"})
        return found

    def _part(self) -> Json:
        return {"type": "output_text", "annotations": [], "logprobs": [], "text": self.given}

    def _ends(self) -> list[Event]:
        """The end events of reasoning and message that the client has not got."""
        ends: list[Event] = []
        for item in self._items():
            if item["type"] == "message":
                done = {"item_id": item["id"], "text": self.given}
                ends.append(("response.output_text.done", done))
                ends.append(("response.content_part.done", {"item_id": item["id"], "part": self._part()}))
            ends.append(("response.output_item.done", {"item": item}))
        return [(name, {"type": name} | data) for name, data in ends if not self._has_sent(name, data)]

    def _has_sent(self, name: str, data: Json) -> bool:
        item = mapping(data.get("item"))
        return (f"{name} {item['type']}" if item else name) in self._sent

    def _edit_end(self, data: Json) -> Json:
        response, ours = mapping(data.get("response")), self._items()
        usage = mapping(response.get("usage"))
        others = [one for one in items(response.get("output")) if mapping(one).get("type") not in _TEXT]
        response |= {"id": self._id or response.get("id"), "output": [*ours, *others]}
        if usage:
            generated = self._generated(count(usage.get("output_tokens")) or 0)
            prompt = self._prompt(count(usage.get("input_tokens")) or 0)
            usage |= {"input_tokens": prompt, "output_tokens": generated, "total_tokens": prompt + generated}
            response["usage"] = usage
        return data | {"response": response}

    def _continue(self, request: Json) -> None:
        given = request.get("input")
        before = [{"role": "user", "content": given}] if isinstance(given, str) else items(given)
        said: list[Json] = []
        if self.reasoning:
            content = [{"type": "reasoning_text", "text": self.reasoning}]
            said.append({"type": "reasoning", "summary": [], "content": content})
        if self.given:
            content = [{"type": "output_text", "text": self.given}]
            said.append({"type": "message", "role": "assistant", "content": content})
        request["input"] = [*before, *said]


def _owner(kind: str) -> str:
    return "message" if kind == "response.output_text.delta" else "reasoning"
