"""Hostile GGUF metadata: the result is facts within bounds, or a GgufError."""

import io

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.gguf_writer import Value, header, llama_metadata, llama_tensors

from mesh_llm.core.placement.fit import plan_solo
from mesh_llm.core.types.model import LaunchOptions, ModelFacts
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import GgufError, parse_header

ARCHITECTURES = ["llama", "gemma3", "deepseek2", "mamba", "jamba", "qwen3next", "rwkv7", "llama4", "bert", "clip", "x"]
_KEYS = """
    block_count context_length embedding_length feed_forward_length expert_used_count expert_feed_forward_length
    expert_shared_count nextn_predict_layers attention.head_count attention.head_count_kv attention.key_length
    attention.value_length attention.key_length_mla attention.sliding_window attention.sliding_window_pattern
    attention.key_length_swa attention.shared_kv_layers attention.recurrent_layers full_attention_interval
    ssm.conv_kernel ssm.inner_size ssm.state_size ssm.group_count kda.head_dim wkv.head_size shortconv.l_cache
    token_shift_count pooling_type vocab_size
"""
KEYS = _KEYS.split()

numbers = st.one_of(
    st.sampled_from([0, 1, 2, 512, 513, 1 << 24, (1 << 31) - 1, 1 << 63]), st.integers(-5, (1 << 64) - 1)
)
values = st.one_of(
    numbers,
    st.lists(st.integers(0, (1 << 31) - 1), max_size=8),
    st.lists(st.booleans(), max_size=8),
    st.booleans(),
    st.floats(width=32),
    st.text(max_size=4),
)


@given(
    st.sampled_from(ARCHITECTURES),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=6),
    st.sampled_from(["m", "m-draft"]),
)
@settings(max_examples=300, deadline=None)
def test_any_metadata(architecture: str, claims: dict[str, Value], name: str) -> None:
    metadata = llama_metadata(architecture=architecture) | {f"{architecture}.{k}": v for k, v in claims.items()}
    data, size = header(metadata, llama_tensors())
    try:
        facts = read_facts([parse_header(io.BytesIO(data), size)], name)
    except GgufError:
        return
    packed = msgspec.msgpack.encode(facts)
    assert msgspec.msgpack.decode(packed, type=ModelFacts) == facts
    assert facts.kv_bytes_per_token >= facts.kv_window_bytes_per_token >= 0
    assert min(facts.state_bytes, facts.compute_width, facts.window, facts.context_train) >= 0
    assert plan_solo(facts, 1 << 40, LaunchOptions())
