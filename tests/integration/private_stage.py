"""Runs a short private stage under each backend in one process group; started by test_backends.py under torchrun.

    torchrun --nproc-per-node 2 tests/integration/private_stage.py BASE BACKEND [BACKEND ...]

BASE holds a prepared run folder `BASE/prepared`; each backend works in a copy of it, hence with the same ledger id, the
same secret and the same noise.
"""

import os
import shutil
import sys
from pathlib import Path

from train.loop import train
from train.parallel import join_world
from train.recipe import load_stage
from train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
OVERRIDES = (
    "init_from=null",
    "model={name: dit, width: 32, depth: 2, heads: 2, image_size: 8, channels: 1, patch_size: 2, num_classes: 10}",
    f"train.steps={STEPS}",
    "train.batch_size=12",
    "train.microbatch_size=4",
    "optim.warmup_steps=0",
    "checkpoint.every=2",
    "log.wandb=disabled",
    "log.every=1",
    "privacy.replay_steps=1",
    "privacy.max_grad_norm=0.5",
)


def stage_for(backend: str, nproc: int):
    """The digits recipe's private stage, small, under `backend`."""
    placed = (f"parallel.backend={backend}", f"parallel.nproc={nproc}")
    return load_stage(ROOT / "configs/digits/40_finetune_dp.yaml", [*OVERRIDES, *placed])


def main() -> None:
    base, backends = Path(sys.argv[1]), sys.argv[2:]
    world = join_world()
    for backend in backends:
        folder = base / f"{backend}-{world.size}"
        if world.rank == 0:
            shutil.copytree(base / "prepared", folder)  # with the id of the run, hence the same name in the ledger
        world.barrier()
        train(stage_for(backend, world.size), RunFolder.open(folder, "digits"), world, fencing_epoch=1)
        world.barrier()
    os._exit(0)  # DeepSpeed's engines would be torn down one by one


if __name__ == "__main__":
    main()
