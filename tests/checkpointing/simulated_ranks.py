"""Ranks for the checkpoint tests: threads, and forked processes that can really be killed. They share a place only."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpointing.layout import Kind, SaveId
from checkpointing.places import Place
from checkpointing.sharded import Checkpoint, Chunk, latest, save_now

TIMEOUT_S = 5.0
Tensors = Mapping[tuple[Kind, str], torch.Tensor]
STATE = {"stage": "pretrain", "ledger": None, "loss": 0.1, "betas": [0.9, 0.999]}


def in_threads(world_size: int, work: Callable[[int], Any]) -> list[Any]:
    """Each rank's result, or the exception it ended with."""
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_processes(
    world_size: int, work: Callable[[int], Any], environment: Mapping[str, str] | None = None
) -> list[int | None]:
    """Each rank's exit code: 0, 1 where it raised, -9 where it was killed."""
    context = multiprocessing.get_context("fork")

    def run(rank: int) -> None:
        os.environ.update(environment or {}, RANK=str(rank))
        try:
            work(rank)
        except Exception:
            os._exit(1)
        os._exit(0)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def example_state(seed: int = 0) -> dict[tuple[Kind, str], torch.Tensor]:
    """Tensors of every awkward shape: a scalar, an empty one, a prime length, matrices."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"scale": (), "nothing": (0, 3), "prime": (101,), "matrix": (7, 9), "blocks.0.qkv.weight": (6, 4, 5)}
    kinds: tuple[Kind, ...] = ("param", "exp_avg", "exp_avg_sq", "ema")
    return {(kind, name): torch.randn(shape, generator=generator) for kind in kinds for name, shape in shapes.items()}


def shard(tensors: Tensors, cuts: Sequence[float], rank: int) -> list[Chunk]:
    """The rank's chunks where each tensor is cut at the given fractions; fractions 0 and 1 make empty shards."""
    chunks = []
    for (kind, name), tensor in tensors.items():
        flat = tensor.flatten()
        bounds = [0, *(round(cut * flat.numel()) for cut in cuts), flat.numel()]
        begin, end = bounds[rank], bounds[rank + 1]
        chunks.append(Chunk(kind, name, begin, tuple(tensor.shape), flat[begin:end]))
    return chunks


def save_all(place: Place, save: SaveId, tensors: Tensors, cuts: Sequence[float] = ()) -> SaveId:
    """The save, committed, from `len(cuts) + 1` ranks."""
    world_size = len(cuts) + 1
    results = in_threads(
        world_size,
        lambda rank: save_now(
            place, save, shard(tensors, cuts, rank), STATE, rank=rank, world_size=world_size, timeout_s=TIMEOUT_S
        ),
    )
    assert results == [None] * world_size
    return save


def load(root: Path) -> Checkpoint:
    checkpoint = latest(root)
    assert checkpoint is not None
    return checkpoint


def assert_holds(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """The checkpoint has these tensors and no others, bit for bit."""
    assert checkpoint.tensors() == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for (kind, name), tensor in tensors.items():
        read = checkpoint.read(kind, name)
        assert torch.equal(read.view(torch.int32), tensor.flatten().view(torch.int32)), (kind, name)
