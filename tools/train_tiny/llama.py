"""The llama architecture in PyTorch, as small as it can be said, and laid out as llama.cpp reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Widths are multiples of 32, as Q8_0 needs them; those of `tiny` of 256, as the K-quants do."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward: int
    context: int = 4096
    rope_base: float = 100000.0
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        """Numbers per attention head."""
        return self.width // self.heads


def rotations(shape: Shape, length: int) -> Tensor:
    """RoPE's unit complex numbers, [length, head_width / 2]."""
    exponents = torch.arange(0, shape.head_width, 2, dtype=torch.float64) / shape.head_width
    angles = torch.outer(torch.arange(length, dtype=torch.float64), shape.rope_base**-exponents)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE over neighbouring pairs, llama.cpp's order here: no permutation on export. x: [..., length, head_width]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Layer(nn.Module):
    """Attention and a gated feed-forward, each added to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, key_value = shape.width, shape.key_value_heads * shape.head_width
        self.attention_norm = nn.RMSNorm(width, eps=shape.norm_epsilon)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, key_value, bias=False)
        self.value = nn.Linear(width, key_value, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width, eps=shape.norm_epsilon)
        self.gate = nn.Linear(width, shape.feed_forward, bias=False)
        self.up = nn.Linear(width, shape.feed_forward, bias=False)
        self.down = nn.Linear(shape.feed_forward, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """x: [batch, length, width]; turns: [length, head_width / 2]."""
        x = x + self.attention_output(self._attend(self.attention_norm(x), turns))
        h = self.feed_forward_norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))

    def _attend(self, h: Tensor, turns: Tensor) -> Tensor:
        batch, length, width = h.shape
        shape = self.shape
        q = _rotate(self.query(h).view(batch, length, shape.heads, -1).transpose(1, 2), turns)
        k = _rotate(self.key(h).view(batch, length, shape.key_value_heads, -1).transpose(1, 2), turns)
        v = self.value(h).view(batch, length, shape.key_value_heads, -1).transpose(1, 2)
        group = shape.heads // shape.key_value_heads
        attended = functional.scaled_dot_product_attention(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True
        )
        return attended.transpose(1, 2).reshape(batch, length, width)


class Llama(nn.Module):
    """The whole model: token ids in, logits out; the output layer is its own, not the embedding's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.width, eps=shape.norm_epsilon)
        self.output = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self._turns = rotations(shape, shape.context)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.zeros_(self.output.weight)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            for matrix in (layer.query, layer.key, layer.value, layer.gate, layer.up):
                nn.init.normal_(matrix.weight, std=shape.width**-0.5)
            nn.init.zeros_(layer.attention_output.weight)
            nn.init.zeros_(layer.down.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, length]; logits: [batch, length, vocabulary]."""
        x = self.embedding(tokens)
        turns = self._turns[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, turns)
        return self.output(self.output_norm(x))

    def parameter_count(self) -> int:
        """Weights in all."""
        return sum(parameter.numel() for parameter in self.parameters())
