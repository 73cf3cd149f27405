"""Runs parts of stages, and loads and saves, in one process group; started by test_elastic.py under torchrun.

    torchrun --nproc-per-node 2 tests/integration/elastic_stage.py BASE TASK [TASK ...]

    train:RUN:BACKEND:UNTIL     the stage in the run folder BASE/RUN, from its newest save until it has UNTIL steps:
                                told to stop there by SIGTERM, as a scheduler would
    copy:FROM:BACKEND:TO        the newest checkpoint in BASE/FROM, loaded under BACKEND and saved again in BASE/TO
    new:SEED:BACKEND:TO         a new model of the seed, under BACKEND, saved in BASE/TO

A run whose name begins with `private` runs the digits recipe's private stage, any other the public one; with `vae`,
this with a VAE in the DiT's place. Each microbatch of a DiT adds a line {"step", "records"} to BASE/RUN/samples.jsonl.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpointing.layout import SaveId
from checkpointing.places import LocalPlace
from checkpointing.sharded import Chunk, latest, save_now
from models.dit import DiT, DiTConfig
from tests.integration import private_stage
from train.config import TrainStage
from train.heartbeat import Heartbeat
from train.loop import Preempted
from train.loop import train as train_stage
from train.optim import ExponentialMovingAverage
from train.parallel import Backend, World, build_model, join_world
from train.randomness import Draws
from train.recipe import load_stage
from train.run_folder import RunFolder
from train.state import initialise, pieces, restore, tensors
from train.step import Batches, PrivateStep, PublicStep

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH = 8, 10
MODEL = "model={name: dit, width: 36, depth: 2, heads: 3, image_size: 8, channels: 1, patch_size: 2, num_classes: 10}"
# In groups of one channel a bias before the norm would have no gradient but rounding, which AdamW makes steps of.
VAE_MODEL = (
    "model={name: vae, image_size: 8, channels: 1, latent_channels: 2, widths: [8, 16], norm_groups: 2, "
    "attention: true}"
)
SMALL = (
    MODEL,  # of a width that three ranks cannot share evenly
    f"train.steps={STEPS}",
    f"train.batch_size={BATCH}",
    "train.microbatch_size=5",
    "optim.warmup_steps=2",
    "optim.weight_decay=0.1",
    "log={every: 1, wandb: disabled}",
    "checkpoint={every: 100}",
)


def stage_for(run: str, backend: str) -> TrainStage:
    """The stage, configured for two ranks: how many there are at run time is another matter."""
    nproc = 1 if backend == "single" else 2
    if run.startswith("private"):
        stage = private_stage.stage_for("two_pass", backend, nproc)
        assert isinstance(stage, TrainStage)
        return stage
    placed = f"parallel={{backend: {backend}, nproc: {nproc}}}"
    model = [VAE_MODEL] if run.startswith("vae") else []
    stage = load_stage(ROOT / "configs/digits/30_pretrain.yaml", [*SMALL, placed, *model])
    assert isinstance(stage, TrainStage)
    return stage


def steps_of(run: str) -> int:
    return private_stage.STEPS if run.startswith("private") else STEPS


def checkpoints(base: Path, run: str) -> Path:
    return base / run / ("finetune_dp" if run.startswith("private") else "pretrain") / "checkpoints"


def train(base: Path, world: World, run: str, backend: str, until: int) -> None:
    def stop_there(step_class: type[Any]) -> None:
        call = step_class.__call__

        def step_and_stop(self: Any, step: int) -> Any:
            report = call(self, step)
            if step + 1 == until < steps_of(run):
                os.kill(os.getpid(), signal.SIGTERM)
            return report

        step_class.__call__ = step_and_stop

    def tell(self: Batches, step: int, records: Sequence[int], shape: Sequence[int], num_draws: int) -> Draws:
        os.write(samples, json.dumps({"step": step, "records": records}).encode() + b"\n")
        return draw(self, step, records, shape, num_draws)

    calls, draw = (PublicStep.__call__, PrivateStep.__call__), Batches.draws
    samples = os.open(base / run / "samples.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    stop_there(PublicStep)
    stop_there(PrivateStep)
    Batches.draws = tell
    try:
        # each start goes further than the one before it, so the step to stop at is as good an epoch as any
        stage, folder = stage_for(run, backend), RunFolder.open(base / run, "digits")
        train_stage(stage, folder, world, fencing_epoch=until, heartbeat=Heartbeat(world.rank))
        assert until == steps_of(run)
    except Preempted:
        assert until < steps_of(run)
    finally:
        PublicStep.__call__, PrivateStep.__call__ = calls
        Batches.draws = draw
        os.close(samples)


def copy(base: Path, world: World, source: str, backend: str, target: str) -> None:
    checkpoint = latest(checkpoints(base, source))
    assert checkpoint is not None
    built, average = build(world, backend)
    restore(checkpoint, built, average)
    assert built.num_updates == checkpoint.state["num_updates"]
    save(base, target, built, average, checkpoint.step)


def new(base: Path, world: World, seed: int, backend: str, target: str) -> None:
    built, average = build(world, backend)
    initialise(built, seed)
    average.restart()
    save(base, target, built, average, 0)


def build(world: World, backend: str) -> tuple[Backend, ExponentialMovingAverage]:
    stage = stage_for("public", backend)
    assert isinstance(stage.model, DiTConfig)
    config = stage.model
    built = build_model(lambda: DiT(config), world, stage.parallel, stage.optim, microbatch_size=5, bf16=False)
    return built, ExponentialMovingAverage(built, stage.optim.ema_decay)


def save(base: Path, target: str, built: Backend, average: ExponentialMovingAverage, step: int) -> None:
    chunks = [
        Chunk(piece.kind, piece.name, piece.offset, piece.shape, tensor.detach())
        for piece, tensor in zip(pieces(built, average), tensors(built, average), strict=True)
    ]
    state, world = {"num_updates": built.num_updates}, built.world
    place, save = LocalPlace(checkpoints(base, target)), SaveId(1, 1, step)
    save_now(place, save, chunks, state, rank=world.rank, world_size=world.size, timeout_s=60)


def main() -> None:
    base, world = Path(sys.argv[1]), join_world()
    torch.set_num_threads(1)
    for task in sys.argv[2:]:
        what, run, backend, how = task.split(":")
        if what == "train":
            train(base, world, run, backend, int(how))
        elif what == "copy":
            copy(base, world, run, backend, how)
        else:
            new(base, world, int(run), backend, how)
        world.barrier()
    os._exit(0)  # DeepSpeed's engines would be torn down one by one


if __name__ == "__main__":
    main()
