"""What Ollama's clients learn of models beyond their routes, from announcements and from the files here."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from mesh_llm.core.node import Node
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts
from mesh_llm.daemon.model_registry import ModelRegistry
from mesh_llm.models.gguf.header import GgufArray, GgufError, read_header

_KEPT = 32


class DescribedModels:
    """Implements api.dialects.ollama.endpoints.KnownModels."""

    def __init__(self, node: Node, registry: ModelRegistry) -> None:
        self._node = node
        self._registry = registry
        self._headers: OrderedDict[tuple[object, ...], dict[str, object]] = OrderedDict()

    @property
    def gpu(self) -> bool:
        """Whether this node computes on a GPU."""
        return self._node.capacity.host_bytes > 0

    def facts(self) -> Mapping[str, ModelFacts]:
        """Facts of the models of the mesh, by name; those of this node's own files come first."""
        others = {facts.name: facts for member in self._node.members for facts in member.announcement.on_disk}
        return {**others, **{facts.name: facts for facts in self._registry.facts()}}

    def modified(self) -> Mapping[str, float]:
        """UNIX seconds at which the files here changed, by name."""
        found: dict[str, float] = {}
        for name, model in self._registry.library.models.items():
            try:
                found[name] = model.path.stat().st_mtime
            except OSError:
                continue
        return found

    async def metadata(self, model: ModelName, *, arrays: bool) -> Mapping[str, object]:
        """The metadata in the header of a model's file, and `general.parameter_count`; empty if it is not here.

        `arrays` False: they are empty, as Ollama shows them. Those that are too long to keep are always empty.
        """
        local = self._registry.find(model)
        if local is None:
            return {}
        try:
            key = tuple((path, path.stat().st_mtime_ns) for path in local.paths)
            known = self._headers.pop(key, None) or await asyncio.to_thread(_read, local.paths)
        except (OSError, GgufError):
            return {}
        self._headers[key] = known
        while len(self._headers) > _KEPT:
            self._headers.popitem(last=False)
        return known if arrays else {name: [] if isinstance(value, list) else value for name, value in known.items()}


def _read(paths: tuple[Path, ...]) -> dict[str, object]:
    headers = [read_header(path) for path in paths]
    found: dict[str, object] = {
        "general.parameter_count": sum(math.prod(tensor.shape) for header in headers for tensor in header.tensors)
    }
    for key, value in headers[0].metadata.items():
        if isinstance(value, GgufArray):
            found[key] = list(value.values or ())
        elif not (isinstance(value, float) and not math.isfinite(value)):
            found[key] = value
    return found
