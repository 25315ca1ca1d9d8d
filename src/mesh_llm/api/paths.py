"""What the front door answers: paths that go to an engine, and its own."""

from mesh_llm.api.errors import MethodNotAllowedError
from mesh_llm.core.errors import MeshError

RELAYED: dict[str, str] = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/responses": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/rerank": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/apply-template": "POST",
    "/props": "GET",
    "/slots": "GET",
}
"""Path to the one method that is passed on."""

OWN = frozenset({"/health", "/metrics", "/v1/models"})
"""Paths answered here, by GET and HEAD."""

_API = ", ".join(["/v1/models", *(path for path in RELAYED if path.startswith("/v1/"))])

MODEL_PREFIX = "/v1/models/"
"""Beginning of `/v1/models/{id}`."""


def is_own(path: str) -> bool:
    """Whether the path is answered here."""
    return path in OWN or (path.startswith(MODEL_PREFIX) and len(path) > len(MODEL_PREFIX))


def check_relayed(path: str, method: str) -> None:
    """Raises MeshError `not_found` (404) or `method_not_allowed` (405) unless the request goes to an engine."""
    allowed = RELAYED.get(path)
    if allowed is None:
        raise MeshError(
            code="not_found",
            message="There is nothing at this path.",
            hint=f"The API is at {_API}.",
            status=404,
        )
    if method != allowed:
        raise method_not_allowed(allowed)


def method_not_allowed(allowed: str) -> MethodNotAllowedError:
    """The error of a path that takes other methods."""
    return MethodNotAllowedError(
        code="method_not_allowed",
        message="This path does not take that method.",
        hint=f"Use {allowed}.",
        status=405,
        allow=allowed,
    )
