"""LM Studio's own list of models (`/api/v0/models`).

Source: LM Studio's documentation of its REST API, "GET /api/v0/models".
"""

from collections.abc import Iterable

from mesh_llm.api.dialects.ollama.catalogue import quantization
from mesh_llm.api.json_values import Json
from mesh_llm.core.routing.ranking import ModelRoute
from mesh_llm.core.types.model import ModelKind, ModelStatus

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
