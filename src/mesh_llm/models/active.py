"""What one token reads of a model's weights, from the headers of its parts."""

from collections.abc import Iterator, Sequence

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.models.gguf_types import GgufHeader, TensorInfo
from mesh_llm.models.shape import Shape

_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"
_EXPERTS = "_exps."


def head_bytes(headers: Sequence[GgufHeader]) -> int:
    """The output layer, which is the token embedding where a model has none of its own."""
    sizes = {tensor.name: tensor.size for tensor in _tensors(headers)}
    return sizes.get(_OUTPUT, sizes.get(_EMBEDDING, 0))


def active_bytes(headers: Sequence[GgufHeader], shape: Shape) -> int:
    """All weights but the rows of the embedding that are not looked up, and the experts that are not used."""
    used, there = shape.optional("expert_used_count"), shape.optional("expert_count")
    part = used / there if 0 < used < there else 1.0
    layers = 0.0
    for tensor in _tensors(headers):
        if tensor.name not in {_EMBEDDING, _OUTPUT}:
            layers += tensor.size * (part if _EXPERTS in tensor.name else 1.0)
    return int(layers) + head_bytes(headers)


def weight_bits(headers: Sequence[GgufHeader]) -> float:
    """Of the layers' matrices; vectors are few, and of another type."""
    size = elements = 0
    for tensor in _tensors(headers):
        kind = GGML_TYPES.get(tensor.type)
        if kind is not None and len(tensor.shape) > 1 and tensor.name not in {_EMBEDDING, _OUTPUT}:
            size += tensor.size
            elements += tensor.size // kind.bytes * kind.block
    return round(8.0 * size / elements, 2) if elements else 0.0


def _tensors(headers: Sequence[GgufHeader]) -> Iterator[TensorInfo]:
    return (tensor for header in headers for tensor in header.tensors)
