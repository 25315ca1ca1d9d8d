"""Writes a trained model as a GGUF file for llama.cpp: matrices in Q8_0, norms in F32."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tools.train_tiny.chat import CHAT_TEMPLATE, DOCUMENT_END, TURN_END
from tools.train_tiny.llama import Llama
from tools.train_tiny.tokenizer import Tokenizer
from torch import Tensor

_LICENCE = "apache-2.0"
_AUTHOR = "mesh-llm"
# Names inside a layer, ours to llama.cpp's.
_LAYER_TENSORS = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_output": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_TENSORS = {"embedding": "token_embd", "output_norm": "output_norm", "output": "output"}


def tensor_name(name: str) -> str:
    """llama.cpp's name of one of our parameters, such as `layers.3.query.weight`."""
    parts = name.split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.weight"
    return f"{_TENSORS[parts[0]]}.weight"


def write(model: Llama, tokenizer: Tokenizer, path: Path, name: str, description: str) -> None:
    """Writes the file; a whole one replaces an old one, or none is left."""
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    _write_description(writer, model, name, description)
    _write_shape(writer, model)
    _write_vocabulary(writer, tokenizer)
    for parameter_name, parameter in model.state_dict().items():
        _write_tensor(writer, tensor_name(parameter_name), parameter)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)


def _write_description(writer: gguf.GGUFWriter, model: Llama, name: str, description: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_author(_AUTHOR)
    writer.add_description(description)
    writer.add_license(_LICENCE)
    writer.add_languages(["en"])
    writer.add_size_label(f"{model.parameter_count() / 1e6:.1f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_shape(writer: gguf.GGUFWriter, model: Llama) -> None:
    shape = model.shape
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    texts = tokenizer.token_texts()
    special = set(tokenizer.special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([gguf.TokenType.CONTROL if text in special else gguf.TokenType.NORMAL for text in texts])
    writer.add_token_merges(tokenizer.merge_texts())
    writer.add_bos_token_id(tokenizer.special_id(DOCUMENT_END))
    writer.add_eos_token_id(tokenizer.special_id(TURN_END))
    writer.add_eot_token_id(tokenizer.special_id(TURN_END))
    writer.add_pad_token_id(tokenizer.special_id(DOCUMENT_END))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_tensor(writer: gguf.GGUFWriter, name: str, parameter: Tensor) -> None:
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = parameter.detach().numpy().astype(np.float32)
    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
