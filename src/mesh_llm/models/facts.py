"""From GGUF headers to what placement needs to know of a model."""

import hashlib
import re
from collections.abc import Sequence

from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import ModelFacts, ModelKind
from mesh_llm.models.active import active_bytes, head_bytes, weight_bits
from mesh_llm.models.gguf_types import GgufError, GgufHeader
from mesh_llm.models.shape import Shape

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_DRAFT_NAME = re.compile(r"(^|[-_.])draft([-_.]|$)", re.IGNORECASE)
_NOT_MODELS = {
    "adapter": "it is a LoRA adapter, not a model",
    "vocab": "it holds a vocabulary only",
    "imatrix": "it holds an importance matrix, not a model",
}
# Ollama writes these for an engine of its own, under names that llama.cpp does not know.
_OTHER_ENGINES = frozenset({"gptoss", "mllama"})
_EMBEDDING_ARCHITECTURES = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "gemma-embedding2",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
_POOLING = ("none", "mean", "cls", "last", "rank")
"""`{arch}.pooling_type` by number (llama.h, `llama_pooling_type`)."""
_DRAFT_ARCHITECTURES = frozenset({"dflash", "eagle3", "gemma4-assistant"})


def split_part_name(stem: str) -> tuple[str, int, int]:
    """Take `name-00002-of-00005` apart: name, number (from 1) and count; (stem, 1, 1) for a file of its own."""
    match = _PART.match(stem)
    if match is None:
        return stem, 1, 1
    return match["stem"], int(match["number"]), int(match["count"])


def read_facts(headers: Sequence[GgufHeader], name: str, source: str = "") -> ModelFacts:
    """Make facts of one model from the headers of all its parts, in order.

    Raises:
        GgufError: it is not a whole model that llama.cpp could serve or use.
    """
    first = headers[0]
    _check_parts(headers)
    kind = _kind(first, name)
    if kind is ModelKind.PROJECTOR:
        return _projector(headers, name, source)
    shape = Shape(first)
    vocabulary = _vocabulary(first, shape)
    if sum(len(header.tensors) for header in headers) == 0:
        raise GgufError("it holds no tensors")
    window, window_bytes = shape.window()
    return ModelFacts(
        name=ModelName(name),
        kind=kind,
        size_bytes=_tensor_bytes(headers),
        layers=shape.layers,
        context_train=shape.number("context_length"),
        embedding_length=shape.width,
        vocabulary=vocabulary,
        kv_bytes_per_token=shape.cache_bytes_per_token(),
        kv_window_bytes_per_token=window_bytes,
        window=window,
        state_bytes=shape.state_bytes(),
        compute_width=shape.compute_width(),
        output_bytes=_output_bytes(headers),
        head_bytes=head_bytes(headers),
        active_bytes=active_bytes(headers, shape),
        weight_bits=weight_bits(headers),
        architecture=shape.architecture,
        pooling=_pooling(first) if kind in {ModelKind.EMBEDDING, ModelKind.RERANK} else "",
        encoder=shape.architecture in _EMBEDDING_ARCHITECTURES,
        fingerprint=_fingerprint(headers),
        source=source,
    )


def _check_parts(headers: Sequence[GgufHeader]) -> None:
    first = headers[0]
    count = first.integer("split.count") or 1
    if count != len(headers):
        raise GgufError(f"it has {count} parts, of which {len(headers)} are there", incomplete=len(headers) < count)
    if count == 1:
        return
    for number, header in enumerate(headers):
        if header.integer("split.no") != number or header.integer("split.count") != count:
            raise GgufError(f"its part {number + 1} of {count} belongs to another model")
    declared = first.integer("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if declared is not None and declared != found:
        raise GgufError(f"its parts have {found} tensors, but {declared} are declared")


def _kind(header: GgufHeader, name: str) -> ModelKind:
    architecture = header.text("general.architecture")
    if not architecture:
        raise GgufError("it does not say its architecture")
    file_type = header.text("general.type")
    if file_type in _NOT_MODELS:
        raise GgufError(_NOT_MODELS[file_type])
    if architecture in _OTHER_ENGINES:
        raise GgufError(f"it is made for Ollama's own engine (architecture {architecture})")
    if architecture == "clip" or file_type in {"mmproj", "projector"}:
        return ModelKind.PROJECTOR
    if architecture in _DRAFT_ARCHITECTURES or _DRAFT_NAME.search(name):
        return ModelKind.DRAFT
    pooling = _pooling(header)
    if pooling == "rank" or _has_classifier(header):
        return ModelKind.RERANK
    if architecture in _EMBEDDING_ARCHITECTURES or pooling not in {"", "none"}:
        return ModelKind.EMBEDDING
    return ModelKind.CHAT


def _pooling(header: GgufHeader) -> str:
    number = header.integer(f"{header.text('general.architecture')}.pooling_type")
    return _POOLING[number] if number is not None and 0 <= number < len(_POOLING) else ""


def _has_classifier(header: GgufHeader) -> bool:
    """Whether an encoder ends in a classification head, as rerankers do whose files do not say how they pool."""
    encoder = header.text("general.architecture") in _EMBEDDING_ARCHITECTURES
    return encoder and any(tensor.name in {"cls.weight", "cls.output.weight"} for tensor in header.tensors)


def _projector(headers: Sequence[GgufHeader], name: str, source: str) -> ModelFacts:
    return ModelFacts(
        name=ModelName(name),
        kind=ModelKind.PROJECTOR,
        size_bytes=_tensor_bytes(headers),
        layers=0,
        context_train=0,
        embedding_length=headers[0].integer("clip.vision.projection_dim") or 0,
        vocabulary=0,
        kv_bytes_per_token=0,
        architecture=_projector_type(headers[0]),
        fingerprint=_fingerprint(headers),
        source=source,
    )


def _projector_type(header: GgufHeader) -> str:
    keys = ("clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type")
    return next((kind for key in keys if (kind := header.text(key))), header.text("general.architecture"))


def _vocabulary(header: GgufHeader, shape: Shape) -> int:
    tokens = header.array("tokenizer.ggml.tokens")
    count = tokens.count if tokens is not None else shape.optional("vocab_size")
    if count == 0:
        raise GgufError("it has no vocabulary, so it is no language model")
    return count


def _tensor_bytes(headers: Sequence[GgufHeader]) -> int:
    return sum(tensor.size for header in headers for tensor in header.tensors)


def _output_bytes(headers: Sequence[GgufHeader]) -> int:
    names = {"output.weight", "token_embd.weight"}
    return sum(tensor.size for header in headers for tensor in header.tensors if tensor.name in names)


def _fingerprint(headers: Sequence[GgufHeader]) -> str:
    if len(headers) == 1:
        return headers[0].digest
    return hashlib.blake2b("".join(header.digest for header in headers).encode(), digest_size=16).hexdigest()
