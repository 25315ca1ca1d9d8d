"""An engine that answers in the four dialects as llama-server does, greedily: always the same tokens after a prompt.

Its tokens are words with the space before them. A request that ends with a part of the answer gets the rest of it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WORDS = "Once upon a time there was a 🦔 who said “déjà vu” and\nwent home ."


def tokens_of(text: str) -> list[str]:
    """Cut a text into tokens; joined they are the text."""
    pieces: list[str] = []
    for character in text:
        if character == " " or not pieces:
            pieces.append(character)
        else:
            pieces[-1] += character
    return pieces


@dataclass
class AnsweringEngine:
    """Streams answers. `life` marks its ids, so that two engines never give the same ones."""

    life: str = "a"
    answer: str = WORDS
    reasoning: str = ""

    def stream(self, path: str, request: dict[str, Any]) -> list[bytes]:
        """The events of the answer."""
        kind = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completion,
            "/v1/messages": self._messages,
            "/v1/responses": self._responses,
        }[path]
        return list(kind(request))

    def _rest(self, request: dict[str, Any], thought: str, said: str) -> tuple[list[str], list[str], str, int]:
        """Tokens of reasoning and of the text still to come, why it ends, and how many that is."""
        assert self.reasoning.startswith(thought), (self.reasoning, thought)
        assert self.answer.startswith(said), (self.answer, said)
        thoughts, words = tokens_of(self.reasoning[len(thought) :]), tokens_of(self.answer[len(said) :])
        most = request.get("max_tokens", request.get("max_output_tokens"))
        room = len(thoughts) + len(words) + 1 if most is None else most
        finish = "stop" if room > len(thoughts) + len(words) else "length"
        used = min(room, len(thoughts) + len(words) + 1)
        words = words[: max(0, room - len(thoughts))]
        return thoughts[:room], words, finish, used

    def _chat(self, request: dict[str, Any]) -> Iterator[bytes]:
        last = request["messages"][-1]
        mine = last if last["role"] == "assistant" else {}
        thoughts, words, finish, used = self._rest(request, mine.get("reasoning_content", ""), mine.get("content", ""))
        stamp = {"created": 7, "id": f"chatcmpl-{self.life}", "model": "tiny", "object": "chat.completion.chunk"}

        def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
            return _event({"choices": [{"finish_reason": reason, "index": 0, "delta": delta}], **stamp, **more})

        yield event({"role": "assistant", "content": None})
        yield from (event({"reasoning_content": word}) for word in thoughts)
        yield from (event({"content": word}) for word in words)
        yield event({}, finish)
        if request.get("stream_options", {}).get("include_usage"):
            prompt = _count(json.dumps(request["messages"][:1])) + _count(mine.get("content", ""))
            prompt += _count(mine.get("reasoning_content", ""))
            usage = {"completion_tokens": used, "prompt_tokens": prompt, "total_tokens": prompt + used}
            yield _event({"choices": [], **stamp, "usage": usage})
        yield b"data: [DONE]\n\n"

    def _completion(self, request: dict[str, Any]) -> Iterator[bytes]:
        said = request["prompt"].partition("|")[2]
        _, words, finish, used = self._rest(request, self.reasoning, said)
        stamp = {"created": 7, "model": "tiny", "object": "text_completion", "id": f"chatcmpl-{self.life}"}

        def event(text: str, reason: str | None = None, **more: Any) -> bytes:
            choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
            return _event({"choices": [choice], **stamp, **more})

        yield from (event(word) for word in words)
        prompt = 3 + _count(said)
        usage = {"completion_tokens": used, "prompt_tokens": prompt, "total_tokens": prompt + used}
        yield event("", finish, usage=usage)
        yield b"data: [DONE]\n\n"

    def _messages(self, request: dict[str, Any]) -> Iterator[bytes]:
        last = request["messages"][-1]
        parts = last["content"] if last["role"] == "assistant" else []
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        thought, said = (
            "".join(part.get(kind, "") for part in parts if part["type"] == kind) for kind in ("thinking", "text")
        )
        thoughts, words, finish, used = self._rest(request, thought, said)
        usage = {"input_tokens": 4 + _count(thought) + _count(said), "output_tokens": 0}
        told = {"id": f"msg-{self.life}", "type": "message", "role": "assistant", "content": [], "usage": usage}
        yield _named({"type": "message_start", "message": told})
        blocks = [("thinking", thoughts, thought), ("text", words, said)]
        index, began = 0, list[int]()
        for kind, pieces, before in blocks:
            if pieces:
                yield _named({"type": "content_block_start", "index": index, "content_block": {"type": kind, kind: ""}})
                began.append(index)
                for piece in pieces:
                    delta = {"type": f"{kind}_delta", kind: piece}
                    yield _named({"type": "content_block_delta", "index": index, "delta": delta})
            index += bool(pieces or before)
        for number in began:
            yield _named({"type": "content_block_stop", "index": number})
        ending = {"stop_reason": "end_turn" if finish == "stop" else "max_tokens", "stop_sequence": None}
        yield _named({"type": "message_delta", "delta": ending, "usage": {"output_tokens": used}})
        yield _named({"type": "message_stop"})

    def _responses(self, request: dict[str, Any]) -> Iterator[bytes]:
        given = request["input"] if isinstance(request["input"], list) else []
        thought = "".join(one["content"][0]["text"] for one in given if one.get("type") == "reasoning")
        said = "".join(one["content"][0]["text"] for one in given if one.get("role") == "assistant")
        thoughts, words, _, used = self._rest(request, thought, said)
        names = {"reasoning": f"rs_{self.life}", "message": f"msg_{self.life}"}
        told = {"id": f"resp_{self.life}", "object": "response", "status": "in_progress"}
        yield _named({"type": "response.created", "response": told})
        yield _named({"type": "response.in_progress", "response": told})
        if thoughts:
            item = {"id": names["reasoning"], "summary": [], "type": "reasoning", "content": []}
            yield _named({"type": "response.output_item.added", "item": item})
        for piece in thoughts:
            kind = "response.reasoning_text.delta"
            yield _named({"type": kind, "delta": piece, "item_id": names["reasoning"]})
        if words:
            item = {"content": [], "id": names["message"], "role": "assistant", "type": "message"}
            yield _named({"type": "response.output_item.added", "item": item})
            part = {"type": "output_text", "text": ""}
            yield _named({"type": "response.content_part.added", "item_id": names["message"], "part": part})
        for piece in words:
            kind = "response.output_text.delta"
            yield _named({"type": kind, "item_id": names["message"], "delta": piece})
        output = _whole_items(names, thought + "".join(thoughts), said + "".join(words))
        for item in output:
            if item["type"] == "message":
                text = item["content"][0]["text"]
                yield _named({"type": "response.output_text.done", "item_id": item["id"], "text": text})
                done = {"type": "response.content_part.done", "item_id": item["id"], "part": item["content"][0]}
                yield _named(done)
            yield _named({"type": "response.output_item.done", "item": item})
        prompt = 4 + _count(thought) + _count(said)
        usage = {"input_tokens": prompt, "output_tokens": used, "total_tokens": prompt + used}
        ending = {**told, "created_at": 7, "status": "completed", "output": output, "usage": usage}
        yield _named({"type": "response.completed", "response": ending})


def _whole_items(names: dict[str, str], thought: str, said: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if thought:
        content = [{"text": thought, "type": "reasoning_text"}]
        item = {"id": names["reasoning"], "summary": [], "type": "reasoning", "content": content}
        items.append({**item, "encrypted_content": ""})
    if said:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": said}
        item = {"type": "message", "status": "completed", "id": names["message"], "content": [part]}
        items.append({**item, "role": "assistant"})
    return items


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _named(data: dict[str, Any]) -> bytes:
    return b"event: " + data["type"].encode() + b"\n" + _event(data)


def _count(text: str) -> int:
    return len(tokens_of(text))


def joined(events: Sequence[bytes]) -> bytes:
    """A whole stream."""
    return b"".join(events)
