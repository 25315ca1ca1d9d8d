"""Continuing `/v1/completions`: the text so far is simply more of the prompt."""

from typing import ClassVar

from mesh_llm.wire.continuing_chat import ChatStory
from mesh_llm.wire.continuing_rules import Json, forbidden, text


class CompletionStory(ChatStory):
    """See Story. Its events are a chat's with `text` in the place of `delta`; the last one tells the usage."""

    LIMITS: ClassVar[tuple[str, ...]] = ("max_tokens", "n_predict")

    @classmethod
    def forbidden(cls, request: Json) -> str:
        """See Story."""
        if reason := forbidden(request):
            return reason
        if not isinstance(request.get("prompt"), str):
            return "its prompt is not one text"
        if request.get("suffix"):
            return "a suffix was to follow it"
        if any(request.get(name) for name in ("json_schema", "response_format")):
            return "a schema binds it from its beginning on"
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
