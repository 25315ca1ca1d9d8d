"""Models of any size without a download: random weights, mostly llama's architecture, real llama.cpp runs them.

Greedy output is words, never ends by itself (`max_tokens` is always reached), and does not depend on rounding: see
`gguf_weights`. The bytes of the file follow from the recipe alone.
"""

import hashlib
import tempfile
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from filelock import FileLock
from tests.support import gguf_vocabulary, gguf_weights
from tests.support.gguf_vocabulary import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    PADDING,
    REASONING_TEMPLATE,
    TURN_END,
    Vocabulary,
    build_vocabulary,
)
from tests.support.gguf_weights import HEAD_EXPERTS, ROPE_BASE, Matrix, Recipe, matrices

PRESETS = {
    "small": Recipe("random-small", layers=6, width=256, feed_forward=256, heads=4, kv_heads=2, seed=1),
    "small-slow": Recipe("random-small-slow", layers=6, width=256, feed_forward=2048, heads=4, kv_heads=2, seed=1),
    "small-draft": Recipe("random-draft", layers=1, width=128, feed_forward=256, heads=4, kv_heads=2, seed=7),
    "small-heads": Recipe(
        "random-heads", layers=6, width=256, feed_forward=256, heads=4, kv_heads=2, seed=1, architecture="glm4moe"
    ),
    "small-eagle3": Recipe(
        "random-eagle3", layers=1, width=256, feed_forward=256, heads=4, kv_heads=4, seed=7, architecture="eagle3"
    ),
    "middle": Recipe("random-middle", layers=12, width=768, feed_forward=2048, heads=12, kv_heads=6, seed=3),
    "small-reasoning": Recipe(
        "random-reasoning", layers=6, width=256, feed_forward=256, heads=4, kv_heads=2, seed=1, reasons=True
    ),
    "half-gigabyte": Recipe(
        "random-half-gigabyte", layers=12, width=1024, feed_forward=6144, heads=16, kv_heads=8, seed=2
    ),
    "long": Recipe("random-long", layers=12, width=768, feed_forward=2048, heads=12, kv_heads=6, seed=3, context=16384),
    "long-heads": Recipe(
        "random-long-heads",
        layers=12,
        width=768,
        feed_forward=2048,
        heads=12,
        kv_heads=6,
        seed=3,
        context=16384,
        architecture="glm4moe",
    ),
    "long-eagle3": Recipe(
        "random-long-eagle3",
        layers=1,
        width=768,
        feed_forward=768,
        heads=12,
        kv_heads=12,
        seed=7,
        architecture="eagle3",
    ),
    "stand-in": Recipe(
        "random-stand-in", layers=24, width=1024, feed_forward=1024, heads=16, kv_heads=2, seed=4, context=65536
    ),
}
"""From 0.5 MB (`small-draft`) over 5 MB (`small`) and 160 MB (`long`) to 530 MB. The draft drafts for all others.

Those with heads have one of their own that guesses (MTP). The EAGLE-3 drafts read the hidden states of the model of
their name. `stand-in` is for engines that do not compute (bench/split/stand_in.py): it is wide, and 2, 3, 4 and 8
machines can share its layers evenly.
"""


def write_model(path: Path, recipe: Recipe) -> None:
    """Write the model, one matrix in memory at a time. The file appears complete or not at all."""
    vocabulary = build_vocabulary()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".model-") as scratch:
        unfinished = Path(scratch) / path.name
        writer = gguf.GGUFWriter(unfinished, recipe.architecture)
        _write_metadata(writer, recipe, vocabulary)
        # The header names every tensor before the first one's data.
        for name, shape in tensor_shapes(recipe, len(vocabulary)).items():
            _announce(writer, name, shape, recipe)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, matrix in matrices(recipe, vocabulary):
            writer.write_tensor_data(_encoded(matrix, recipe))
        writer.close()
        unfinished.replace(path)


def cached_model(directory: Path, preset: str) -> Path:
    """The path of a preset's model in `directory`, generated if it is not there. Safe among parallel processes."""
    recipe = PRESETS[preset]
    # A changed recipe, or a change in how it is followed, makes another file.
    digest = hashlib.sha256(repr(recipe).encode())
    for source in (__file__, gguf_vocabulary.__file__, gguf_weights.__file__):
        digest.update(Path(source).read_bytes())
    path = directory / digest.hexdigest()[:16] / f"{recipe.name}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made once: nodes that have opened it would say that their file has changed.
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                write_model(path, recipe)
    return path


def tensor_shapes(recipe: Recipe, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Shape (rows, columns) of each tensor by name, in the order of the file."""
    width, inner = recipe.width, recipe.feed_forward
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary_size, width)}
    if recipe.architecture == "eagle3":
        shapes |= {"fc.weight": (width, 3 * width), "blk.0.attn_norm_2.weight": (width,)}
    for layer in range(recipe.layers):
        shapes |= _attention_shapes(recipe, layer) | {
            f"blk.{layer}.ffn_gate.weight": (inner, width),
            f"blk.{layer}.ffn_up.weight": (inner, width),
            f"blk.{layer}.ffn_down.weight": (width, inner),
        }
    if recipe.architecture == "glm4moe":
        shapes |= _head_shapes(recipe)
    return shapes | {"output_norm.weight": (width,), "output.weight": (vocabulary_size, width)}


def _attention_shapes(recipe: Recipe, layer: int) -> dict[str, tuple[int, ...]]:
    width, keys = recipe.width, recipe.head_width * recipe.kv_heads
    read = 2 * width if recipe.architecture == "eagle3" else width
    after = "post_attention_norm" if recipe.architecture == "glm4moe" else "ffn_norm"
    return {
        f"blk.{layer}.attn_norm.weight": (width,),
        f"blk.{layer}.attn_q.weight": (width, read),
        f"blk.{layer}.attn_k.weight": (keys, read),
        f"blk.{layer}.attn_v.weight": (keys, read),
        f"blk.{layer}.attn_output.weight": (width, width),
        f"blk.{layer}.{after}.weight": (width,),
    }


def _head_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The block that guesses."""
    width, inner, block = recipe.width, recipe.feed_forward, f"blk.{recipe.layers}"
    shapes = _attention_shapes(recipe, recipe.layers) | {
        f"{block}.ffn_gate_inp.weight": (HEAD_EXPERTS, width),
        f"{block}.exp_probs_b.bias": (HEAD_EXPERTS,),
    }
    for part in ("gate", "up"):
        shapes[f"{block}.ffn_{part}_exps.weight"] = (HEAD_EXPERTS, inner, width)
        shapes[f"{block}.ffn_{part}_shexp.weight"] = (inner, width)
    return shapes | {
        f"{block}.ffn_down_exps.weight": (HEAD_EXPERTS, width, inner),
        f"{block}.ffn_down_shexp.weight": (width, inner),
        f"{block}.nextn.eh_proj.weight": (width, 2 * width),
        f"{block}.nextn.enorm.weight": (width,),
        f"{block}.nextn.hnorm.weight": (width,),
    }


def _write_metadata(writer: gguf.GGUFWriter, recipe: Recipe, vocabulary: Vocabulary) -> None:
    file_types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_name(recipe.name)
    writer.add_file_type(file_types[recipe.weights])
    writer.add_context_length(recipe.context)
    writer.add_embedding_length(recipe.width)
    writer.add_feed_forward_length(recipe.feed_forward)
    writer.add_head_count(recipe.heads)
    writer.add_head_count_kv(recipe.kv_heads)
    writer.add_rope_dimension_count(recipe.head_width)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(1e-5)
    if recipe.architecture == "glm4moe":
        writer.add_block_count(recipe.layers + 1)
        writer.add_nextn_predict_layers(1)
        writer.add_leading_dense_block_count(recipe.layers)
        writer.add_expert_count(HEAD_EXPERTS)
        writer.add_expert_used_count(1)
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(recipe.feed_forward)
        writer.add_expert_weights_scale(1.0)
    else:
        writer.add_block_count(recipe.layers)
    if recipe.architecture == "eagle3":
        # The inputs of these layers of the model that it drafts for.
        writer.add_array("eagle3.target_layers", [0, 2, 5])
        writer.add_uint32("eagle3.target_hidden_size", recipe.width)
        writer.add_bool("eagle3.norm_before_residual", True)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.id_of(END_OF_TEXT))
    writer.add_eos_token_id(vocabulary.id_of(TURN_END))
    writer.add_pad_token_id(vocabulary.id_of(PADDING))
    writer.add_add_bos_token(False)
    writer.add_chat_template(REASONING_TEMPLATE if recipe.reasons else CHAT_TEMPLATE)


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], recipe: Recipe) -> None:
    elements = int(np.prod(shape))
    if len(shape) == 1:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), elements * 4)
    elif recipe.weights == "f16":
        writer.add_tensor_info(name, shape, np.dtype(np.float16), elements * 2)
    else:
        kind = gguf.GGMLQuantizationType.Q8_0
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = elements // block_size * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _encoded(matrix: Matrix, recipe: Recipe) -> npt.NDArray[np.generic]:
    """A matrix as it stands in the file; vectors stay as they are."""
    if matrix.ndim == 1:
        return matrix
    if recipe.weights == "f16":
        return matrix.astype(np.float16)
    return gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)


def main() -> None:
    """`python -m tests.support.gguf_models PRESET FILE`, for use by hand."""
    import sys

    preset, target = sys.argv[1:]
    write_model(Path(target), PRESETS[preset])
    print(f"{target}: {Path(target).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
