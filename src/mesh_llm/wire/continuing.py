"""How an answer that broke off is continued by another engine: the next request, and what the client gets of it.

Pure. The text so far becomes the beginning of the assistant's message, and the engine writes on from there:
llama-server does so for a conversation that ends with an assistant's message, and streams only what is new. What it
sends is told as the rest of the first answer: same id, nothing said twice, tokens counted over all engines.

Where that cannot be right, `story_of` or `Story.blocked` says why, in words that complete "it cannot be continued: …".
"""

import msgspec

from mesh_llm.wire.continuing_chat import ChatStory
from mesh_llm.wire.continuing_completions import CompletionStory
from mesh_llm.wire.continuing_messages import MessagesStory
from mesh_llm.wire.continuing_responses import ResponsesStory
from mesh_llm.wire.continuing_rules import Cannot
from mesh_llm.wire.continuing_story import Story

__all__ = ["CONTINUED", "Cannot", "Story", "story_of"]

CONTINUED: dict[str, type[Story]] = {
    "/v1/chat/completions": ChatStory,
    "/v1/completions": CompletionStory,
    "/v1/messages": MessagesStory,
    "/v1/responses": ResponsesStory,
}
"""Paths whose streams can go on elsewhere."""


def story_of(path: str, body: bytes) -> Story | Cannot:
    """The story of an answer to a request, with nothing of it told yet; or why it could never be continued."""
    kind = CONTINUED.get(path)
    if kind is None:
        return Cannot("answers of this kind never are")
    try:
        request = msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Cannot("its request is not understood")
    reason = kind.forbidden(request)
    return Cannot(reason) if reason else kind(request)
