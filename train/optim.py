"""Learning-rate schedules and the weights' exponential moving average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.config import Optim
from train.parallel import Backend, Shard


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0): a linear warm-up, then constant, or a cosine or linear fall towards 0."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return optim.learning_rate * factor[optim.schedule]


class ExponentialMovingAverage:
    """fp32 average of the weights, kept by each rank for the shards it owns.

    In a private stage it is a function of released weights only, so it costs no privacy (post-processing).
    """

    def __init__(self, backend: Backend, decay: float) -> None:
        self.decay = decay
        self.averages: list[tuple[Shard, Tensor]] = [(shard, shard.value.clone()) for shard in backend.shards]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are now."""
        for shard, average in self.averages:
            average.copy_(shard.value)

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after update `num_updates` (from 1); early averages forget faster."""
        decay = min(self.decay, num_updates / (num_updates + 10.0))
        for shard, average in self.averages:
            average.lerp_(shard.value.float(), 1.0 - decay)
