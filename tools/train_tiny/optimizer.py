"""Muon for the matrices inside the layers, Adam for the rest.

Muon: the momentum's direction is made orthogonal before the step, so that every direction of a matrix is used
(K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024). With few tokens to learn from it needs
clearly fewer of them than Adam.
"""

from __future__ import annotations

import torch
from tools.train_tiny.llama import Llama
from torch import Tensor

_MOMENTUM = 0.95
# Coefficients of the quintic Newton-Schulz iteration, from the same source.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def _orthogonal(matrix: Tensor) -> Tensor:
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return x.T if tall else x


class Optimizer:
    """Both methods behind one step; `fraction` scales the learning rates of both."""

    def __init__(self, model: Llama, matrix_rate: float, other_rate: float, weight_decay: float) -> None:
        self._matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
        chosen = {id(parameter) for parameter in self._matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        self._momenta = [torch.zeros_like(parameter) for parameter in self._matrices]
        self._matrix_rate, self._other_rate, self._weight_decay = matrix_rate, other_rate, weight_decay
        self._adam = torch.optim.Adam(others, lr=other_rate, betas=(0.9, 0.95), eps=1e-10, foreach=True)

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        """One step down the gradients, which are cleared."""
        for group in self._adam.param_groups:
            group["lr"] = self._other_rate * fraction
        self._adam.step()
        self._adam.zero_grad()
        rate = self._matrix_rate * fraction
        for matrix, momentum in zip(self._matrices, self._momenta, strict=True):
            if matrix.grad is None:
                continue
            momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
            direction = _orthogonal(matrix.grad.lerp_(momentum, _MOMENTUM))
            scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.mul_(1 - rate * self._weight_decay)
            matrix.add_(direction, alpha=-rate * scale)
            matrix.grad = None
