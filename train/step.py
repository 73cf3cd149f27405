"""One training step, public and private, whatever the model and the sharding: the whole of it is on this page.

A step's records are decided by a pure function of the step; each rank takes its part of them in microbatches. What
chance each record meets (timestep, noise, dropped label) is a function of (seed, stage, step, record). How records
become microbatches is the model family's matter: `train.families`.
"""

# B units of a microbatch, R records a unit
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from checkpointing.failpoints import failpoint
from privacy.clipping import Clipper, GroupWiseClipper
from privacy.mechanism import Mechanism
from train.config import TrainStage
from train.data import Prefetcher, ShardDataset
from train.health import Health
from train.optim import ExponentialMovingAverage, learning_rate
from train.parallel import Backend, World
from train.randomness import Draws, record_draws, record_number

Slots = NDArray[np.int64]
"""A step's units, (units, R): the records of each, -1 where it has fewer than R. A unit is a record unless privacy says
a user; then R is the most records of one that a step reads."""


@dataclass(frozen=True)
class Microbatch:
    """What one rank puts through one forward; `losses` maps a model to this microbatch's losses (B,).

    In a private stage they are the units', elsewhere they may be of any parts of the batch: a step's loss is their sum
    over the batch size.
    """

    present_B: Tensor  # False for padding, which evens out the ranks
    losses: Callable[[nn.Module], Tensor]
    last: bool
    slots_BR: Slots  # the records that each loss is of, -1 padding


class Batches(ABC):
    """How the records of a model family become a step's microbatches: equally many on every rank.

    unit_flops: of a unit's forward, the same for every unit: what a private step may tell.
    """

    unit_flops: float

    def __init__(self, stage: TrainStage, config: Any, world: World, dataset: ShardDataset) -> None:
        self.stage, self.config, self.world, self.dataset = stage, config, world, dataset
        bf16 = stage.train.precision == "bf16"
        self.autocast = torch.autocast(world.device.type, torch.bfloat16) if bf16 else nullcontext()

    @abstractmethod
    def require_fit(self) -> None:
        """Raise ValueError where the stage cannot be trained with this model on these records."""

    @abstractmethod
    def load(self, step: int, slots: Slots) -> Any:
        """Read this rank's part of a step's units, which are the same on every rank; runs in the prefetcher's thread.

        The result has `flops`, those of the step's forward over all ranks.
        """

    @abstractmethod
    def of(self, loaded: Any) -> Iterator[Microbatch]:
        """What was loaded, as microbatches. An empty step is one of padding."""

    def draws(self, step: int, records: Sequence[int], shape: Sequence[int], num_draws: int) -> Draws:
        """What chance these records, given by their places in the split, meet at the step.

        Guarantee: each record's is a function of the step and of that record. Were it one of the place, a unit that
        comes or goes would change the gradients of all that stand behind it, and no clipping bounds that.
        """
        numbers = [record_number(self.dataset.digest(record)) for record in records]
        return record_draws(self.stage.train.seed, self.stage.name, step, numbers, shape, num_draws)

    def slice_of(self, slots: Slots) -> Slots:
        """This rank's slice of a step's units, each rank's as long as the first's but for the last ones'."""
        size = -(-len(slots) // self.world.size)
        return slots[self.world.rank * size : (self.world.rank + 1) * size]

    def facts(self) -> Mapping[str, int]:
        """What reading the split has shown of it: for whoever may see raw data."""
        return {}

    def figures(self) -> Mapping[str, float]:
        """What the forwards since the last call have shown, over all ranks, which call together: raw, as `facts`."""
        return {}

    def draw(self, folder: Path) -> list[Path]:
        """Pictures of what `figures` told last; on one rank."""
        return []


@dataclass(frozen=True)
class StepReport:
    """What a step may tell the world: its mean loss (noised in a private stage), and how many images and how many FLOPs
    of their forward it stands for.
    """

    loss: float
    images: int
    flops: float


@dataclass
class PublicStep:
    """Plain training: the mean loss over a fixed global batch."""

    stage: TrainStage
    batches: Batches
    backend: Backend
    average: ExponentialMovingAverage
    prefetcher: Prefetcher[Any]  # of this rank's part of each step
    health: Health

    def __call__(self, step: int) -> StepReport:
        world, size = self.batches.world, self.stage.train.batch_size
        loss = torch.zeros((), device=world.device)
        loaded = self.prefetcher.fetch(step)
        for batch in self.batches.of(loaded):
            with self.backend.microbatch(last=batch.last):
                losses_B = batch.losses(self.backend.model)
                self.backend.backward((losses_B * batch.present_B).sum() / size)
            loss += losses_B.detach()[batch.present_B].sum() / size
        failpoint("step.computed", step=step)
        of_rank = float(loss)
        loss = float(world.sum(loss))
        self.health.judge_loss(step, loss, of_rank)  # before it reaches a weight
        self.backend.update(learning_rate(self.stage.optim, step, self.stage.train.steps), average=self.average)
        return StepReport(loss, size, loaded.flops)


@dataclass
class PrivateStep:
    """Differentially private training: Poisson draw, per-record clipping, noise, and a charge that comes before all."""

    stage: TrainStage
    batches: Batches
    backend: Backend
    average: ExponentialMovingAverage
    clipper: Clipper
    mechanism: Mechanism

    def __call__(self, step: int) -> StepReport:
        world, mechanism = self.batches.world, self.mechanism
        charge = mechanism.charge(step)  # durable before anything private is drawn
        failpoint("ledger.synced", step=step)
        slots = mechanism.draw(charge)  # the same on every rank
        failpoint("batch.drawn", step=step)
        loss = torch.zeros((), device=world.device, dtype=torch.float64)
        for batch in self.batches.of(self.batches.load(step, slots)):
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
        mechanism.done(charge, [self.batches.dataset.digest(record) for record in slots[slots >= 0].tolist()])
        expected = self.stage.train.batch_size  # the true batch size is private
        return StepReport(released, expected, expected * self.batches.unit_flops)
