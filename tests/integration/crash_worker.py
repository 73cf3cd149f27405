"""A private stage in real processes that die by SIGKILL where they are told to, and that keep their own account.

The account is written here, outside the product, whenever noise is about to be added: what was released can then be
counted without asking the ledger. Places to die at, beside those of `checkpointing.failpoints` and of `train.step`:

    charge.torn        half of the bytes that hold the step's charges are written
    charge.appended    all of them are, and not yet synced
    charge.synced      they are on the disk, and nobody knows yet
    noise.drawn        a shard of the gradient has its noise (:2 the second one)
    noise.whole        all of the rank's shards have, and AdamW has not seen them
    loss.released      the loss has its noise, and nobody was told of it
    done.appended      the step's charge is marked as used
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401  (loaded once, before the processes part)
import torch

import privacy.accounting.pld  # noqa: F401
from checkpointing.failpoints import failpoint
from checkpointing.tiers import Checkpointer
from privacy.noise import GaussianNoise
from train.config import FinetuneStage
from train.heartbeat import Heartbeat
from train.parallel import Backend
from train.recipe import load_stage
from train.run_folder import RunFolder
from train.stages import run_stage

ROOT = Path(__file__).resolve().parents[2]
STEPS, NUM_RECORDS, BATCH, MAX_GRAD_NORM, LOSS_BOUND = 6, 60, 12, 0.5, 2.0
OVERRIDES = (
    "init_from=null",
    "model={name: dit, width: 16, depth: 1, heads: 2, image_size: 8, channels: 1, patch_size: 4, num_classes: 10}",
    f"train.steps={STEPS}",
    f"train.batch_size={BATCH}",
    "train.microbatch_size=12",
    "optim.warmup_steps=0",
    "checkpoint={every: 2, keep: 2, memory_every: 0}",
    "log={every: 100, wandb: disabled}",
    "privacy.replay_steps=8",
    "privacy.clipping=two_pass",
    f"privacy.max_grad_norm={MAX_GRAD_NORM}",
    f"privacy.loss_bound={LOSS_BOUND}",
)


def stage_for(nproc: int, charge_ahead: int) -> FinetuneStage:
    """The digits recipe's private stage, tiny: one process on its own, or FSDP2."""
    placed = f"parallel={{backend: {'single' if nproc == 1 else 'fsdp2'}, nproc: {nproc}}}"
    overrides = [*OVERRIDES, placed, f"privacy.charge_ahead={charge_ahead}"]
    stage = load_stage(ROOT / "configs/digits/40_finetune_dp.yaml", overrides)
    assert isinstance(stage, FinetuneStage)
    return stage


def run(folder: Path, charge_ahead: int, environment: dict[str, str], fencing_epoch: int) -> None:
    """Run or resume the stage in `folder` as one rank of the environment's world."""
    os.environ.update(environment)
    rank = int(environment["RANK"])
    log = os.open(folder / f"log-{fencing_epoch}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(1)
    _Account(folder / f"account-{fencing_epoch}-{rank}.jsonl", folder / "ledger.jsonl").open()
    _save_before_the_next_step()
    stage = stage_for(int(environment["WORLD_SIZE"]), charge_ahead)
    run_stage(stage, RunFolder.open(folder, "digits"), fencing_epoch, Heartbeat(rank))


def _save_before_the_next_step() -> None:
    """So that what is on the disk when the process dies does not depend on how far its writer has come."""
    snapshot = Checkpointer.snapshot

    def snapshot_and_drain(saves: Checkpointer, *what: Any, **how: Any) -> bool:
        begun = snapshot(saves, *what, **how)
        saves.drain()
        return begun

    Checkpointer.snapshot = snapshot_and_drain  # type: ignore[method-assign]


class _Account:
    """What this process releases, and how much of the ledger it made durable, a line each, written as it happens."""

    def __init__(self, path: Path, ledger: Path) -> None:
        self._ledger, self._write, self._sync = ledger, os.write, os.fsync
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._step = -1  # that released last
        self._charging: int | None = None  # first of the steps whose charges are written and not yet synced

    def open(self) -> None:
        os.write, os.fsync = self.write, self.fsync
        add, before_adamw = GaussianNoise.add_, Backend._before_adamw

        def add_and_tell(noise: GaussianNoise, shard: torch.Tensor, **where: Any) -> None:
            bits = hashlib.sha256(shard.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
            self._tell(released={"length": shard.numel(), "input": bits, **where})
            add(noise, shard, **where)
            self._step = where["step"]
            failpoint("loss.released" if where["name"] == "released loss" else "noise.drawn", step=self._step)

        def before_adamw_and_tell(backend: Backend, optimizer: torch.optim.Optimizer, *rest: Any) -> None:
            before_adamw(backend, optimizer, *rest)
            failpoint("noise.whole", step=self._step)

        GaussianNoise.add_, Backend._before_adamw = add_and_tell, before_adamw_and_tell  # type: ignore[method-assign]

    def write(self, file: int, data: bytes) -> int:
        if not self._is_ledger(file) or not data:
            return self._write(file, data)
        first = json.loads(data.splitlines()[0])
        if first["type"] == "charge":
            half = len(data) // 2
            written = self._write(file, data[:half])
            failpoint("charge.torn", step=first["step"])
            written += self._write(file, data[half:])
            failpoint("charge.appended", step=first["step"])
            self._charging = first["step"]
            return written
        written = self._write(file, data)
        if first["type"] == "done":
            failpoint("done.appended", step=self._step)
        return written

    def fsync(self, file: int) -> None:
        self._sync(file)
        if self._is_ledger(file):
            self._tell(synced=os.fstat(file).st_size)
            charging, self._charging = self._charging, None
            if charging is not None:
                failpoint("charge.synced", step=charging)

    def _is_ledger(self, file: int) -> bool:
        return self._ledger.exists() and os.path.samestat(os.fstat(file), self._ledger.stat())

    def _tell(self, **line: Any) -> None:
        self._write(self._file, json.dumps(line).encode() + b"\n")
