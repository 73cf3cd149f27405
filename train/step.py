"""One training step, public and private, whatever the sharding: the whole of it is on this page.

A step's records are decided by a pure function of the step; each rank takes its slice of them in microbatches. What
chance each record meets (timestep, noise, dropped label) is a function of (seed, stage, step, record).
"""

# B records of a microbatch, K noise draws a record
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from checkpointing.failpoints import failpoint
from models.dit import DiTConfig
from models.flow import Objective, drop_labels
from privacy.clipping import TwoPassClipper
from privacy.mechanism import Mechanism
from train.config import TrainStage
from train.data import Batch, Prefetcher, ShardDataset
from train.optim import ExponentialMovingAverage, learning_rate
from train.parallel import Backend, World
from train.randomness import record_draws

Draw = NDArray[np.int64]


class NonFiniteLoss(ValueError):
    """The public loss is inf or NaN: the weights before this step are still good, those after it would not be."""


@dataclass(frozen=True)
class Microbatch:
    """What one rank puts through one forward; `losses` maps a model to this microbatch's per-record losses (B,)."""

    present_B: Tensor  # False for padding, which evens out the ranks
    losses: Callable[[nn.Module], Tensor]
    last: bool


class Batches:
    """A step's records as this rank's microbatches: equally many, and of equal size, on every rank."""

    def __init__(self, stage: TrainStage, model: DiTConfig, world: World) -> None:
        self.stage, self.model, self.world = stage, model, world
        self.objective = Objective(prediction=stage.objective.prediction, timesteps=stage.objective.timesteps)
        bf16 = stage.train.precision == "bf16"
        self.autocast = torch.autocast(world.device.type, torch.bfloat16) if bf16 else nullcontext()

    def share(self, records: Draw) -> Draw:
        """This rank's slice of a step's records."""
        size = -(-len(records) // self.world.size)
        return records[self.world.rank * size : (self.world.rank + 1) * size]

    def of(self, step: int, num_records: int, mine: Batch) -> Iterator[Microbatch]:
        """This rank's share, padded where the records do not fall evenly; an empty step is one padded microbatch."""
        share = -(-num_records // self.world.size)
        count = max(1, -(-share // self.stage.train.microbatch_size))
        size = max(1, -(-share // count))
        for index in range(count):
            part = slice(index * size, (index + 1) * size)
            records = Batch(mine.indices[part], mine.images[part], mine.labels[part])
            yield self._microbatch(step, records, size, last=index == count - 1)

    def _microbatch(self, step: int, records: Batch, size: int, *, last: bool) -> Microbatch:
        model, objective, num_draws = self.model, self.stage.objective, self.stage.objective.noise_draws
        shape = (model.channels, model.image_size, model.image_size)
        draws = record_draws(self.stage.train.seed, self.stage.name, step, records.indices.tolist(), shape, num_draws)
        labels = records.labels.repeat_interleave(num_draws)
        labels = drop_labels(labels, draws.dropout, objective.label_dropout, model.num_classes)

        def padded(values: Tensor, length: int) -> Tensor:
            return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])]).to(self.world.device)

        images_BK = padded(records.images.repeat_interleave(num_draws, 0), size * num_draws)
        labels_BK, noise_BK = padded(labels, size * num_draws), padded(draws.noise, size * num_draws)
        t_BK = self.objective.sample_timesteps(padded(draws.timestep, size * num_draws))

        def losses(network: nn.Module) -> Tensor:
            with self.autocast:
                losses_BK = self.objective.losses(network, images_BK, labels_BK, t_BK, noise_BK)
            return losses_BK.view(size, num_draws).mean(1)

        return Microbatch(padded(torch.ones(len(records.indices), dtype=torch.bool), size), losses, last)


@dataclass(frozen=True)
class StepReport:
    """What a step may tell the world: its mean loss (noised in a private stage) and how many images it stands for."""

    loss: float
    images: int


@dataclass
class PublicStep:
    """Plain training: the mean loss over a fixed global batch."""

    stage: TrainStage
    batches: Batches
    backend: Backend
    average: ExponentialMovingAverage
    prefetcher: Prefetcher  # of this rank's share of each step

    def __call__(self, step: int) -> StepReport:
        world, size = self.batches.world, self.stage.train.batch_size
        loss = torch.zeros((), device=world.device)
        for batch in self.batches.of(step, size, self.prefetcher.fetch(step)):
            with self.backend.microbatch(last=batch.last):
                losses_B = batch.losses(self.backend.model)
                self.backend.backward((losses_B * batch.present_B).sum() / size)
            loss += losses_B.detach()[batch.present_B].sum() / size
        failpoint("step.computed", step=step)
        loss = float(world.sum(loss))
        if not np.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss of {self.stage.name} is {loss} at step {step}: "
                "lower optim.learning_rate, or raise optim.warmup_steps"
            )
        self.backend.update(learning_rate(self.stage.optim, step, self.stage.train.steps))
        self.average.update(step + 1)
        return StepReport(loss, size)


@dataclass
class PrivateStep:
    """Differentially private training: Poisson draw, per-record clipping, noise, and a charge that comes before all."""

    stage: TrainStage
    batches: Batches
    backend: Backend
    average: ExponentialMovingAverage
    clipper: TwoPassClipper
    mechanism: Mechanism
    dataset: ShardDataset

    def __call__(self, step: int) -> StepReport:
        world = self.batches.world
        charge = self.mechanism.charge(step)  # durable before anything private is drawn
        failpoint("ledger.synced", step=step)
        units = self.mechanism.draw(charge)  # the same on every rank
        loss = torch.zeros((), device=world.device)
        for batch in self.batches.of(step, len(units), self._load(self.batches.share(units))):
            losses_B = self.clipper.accumulate(self.backend, batch.losses, batch.present_B, last=batch.last)
            loss += self.mechanism.clip_losses(losses_B, batch.present_B)
        failpoint("step.computed", step=step)
        self.backend.update(  # noise on each owned shard, once an element, after reduction
            learning_rate(self.stage.optim, step, self.stage.train.steps), self.mechanism.privatise(charge)
        )
        failpoint("noise.added", step=step)
        self.average.update(step + 1)
        released = self.mechanism.release_loss(world.sum(loss), charge)
        self.mechanism.done(charge, [self.dataset.digest(unit) for unit in units.tolist()])
        # The true batch size is private: throughput counts the expected one.
        return StepReport(released, self.stage.train.batch_size)

    def _load(self, units: Draw) -> Batch:
        model = self.batches.model
        return Batch(units, *self.dataset.batch(units, model.channels, model.image_size))
