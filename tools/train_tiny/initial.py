"""Starting weights that can already look back.

To repeat a word, to count on from a given number or to fill in a tool's argument, a model must find where it saw the
present token before, and say what came after it then. Two heads in a row do that: one brings each position the token
before it, the next compares that with the present token and copies what stands there ("induction heads": C. Olsson et
al., "In-context Learning and Induction Heads", 2022). Models find this by themselves, but late: not within the few
tokens that there is time for here. So the first two layers start with such heads, roughly made, and training does the
rest. (Starting from weights that look like trained ones: A. Trockman, Z. Kolter, "Mimetic Initialization of
Self-Attention Layers", 2023.)
"""

from __future__ import annotations

import torch
from tools.train_tiny.llama import Layer, Llama, Shape, rotations
from torch import Tensor

# One number of every embedding is this constant: what a head that goes by position alone can hold on to.
_CONSTANT_PLACE, _CONSTANT = 0, 0.8
_EMBEDDING_SCALE = 0.1
_OUTPUT_SCALE = 0.3
# Fastest rotations, which tell neighbours apart; and how strongly they do.
_POSITION_PAIRS = 4
_POSITION_STRENGTH = 1.5
# Rotations after this part of them are so slow that what they carry can be compared over hundreds of tokens.
_CONTENT_FROM = 5 / 16
_CONTENT_STRENGTH = 2.2
_BROUGHT, _COPIED = 2.0, 6.0


@torch.no_grad()
def look_back(model: Llama) -> None:
    """Sets the embedding, the output layer, and the attention of the first two layers."""
    shape = model.shape
    head = shape.head_width
    # A basis without the constant's place: `own` and `rest` for a token's own embedding, `before` for the token before.
    basis = torch.zeros(shape.width - 1, shape.width)
    basis[:, 1:] = torch.linalg.qr(torch.randn(shape.width - 1, shape.width - 1)).Q
    before, own = basis[:head], basis[head : head * 2]

    embedding = torch.randn(shape.vocabulary, shape.width) * _EMBEDDING_SCALE
    embedding -= embedding @ before.T @ before
    embedding[:, _CONSTANT_PLACE] = 0.0
    model.output.weight.copy_(embedding * _OUTPUT_SCALE)
    embedding[:, _CONSTANT_PLACE] = _CONSTANT
    model.embedding.weight.copy_(embedding)

    first, second = model.layers[0], model.layers[1]
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    _bring_previous(first, shape, own, before)
    for group in range(shape.key_value_heads):
        copied = own if group == 0 else basis[head * (group + 1) : head * (group + 2)]
        _find_and_copy(second, shape, group, own, before, copied)


def _bring_previous(layer: Layer, shape: Shape, own: Tensor, before: Tensor) -> None:
    """Head 0 looks one token back, by position alone, and brings that token's own part."""
    head = shape.head_width
    turn = rotations(shape, 2)[1, :_POSITION_PAIRS]
    layer.query.weight[:head] = 0.0
    layer.key.weight[:head] = 0.0
    layer.query.weight[0 : _POSITION_PAIRS * 2 : 2, _CONSTANT_PLACE] = _POSITION_STRENGTH
    # Turned ahead by one position, so that the two agree one token apart.
    layer.key.weight[0 : _POSITION_PAIRS * 2 : 2, _CONSTANT_PLACE] = turn.real * _POSITION_STRENGTH
    layer.key.weight[1 : _POSITION_PAIRS * 2 : 2, _CONSTANT_PLACE] = turn.imag * _POSITION_STRENGTH
    layer.value.weight[:head] = own
    layer.attention_output.weight[:, :head] = before.T * _BROUGHT


def _find_and_copy(layer: Layer, shape: Shape, group: int, own: Tensor, before: Tensor, copied: Tensor) -> None:
    """The group's first head looks for places that came after the present token, and copies what stands there."""
    head = shape.head_width
    query_rows = slice(group * (shape.heads // shape.key_value_heads) * head, None)
    query = layer.query.weight[query_rows][:head]
    key = layer.key.weight[group * head : (group + 1) * head]
    compared = slice(int(head / 2 * _CONTENT_FROM) * 2, head)
    query.zero_()
    key.zero_()
    query[compared] = own[compared] * _CONTENT_STRENGTH
    key[compared] = before[compared] * _CONTENT_STRENGTH
    layer.value.weight[group * head : (group + 1) * head] = copied
    layer.attention_output.weight[:, query_rows][:, :head] = copied.T * _COPIED
