"""Weights that make a generated model predictable in what matters, and random in all else.

The next token is one of two successors of the last one; which of the two is a vote. Each layer casts two: by a fixed
sign of the token that stands so and so many places back, which one of its attention heads looks up exactly, by
position. So every layer and its KV cache decide, a wrong one shows within a few tokens, and the winner leads by far
more than rounding can change: greedy output is the same however the work is batched or split. All models share signs
and successors, so that a small one drafts for a large one and is right more often than not.

The hidden state has channels of its own for this, to which the random rest adds nothing; the rest is as large as the
recipe says, and is seen in the probabilities alone.

Two architectures guess tokens ahead: `glm4moe` has a block for it (MTP), and `eagle3` is a draft that reads the hidden
states of another model. Both have the votes of the first layer, so they are right as often as any draft of one layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tests.support.gguf_vocabulary import Vocabulary

Matrix = npt.NDArray[np.float32]

ROPE_BASE = 10_000.0

_SHARED_SEED = 15
"""Chosen: with it no text of the presets falls into a loop of fewer than 130 words."""
_CLASSES = 64
"""As many words as a model may write, each with a code that is orthogonal to all others."""
_VOTES_A_LAYER = 2
_MOST_VOTES = 48
_FARTHEST = 12
"""Votes look at most so many places back: less than the shortest chat prompt has."""

# Channels of the hidden state.
_CONSTANT, _TALLY = 0, 1
_SIGNS = slice(2, 2 + _MOST_VOTES)
_CODE = slice(_SIGNS.stop, _SIGNS.stop + _CLASSES)
_PLANNED = _CODE.stop

_CONSTANT_VALUE = 2.0
_VOTE = 0.1
"""What one vote adds, against 1 for a channel of the code: small, so that votes do not change the scale."""
_FIRST_VOTES = (2.0, 1.0)
"""The first layer's votes weigh more, as they are those that a draft of a single layer has. An odd sum: no ties."""
_SHARPNESS = 4.0
"""Of the looking up by position: at this, the right place outweighs its neighbours by e to the tenth and more."""
_SLOWEST = 0.04
"""Radians a position: slower pairs of RoPE tell neighbours apart too little to be worth their noise."""
_BLOCK_NOISE = 0.1
"""What a block's random part adds to a channel, as a share of the recipe's noise: so little that normalisation has
the same scale in all layers, and their votes weigh the same."""
HEAD_EXPERTS = 2
"""Experts of the block that guesses. One of them is used, besides one that is always."""
_FORBIDDEN = -60.0
_SUCCESSOR, _DECISION = 20.0, 25.0
"""In the output: how far the two successors lead the other words, and what a vote counts between the two."""


@dataclass(frozen=True)
class Recipe:
    """A model to generate.

    Attributes:
        name: what the GGUF's metadata calls it.
        layers: number of blocks, up to 24.
        width: channels of the hidden state; a multiple of `heads` and of 32, at least 128.
        feed_forward: channels inside a block's feed-forward part; a multiple of 32.
        heads: attention heads.
        kv_heads: heads of keys and values, at least 2; divides `heads`.
        seed: of what is random.
        noise: how much the random part shows in the probabilities, 0 to about 1.
        contrast: how far the planned words lead, as a part of what makes them independent of rounding.
        context: the longest text, in tokens, that the metadata promises.
        weights: type of the matrices in the file.
        reasons: its chat template begins every answer inside of `<think>`, which only a budget ends.
        architecture: `glm4moe` is `llama` with a block more, which guesses the token after the next one (MTP).
            `eagle3` drafts for models of its own width and six layers or more; it has one layer.
    """

    name: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    seed: int
    noise: float = 0.4
    contrast: float = 1.0
    context: int = 4096
    weights: Literal["f16", "q8_0"] = "f16"
    reasons: bool = False
    architecture: Literal["llama", "glm4moe", "eagle3"] = "llama"

    def __post_init__(self) -> None:
        if self.width < 128 or self.kv_heads < _VOTES_A_LAYER or self.layers * _VOTES_A_LAYER > _MOST_VOTES:
            raise ValueError(f"too narrow, too few heads, or too many layers for the plan: {self}")

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class _Plan:
    """What all models share. One row for each token of the vocabulary."""

    word_of_token: npt.NDArray[np.intp]
    """The word, counted from 0, that a token is or counts as."""
    codes: Matrix
    """The code of that word."""
    signs: Matrix
    """How each token decides each vote: 1 or -1."""
    successors: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
    """For each word, the one that follows when the vote is positive, and the one when it is negative."""
    words: npt.NDArray[np.intp]
    """The tokens that the words are."""


def matrices(recipe: Recipe, vocabulary: Vocabulary) -> Iterator[tuple[str, Matrix]]:
    """Name and values of each tensor, one by one, as rows of the output's channels."""
    rng = np.random.default_rng(recipe.seed)
    plan = _plan(vocabulary)
    ones = np.ones(recipe.width, np.float32)
    yield "token_embd.weight", _embedding(rng, recipe, plan)
    if recipe.architecture == "eagle3":
        yield from _fusion(rng, recipe)
    for layer in range(recipe.layers):
        block = f"blk.{layer}."
        yield from _attention(rng, recipe, block, layer)
        yield block + "ffn_gate.weight", _random(rng, recipe.feed_forward, recipe.width)
        yield block + "ffn_up.weight", _random(rng, recipe.feed_forward, recipe.width)
        yield block + "ffn_down.weight", _inner_output(rng, recipe)
    if recipe.architecture == "glm4moe":
        yield from _own_head(rng, recipe, f"blk.{recipe.layers}.")
    yield "output_norm.weight", ones
    yield "output.weight", _output(rng, recipe, plan, vocabulary)


def foretell(recipe: Recipe, vocabulary: Vocabulary, tokens: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that the model writes after `tokens`, greedily; computed from the plan, not from weights.

    Raises ValueError for fewer tokens than the votes look back at.
    """
    if len(tokens) <= _FARTHEST:
        raise ValueError(f"the votes look {_FARTHEST} places back, and there are only {len(tokens)} tokens")
    plan = _plan(vocabulary)
    text = list(tokens)
    for _ in range(count):
        tally = sum(
            _weight(layer, rank) * plan.signs[text[-1 - _back(layer, rank)], _vote(layer, rank)]
            for layer in range(recipe.layers)
            for rank in range(_VOTES_A_LAYER)
        )
        text.append(int(plan.words[plan.successors[0 if tally > 0 else 1][plan.word_of_token[text[-1]]]]))
    return text[len(tokens) :]


def _vote(layer: int, rank: int) -> int:
    """The number of a layer's first or second vote, counted through all layers."""
    return layer * _VOTES_A_LAYER + rank


def _back(layer: int, rank: int) -> int:
    """How many places back a vote looks."""
    return _vote(layer, rank) % _FARTHEST + 1


def _weight(layer: int, rank: int) -> float:
    return _FIRST_VOTES[rank] if layer == 0 else 1.0


def _plan(vocabulary: Vocabulary) -> _Plan:
    rng = np.random.default_rng(_SHARED_SEED)
    size = len(vocabulary)
    words = np.flatnonzero(vocabulary.writable)
    if len(words) != _CLASSES:
        raise ValueError(f"the plan is for {_CLASSES} words, not {len(words)}")
    word_of_token = rng.integers(0, _CLASSES, size)
    word_of_token[words] = np.arange(_CLASSES)
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < _CLASSES:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = rng.choice(np.array([-1, 1], np.float32), size=(size, _MOST_VOTES))
    # A positive vote leads to words of even rank, a negative one to words of odd rank; each half follows all words.
    halves = [rng.permutation(np.repeat(np.arange(first, _CLASSES, 2), 2)) for first in (0, 1)]
    return _Plan(word_of_token, hadamard[word_of_token], signs, (halves[0], halves[1]), words)


def _embedding(rng: np.random.Generator, recipe: Recipe, plan: _Plan) -> Matrix:
    matrix = rng.standard_normal((len(plan.codes), recipe.width), np.float32)
    # Of one length for all tokens, as normalisation would otherwise make some look nearer than they are.
    matrix[:, :_PLANNED] = 0
    matrix *= 0.5 * np.sqrt(recipe.width - _PLANNED) / np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix[:, _CONSTANT] = _CONSTANT_VALUE
    matrix[:, _SIGNS] = plan.signs
    matrix[:, _CODE] = plan.codes
    return matrix


def _attention(rng: np.random.Generator, recipe: Recipe, block: str, layer: int) -> Iterator[tuple[str, Matrix]]:
    """What a block has before its feed-forward part, with the votes of a layer."""
    ones = np.ones(recipe.width, np.float32)
    yield block + "attn_norm.weight", ones
    queries, keys, values, output = (
        _queries(rng, recipe, layer),
        _keys(rng, recipe),
        _values(rng, recipe, layer),
        _attention_output(rng, recipe, layer),
    )
    if recipe.architecture == "glm4moe":
        queries, keys = _turned_by_halves(queries, recipe), _turned_by_halves(keys, recipe)
    if recipe.architecture == "eagle3":
        _copy_the_code(recipe, queries, keys, values, output)
        # Each reads a token's embedding and, after it, the hidden state: of that nothing.
        queries, keys, values = (np.hstack([one, np.zeros_like(one)]) for one in (queries, keys, values))
    yield block + "attn_q.weight", queries
    yield block + "attn_k.weight", keys
    yield block + "attn_v.weight", values
    yield block + "attn_output.weight", output
    yield block + ("post_attention_norm.weight" if recipe.architecture == "glm4moe" else "ffn_norm.weight"), ones


def _own_head(rng: np.random.Generator, recipe: Recipe, block: str) -> Iterator[tuple[str, Matrix]]:
    """The block that guesses (MTP): the first layer's votes, on the next token's embedding and the hidden state.

    Source of names and shapes: llama.cpp, src/models/glm4-moe.cpp. The head is the model's own.
    """
    width, inner = recipe.width, recipe.feed_forward
    ones = np.ones(width, np.float32)
    yield from _attention(rng, recipe, block, 0)
    yield block + "ffn_gate_inp.weight", _random(rng, HEAD_EXPERTS, width)
    yield block + "exp_probs_b.bias", np.zeros(HEAD_EXPERTS, np.float32)
    for part in ("gate", "up"):
        experts = [_random(rng, inner, width) for _ in range(HEAD_EXPERTS)]
        yield f"{block}ffn_{part}_exps.weight", np.stack(experts)
        yield f"{block}ffn_{part}_shexp.weight", _random(rng, inner, width)
    yield block + "ffn_down_exps.weight", np.stack([_inner_output(rng, recipe) for _ in range(HEAD_EXPERTS)])
    yield block + "ffn_down_shexp.weight", _inner_output(rng, recipe)
    # Normalised, the embedding is larger than in the first layer, where the votes were planned.
    hidden = _leaving_the_plan(_random(rng, width, width) * (_BLOCK_NOISE * recipe.noise))
    yield block + "nextn.eh_proj.weight", np.hstack([np.eye(width, dtype=np.float32) * _embedding_size(width), hidden])
    yield block + "nextn.enorm.weight", ones
    yield block + "nextn.hnorm.weight", ones


def _fusion(rng: np.random.Generator, recipe: Recipe) -> Iterator[tuple[str, Matrix]]:
    """What an EAGLE-3 draft does with hidden states: it mixes three layers', and keeps the constant of the first.

    Source of names and shapes: llama.cpp, src/models/eagle3.cpp.
    """
    width = recipe.width
    mixed = _leaving_the_plan(_random(rng, width, 3 * width))
    mixed[_CONSTANT, _CONSTANT] = 1
    yield "fc.weight", mixed
    # The state of the last guess has the code and the votes of a token that is over.
    kept = np.ones(width, np.float32)
    kept[_TALLY:_PLANNED] = 0
    yield "blk.0.attn_norm_2.weight", kept


def _copy_the_code(recipe: Recipe, queries: Matrix, keys: Matrix, values: Matrix, output: Matrix) -> None:
    """Let a third head take the code of the token itself: the embedding is not in what the block adds to."""
    if recipe.heads != recipe.kv_heads or recipe.heads <= _VOTES_A_LAYER or recipe.head_width != _CLASSES:
        raise ValueError(f"no head for the code of a token: {recipe}")
    own = slice(_VOTES_A_LAYER * recipe.head_width, (_VOTES_A_LAYER + 1) * recipe.head_width)
    queries[own] = keys[own] = values[own] = 0
    pairs = slice(own.start, own.start + 2 * len(_frequencies(recipe)), 2)
    queries[pairs, _CONSTANT] = keys[pairs, _CONSTANT] = _SHARPNESS
    values[own, _CODE] = np.eye(_CLASSES)
    output[:, own] = 0
    output[_CODE, own] = np.eye(_CLASSES)


def _turned_by_halves(matrix: Matrix, recipe: Recipe) -> Matrix:
    """Queries or keys for a RoPE that turns channel n with the one half a head after it, not with the next one."""
    heads = matrix.reshape(-1, recipe.head_width // 2, 2, recipe.width)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(matrix.shape)


def _embedding_size(width: int) -> float:
    """Root mean square of an embedding: the same for all tokens."""
    rest = 0.25 * (width - _PLANNED)
    return float(np.sqrt((_CONSTANT_VALUE**2 + _MOST_VOTES + _CLASSES + rest) / width))


def _inner_output(rng: np.random.Generator, recipe: Recipe) -> Matrix:
    return _leaving_the_plan(_random(rng, recipe.width, recipe.feed_forward) * (_BLOCK_NOISE * recipe.noise))


def _queries(rng: np.random.Generator, recipe: Recipe, layer: int) -> Matrix:
    matrix = _random(rng, recipe.width, recipe.width) * 2
    sharing = recipe.heads // recipe.kv_heads
    # The other heads that share a voting head's keys have no use for them: they look at all places alike.
    matrix[: recipe.head_width * sharing * _VOTES_A_LAYER] = 0
    for rank in range(_VOTES_A_LAYER):
        # RoPE turns a pair by its frequency times the position: this query meets the key so far back in phase.
        angles = _frequencies(recipe) * _back(layer, rank)
        first = rank * sharing * recipe.head_width
        matrix[first : first + 2 * len(angles) : 2, _CONSTANT] = _SHARPNESS * np.cos(angles)
        matrix[first + 1 : first + 2 * len(angles) : 2, _CONSTANT] = -_SHARPNESS * np.sin(angles)
    return matrix


def _keys(rng: np.random.Generator, recipe: Recipe) -> Matrix:
    matrix = _random(rng, recipe.head_width * recipe.kv_heads, recipe.width) * 2
    for rank in range(_VOTES_A_LAYER):
        first = rank * recipe.head_width
        matrix[first : first + recipe.head_width] = 0
        matrix[first : first + 2 * len(_frequencies(recipe)) : 2, _CONSTANT] = _SHARPNESS
    return matrix


def _values(rng: np.random.Generator, recipe: Recipe, layer: int) -> Matrix:
    matrix = _random(rng, recipe.head_width * recipe.kv_heads, recipe.width)
    for rank in range(_VOTES_A_LAYER):
        row = rank * recipe.head_width
        matrix[row] = 0
        matrix[row, _SIGNS.start + _vote(layer, rank)] = 1
    return matrix


def _attention_output(rng: np.random.Generator, recipe: Recipe, layer: int) -> Matrix:
    matrix = _leaving_the_plan(_random(rng, recipe.width, recipe.width) * (_BLOCK_NOISE * recipe.noise))
    for rank in range(_VOTES_A_LAYER):
        column = rank * recipe.heads // recipe.kv_heads * recipe.head_width
        matrix[_TALLY, column] = _VOTE * _weight(layer, rank)
    return matrix


def _output(rng: np.random.Generator, recipe: Recipe, plan: _Plan, vocabulary: Vocabulary) -> Matrix:
    matrix = _random(rng, len(vocabulary), recipe.width) * recipe.noise
    matrix[:, :_PLANNED] = 0
    matrix[:, _CONSTANT] = np.where(vocabulary.writable, 0, _FORBIDDEN)
    codes = plan.codes[plan.words]
    for successors in plan.successors:
        for word, successor in enumerate(successors):
            matrix[plan.words[successor], _CODE] += codes[word] * (_SUCCESSOR * recipe.contrast / _CLASSES)
    matrix[plan.words, _TALLY] = np.where(np.arange(_CLASSES) % 2 == 0, _DECISION, -_DECISION) * recipe.contrast
    return matrix


def _frequencies(recipe: Recipe) -> npt.NDArray[np.float64]:
    """Radians by which RoPE turns each pair of a head's channels from one position to the next, the fast ones only."""
    pairs = np.arange(recipe.head_width // 2)
    frequencies = ROPE_BASE ** (-2.0 * pairs / recipe.head_width)
    return frequencies[frequencies >= _SLOWEST]


def _random(rng: np.random.Generator, rows: int, columns: int) -> Matrix:
    """Random values that keep the scale of what they are applied to."""
    matrix = rng.standard_normal((rows, columns), np.float32)
    matrix /= np.float32(np.sqrt(columns))
    return matrix


def _leaving_the_plan(matrix: Matrix) -> Matrix:
    """Let a block add nothing to the planned channels."""
    matrix[:_PLANNED] = 0
    return matrix
