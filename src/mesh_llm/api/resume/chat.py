"""Resuming `/v1/chat/completions` and `/v1/completions`."""

from typing import ClassVar

from mesh_llm.api.json_values import Json, count, items, last, mapping, text
from mesh_llm.api.resume.state import Event, ResumeState

_STAMPS = ("id", "created", "model", "system_fingerprint")


class ChatState(ResumeState):
    """Events are chunks with `delta`; the text so far goes into a last message of the assistant."""

    LIMITS: ClassVar[tuple[str, ...]] = ("max_tokens", "max_completion_tokens", "n_predict")

    def __init__(self, request: Json) -> None:
        super().__init__(request)
        self._stamp: Json = {}
        self._role_given = False
        self._usage_given = False
        self._wants_usage = mapping(request.get("stream_options")).get("include_usage") is True

    @classmethod
    def forbidden(cls, request: Json) -> str:
        """A last message that cannot be extended."""
        message = last(items(request.get("messages")))
        if message.get("role") == "assistant" and not isinstance(message.get("content"), str | None):
            return "it already continues a message in parts"
        return ""

    def _tail(self) -> bytes | None:
        return b"data: [DONE]\n\n" if self.finished and (self._usage_given or not self._wants_usage) else None

    def _note(self, name: str, data: Json) -> None:  # noqa: ARG002 - its events have no names
        if "error" in data:
            self.over = True
            return
        if not self._stamp:
            self._stamp = {key: data[key] for key in _STAMPS if key in data}
        if data.get("usage"):
            self._usage_given = True
        for choice in items(data.get("choices")):
            self._note_choice(mapping(choice))

    def _note_choice(self, choice: Json) -> None:
        if choice.get("index"):
            self.blocked = "several answers came at once"
        delta = mapping(choice.get("delta"))
        self._role_given |= "role" in delta
        reasoning, content = text(delta.get("reasoning_content")), text(delta.get("content"))
        if reasoning or content:
            self.reasoning += reasoning
            self.given += content
            self.pieces += 1
        if delta.get("tool_calls"):
            self.blocked = "a tool call was incomplete"
        if choice.get("finish_reason") is not None:
            self.finished = True

    def _edit(self, name: str, data: Json) -> list[Event]:
        if "error" in data:
            return [(name, data)]
        data |= {key: value for key, value in self._stamp.items() if key in data}
        choices = [edited for choice in items(data.get("choices")) if (edited := self._edit_choice(mapping(choice)))]
        usage = mapping(data.get("usage"))
        if usage:
            data["usage"] = self._edit_usage(usage)
        if not choices and (not usage or self._usage_given):
            return []
        data["choices"] = choices
        return [(name, data)]

    def _edit_choice(self, choice: Json) -> Json | None:
        delta = mapping(choice.get("delta"))
        if self._role_given and delta.pop("role", None) is not None and delta.get("content") is None:
            delta.pop("content", None)
        if delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
            self._fresh = True
            if self._muted:
                delta = {}
        finish = choice.get("finish_reason")
        if self._closing:
            return None
        if finish is not None and self._spent:
            finish = "length"
        if not delta and finish is None:
            return None
        return choice | {"delta": delta, "finish_reason": finish}

    def _edit_usage(self, usage: Json) -> Json:
        generated = self._generated(count(usage.get("completion_tokens")) or 0)
        prompt = self._prompt(count(usage.get("prompt_tokens")) or 0)
        return usage | {
            "completion_tokens": generated,
            "prompt_tokens": prompt,
            "total_tokens": prompt + generated,
        }

    def _continue(self, request: Json) -> None:
        messages = items(request.get("messages"))
        message = last(messages)
        said: Json = {"role": "assistant", "content": self.given}
        if message.get("role") == "assistant":
            said = message | {"content": text(message.get("content")) + self.given}
            messages = messages[:-1]
        if self.reasoning:
            said["reasoning_content"] = text(said.get("reasoning_content")) + self.reasoning
        request["messages"] = [*messages, said]


class CompletionState(ChatState):
    """Events have `text` in place of `delta`, and the last one the usage; the text so far extends the prompt."""

    LIMITS: ClassVar[tuple[str, ...]] = ("max_tokens", "n_predict")

    @classmethod
    def forbidden(cls, request: Json) -> str:
        """A prompt that cannot be extended, and a schema."""
        if not isinstance(request.get("prompt"), str):
            return "its prompt is not one text"
        if request.get("suffix"):
            return "a suffix must follow it"
        if any(request.get(name) for name in ("json_schema", "response_format")):
            return "a schema constrains it from its beginning on"
        return ""

    def _note_choice(self, choice: Json) -> None:
        if choice.get("index"):
            self.blocked = "several answers came at once"
        if said := text(choice.get("text")):
            self.given += said
            self.pieces += 1
        if choice.get("finish_reason") is not None:
            self.finished = True

    def _edit_choice(self, choice: Json) -> Json | None:
        finish = choice.get("finish_reason")
        if self._closing:
            return None
        if text(choice.get("text")):
            self._fresh = True
            if self._spent:
                choice["text"] = ""
        if finish is None and self._spent:
            return None
        return choice | {"finish_reason": "length"} if finish is not None and self._spent else choice

    def _continue(self, request: Json) -> None:
        request["prompt"] = text(request.get("prompt")) + self.given
