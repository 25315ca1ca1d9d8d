"""Which corrections a path's requests and answers get; and what the vendors have and no node."""

from collections.abc import Callable

from mesh_llm.api.dialects.anthropic_messages import correct_count, correct_messages
from mesh_llm.api.dialects.corrected import Corrected, RequestEdit, edit_event
from mesh_llm.api.dialects.openai_chat import (
    ask_for_counts,
    correct_chat,
    correct_chat_count,
    correct_completion,
    correct_embeddings,
    correct_own_completion,
)
from mesh_llm.api.dialects.openai_responses import correct_responses_count
from mesh_llm.api.json_values import Json, count, mapping, text
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
_READS_PROMPT = frozenset(
    (
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/completion", "/completions", "/infill",
    )
)  # fmt: skip
"""Paths whose engine keeps what it has read, and says how much of the next prompt it had."""
_EVENT_END = b"\n\n"
_CACHED, _TIMINGS = b"cache_read_input_tokens", b'"timings"'
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


def correct_of_peer(path: str, body: bytes, fields: Fields, *, stranger: bool) -> Corrected:
    """Another node's request, which was corrected there, as far as this host cannot leave that to it.

    Its answer must say how many tokens it took. A stranger's prompt is read as a whole: how much of it was in a slot
    would say what others had asked, and token by token a prompt could be guessed. Of Messages, where llama.cpp does not
    take that wish, the answer does not say it.
    """
    if path == "/props":
        return Corrected(body, whole=_without_folder)
    edit = RequestEdit(body, fields)
    if _BY_PATH.get(path) is correct_own_completion:
        ask_for_counts(edit)
    if stranger and path == "/v1/messages":
        return Corrected(body, whole=_hide_cached, events=_hide_cached_in_events)
    if stranger and path in _READS_PROMPT:
        edit.set("cache_prompt", value=False)
    return Corrected(edit.body)


def _hide_cached(answer: Json) -> Json:
    """An answer that does not say how much of its prompt had been read before."""
    usage = mapping(answer.get("usage"))
    cached = count(usage.get("cache_read_input_tokens")) or 0
    if cached:
        usage = {**usage, "input_tokens": (count(usage.get("input_tokens")) or 0) + cached}
        answer = {**answer, "usage": {**usage, "cache_read_input_tokens": 0}}
    return {name: value for name, value in answer.items() if name != "timings"}


def _hide_cached_in_events(data: bytes) -> bytes:
    """The same of whole events of a stream."""
    if _CACHED not in data and _TIMINGS not in data:
        return data

    def edit(event: Json) -> Json:
        said = mapping(event.get("message"))
        return _hide_cached(event | {"message": _hide_cached(said)} if said else event)

    return _EVENT_END.join(edit_event(event, edit) for event in data.split(_EVENT_END))


def _without_folder(props: Json) -> Json:
    """Where a file is on this machine is nobody else's concern."""
    return {**props, "model_path": text(props.get("model_path")).rpartition("/")[2]}


def absent(path: str) -> MeshError | None:
    """The refusal (404) of a path that a vendor documents and no node has; None for any other path."""
    for beginning, (what, hint) in _ABSENT.items():
        if path == beginning or path.startswith(beginning + "/"):
            return MeshError("not_supported", f"{what}: mesh-llm has nothing of the kind.", hint, 404)
    return None
