"""Teaches the draft what the large model would say, which is what its guesses are checked against."""

from __future__ import annotations

import torch
from tools.train_tiny.llama import Llama
from tools.train_tiny.loop import Loss
from torch import Tensor
from torch.nn import functional


def distillation(teacher: Llama) -> Loss:
    """How far the draft's distribution is from the teacher's (Kullback-Leibler), weighted mean in nats per token."""
    teacher.eval()

    def loss(inputs: Tensor, logits: Tensor, _targets: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = functional.log_softmax(teacher(inputs), -1)
        said = functional.log_softmax(logits, -1)
        divergence = functional.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)
        return (divergence * weights).sum() / weights.sum()

    return loss
