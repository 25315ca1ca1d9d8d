from dataclasses import replace
from pathlib import Path

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.models.gguf.facts import Shape, active_bytes, head_bytes, weight_bits
from mesh_llm.models.gguf.header import TensorInfo, read_header

TINY = Path("src/mesh_llm/models/builtin/tiny.gguf")


def test_all_but_the_looked_up_embedding_is_read() -> None:
    header = read_header(TINY)
    sizes = {tensor.name: tensor.size for tensor in header.tensors}
    assert head_bytes([header]) == sizes["output.weight"]
    assert active_bytes([header], Shape(header)) == sum(sizes.values()) - sizes["token_embd.weight"]
    assert weight_bits([header]) == 8.0 * GGML_TYPES[8].bytes / GGML_TYPES[8].block


def test_of_experts_those_that_are_used() -> None:
    header = read_header(TINY)

    def tensor(name: str, elements: int) -> TensorInfo:
        return TensorInfo(name, (elements // 32, 32), 1, 0, elements * 2)

    metadata = dict(header.metadata) | {"llama.expert_count": 8, "llama.expert_used_count": 2}
    tensors = (
        tensor("token_embd.weight", 1024),
        tensor("blk.0.attn_q.weight", 1024),
        tensor("blk.0.ffn_up_exps.weight", 8192),
    )
    mixed = replace(header, metadata=metadata, tensors=tensors)
    # The head is the embedding where there is no other.
    assert head_bytes([mixed]) == 2048
    assert active_bytes([mixed], Shape(mixed)) == 2048 + 2048 + 16384 // 4
    assert weight_bits([mixed]) == 16.0
