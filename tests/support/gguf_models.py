"""Models of any size without a download: random weights, llama's architecture, real llama.cpp runs them.

They are made so that tests can rely on what they write:

- Greedy output is words, and never ends by itself: `max_tokens` is always reached. One channel of the hidden state is
  constant, and the output matrix uses it to push every other token far down.
- The next token follows mostly from the last ones, through a code that all models share. So a small model drafts well
  for a large one, while attention to the whole text still decides often enough for a wrong KV cache to show.
- The bytes of the file follow from the recipe alone.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt
from tests.support.gguf_vocabulary import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    PADDING,
    TURN_END,
    Vocabulary,
    build_vocabulary,
)

Matrix = npt.NDArray[np.float32]

_CODE_SEED = 1234
"""Same for every model: it makes what one model drafts likely to be what another would write."""
_CODE_CHANNELS = 64
_CONSTANT = 2.0
_FORBIDDEN = -60.0
_CODE_STRENGTH = 4.0
_FROM_OTHER_TOKENS = 0.15
"""How strongly tokens that a model never writes (those of prompts) determine their successor."""


@dataclass(frozen=True)
class Recipe:
    """A model to generate.

    Attributes:
        name: what the GGUF's metadata calls it.
        layers: number of blocks.
        width: channels of the hidden state; a multiple of `heads` and of 32.
        feed_forward: channels inside a block's feed-forward part; a multiple of 32.
        heads: attention heads.
        kv_heads: heads of keys and values; divides `heads`.
        seed: of the weights.
        noise: how much attention and feed-forward decide against the shared code, 0 to about 1.
        context: the longest text, in tokens, that the metadata promises.
        weights: type of the matrices in the file.
    """

    name: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    seed: int
    noise: float
    context: int = 4096
    weights: Literal["f16", "q8_0"] = "f16"


PRESETS = {
    "small": Recipe("random-small", layers=4, width=256, feed_forward=512, heads=4, kv_heads=2, seed=1, noise=0.5),
    "small-draft": Recipe(
        "random-draft", layers=1, width=128, feed_forward=256, heads=4, kv_heads=2, seed=7, noise=0.1
    ),
    "half-gigabyte": Recipe(
        "random-half-gigabyte", layers=12, width=1024, feed_forward=6144, heads=16, kv_heads=8, seed=2, noise=0.3
    ),
}
"""About 5 MB, 1 MB and 530 MB."""


def write_model(path: Path, recipe: Recipe) -> None:
    """Write the model, one matrix in memory at a time. The file appears complete or not at all."""
    vocabulary = build_vocabulary()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".model-") as scratch:
        unfinished = Path(scratch) / path.name
        writer = gguf.GGUFWriter(unfinished, "llama")
        _write_metadata(writer, recipe, vocabulary)
        # The header names every tensor, so their shapes are told first, and made when their turn comes.
        for name, shape in _shapes(recipe, len(vocabulary)):
            _announce(writer, name, shape, recipe)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for matrix in _matrices(recipe, vocabulary):
            writer.write_tensor_data(_encoded(matrix, recipe))
        writer.close()
        unfinished.replace(path)


def cached_model(directory: Path, preset: str) -> Path:
    """The path of a preset's model in `directory`, generated if it is not there. Safe among parallel processes."""
    recipe = PRESETS[preset]
    # The recipe is part of the name: a changed one makes a new file. So is this module's own age.
    identity = f"{abs(_stable_hash(f'{recipe} {_source_digest()}')):016x}"
    path = directory / identity / f"{recipe.name}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_model(path, recipe)
    return path


def _stable_hash(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _source_digest() -> int:
    here = Path(__file__)
    return _stable_hash(here.read_text() + here.with_name("gguf_vocabulary.py").read_text())


def _write_metadata(writer: gguf.GGUFWriter, recipe: Recipe, vocabulary: Vocabulary) -> None:
    file_types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_name(recipe.name)
    writer.add_file_type(file_types[recipe.weights])
    writer.add_context_length(recipe.context)
    writer.add_embedding_length(recipe.width)
    writer.add_block_count(recipe.layers)
    writer.add_feed_forward_length(recipe.feed_forward)
    writer.add_head_count(recipe.heads)
    writer.add_head_count_kv(recipe.kv_heads)
    writer.add_rope_dimension_count(recipe.width // recipe.heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
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
    writer.add_chat_template(CHAT_TEMPLATE)


def _shapes(recipe: Recipe, vocabulary_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape (rows, columns) of each tensor, in the order of `_matrices`."""
    width, inner = recipe.width, recipe.feed_forward
    keys = width // recipe.heads * recipe.kv_heads
    yield "token_embd.weight", (vocabulary_size, width)
    for layer in range(recipe.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (width,)
        yield block + "attn_q.weight", (width, width)
        yield block + "attn_k.weight", (keys, width)
        yield block + "attn_v.weight", (keys, width)
        yield block + "attn_output.weight", (width, width)
        yield block + "ffn_norm.weight", (width,)
        yield block + "ffn_gate.weight", (inner, width)
        yield block + "ffn_up.weight", (inner, width)
        yield block + "ffn_down.weight", (width, inner)
    yield "output_norm.weight", (width,)
    yield "output.weight", (vocabulary_size, width)


def _matrices(recipe: Recipe, vocabulary: Vocabulary) -> Iterator[Matrix]:
    """The tensors themselves, one by one."""
    rng = np.random.default_rng(recipe.seed)
    width, inner, noise = recipe.width, recipe.feed_forward, recipe.noise
    keys = width // recipe.heads * recipe.kv_heads
    codes, wanted = _shared_code(vocabulary)
    code_channels = slice(1, 1 + _CODE_CHANNELS)

    embedding = _random(rng, len(vocabulary), width, 0.5)
    embedding[:, 0] = _CONSTANT
    embedding[:, code_channels] = codes
    yield embedding
    scale = 1 / np.sqrt(width)
    for _ in range(recipe.layers):
        yield np.ones(width, np.float32)
        yield _random(rng, width, width, 2 * scale)
        yield _random(rng, keys, width, 2 * scale)
        yield _random(rng, keys, width, scale)
        yield _keeping_the_constant(_random(rng, width, width, 1.5 * noise * scale))
        yield np.ones(width, np.float32)
        yield _random(rng, inner, width, scale)
        yield _random(rng, inner, width, scale)
        yield _keeping_the_constant(_random(rng, width, inner, noise / np.sqrt(inner)))
    yield np.ones(width, np.float32)
    output = _random(rng, len(vocabulary), width, noise * scale)
    output[:, 0] = np.where(vocabulary.writable, 0.0, _FORBIDDEN)
    output[:, code_channels] = wanted * (_CODE_STRENGTH / _CODE_CHANNELS)
    yield output


def _shared_code(vocabulary: Vocabulary) -> tuple[Matrix, Matrix]:
    """A code of signs for each token, and for each token the sum of the codes of those that it should follow."""
    rng = np.random.default_rng(_CODE_SEED)
    codes = rng.choice(np.array([-1.0, 1.0], np.float32), size=(len(vocabulary), _CODE_CHANNELS))
    writable = np.flatnonzero(vocabulary.writable)
    successors = rng.choice(writable, size=len(vocabulary))
    # The words follow each other in one long cycle, so that no short loop swallows the text.
    cycle = rng.permutation(writable)
    successors[cycle] = np.roll(cycle, -1)
    strengths = np.where(vocabulary.writable, np.float32(1), np.float32(_FROM_OTHER_TOKENS))
    wanted = np.zeros_like(codes)
    np.add.at(wanted, successors, codes * strengths[:, None])
    return codes, wanted


def _random(rng: np.random.Generator, rows: int, columns: int, scale: float) -> Matrix:
    matrix = rng.standard_normal((rows, columns), np.float32)
    matrix *= np.float32(scale)
    return matrix


def _keeping_the_constant(matrix: Matrix) -> Matrix:
    """Let a block add nothing to the constant channel."""
    matrix[0] = 0
    return matrix


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
    print(f"{target}: {os.path.getsize(target):,} bytes")  # noqa: PTH202


if __name__ == "__main__":
    main()
