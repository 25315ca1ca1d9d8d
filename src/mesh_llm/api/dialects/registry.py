"""Which corrections a path's requests and answers get; and what the vendors have and no node."""

from collections.abc import Callable

from mesh_llm.api.dialects.anthropic_messages import correct_count, correct_messages
from mesh_llm.api.dialects.corrected import Corrected
from mesh_llm.api.dialects.openai_chat import (
    correct_chat,
    correct_chat_count,
    correct_completion,
    correct_embeddings,
    correct_own_completion,
)
from mesh_llm.api.dialects.openai_responses import correct_responses_count
from mesh_llm.api.validation import Fields
from mesh_llm.core.types.errors import MeshError

_BY_PATH: dict[str, Callable[[bytes, Fields], Corrected]] = {
    "/v1/chat/completions": correct_chat,
    "/v1/chat/completions/input_tokens": correct_chat_count,
    "/v1/completions": correct_completion,
    "/completion": correct_own_completion,
    "/completions": correct_own_completion,
    "/infill": correct_own_completion,
    "/v1/embeddings": correct_embeddings,
    "/v1/messages/count_tokens": correct_count,
    "/v1/responses/input_tokens": correct_responses_count,
}
_ABSENT = {
    "/v1/messages/batches": ("Batches of messages", "Send each message to /v1/messages."),
    "/v1/batches": ("Batches", "Send each request by itself."),
    "/v1/conversations": ("Conversations", "Send previous_response_id to /v1/responses."),
    "/v1/files": ("Files", "Send the content in the request."),
    "/v1/uploads": ("Uploads", "Send the content in the request."),
    "/v1/vector_stores": ("Vector stores", "Make vectors at /v1/embeddings, and search them yourself."),
    "/v1/assistants": ("Assistants", "Use /v1/responses."),
    "/v1/threads": ("Threads", "Use /v1/responses."),
    "/v1/realtime": ("Realtime sessions", "Use /v1/responses with a stream."),
    "/v1/images": ("Pictures as answers", ""),
    "/v1/videos": ("Videos as answers", ""),
    "/v1/audio/speech": ("Speech as an answer", ""),
    "/v1/audio/translations": ("Translations of sound", "Use /v1/audio/transcriptions, and ask a model to translate."),
    "/v1/moderations": ("Moderation", "Ask a model at /v1/chat/completions."),
    "/v1/fine_tuning": ("Fine-tuning", ""),
    "/v1/complete": ("Anthropic's text completions", "Use /v1/messages."),
    "/v1/responses/compact": ("Compacting a conversation", "Ask a model for a summary of it."),
}
"""Beginnings of paths that the vendors document, what they are, and what to do instead."""


def correct(path: str, body: bytes, fields: Fields, request_id: str = "") -> Corrected:
    """The request of a client, corrected for an engine, with what its answer needs.

    Not one of Responses, which may continue a stored answer: see `correct_responses`.

    Args:
        path: that the client asked.
        body: of the request.
        fields: of the body.
        request_id: the request's name.

    Raises:
        MeshError: 400 for what the vendor's API has and no engine.
    """
    if path == "/v1/messages":
        return correct_messages(body, fields, request_id)
    correct_path = _BY_PATH.get(path)
    return correct_path(body, fields) if correct_path is not None else Corrected(body)


def absent(path: str) -> MeshError | None:
    """The refusal (404) of a path that a vendor documents and no node has; None for any other path."""
    for beginning, (what, hint) in _ABSENT.items():
        if path == beginning or path.startswith(beginning + "/"):
            return MeshError("not_supported", f"{what}: mesh-llm has nothing of the kind.", hint, 404)
    return None
