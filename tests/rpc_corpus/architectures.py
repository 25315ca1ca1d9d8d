"""Hyperparameters of a tiny model of each architecture, in GGUF's words.

One table of values serves all; an architecture reads those that it knows. `_OTHERWISE` is what one wants otherwise.
"""

from collections.abc import Mapping

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


def _vocabulary(size: int) -> Values:
    return {
        "vocab_size": size,
        "/tokenizer.ggml.tokens": [f"t{number}" for number in range(size)],
        "/tokenizer.ggml.scores": [0.0] * size,
    }


_WIDE: Values = {"attention.head_count_kv": HEADS}
"""As many heads of keys as of queries, where the architecture knows nothing else."""

_MLA_HEADS: Values = {"attention.key_length": 96, "attention.value_length": 64, "rope.dimension_count": 32} | _WIDE
"""Latent attention whose cache holds whole heads: 64 numbers without position and 32 with."""

_MLA: Values = {
    "attention.head_count_kv": 1,
    "attention.key_length": 192,
    "attention.value_length": 128,
    "attention.key_length_mla": 128,
    "attention.value_length_mla": 64,
    "rope.dimension_count": 64,
}
"""Latent attention whose cache holds the latent vector: 128 numbers without position and 64 with."""

_ONE_OF_TWO = [number % 2 for number in range(LAYERS)]

_STATE_SPACE: Values = {"attention.head_count_kv": [KV_HEADS, 0], "attention.head_count": [HEADS, HEADS]}
"""The second layer has a state instead of attention."""

_GATED_DELTA: Values = {"ssm.inner_size": 256}
_BERT: Values = {"/tokenizer.ggml.token_type_count": 2} | _WIDE
_SWA_PATTERN: Values = {"attention.sliding_window_pattern": _ONE_OF_TWO}
_SWA_HEADS: Values = {
    "attention.key_length_swa": 64,
    "attention.value_length_swa": 64,
    "rope.freq_base_swa": 10000.0,
    "embedding_length_per_layer_input": 64,
    "attention.shared_kv_layers": 0,
}
_HYPER: Values = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.magnitude": 2.0,
    "hyper_connection.low_rank": 8,
}
_PLE: Values = {
    "ple.layers": [0],
    "ple.ngram_size": 3,
    "ple.heads_per_ngram": 2,
    "ple.conv_kernel": 4,
    "ple.eos_token_id": 0,
    "ple.layer_multipliers": [1, 3, 5],
    "ple.head_offsets": [number * VOCABULARY for number in range(4)],
    "ple.head_vocab_sizes": [VOCABULARY] * 4,
    "embedding_length_per_layer_input": WIDTH // 4,
}

_OTHERWISE: dict[str, Values] = {
    "bert": _BERT,
    "nomic-bert": _BERT,
    "nomic-bert-moe": _BERT,
    "jina-bert-v2": _BERT,
    "jina-bert-v3": _BERT,
    "modern-bert": _WIDE,
    "neo-bert": _WIDE,
    "llama4": {"block_count": 4},
    "qwen3next": _GATED_DELTA,
    "qwen35": _GATED_DELTA,
    "qwen35moe": _GATED_DELTA,
    "clef": _GATED_DELTA | {"decision.block_count": 1, "decision.routing_block_count": 1, "decision.head_count": 4},
    "qwen4exp": _GATED_DELTA | _HYPER | _PLE
    | {"attention.compress_ratios": [4] * LAYERS, "attention.indexer.key_length": 64},
    "plamo2": _STATE_SPACE | {"ssm.group_count": 0},
    "jamba": _STATE_SPACE,
    "nemotron_h": _STATE_SPACE | {"block_count": 3, "attention.head_count": [HEADS, HEADS, HEADS],
        "attention.head_count_kv": [KV_HEADS, 0, 0], "feed_forward_length": [0, 0, HIDDEN]},
    "nemotron_h_moe": _STATE_SPACE | {"block_count": 3, "attention.head_count": [HEADS, HEADS, HEADS],
        "attention.head_count_kv": [KV_HEADS, 0, 0], "feed_forward_length": [0, 0, HIDDEN]},
    "granitehybrid": _STATE_SPACE,
    "lfm2": _STATE_SPACE | {"attention.sliding_window": 0},
    "lfm2moe": _STATE_SPACE,
    "minicpm3": _MLA_HEADS,
    "deepseek2-ocr": _WIDE,
    "deepseek": _WIDE,
    "plm": _MLA_HEADS,
    "olmoe": _WIDE,
    "gemma3n": {"block_count": 22},
    "gemma4": _SWA_HEADS | {"block_count": 4, "attention.sliding_window_pattern": [1, 1, 0, 1]},
    "gemma-embedding2": _SWA_HEADS,
    "maple": _SWA_PATTERN | {"swiglu_clamp_exp": 7.0},
    "cohere2moe": _SWA_PATTERN,
    "mimo2": _SWA_PATTERN,
    "step35": _SWA_PATTERN,
    "spark2_5": _SWA_PATTERN,
    "muse-glimmer": _SWA_PATTERN,
    "granite_swa": _SWA_PATTERN,
    "deepseek2": _MLA,
    "deepseek32": _MLA,
    "glm-dsa": _MLA,
    "mistral4": _MLA,
    "dots3note": _MLA | _SWA_PATTERN | {
        "attention.kv_lora_rank_swa": 128, "attention.key_length_swa": 192, "attention.value_length_swa": 128,
        "attention.key_length_mla_swa": 128, "attention.value_length_mla_swa": 64, "rope.freq_base_swa": 10000.0,
        "attention.indexer.types": [1, 0]},
    "kimi-linear": _MLA | {"attention.head_count": [HEADS, HEADS], "attention.head_count_kv": [1, 0]},
    "kimi-k3": _MLA | {"attention.head_count": [HEADS, HEADS], "attention.head_count_kv": [1, 0]},
    "bailingmoe3": _MLA | {"attention.head_count": [HEADS, HEADS], "attention.head_count_kv": [1, 0],
        "rope.dimension_sections": [8, 12, 12, 0], "swiglu_clamp_exp": [0.0, 4.0], "swiglu_clamp_shexp": [0.0, 5.0]},
    "glm5-next": _MLA | _HYPER | _PLE | {"attention.head_count_kv": [1, 0], "attention.key_length": 128,
        "rope.dimension_count": 0, "attention.compress_ratios": [4] * LAYERS},
    "hy_v4": _MLA | _HYPER | {"swiglu_clamp_exp": 10.0, "expert_weights_norm": True, "attention.indexer.types": [1, 0]},
    "deepseek4": _HYPER | {
        "block_count": 4, "attention.head_count": 8, "attention.head_count_kv": 1, "embedding_length": 512,
        "attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 32,
        "attention.output_group_count": 8, "attention.output_lora_rank": 32,
        "attention.compress_ratios": [0, 0, 4, 128], "attention.compress_rope_freq_base": 160000.0,
        "hash_layer_count": 0, "swiglu_clamp_exp": 10.0, "expert_weights_norm": True, "expert_gating_func": 4},
    "dots1": _WIDE,
    "gemma4-assistant": _SWA_HEADS | _SWA_PATTERN | {
        "embedding_length": 128, "embedding_length_out": WIDTH, "nextn_predict_layers": LAYERS,
        "attention.key_length": 64, "attention.value_length": 64},
    "minimax-m3": {"attention.indexer.head_count": KV_HEADS, "rope.dimension_count": 64},
    "hrm_text": {"block_count": 6, "hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
    "graniteswitch": {"adapters.count": 2, "adapters.lora_rank": 8, "adapters.token_ids_activate": [1, 2],
        "adapters.token_ids_substitute": [3, 4], "adapters.router_gain": 1.0},
    "eagle3": {"block_count": 1, "target_layers": [0, 1, 1], "target_hidden_size": WIDTH},
    "dflash": {"target_layers": [0, 1], "block_size": 4, "attention.causal": False} | _SWA_PATTERN,
    "rwkv6qwen2": {"token_shift_count": 1},
    "arwkv7": {"token_shift_count": 1},
    "chameleon": _vocabulary(10240),
    "qwen3tts": _vocabulary(3072),
    "rwkv6": _WIDE,
    "t5": _WIDE,
    "t5encoder": _WIDE,
}  # fmt: skip


USED: dict[str, str] = {
    "jina-bert-v2": r"ffn_(up|gate)\.weight",
    "qwen4exp": r"per_layer_token_embd",
    "qwen3next": r"attn_qkv|attn_gate|ssm_|shexp",
    "qwen35": r"attn_qkv|attn_gate|ssm_|shexp",
    "qwen35moe": r"attn_qkv|attn_gate|ssm_|shexp",
    "nemotron_h": r"weight$|ssm_",
    "nemotron_h_moe": r"weight$|ssm_|exp_probs",
    "glm-dsa": r"indexer",
    "clef": r"attn_qkv|attn_gate|ssm_",
    "laguna": r"attn_gate",
    "falcon-h1": r"ssm_",
    "granitehybrid": r"ssm_",
    "phi3": r"rope_factors",
    "rwkv6": r"time_mix_lerp_fused",
    "t5": r"rel_b",
    "t5encoder": r"rel_b",
}
"""Tensors that the loader calls optional, and the graph takes for granted; by a pattern of their names."""

LIKE = {"clef": "qwen35"}
"""Whose shapes those are, where the architecture's own model cannot be made without a file."""

WANTS_ALL_OUTPUTS = frozenset({"chameleon"})
"""Its graph cannot be built for a micro-batch without outputs."""

SHIFT_FALLS = frozenset({"minicpm3", "plm"})
"""llama.cpp ends on the host when it shifts a quantised cache whose heads are no multiple of 64."""

FEATURES = {"eagle3": 3 * WIDTH, "dflash": 2 * WIDTH}
"""Numbers of each row that a draft's encoder takes: the hidden states of several layers of the model it guesses for."""

TAKES_NO_STATE = frozenset({"eagle3", "dflash"})

ONE_TEXT = frozenset({"t5encoder"})
"""Takes no texts of several clients at once."""

FUSED = frozenset({"phi3"})
"""Takes queries, keys and values from one matrix only."""

SEEDS: dict[str, dict[str, list[int]]] = {
    "clef": {"decision.proj_memory.weight": [WIDTH, 128], "dec.blk.0.ffn_up.weight": [128, 256]},
}
"""Tensors whose shapes say how large others are."""


def values(architecture: str, *, experts: bool, more: Mapping[str, Value] | None = None) -> Values:
    """The metadata of a tiny model."""
    own: Values = _common() | (_experts() if experts else {})
    own |= _OTHERWISE.get(architecture, {})
    everything = _global() | {f"{architecture}.{key}": value for key, value in own.items() if key[0] != "/"}
    everything |= {key[1:]: value for key, value in own.items() if key[0] == "/"}
    return {"general.architecture": architecture} | everything | dict(more or {})
