"""A training stage's state on any backend: what a rank saves, and how it is filled in, shard by shard.

The state is the weights, AdamW's two moments and the weights' average, in fp32, under the kinds param, exp_avg,
exp_avg_sq and ema. Each rank lists the flat ranges it answers for; a load asks for the ranges it holds, whoever saved
them. Nothing here ever holds a whole model: at most one chunk of a checkpoint, or one tensor of a new model.

    backend = build_model(lambda: DiT(config), world, parallel, optim, ...)     # room, and nothing in it yet
    average = ExponentialMovingAverage(backend, decay)
    restore(checkpoint, backend, average)                                       # to go on, or to begin:
    initialise(backend, seed) or load_weights(checkpoint, backend); average.restart()
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from checkpointing.layout import Kind, Piece
from checkpointing.sharded import Checkpoint
from train.optim import ExponentialMovingAverage
from train.parallel import Backend, Shard

KINDS: tuple[Kind, ...] = ("param", "exp_avg", "exp_avg_sq", "ema")


def pieces(backend: Backend, average: ExponentialMovingAverage) -> list[Piece]:
    """The ranges that this rank saves, the same for the length of a stage.

    Guarantee: over all ranks every element of every kind and tensor is in exactly one piece. A rank may have none.
    """
    return [
        Piece(kind, shard.name, shard.offset + start, stop - start, shard.shape)
        for kind, shard, _, start, stop in _stored(backend, average)
    ]


def ranges(backend: Backend, average: ExponentialMovingAverage) -> list[Piece]:
    """The ranges that this rank reads on a load: all that it holds, replicas included."""
    return [
        Piece(kind, shard.name, shard.offset, shard.numel, shard.shape) for kind, shard, _ in _held(backend, average)
    ]


def tensors(backend: Backend, average: ExponentialMovingAverage) -> list[Tensor]:
    """The state of `pieces`, in their order: flat fp32 views of what the step changes, on its device, not copies.

    Ask anew for each snapshot: a backend may lay its tensors elsewhere between steps.
    """
    return [state[start:stop] for _, _, state, start, stop in _stored(backend, average)]


def initialise(backend: Backend, seed: int) -> None:
    """Give a new model its first weights: those of the model's `init_weights`, on any backend and world size."""
    generator = torch.Generator().manual_seed(seed)
    own: dict[str, list[Shard]] = {name: [] for name in backend.shapes}
    for shard in backend.shards:
        own[shard.name].append(shard)
    for name, shape in backend.shapes.items():
        value = backend.module.initial_value(name, shape, generator).flatten()  # type: ignore[operator]
        for shard in own[name]:
            shard.value.copy_(value[shard.offset : shard.offset + shard.numel])
    backend.publish()


def load_weights(checkpoint: Checkpoint, backend: Backend, kind: Kind = "ema") -> None:
    """Start from the weights of another stage's checkpoint, by default from their average; AdamW starts anew.

    Raises CheckpointError, naming the first tensor that differs, where the checkpoint is of another model.
    """
    _require_model(checkpoint, backend)
    for shard in backend.shards:
        checkpoint.read_into(kind, shard.name, shard.offset, shard.value)
    checkpoint.close()
    backend.publish()


def restore(checkpoint: Checkpoint, backend: Backend, average: ExponentialMovingAverage) -> None:
    """Put back the whole state, bit for bit; each rank reads the ranges it holds, straight into their place.

    Guarantee: the state is that of the save, whatever backend and world size wrote it; host memory beyond the state
    itself is one chunk. Raises CheckpointError, naming the first tensor that differs, where it is of another model.
    """
    _require_model(checkpoint, backend)
    for kind, shard, state in _held(backend, average):
        checkpoint.read_into(kind, shard.name, shard.offset, state)
    checkpoint.close()
    backend.restore_optimizer(checkpoint.state["num_updates"])
    backend.publish()


def _require_model(checkpoint: Checkpoint, backend: Backend) -> None:
    checkpoint.require({(kind, name): shape for kind in KINDS for name, shape in backend.shapes.items()})


def _held(backend: Backend, average: ExponentialMovingAverage) -> Iterator[tuple[Kind, Shard, Tensor]]:
    """All that this rank holds, as (kind, shard, its flat state)."""
    for shard in backend.shards:
        yield "param", shard, shard.value
    yield from backend.optimizer_tensors()
    for shard, value in average.averages:
        yield "ema", shard, value


def _stored(backend: Backend, average: ExponentialMovingAverage) -> Iterator[tuple[Kind, Shard, Tensor, int, int]]:
    """What this rank holds and also saves: the elements [start, stop) of each state, where there are any."""
    for kind, shard, state in _held(backend, average):
        assert state.dtype == torch.float32, f"{kind} {shard.name} is {state.dtype}: a state is kept in fp32"
        start, stop = backend.stored_range(shard)
        if start < stop:
            yield kind, shard, state, start, stop
