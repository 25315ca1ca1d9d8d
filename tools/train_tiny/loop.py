"""The training loop: windows of text in, a trained model out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tools.train_tiny.corpus import documents
from tools.train_tiny.llama import Llama
from tools.train_tiny.optimizer import Optimizer
from tools.train_tiny.packing import Window, windows
from tools.train_tiny.tokenizer import Tokenizer
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Phase:
    """A stretch of steps over windows of one length."""

    steps: int
    length: int
    batch: int
    long: bool = False


@dataclass(frozen=True)
class Schedule:
    """The phases in turn, and the learning rates: warmed up, constant, then falling over `decay` of the steps."""

    phases: Sequence[Phase]
    matrix_rate: float
    other_rate: float
    weight_decay: float = 0.05
    warm_up: int = 10
    decay: float = 0.5

    @property
    def steps(self) -> int:
        """Steps in all."""
        return sum(phase.steps for phase in self.phases)

    def fraction(self, step: int) -> float:
        """How much of the learning rates applies in a step."""
        left = (self.steps - step) / self.steps
        return min(1.0, (step + 1) / self.warm_up, left / self.decay)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of the input ids, the logits, the ids to be predicted and their weights."""


def cross_entropy(_inputs: Tensor, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean surprise, in nats per token."""
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def _batches(source: Iterator[Window], count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    while True:
        batch = [next(source) for _ in range(count)]
        tokens = torch.tensor([window.tokens for window in batch])
        weights = torch.tensor([window.weights for window in batch])
        yield tokens[:, :-1], tokens[:, 1:], weights[:, 1:]


def train(
    model: Llama,
    tokenizer: Tokenizer,
    schedule: Schedule,
    seed: int,
    loss_of: Loss = cross_entropy,
    report: Callable[[str], None] = print,
) -> float:
    """Trains the model in place. Returns the mean loss of the last twenty steps."""
    optimizer = Optimizer(model, schedule.matrix_rate, schedule.other_rate, schedule.weight_decay)
    recent: list[float] = []
    started = time.monotonic()
    step = seen = 0
    for place, phase in enumerate(schedule.phases):
        text = documents(seed + place, long=phase.long)
        batches = _batches(windows(text, tokenizer, phase.length + 1), phase.batch)
        for _ in range(phase.steps):
            inputs, targets, weights = next(batches)
            loss = loss_of(inputs, model(inputs), targets, weights)
            loss.backward()
            optimizer.step(schedule.fraction(step))
            recent = [*recent[-19:], loss.item()]
            step, seen = step + 1, seen + inputs.numel()
            if step % 20 == 0 or step == schedule.steps:
                spent = time.monotonic() - started
                mean = sum(recent) / len(recent)
                report(f"step {step}/{schedule.steps}  loss {mean:.4f}  {seen / spent:.0f} tokens/s  {spent:.0f} s")
    return sum(recent) / len(recent)
