"""What Ollama's clients learn of models beyond their routes, and what they change on this machine's disk."""

import asyncio
import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

from mesh_llm.api.dialects.ollama.management import PullStep
from mesh_llm.console.schema import DownloadRecord
from mesh_llm.core.node import Node
from mesh_llm.core.placement.launches import Origin
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, DropRequested
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts
from mesh_llm.daemon.downloads import Downloads
from mesh_llm.daemon.model_registry import ModelRegistry
from mesh_llm.daemon.published_state import ChangeSignal
from mesh_llm.models.gguf.header import GgufArray, GgufError, read_header
from mesh_llm.models.hub.cache import hub_cache_directory
from mesh_llm.models.library.created import BlobStore, link_model, make_model, remove_created
from mesh_llm.models.library.library import LocalModel
from mesh_llm.models.library.upkeep import plan_removal, remove

_KEPT = 32
_DRAIN_SECONDS = 600.0
Register = Callable[[str], Awaitable[object]]
"""Scans the disk again, and reports its models to the core. Gets the name of the model that changed."""


class DescribedModels:
    """Implements api.dialects.ollama.endpoints.KnownModels."""

    def __init__(self, node: Node, registry: ModelRegistry, post: Callable[[AnyEvent], None]) -> None:
        self._post = post
        self._node = node
        self._registry = registry
        self._headers: OrderedDict[tuple[object, ...], dict[str, object]] = OrderedDict()

    @property
    def gpu(self) -> bool:
        """Whether this node computes on a GPU."""
        return self._node.capacity.host_bytes > 0

    def unload(self, model: ModelName) -> None:
        """Unload a model of this node that a request loaded, once its answers have ended; the next one loads it again.

        What the user serves, pins or keeps loaded stays.
        """
        launch = next((one for one in self._node.launches if one.model == model), None)
        if launch is not None and launch.order.origin is Origin.DEMAND and not self._node.is_pinned(model):
            self._post(DropRequested(model=model, drain_seconds=_DRAIN_SECONDS, rest=True))

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


_POLL_SECONDS = 5.0
_ENDED = frozenset({"done", "failed", "cancelled"})
_HUB = re.compile(r"(?:hf\.co|huggingface\.co)/([\w.-]+/[\w.-]+)(?::([\w.-]+))?", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,119}(?::[\w.-]{1,80})?", re.ASCII)
_SOURCE = re.compile(r"hf:[\w.-]+/[\w.-]+(?::[\w.-]+)?(?:@[\w.-]+)?", re.ASCII)
_JOINT = re.compile(r"(?<=[a-z])(?=\d)")


def pull_specs(name: str) -> list[str]:
    """What to ask for in place of a name of Ollama's, the best first. A name never means a path or another address.

    `hf.co/OWNER/REPO:Q4_K_M` is that repository of the hub. `llama3.2:3b` is looked for as `llama3.2-3b`, and as
    `llama-3.2-3b` in the catalogue.

    Raises:
        MeshError: `model_not_found` (404) for names of other registries.
    """
    hub = _HUB.fullmatch(name)
    if hub is not None:
        return [f"hf:{hub[1]}" + (f":{hub[2]}" if hub[2] and hub[2] != "latest" else "")]
    if _SOURCE.fullmatch(name) and ".." not in name:
        return [name]
    if not _PLAIN.fullmatch(name) or name.lower().endswith(".gguf"):
        raise MeshError(
            "model_not_found",
            f"pull model manifest: {name[:200]!r} is in no place that this node fetches models from.",
            "Use a name of the catalogue (mesh-llm models search), or hf.co/OWNER/REPO:QUANT.",
            404,
            param="model",
        )
    plain = name.removesuffix(":latest").replace(":", "-")
    return list(dict.fromkeys((plain, _JOINT.sub("-", plain, count=1))))


class ClientsModels:
    """Implements api.dialects.ollama.management.ModelStore."""

    def __init__(
        self,
        node: Node,
        registry: ModelRegistry,
        downloads: Downloads,
        changes: ChangeSignal,
        register: Register,
        blobs: Path,
    ) -> None:
        """`register`: scans the disk again for a model; `blobs`: where uploaded files wait."""
        self._node = node
        self._registry = registry
        self._downloads = downloads
        self._changes = changes
        self._register = register
        self._blobs = BlobStore(blobs)

    async def pull(self, model: str) -> AsyncGenerator[PullStep]:
        """Fetch a model from other nodes or the hub, and follow the download."""
        record = await self._begin(model)
        if record is None:
            yield PullStep(phase="done")
            return
        while True:
            record = next((one for one in self._downloads.records() if one.id == record.id), record)
            yield PullStep(
                phase=record.phase,
                digest=f"sha256:{hashlib.sha256(record.source.encode()).hexdigest()}",
                total=record.total_bytes,
                completed=record.done_bytes,
            )
            if record.phase in _ENDED:
                break
            await self._changes.wait(_POLL_SECONDS)
        if record.phase == "cancelled":
            raise MeshError("download_cancelled", "The download was cancelled.", "Pull it again to go on.", 409)
        if record.error is not None:
            raise MeshError(record.error.code, record.error.message, record.error.hint, 500)

    async def _begin(self, model: str) -> DownloadRecord | None:
        """Begin a download; None if the model is here."""
        missing: MeshError | None = None
        for spec in pull_specs(model):
            try:
                return await self._downloads.start(spec, load=False)
            except MeshError as error:
                if error.code == "already_here":
                    return None
                if error.code != "model_not_found":
                    raise
                missing = missing or error
        message = missing.message if missing is not None else ""
        hint = "Use a name of the catalogue (mesh-llm models search), or hf.co/OWNER/REPO:QUANT."
        raise MeshError("model_not_found", f"pull model manifest: {message}", hint, 404, param="model")

    async def delete(self, model: str) -> None:
        """Remove a model that was fetched, or that a client made."""
        found = self._find(model)
        if any(serving.model == found.name for serving in self._node.serving):
            message = f"{found.name} is being served."
            raise MeshError("model_served", message, f"Stop it first: mesh-llm drop {found.name}", 409)

        def work() -> None:
            if not remove_created(found):
                cache = hub_cache_directory()
                remove(plan_removal(found, cache), cache)

        await asyncio.to_thread(work)
        await self._register(found.name)

    async def copy(self, source: str, destination: str) -> str:
        """Give a model a further name."""
        found = self._find(source)
        self._check_free(destination)
        name = await asyncio.to_thread(link_model, found, destination)
        await self._register(name)
        return name

    async def create(self, model: str, digest: str) -> str:
        """Make a model of an uploaded file."""
        blob = self._blobs.find(digest)
        if blob is None:
            raise MeshError("blob_not_found", f"blob {digest!r} not found", f"Upload it: POST /api/blobs/{digest}", 400)
        self._check_free(model)
        name = await asyncio.to_thread(make_model, blob, model)
        await self._register(name)
        return name

    def has_blob(self, digest: str) -> bool:
        """Whether a file with this digest was uploaded."""
        return self._blobs.find(digest) is not None

    async def store_blob(self, digest: str, size: int | None, pieces: AsyncIterator[bytes]) -> None:
        """Store an uploaded file; its bytes are written and hashed on a thread."""
        upload = await asyncio.to_thread(self._blobs.begin, digest, size)
        try:
            async for piece in pieces:
                await asyncio.to_thread(upload.write, piece)
            await asyncio.to_thread(upload.finish)
        finally:
            upload.abort()

    def _find(self, name: str) -> LocalModel:
        """The model on this disk that a client names; never by a path. Raises MeshError (404)."""
        library = self._registry.library
        known = {**library.drafts, **library.models}
        plain = name.removesuffix(":latest")
        for reading in dict.fromkeys((name, plain, plain.rpartition("/")[2].replace(":", "-"))):
            for model, found in known.items():
                if model.casefold() == reading.casefold():
                    return found
        raise MeshError("model_not_found", f"model '{name[:200]}' not found.", "It is not on this node's disk.", 404)

    def _check_free(self, name: str) -> None:
        """Raises MeshError (409) if a model is called so already."""
        try:
            other = self._find(name)
        except MeshError:
            return
        raise MeshError("model_exists", f"A model is called {other.name} already.", "Choose another name.", 409)
