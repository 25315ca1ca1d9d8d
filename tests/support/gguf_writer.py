"""Writes GGUF headers byte by byte, well-formed or not, with tensor data left as a hole: large models in no space."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.types.model import GGML_TYPES

Scalar = int | float | bool | str

_BY_NAME = {kind.name: (number, kind) for number, kind in GGML_TYPES.items()}


@dataclass(frozen=True)
class Raw:
    """A value given as type number and bytes, for what no honest writer would write."""

    type: int
    data: bytes


Value = Scalar | Sequence[Scalar] | Raw


@dataclass(frozen=True)
class Tensor:
    """A tensor to declare; `offset` None is where it belongs."""

    name: str
    shape: tuple[int, ...]
    type: str | int = "f16"
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    """A GGUF string."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item: Value) -> bytes:
    """A metadata value: its type's number and its bytes."""
    if isinstance(item, Raw):
        return struct.pack("<I", item.type) + item.data
    if isinstance(item, str | int | float):
        number, data = _scalar(item)
        return struct.pack("<I", number) + data
    if item and all(
        isinstance(element, int) and not isinstance(element, bool) and -(1 << 31) <= element < 1 << 31
        for element in item
    ):
        return struct.pack(f"<IIQ{len(item)}i", 9, 5, len(item), *item)
    encoded = [_scalar(element) for element in item]
    number = encoded[0][0] if encoded else 4
    return struct.pack("<IIQ", 9, number, len(encoded)) + b"".join(data for _, data in encoded)


def _scalar(item: Scalar) -> tuple[int, bytes]:
    if isinstance(item, bool):
        return 7, struct.pack("<?", item)
    if isinstance(item, str):
        return 8, string(item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    if item < 0:
        return 5, struct.pack("<i", item)
    return (4, struct.pack("<I", item)) if item < 1 << 32 else (10, struct.pack("<Q", item))


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor of a known type."""
    _, kind = _BY_NAME[tensor.type] if isinstance(tensor.type, str) else (0, GGML_TYPES[tensor.type])
    elements = 1
    for length in tensor.shape:
        elements *= length
    return elements // kind.block * kind.bytes


def header(
    metadata: Mapping[str, Value] | Sequence[tuple[str, Value]],
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> tuple[bytes, int]:
    """The header's bytes, padded to the data, and the whole file's size."""
    entries = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    out += b"".join(string(key) + value(item) for key, item in entries)
    end = 0
    for tensor in tensors:
        number = _BY_NAME[tensor.type][0] if isinstance(tensor.type, str) else tensor.type
        offset = end if tensor.offset is None else tensor.offset
        out += string(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        out += struct.pack("<IQ", number, offset)
        size = tensor_bytes(tensor) if number in GGML_TYPES else 0
        end = -(-(end + size) // alignment) * alignment
    out += bytes(-len(out) % alignment)
    return out, len(out) + end


def write(
    path: Path,
    metadata: Mapping[str, Value] | Sequence[tuple[str, Value]],
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Write a file of the declared size; tensor data is a hole of zeros."""
    head, size = header(metadata, tensors, version=version, alignment=alignment)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def llama_metadata(
    *,
    architecture: str = "llama",
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    kv_heads: int | Sequence[int] = 2,
    feed_forward: int = 768,
    context: int = 4096,
    tokens: Sequence[str] = ("<s>", "</s>", "a", "b"),
    name: str = "",
    extra: Mapping[str, Value] | None = None,
) -> dict[str, Value]:
    """Metadata of a small transformer."""
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        f"{architecture}.block_count": layers,
        f"{architecture}.context_length": context,
        f"{architecture}.embedding_length": width,
        f"{architecture}.feed_forward_length": feed_forward,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    if name:
        metadata["general.name"] = name
    return metadata | dict(extra or {})


def llama_tensors(
    *,
    layers: int = 4,
    width: int = 256,
    vocabulary: int = 4,
    feed_forward: int = 768,
    element: str = "f16",
    tied: bool = False,
) -> list[Tensor]:
    """Tensors of a small transformer, roughly: sizes are right, names are llama.cpp's."""
    tensors = [Tensor("token_embd.weight", (width, vocabulary), element), Tensor("output_norm.weight", (width,), "f32")]
    if not tied:
        tensors.append(Tensor("output.weight", (width, vocabulary), element))
    for layer in range(layers):
        tensors += [
            Tensor(f"blk.{layer}.attn_q.weight", (width, width), element),
            Tensor(f"blk.{layer}.ffn_up.weight", (width, feed_forward), element),
        ]
    return tensors
