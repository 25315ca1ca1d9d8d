"""A tiny BERT without a download: random weights that real llama.cpp embeds or ranks with."""

from pathlib import Path

import gguf
import numpy as np
from tests.support.gguf_vocabulary import END_OF_TEXT, PADDING, TURN_END, build_vocabulary

_WIDTH, _HEADS, _FEED_FORWARD, _LAYERS = 128, 4, 256, 2


def write_encoder(path: Path, pooling: gguf.PoolingType, context: int = 2048) -> Path:
    """Write one. Pooling `RANK` makes a reranker, with a classification head of one output.

    Source of names and shapes: llama.cpp, src/models/bert.cpp.
    """
    vocabulary = build_vocabulary()
    random = np.random.default_rng(5)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name(path.stem)
    writer.add_context_length(context)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_type_count(2)
    writer.add_bos_token_id(vocabulary.id_of(END_OF_TEXT))
    writer.add_eos_token_id(vocabulary.id_of(TURN_END))
    writer.add_sep_token_id(vocabulary.id_of(TURN_END))
    writer.add_pad_token_id(vocabulary.id_of(PADDING))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)

    def matrix(name: str, *shape: int) -> None:
        values = random.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1], dtype=np.float32)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, dtype=np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(_WIDTH, dtype=np.float32))

    matrix("token_embd", len(vocabulary), _WIDTH)
    matrix("token_types", 2, _WIDTH)
    matrix("position_embd", context, _WIDTH)
    norm("token_embd_norm")
    for layer in range(_LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}", _WIDTH, _WIDTH)
        matrix(f"blk.{layer}.ffn_up", _FEED_FORWARD, _WIDTH)
        matrix(f"blk.{layer}.ffn_down", _WIDTH, _FEED_FORWARD)
        norm(f"blk.{layer}.attn_output_norm")
        norm(f"blk.{layer}.layer_output_norm")
    if pooling is gguf.PoolingType.RANK:
        matrix("cls", _WIDTH, _WIDTH)
        matrix("cls.output", 1, _WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
