"""Which corrections a path's requests and answers get."""

from collections.abc import Callable

from mesh_llm.api.dialects.anthropic_messages import correct_count, correct_messages
from mesh_llm.api.dialects.corrected import Corrected
from mesh_llm.api.dialects.openai_chat import correct_chat, correct_completion, correct_embeddings
from mesh_llm.api.dialects.openai_responses import ResponsesContext, correct_responses
from mesh_llm.api.validation import Fields

_BY_PATH: dict[str, Callable[[bytes, Fields], Corrected]] = {
    "/v1/chat/completions": correct_chat,
    "/v1/completions": correct_completion,
    "/v1/embeddings": correct_embeddings,
    "/v1/messages": correct_messages,
    "/v1/messages/count_tokens": correct_count,
}


def correct(path: str, body: bytes, fields: Fields, known: ResponsesContext) -> Corrected:
    """The request of a client, corrected for an engine, with what its answer needs.

    Raises:
        MeshError: 400 for what the vendor's API has and no engine.
    """
    if path == "/v1/responses":
        return correct_responses(body, fields, known)
    correct_path = _BY_PATH.get(path)
    return correct_path(body, fields) if correct_path is not None else Corrected(body)
