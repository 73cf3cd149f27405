"""Ranks for the checkpoint tests: threads with a real barrier, and forked processes that can really be killed."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpointing.sharded import Checkpoint, Chunk

TIMEOUT_S = 5.0
Gather = Callable[[object], list[Any]]


def in_threads(world_size: int, work: Callable[[int, Gather], Any]) -> list[Any]:
    """Each rank's result, or the exception it ended with."""
    barrier = threading.Barrier(world_size, timeout=TIMEOUT_S)
    slots: list[Any] = [None] * world_size
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        def gather(mine: object) -> list[Any]:
            slots[rank] = json.dumps(mine)
            barrier.wait()
            everyone = [json.loads(slot) for slot in slots]
            barrier.wait()
            return everyone

        try:
            results[rank] = work(rank, gather)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_processes(
    world_size: int, folder: Path, work: Callable[[int, Gather], Any], environment: Mapping[str, str]
) -> list[int | None]:
    """Each rank's exit code: 0, 1 where it raised, -9 where it was killed. They speak through files in `folder`."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(world_size, timeout=TIMEOUT_S)
    folder.mkdir()

    def run(rank: int) -> None:
        os.environ.update(environment, RANK=str(rank))
        phase = 0

        def gather(mine: object) -> list[Any]:
            nonlocal phase
            phase += 1
            (folder / f"{phase}-{rank}").write_text(json.dumps(mine))
            barrier.wait()
            return [json.loads((folder / f"{phase}-{peer}").read_text()) for peer in range(world_size)]

        try:
            work(rank, gather)
        except Exception:
            os._exit(1)
        os._exit(0)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(timeout=0.02)
        if any(process.exitcode == -9 for process in processes):
            barrier.abort()  # what a collective's time-out does for the survivors, sooner
    return [process.exitcode for process in processes]


def example_state(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    """Tensors of every awkward shape: a scalar, an empty one, a prime length, matrices."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"scale": (), "nothing": (0, 3), "prime": (101,), "matrix": (7, 9), "blocks.0.qkv.weight": (6, 4, 5)}
    return {
        (kind, name): torch.randn(shape, generator=generator)
        for kind in ("param", "exp_avg", "exp_avg_sq", "ema")
        for name, shape in shapes.items()
    }


def shard(tensors: Mapping[tuple[str, str], torch.Tensor], cuts: Sequence[float], rank: int) -> list[Chunk]:
    """The rank's chunks where each tensor is cut at the given fractions; fractions 0 and 1 make empty shards."""
    chunks = []
    for (kind, name), tensor in tensors.items():
        flat = tensor.flatten()
        bounds = [0, *(round(cut * flat.numel()) for cut in cuts), flat.numel()]
        begin, end = bounds[rank], bounds[rank + 1]
        chunks.append(Chunk(kind, name, begin, tuple(tensor.shape), flat[begin:end]))  # pyright: ignore[reportArgumentType]
    return chunks


def assert_holds(checkpoint: Checkpoint, tensors: Mapping[tuple[str, str], torch.Tensor]) -> None:
    """The checkpoint has these tensors and no others, bit for bit."""
    assert checkpoint.tensors() == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for (kind, name), tensor in tensors.items():
        read = checkpoint.read(kind, name)  # pyright: ignore[reportArgumentType]
        assert torch.equal(read.view(torch.int32), tensor.flatten().view(torch.int32)), (kind, name)
