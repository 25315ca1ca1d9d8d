"""The sums of core.placement.fit against what the pinned engine really allocates, for models of many shapes.

The models are headers with holes for weights: llama.cpp maps them, allocates its buffers, and says how large they are.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.engine_log import loading_log
from tests.support.gguf_vocabulary import build_vocabulary
from tests.support.gguf_writer import Tensor, Value, write

from mesh_llm.core.placement.fit import PROCESS_BYTES, launch_memory
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header

MIB = 1 << 20

# Loads a model as the engine does, and serves nobody.
LOADER = """
import json, sys
import xllamacpp
model, context, slots, cache = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.port, params.verbosity = model, 0, 4
params.n_ctx, params.n_parallel = context * slots, slots
params.fit_params = params.warmup = False
params.embedding = True
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
server = xllamacpp.Server(params)
sys.stdin.read()
"""


class Allocated(NamedTuple):
    model: float
    cache: float
    compute: float


def load(path: Path, context: int, slots: int, cache: str) -> Allocated:
    log = loading_log(LOADER, [json.dumps([str(path), context, slots, cache])], 120)

    def sizes(what: str) -> float:
        return MIB * sum(float(size) for size in re.findall(rf"{what} buffer size = +([\d.]+) MiB", log))

    return Allocated(sizes("model"), sizes("(?:KV|RS)"), sizes("compute"))


class Shape(NamedTuple):
    layers: int = 3
    width: int = 512
    forward: int = 2048
    heads: int = 8
    kv_heads: int = 2
    head: int = 64
    vocabulary: int = 2048


def common(architecture: str, shape: Shape, extra: Mapping[str, Value]) -> dict[str, Value]:
    words = build_vocabulary()
    padding = [f"<|more{number}|>" for number in range(shape.vocabulary - len(words))]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*words.tokens, *padding],
        "tokenizer.ggml.token_type": [*(int(kind) for kind in words.types), *([5] * len(padding))],
        "tokenizer.ggml.merges": words.merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    } | {
        f"{architecture}.{key}": value
        for key, value in {
            "block_count": shape.layers,
            "context_length": 131_072,
            "embedding_length": shape.width,
            "feed_forward_length": shape.forward,
            "attention.head_count": shape.heads,
            "attention.head_count_kv": shape.kv_heads,
            "attention.key_length": shape.head,
            "attention.value_length": shape.head,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": shape.head,
            **extra,
        }.items()
    }


def tensors(shape: Shape, blocks: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    made = [
        Tensor("token_embd.weight", (shape.width, shape.vocabulary), "q8_0"),
        Tensor("output_norm.weight", (shape.width,), "f32"),
    ]
    for layer in range(shape.layers):
        for name, dimensions in blocks.items():
            quantised = len(dimensions) > 1 and "conv1d" not in name and "ssm_a" not in name and "gate_inp" not in name
            made.append(Tensor(f"blk.{layer}.{name}", dimensions, "q8_0" if quantised else "f32"))
    return made


def attention(shape: Shape) -> dict[str, tuple[int, ...]]:
    width, query, row = shape.width, shape.heads * shape.head, shape.kv_heads * shape.head
    return {
        "attn_norm.weight": (width,),
        "attn_q.weight": (width, query),
        "attn_k.weight": (width, row),
        "attn_v.weight": (width, row),
        "attn_output.weight": (query, width),
        "ffn_norm.weight": (width,),
    }


def forward(shape: Shape) -> dict[str, tuple[int, ...]]:
    width, inner = shape.width, shape.forward
    return {"ffn_gate.weight": (width, inner), "ffn_up.weight": (width, inner), "ffn_down.weight": (inner, width)}


def llama(path: Path, shape: Shape) -> Path:
    return write(path, common("llama", shape, {}), tensors(shape, attention(shape) | forward(shape)))


def mixture(path: Path, shape: Shape) -> Path:
    experts, inner = 16, shape.forward
    extra: dict[str, Value] = {"expert_count": experts, "expert_used_count": 8, "expert_feed_forward_length": inner}
    blocks = attention(shape) | {
        "attn_q_norm.weight": (shape.head,),
        "attn_k_norm.weight": (shape.head,),
        "ffn_gate_inp.weight": (shape.width, experts),
        "ffn_gate_exps.weight": (shape.width, inner, experts),
        "ffn_up_exps.weight": (shape.width, inner, experts),
        "ffn_down_exps.weight": (inner, shape.width, experts),
    }
    return write(path, common("qwen3moe", shape, extra), tensors(shape, blocks))


def windowed(path: Path, shape: Shape) -> Path:
    blocks = (
        attention(shape)
        | forward(shape)
        | {
            "attn_q_norm.weight": (shape.head,),
            "attn_k_norm.weight": (shape.head,),
            "post_attention_norm.weight": (shape.width,),
            "post_ffw_norm.weight": (shape.width,),
        }
    )
    return write(path, common("gemma3", shape, {"attention.sliding_window": 512}), tensors(shape, blocks))


def compressed(path: Path, shape: Shape) -> Path:
    rank, rotated, plain, value, query = 256, 32, 64, 64, 192
    extra: dict[str, Value] = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": plain + rotated,
        "attention.value_length_mla": value,
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": query,
        "rope.dimension_count": rotated,
        "leading_dense_block_count": shape.layers,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 64,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
    }
    width, heads = shape.width, shape.heads
    blocks = forward(shape) | {
        "attn_norm.weight": (width,),
        "ffn_norm.weight": (width,),
        "attn_q_a_norm.weight": (query,),
        "attn_kv_a_norm.weight": (rank,),
        "attn_q_a.weight": (width, query),
        "attn_q_b.weight": (query, heads * (plain + rotated)),
        "attn_kv_a_mqa.weight": (width, rank + rotated),
        "attn_k_b.weight": (plain, rank, heads),
        "attn_v_b.weight": (rank, value, heads),
        "attn_output.weight": (heads * value, width),
    }
    return write(path, common("deepseek2", shape, extra), tensors(shape, blocks))


def recurrent(path: Path, shape: Shape) -> Path:
    inner, state, kernel, rank = 2 * shape.width, 16, 4, 32
    extra: dict[str, Value] = {
        "attention.head_count": 0,
        "attention.head_count_kv": 0,
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
    }
    blocks: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (shape.width,),
        "ssm_in.weight": (shape.width, 2 * inner),
        "ssm_conv1d.weight": (kernel, inner),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (inner, rank + 2 * state),
        "ssm_dt.weight": (rank, inner),
        "ssm_dt.bias": (inner,),
        "ssm_a": (state, inner),
        "ssm_d": (inner,),
        "ssm_out.weight": (inner, shape.width),
    }
    return write(path, common("mamba", shape, extra), tensors(shape, blocks))


@pytest.mark.parametrize(
    ("make", "shape", "context", "slots", "cache"),
    [
        (llama, Shape(), 4096, 1, "f16"),
        (llama, Shape(), 8192, 4, "q8_0"),
        (llama, Shape(width=1024, forward=1024, heads=32, head=128), 1000, 2, "f16"),
        (llama, Shape(vocabulary=64_000), 2048, 2, "q4_0"),
        (llama, Shape(forward=8192), 16_384, 1, "f16"),
        (mixture, Shape(forward=256), 4096, 2, "f16"),
        (mixture, Shape(forward=1024), 4096, 1, "f16"),
        (windowed, Shape(layers=8), 8192, 2, "f16"),
        (compressed, Shape(), 4096, 2, "f16"),
        (compressed, Shape(heads=32, forward=512), 8192, 1, "f16"),
        (recurrent, Shape(), 4096, 4, "f16"),
    ],
)
def test_what_is_counted_is_what_is_allocated(
    make: Callable[[Path, Shape], Path], shape: Shape, context: int, slots: int, cache: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "model.gguf", shape)
    facts = read_facts([read_header(path)], "model")
    counted = launch_memory(facts, context, slots, cache)
    allocated = load(path, context, slots, cache)
    print(f"{make.__name__} {shape}: counted {counted}, allocated {allocated}, "
          f"compute {counted.compute / allocated.compute:.2f}")  # fmt: skip
    # The log's figures have two digits after the point.
    assert abs(counted.weights - allocated.model) <= 0.01 * MIB
    assert abs(counted.cache - allocated.cache) <= 0.01 * MIB
    assert allocated.compute <= counted.compute + PROCESS_BYTES / 8
    assert counted.compute <= allocated.compute * 1.6 + 8 * MIB
