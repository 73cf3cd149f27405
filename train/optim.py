"""Learning-rate schedules, the weights' exponential moving average, and the update that a GPU makes in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.noisy_adamw import noisy_adamw_ema_
from privacy.mechanism import Release
from train.config import Optim

if TYPE_CHECKING:
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

    def decay_at(self, num_updates: int) -> float:
        """The decay of update `num_updates` (from 1): early averages forget faster."""
        return min(self.decay, num_updates / (num_updates + 10.0))

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after update `num_updates`, where `Backend.update` has not done so."""
        for shard, average in self.averages:
            average.lerp_(shard.value.float(), 1.0 - self.decay_at(num_updates))


@torch.no_grad()
def step_in_one_pass(
    optimizer: torch.optim.AdamW,
    shards: Sequence[Shard],
    num_updates: int,
    release: Release | None,
    average: ExponentialMovingAverage,
) -> Tensor:
    """AdamW's update `num_updates` (from 1) on gradients released by `release`, and the average's, by one kernel.

    Returns which shards were refused because their sum is not finite: see `kernels.noisy_adamw`.
    """
    group = optimizer.param_groups[0]
    states = [optimizer.state[shard.holder] for shard in shards]

    def parts(name: str) -> list[Tensor]:
        return [shard.of(state[name]) for shard, state in zip(shards, states, strict=True)]

    gradients: list[Tensor] = []
    for shard in shards:
        assert shard.holder.grad is not None, f"{shard.name} reached the optimizer without a gradient"
        gradients.append(shard.of(shard.holder.grad))
    refused = noisy_adamw_ema_(
        [shard.value for shard in shards],
        gradients,
        parts("exp_avg"),
        parts("exp_avg_sq"),
        [mean for _, mean in average.averages],
        noise=None if release is None else release.for_kernels(shards),
        grad_scale=1.0 if release is None else 1.0 / release.divisor,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=num_updates,
        ema_decay=average.decay_at(num_updates),
    )
    for state in optimizer.state.values():
        state["step"] += 1
    optimizer.zero_grad(set_to_none=True)
    return refused
