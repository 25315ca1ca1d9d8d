"""Resuming `/v1/messages`: an answer in numbered blocks, each with a start and a stop event."""

from typing import ClassVar

from mesh_llm.api.json_values import Json, count, items, last, mapping, text
from mesh_llm.api.resume.state import Event, ResumeState

_STOP = "content_block_stop"


class MessagesState(ResumeState):
    """Blocks of the next engine are mapped to those that the client has; `_open` blocks are stopped at the end."""

    LIMITS: ClassVar[tuple[str, ...]] = ("max_tokens", "n_predict")

    def __init__(self, request: Json) -> None:
        super().__init__(request)
        self._kinds: list[str] = []
        self._open: set[int] = set()
        self._mapped: dict[int, int] = {}

    @classmethod
    def forbidden(cls, request: Json) -> str:
        """A last message that cannot be extended."""
        message = last(items(request.get("messages")))
        if message.get("role") == "assistant" and not isinstance(message.get("content"), str):
            return "it already continues a message in parts"
        return ""

    def request(self, counted: int | None) -> bytes:
        """Also forget the last engine's numbers of blocks."""
        self._mapped.clear()
        return super().request(counted)

    def _tail(self) -> bytes | None:
        return b'event: message_stop\ndata: {"type":"message_stop"}\n\n' if self.finished else None

    def _note(self, name: str, data: Json) -> None:
        match data.get("type", name):
            case "content_block_start":
                self._note_start(mapping(data.get("content_block")).get("type"))
            case "content_block_delta":
                delta = mapping(data.get("delta"))
                said, thought = text(delta.get("text")), text(delta.get("thinking"))
                if said or thought:
                    self.given += said
                    self.reasoning += thought
                    self.pieces += 1
            case "content_block_stop":
                self._open.discard(count(data.get("index")) or 0)
            case "message_delta":
                self.finished = True
            case "message_stop" | "error":
                self.over = True
            case _:
                pass

    def _note_start(self, kind: object) -> None:
        self._open.add(len(self._kinds))
        self._kinds.append(text(kind))
        if kind not in ("text", "thinking"):
            self.blocked = "a tool call was incomplete"

    def _edit(self, name: str, data: Json) -> list[Event]:
        match data.get("type", name):
            case "message_start":
                return [] if self.begun else [(name, data)]
            case "content_block_start" | "content_block_delta" if self._muted:
                self._fresh = True
                return []
            case "content_block_start":
                return self._edit_start(name, data)
            case "content_block_delta":
                return self._edit_delta(name, data)
            case "content_block_stop":
                return []
            case "message_delta":
                return [] if self.finished else [*self._stops(), (name, self._edit_end(data))]
            case _:
                return [(name, data)]

    def _edit_start(self, name: str, data: Json) -> list[Event]:
        index, kind = count(data.get("index")) or 0, text(mapping(data.get("content_block")).get("type"))
        known = kind in ("text", "thinking") and kind in self._kinds
        self._mapped[index] = self._kinds.index(kind) if known else len(self._kinds)
        return [] if known else [(name, data | {"index": self._mapped[index]})]

    def _edit_delta(self, name: str, data: Json) -> list[Event]:
        index = count(data.get("index")) or 0
        delta = mapping(data.get("delta"))
        kind = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "thinking"}.get(
            text(delta.get("type")), ""
        )
        self._fresh = True
        if kind in self._kinds:
            return [(name, data | {"index": self._kinds.index(kind)})]
        return [(name, data | {"index": self._mapped[index]})] if index in self._mapped else []

    def _stops(self) -> list[Event]:
        return [(_STOP, {"type": _STOP, "index": index}) for index in sorted(self._open)]

    def _edit_end(self, data: Json) -> Json:
        usage, delta = mapping(data.get("usage")), mapping(data.get("delta"))
        if "output_tokens" in usage:
            data["usage"] = usage | {"output_tokens": self._generated(count(usage["output_tokens"]) or 0)}
        if self._spent:
            data["delta"] = delta | {"stop_reason": "max_tokens", "stop_sequence": None}
        return data

    def _continue(self, request: Json) -> None:
        messages = items(request.get("messages"))
        message, before = last(messages), ""
        if message.get("role") == "assistant":
            before = text(message.get("content"))
            messages = messages[:-1]
        parts: list[Json] = [{"type": "thinking", "thinking": self.reasoning}] if self.reasoning else []
        if before or self.given:
            parts.append({"type": "text", "text": before + self.given})
        said = parts if self.reasoning else before + self.given
        request["messages"] = [*messages, {"role": "assistant", "content": said}]
