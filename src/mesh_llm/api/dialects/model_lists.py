"""Models as other vendors than OpenAI list them: Anthropic, LM Studio.

A client asks for Anthropic's form by the header `anthropic-version`. LM Studio's (`/api/v0/models`) is that of its
documentation of its REST API, "GET /api/v0/models".
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import msgspec

from mesh_llm.api.dialects.ollama.catalogue import quantization
from mesh_llm.api.json_values import Json
from mesh_llm.api.request import query_fields
from mesh_llm.core.routing.ranking import ModelRoute
from mesh_llm.core.types.model import ModelKind, ModelStatus

_MOST, _USUAL = 1000, 20


class AnthropicModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model. `max_input_tokens`, `max_tokens`: the context, null where it is not known."""

    id: str
    display_name: str
    created_at: str
    max_input_tokens: int | None
    max_tokens: int | None
    type: str = "model"
    lifecycle: str = "active"
    capabilities: None = None
    line: None = None
    deprecated_at: None = None
    retires_at: None = None


def anthropic_model(route: ModelRoute) -> AnthropicModel:
    """A model as Anthropic describes one."""
    return AnthropicModel(
        id=route.name,
        display_name=route.name,
        created_at=datetime.fromtimestamp(route.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=route.context or None,
        max_tokens=route.context or None,
    )


def anthropic_list(routes: Sequence[ModelRoute], query: str) -> dict[str, object]:
    """One page of models; `query`: with `limit`, and `after_id` or `before_id`."""
    asked = query_fields(query)
    limit = next((int(value) for value in asked.get("limit", []) if value.isdecimal() and len(value) < 9), _USUAL)
    limit = min(max(limit, 1), _MOST)
    names = [str(route.name) for route in routes]
    start, end = 0, len(routes)
    if (after := asked.get("after_id", [""])[0]) in names:
        start = names.index(after) + 1
    backwards = (before := asked.get("before_id", [""])[0]) in names
    if backwards:
        end = names.index(before)
        start = max(start, end - limit)
    page = routes[start : min(end, start + limit)]
    return {
        "data": [anthropic_model(route) for route in page],
        "has_more": start > 0 if backwards else start + len(page) < end,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }


_TYPES = {ModelKind.CHAT: "llm", ModelKind.EMBEDDING: "embeddings"}


def lm_studio_list(routes: Iterable[ModelRoute]) -> Json:
    """The answer to `/api/v0/models`."""
    return {"object": "list", "data": [lm_studio_model(route) for route in routes]}


def lm_studio_model(route: ModelRoute) -> Json:
    """The answer to `/api/v0/models/NAME`, and an entry of the list."""
    return {
        "id": route.name,
        "object": "model",
        "type": _TYPES.get(route.kind, route.kind.value),
        "publisher": route.owner or "mesh-llm",
        "compatibility_type": "gguf",
        "quantization": quantization(route.name, None, None),
        "state": "loaded" if route.status is ModelStatus.WARM else "not-loaded",
        "max_context_length": route.context,
    }
