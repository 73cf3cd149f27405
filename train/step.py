"""One training step, public and private, whatever the sharding: the whole of it is on this page.

A step's records are decided by a pure function of the step; each rank takes its slice of them in microbatches. What
chance each record meets (timestep, noise, dropped label) is a function of (seed, stage, step, record).
"""

# B units of a microbatch, R records a unit, K noise draws a record
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
from privacy.clipping import Clipper, GroupWiseClipper
from privacy.mechanism import Mechanism
from train.config import TrainStage
from train.data import Batch, Prefetcher, ShardDataset
from train.health import Health
from train.optim import ExponentialMovingAverage, learning_rate
from train.parallel import Backend, World
from train.randomness import record_draws

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Microbatch:
    """What one rank puts through one forward; `losses` maps a model to this microbatch's losses by unit (B,)."""

    present_B: Tensor  # False for padding, which evens out the ranks
    losses: Callable[[nn.Module], Tensor]
    last: bool


class Batches:
    """A step's units as this rank's microbatches: equally many, and of equal size, on every rank.

    A step's slots are int64 (units, R): the records of each unit, -1 where a unit has fewer than R. A unit is a record
    unless privacy says a user; then R is the most records of one that a step reads.
    """

    def __init__(self, stage: TrainStage, model: DiTConfig, world: World) -> None:
        self.stage, self.model, self.world = stage, model, world
        self.objective = Objective(prediction=stage.objective.prediction, timesteps=stage.objective.timesteps)
        bf16 = stage.train.precision == "bf16"
        self.autocast = torch.autocast(world.device.type, torch.bfloat16) if bf16 else nullcontext()

    def share(self, slots: Slots) -> Slots:
        """This rank's slice of a step's units."""
        size = -(-len(slots) // self.world.size)
        return slots[self.world.rank * size : (self.world.rank + 1) * size]

    def of(self, step: int, num_units: int, slots: Slots, mine: Batch) -> Iterator[Microbatch]:
        """This rank's share, padded where the units do not fall evenly; an empty step is one padded microbatch.

        num_units: of the step, on all ranks; mine: the records of `slots`, this rank's share, in their order.
        """
        share = -(-num_units // self.world.size)
        count = max(1, -(-share // self.stage.train.microbatch_size))
        size = max(1, -(-share // count))
        start = 0
        for index in range(count):
            part = np.full((size, slots.shape[1]), -1, np.int64)
            there = slots[index * size : (index + 1) * size]
            part[: len(there)] = there
            stop = start + int((part >= 0).sum())
            records = Batch(mine.indices[start:stop], mine.images[start:stop], mine.labels[start:stop])
            yield self._microbatch(step, part, records, last=index == count - 1)
            start = stop

    def _microbatch(self, step: int, slots_BR: Slots, records: Batch, *, last: bool) -> Microbatch:
        model, objective, num_draws = self.model, self.stage.objective, self.stage.objective.noise_draws
        shape = (model.channels, model.image_size, model.image_size)
        draws = record_draws(self.stage.train.seed, self.stage.name, step, records.indices.tolist(), shape, num_draws)
        labels = records.labels.repeat_interleave(num_draws)
        labels = drop_labels(labels, draws.dropout, objective.label_dropout, model.num_classes)
        present_BR = torch.from_numpy(slots_BR >= 0)
        present_BRK = present_BR.flatten().repeat_interleave(num_draws)

        def padded(values: Tensor) -> Tensor:
            rows = values.new_zeros(len(present_BRK), *values.shape[1:])
            rows[present_BRK] = values
            return rows.to(self.world.device)

        images, labels = padded(records.images.repeat_interleave(num_draws, 0)), padded(labels)
        noise, t = padded(draws.noise), self.objective.sample_timesteps(padded(draws.timestep))
        present_BR = present_BR.to(self.world.device)

        def losses(network: nn.Module) -> Tensor:
            with self.autocast:
                rows = self.objective.losses(network, images, labels, t, noise)
            losses_BR = rows.view(*slots_BR.shape, num_draws).mean(2)
            # A unit's loss is the mean over its records; `where`, for a product would pass on an absent row's NaN.
            return torch.where(present_BR, losses_BR, 0.0).sum(1) / present_BR.sum(1).clamp(min=1)

        return Microbatch(present_BR.any(1), losses, last)


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
    health: Health

    def __call__(self, step: int) -> StepReport:
        world, size = self.batches.world, self.stage.train.batch_size
        loss = torch.zeros((), device=world.device)
        mine = self.prefetcher.fetch(step)
        for batch in self.batches.of(step, size, mine.indices[:, None], mine):
            with self.backend.microbatch(last=batch.last):
                losses_B = batch.losses(self.backend.model)
                self.backend.backward((losses_B * batch.present_B).sum() / size)
            loss += losses_B.detach()[batch.present_B].sum() / size
        failpoint("step.computed", step=step)
        of_rank = float(loss)
        loss = float(world.sum(loss))
        self.health.judge_loss(step, loss, of_rank)  # before it reaches a weight
        self.backend.update(learning_rate(self.stage.optim, step, self.stage.train.steps), average=self.average)
        return StepReport(loss, size)


@dataclass
class PrivateStep:
    """Differentially private training: Poisson draw, per-record clipping, noise, and a charge that comes before all."""

    stage: TrainStage
    batches: Batches
    backend: Backend
    average: ExponentialMovingAverage
    clipper: Clipper
    mechanism: Mechanism
    dataset: ShardDataset

    def __call__(self, step: int) -> StepReport:
        world, mechanism = self.batches.world, self.mechanism
        charge = mechanism.charge(step)  # durable before anything private is drawn
        failpoint("ledger.synced", step=step)
        slots = mechanism.draw(charge)  # the same on every rank
        mine = self.batches.share(slots)
        failpoint("batch.drawn", step=step)
        loss = torch.zeros((), device=world.device, dtype=torch.float64)
        for batch in self.batches.of(step, len(slots), mine, self._load(mine)):
            losses_B = self.clipper.accumulate(self.backend, batch.losses, batch.present_B, last=batch.last)
            loss += mechanism.clip_losses(losses_B, batch.present_B)
        failpoint("step.computed", step=step)
        self.backend.update(  # noise on each owned shard, once an element, after reduction
            learning_rate(self.stage.optim, step, self.stage.train.steps),
            mechanism.privatise(charge, self.backend.num_elements),
            self.average,
        )
        self.backend.check_released(step)
        failpoint("noise.added", step=step)
        if isinstance(self.clipper, GroupWiseClipper) and self.clipper.quantile is not None:
            counts = mechanism.release_counts(world.sum(self.clipper.take_counts()), charge)
            self.clipper.adapt(counts, mechanism.terms.expected_batch_size)
        released = mechanism.release_loss(world.sum(loss), charge)
        mechanism.done(charge, [self.dataset.digest(record) for record in slots[slots >= 0].tolist()])
        # The true batch size is private: throughput counts the expected one.
        return StepReport(released, self.stage.train.batch_size)

    def _load(self, slots: Slots) -> Batch:
        model, records = self.batches.model, slots[slots >= 0]
        return Batch(records, *self.dataset.batch(records, model.channels, model.image_size))
