"""Labelled images as a DiT's microbatches: equally many, and of equal size, on every rank."""

# B units of a microbatch, R records a unit, K noise draws a record
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.dit import DiTConfig
from models.flow import Objective, drop_labels
from train.config import TrainStage
from train.data import Batch, ShardDataset
from train.parallel import World
from train.step import Batches, Microbatch, Slots


@dataclass(frozen=True)
class Loaded:
    """This rank's slice of a step's units, and their records in order; `num_units` and `flops` are of all ranks."""

    step: int
    num_units: int
    slots: Slots
    records: Batch
    flops: float


class LabelledImages(Batches):
    """The mean squared error of each image, noised as its draw says, given its label; a unit's is its records' mean."""

    def __init__(self, stage: TrainStage, config: DiTConfig, world: World, dataset: ShardDataset) -> None:
        super().__init__(stage, config, world, dataset)
        self.config = config
        self.objective = Objective(prediction=stage.objective.prediction, timesteps=stage.objective.timesteps)
        self.unit_flops = config.forward_flops()

    def require_fit(self) -> None:
        """Raise ValueError for a class that the model does not have."""
        split, beyond = self.dataset.split, int(self.dataset.labels.max(initial=-1))
        if beyond >= self.config.num_classes:
            raise ValueError(f"split {split} holds class {beyond}, but model.num_classes is {self.config.num_classes}")

    def load(self, step: int, slots: Slots) -> Loaded:
        mine = self.slice_of(slots)
        indices = mine[mine >= 0]
        records = Batch(indices, *self.dataset.batch(indices, self.config.channels, self.config.image_size))
        return Loaded(step, len(slots), mine, records, len(slots) * self.unit_flops)

    def of(self, loaded: Loaded) -> Iterator[Microbatch]:
        """The slice padded where the units do not fall evenly; an empty step is one padded microbatch."""
        slots, mine = loaded.slots, loaded.records
        share = -(-loaded.num_units // self.world.size)
        count = max(1, -(-share // self.stage.train.microbatch_size))
        size = max(1, -(-share // count))
        start = 0
        for index in range(count):
            part = np.full((size, slots.shape[1]), -1, np.int64)
            there = slots[index * size : (index + 1) * size]
            part[: len(there)] = there
            stop = start + int((part >= 0).sum())
            records = Batch(mine.indices[start:stop], mine.images[start:stop], mine.labels[start:stop])
            yield self._microbatch(loaded.step, part, records, last=index == count - 1)
            start = stop

    def _microbatch(self, step: int, slots_BR: Slots, records: Batch, *, last: bool) -> Microbatch:
        config, objective, num_draws = self.config, self.stage.objective, self.stage.objective.noise_draws
        shape = (config.channels, config.image_size, config.image_size)
        draws = self.draws(step, records.indices.tolist(), shape, num_draws)
        labels = records.labels.repeat_interleave(num_draws)
        labels = drop_labels(labels, draws.dropout, objective.label_dropout, config.num_classes)
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

        return Microbatch(present_BR.any(1), losses, last, slots_BR)
