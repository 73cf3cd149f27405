"""Runs a short private stage under each backend in one process group; started by test_backends.py under torchrun.

    torchrun --nproc-per-node 2 tests/integration/private_stage.py BASE CASE:BACKEND [CASE:BACKEND ...]

BASE holds a prepared run folder `BASE/prepared-CASE` for each case of CASES; each backend works in a copy of it, hence
with the same ledger id, the same secret and the same noise. Its copy is `BASE/CASE-BACKEND-RANKS`.
"""

import faulthandler
import os
import shutil
import sys
from pathlib import Path

from train.heartbeat import Heartbeat
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


UNIFIED = (
    "model={name: unified, width: 32, depth: 2, heads: 2, image_size: 8, channels: 1, patch_size: 4, "
    "max_caption_tokens: 12, modality_experts: true, num_experts: 2}",
    "documents={row_tokens: 60, bounds: [36, 44, 60]}",
    "objective.balancing=row",
)
CASES: dict[str, tuple[str, ...]] = {
    "two_pass": ("privacy.clipping=two_pass",),
    "kept_gradients": ("privacy.clipping=kept_gradients",),
    "group_wise": ("privacy.clipping=group_wise", "privacy.adaptive_bounds={quantile: 0.5, rate: 0.5, share: 0.1}"),
    "sparse": ("train.batch_size=1",),  # most ranks have no record, and two draws in five are empty
    "checkpointed": ("parallel.activation_checkpointing=true", "privacy.clipping=kept_gradients"),
    "bf16": ("train.precision=bf16",),
    "compiled": ("parallel.compile=true",),
    "banded": (
        "privacy.sampling={method: cyclic_poisson, cycle: 5}",
        "privacy.bands=3",
        "privacy.charge_ahead=2",
        "objective.noise_draws=2",
    ),
    "users": ("privacy.unit=user", "privacy.max_records_per_user=3", "train.batch_size=5"),
    "unified": (*UNIFIED, "objective.noise_draws=2", "privacy.clipping=two_pass"),
    "unified_groups": (*UNIFIED, "privacy.clipping=group_wise"),
}


def stage_for(case: str, backend: str, nproc: int):
    """The digits recipe's private stage, small, under `backend`."""
    placed = (f"parallel.backend={backend}", f"parallel.nproc={nproc}")
    return load_stage(ROOT / "configs/digits/40_finetune_dp.yaml", [*OVERRIDES, *CASES[case], *placed])


def main() -> None:
    base = Path(sys.argv[1])
    world = join_world()
    faulthandler.dump_traceback_later(270, exit=True)  # before test_backends.py loses its patience
    for token in sys.argv[2:]:
        case, backend = token.split(":")
        folder = base / f"{case}-{backend}-{world.size}"
        if world.rank == 0:  # with the id of the run, hence the same name in the ledger
            shutil.copytree(base / f"prepared-{case}", folder)
        world.barrier()
        train(stage_for(case, backend, world.size), RunFolder.open(folder, "digits"), world, 1, Heartbeat(world.rank))
        world.barrier()
    os._exit(0)  # DeepSpeed's engines would be torn down one by one


if __name__ == "__main__":
    main()
