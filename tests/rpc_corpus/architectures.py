"""Hyperparameters of a tiny model of each architecture, in GGUF's words.

One table of values serves all; an architecture reads those that it knows. `_OTHERWISE` is what one wants otherwise.
"""

from collections.abc import Callable, Mapping

from tests.rpc_corpus.llama import Value

VOCABULARY = 160
CONTEXT = 512
WIDTH = 256
HEADS = 4
KV_HEADS = 2
LAYERS = 2
HIDDEN = 512
EXPERTS = 4
Values = dict[str, Value]


def _common() -> Values:
    head = WIDTH // HEADS
    return {
        "vocab_size": VOCABULARY,
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "features_length": WIDTH,
        "block_count": LAYERS,
        "leading_dense_block_count": 1,
        "feed_forward_length": HIDDEN,
        "use_parallel_residual": False,
        "logit_scale": 0.5,
        "time_mix_extra_dim": 32,
        "time_decay_extra_dim": 64,
        "full_attention_interval": 2,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 8,
        "attention.q_lora_rank": 64,
        "attention.kv_lora_rank": 128,
        "attention.relative_buckets_count": 8,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": 2,
        "attention.indexer.head_count": 64,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 16,
        "attention.indexer.block_size": 4,
        "attention.indexer.kpool": 4,
        "attention.indexer.kpool_select_tail": True,
        "attention.indexer.local_blocks": 1,
        "attention.decay_lora_rank": 32,
        "attention.iclr_lora_rank": 32,
        "attention.value_residual_mix_lora_rank": 32,
        "attention.gate_lora_rank": 64,
        "rope.dimension_sections": [head // 4] * 4,
        "ssm.inner_size": 2 * WIDTH,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 64,
        "ssm.time_step_rank": HEADS,
        "ssm.group_count": 2,
        "kda.head_dim": 64,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": -5.0,
        "wkv.head_size": head,
        "shortconv.l_cache": 3,
        "residual_scale": 1.5,
        "embedding_scale": 2.0,
        "attn_res.block_size": 12,
        "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0,
        "posnet.embedding_length": WIDTH,
        "posnet.block_count": LAYERS,
        "convnext.embedding_length": WIDTH,
        "convnext.block_count": LAYERS,
        "token_shift_count": 2,
    }  # fmt: skip


def _experts() -> Values:
    return {
        "expert_feed_forward_length": HIDDEN,
        "expert_shared_feed_forward_length": HIDDEN // 2,
        "expert_chunk_feed_forward_length": HIDDEN // 2,
        "expert_latent_length": HIDDEN,
        "interleave_moe_layer_step": 2,
        "expert_count": EXPERTS,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "expert_group_scale": 1.0,
        "experts_per_group": 1,
        "expert_weights_scale": 1.0,
        "moe_every_n_layers": 2,
    }


def _global() -> Values:
    return {
        "tokenizer.ggml.model": "test",
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(VOCABULARY)],
        "tokenizer.ggml.scores": [0.0] * VOCABULARY,
        "xielu.alpha_n": [1.0] * LAYERS,
        "xielu.alpha_p": [1.0] * LAYERS,
        "xielu.beta": [1.0] * LAYERS,
        "xielu.eps": [1e-7] * LAYERS,
    }


DENSE_AND_EXPERTS = frozenset({"llama", "refact", "minicpm", "granite", "mistral3", "deci", "llama-embed"})
"""Architectures whose experts are optional; both forms are recorded."""

_OTHERWISE: dict[str, Values | Callable[[], Values]] = {}


def values(architecture: str, *, experts: bool, more: Mapping[str, Value] | None = None) -> Values:
    """The metadata of a tiny model."""
    own: Values = _common() | (_experts() if experts else {})
    changed = _OTHERWISE.get(architecture, {})
    own |= changed() if callable(changed) else changed
    everything = _global() | {f"{architecture}.{key}": value for key, value in own.items() if key[0] != "/"}
    everything |= {key[1:]: value for key, value in own.items() if key[0] == "/"}
    return {"general.architecture": architecture} | everything | dict(more or {})
