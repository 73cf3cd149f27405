"""Measures what loading a checkpoint takes of a process's memory; started by test_state.py under torchrun.

    torchrun --nproc-per-node 2 tests/train/load_worker.py CHECKPOINTS OUT BACKEND

Writes OUT/RANK.json: bytes of the rank's own state (`share`), and by how much resident memory had risen at most when
the model stood, with nothing in it (`built`), and when its state was loaded (`loaded`).
"""

import json
import os
import re
import sys
from pathlib import Path

import torch

from checkpointing.sharded import Checkpoint, latest
from models.dit import DiT, DiTConfig
from train.config import Optim, Parallel
from train.optim import ExponentialMovingAverage
from train.parallel import Backend, World, build_model, join_world
from train.state import restore

SMALL = DiTConfig(width=16, depth=1, heads=2, image_size=8, channels=1, num_classes=10)


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def build(config: DiTConfig, world: World, backend: str) -> Backend:
    parallel, optim = Parallel(backend=backend, nproc=world.size), Optim(learning_rate=1e-3)  # type: ignore[arg-type]
    return build_model(lambda: DiT(config), world, parallel, optim, microbatch_size=1, bf16=False)


def main() -> None:
    root, out, backend = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    world = join_world()
    torch.set_num_threads(1)
    warm = build(SMALL, world, backend)  # libraries are loaded, and threads and sockets are there
    found = latest(root) if world.rank == 0 else None
    folder = world.broadcast(None if found is None else found.folder)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    checkpoint = Checkpoint.open(folder)
    built = build(DiTConfig(**checkpoint.state["model"]), world, backend)
    figures = {"built": memory("VmHWM") - before}
    restore(checkpoint, built, ExponentialMovingAverage(built, 0.9))
    figures |= {"loaded": memory("VmHWM") - before, "share": 4 * 4 * sum(shard.numel for shard in built.shards)}
    (out / f"{world.rank}.json").write_text(json.dumps(figures))
    world.barrier()
    del warm
    os._exit(0)


if __name__ == "__main__":
    main()
