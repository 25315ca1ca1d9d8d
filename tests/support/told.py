"""A streamed answer in any dialect, as its client read it, to be compared with another."""

import json
from typing import Any

RESPONSE_ENDS = {"response.completed", "response.incomplete"}
"""The last event of a response: the latter where it ended at its token limit."""
ENDS = RESPONSE_ENDS | {"message_stop"}


class Told:
    """A streamed answer, as its client read it."""

    def __init__(self) -> None:
        self.text = ""
        self.thought = ""
        self.finish: list[Any] = []
        self.usage: list[dict[str, int]] = []
        self.ids: set[str] = set()
        self.kinds: list[str] = []
        self.over = False

    def take(self, name: str, data: str) -> None:
        assert not self.over, data
        if data == "[DONE]":
            self.over = True
            return
        event = json.loads(data)
        assert "error" not in event, event
        kind = event.get("type", name)
        if kind in ENDS:
            self.over = True
        if not self.kinds or self.kinds[-1] != kind:
            self.kinds.append(kind)
        for choice in event.get("choices", []):
            self.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            self.thought += choice.get("delta", {}).get("reasoning_content") or ""
            self.finish += [choice["finish_reason"]] if choice["finish_reason"] else []
        delta = event.get("delta")
        if isinstance(delta, str) and kind == "response.reasoning_text.delta":
            self.thought += delta
        elif isinstance(delta, str):
            self.text += delta
        elif delta:
            self.text += delta.get("text", "")
            self.thought += delta.get("thinking", "")
            self.finish += [delta["stop_reason"]] if delta.get("stop_reason") else []
        response = event.get("response", {})
        usage = event.get("usage") or response.get("usage")
        if usage:
            self.usage.append({key: value for key, value in usage.items() if key.endswith("_tokens")})
        self.ids |= {one["id"] for one in (event, response, event.get("message", {})) if "id" in one}
        if kind in RESPONSE_ENDS:
            whole = [text for text in (self.thought, self.text) if text]
            assert [one["content"][0]["text"] for one in response["output"]] == whole

    def same_as(self, other: "Told") -> None:
        assert self.over
        assert (self.thought, self.text) == (other.thought, other.text)
        assert (self.finish, self.kinds) == (other.finish, other.kinds)
        assert [_without_cache(usage) for usage in self.usage] == [_without_cache(usage) for usage in other.usage]
        assert len(self.ids) == len(other.ids) == 1


def _without_cache(usage: dict[str, int]) -> dict[str, int]:
    """How much of a prompt was in a cache differs from request to request."""
    kept = {key: value for key, value in usage.items() if "cache" not in key}
    return kept | {"input_tokens": kept.get("input_tokens", 0) + usage.get("cache_read_input_tokens", 0)}
