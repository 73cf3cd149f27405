"""The training stages' loop: start or resume, step, log, save, stop in order when told to."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpointing.failpoints import failpoint
from checkpointing.sharded import Checkpoint, latest
from checkpointing.store import open_place
from kernels import dispatch
from models.registry import ModelConfig, build_module
from privacy.clipping import Clipper
from privacy.mechanism import Mechanism
from train.config import FinetuneStage, TrainStage
from train.data import Prefetcher, ShardDataset, public_batch
from train.families import architecture, batches_of, keep_tokenizer, read_config, written
from train.hardware import find_hardware
from train.health import Health
from train.heartbeat import Heartbeat
from train.metrics import MetricsLogger, Throughput, plot_curves, read_metrics
from train.optim import ExponentialMovingAverage
from train.parallel import Backend, World, build_model
from train.private import clipping_state, open_mechanism, stage_clipper
from train.progress import Progress
from train.run_folder import RunFolder
from train.saves import CHECKPOINTS, Saves
from train.state import initialise, load_weights, restore
from train.step import Batches, PrivateStep, PublicStep, StepReport
from train.timeline import Timeline

_TIMELINE_S = 2.0  # between two lines on steps done
_FIGURES = ("loss", "text_loss", "patches_loss", "expert_load_cv", "images_per_s", "tflops", "mfu")  # of the last row


class Preempted(Exception):
    """Told to stop: everything done so far is saved, and the stage can go on from there."""


@dataclass(frozen=True)
class Trained:
    """What a finished training stage has to say of itself."""

    checkpoint: Path
    metrics: dict[str, Any]
    ledger: dict[str, Any] | None


def open_split(run: RunFolder, stage: TrainStage) -> ShardDataset:
    """The split a training stage reads, if it is whole: its root must be the one that its writer's manifest names."""
    manifest = run.read_manifest(stage.data_from)
    if manifest is None:
        raise ValueError(f"stage {stage.name} reads {stage.data_from}, which is not finished: run it first")
    splits = manifest["metrics"].get("splits", {})
    if stage.split not in splits:
        raise ValueError(f"split is {stage.split!r}, but stage {stage.data_from} made {', '.join(splits) or 'none'}")
    dataset = ShardDataset(run.path / stage.data_from / stage.split, stage.split)
    written = splits[stage.split]["root"]
    if dataset.root != written:
        raise ValueError(
            f"split {stage.split} of {stage.data_from} has root {dataset.root[:19]}.., and its manifest names "
            f"{written[:19]}..: a shard was changed or lost; restore it, or start a new --run-dir"
        )
    return dataset


def train(stage: TrainStage, run: RunFolder, world: World, fencing_epoch: int, heartbeat: Heartbeat) -> Trained:
    """Run `stage` to its last step, from its newest whole save where it has one, in memory or on a disk.

    Raises Preempted after SIGTERM or SIGINT, with the state saved, and BadStep where the stage must go back to a save.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_on_signal())
        heartbeat.section("load")
        training = _Training(stage, run, world, fencing_epoch, stack)
        training.backend.before_backward = heartbeat.waiting
        heartbeat.section("step")
        done, stopping = training.first, False
        while done < stage.train.steps and not stopping:
            training.step(done)
            done += 1
            heartbeat.beat(done)
            stopping = world.any(stop.is_set())
            with heartbeat.section("save"):
                training.save_if_due(done, stopping=stopping)
        with heartbeat.section("save"):
            saved = training.saves.finish()
        if done < stage.train.steps:
            training.log.tell(done, at_once=True)
            training.timeline.event("stopped", step=done, why="signal")
            raise Preempted(f"stage {stage.name} was told to stop: step {done} of {stage.train.steps} is saved")
        heartbeat.section("finish")
        return training.trained(saved)


class _Training:
    """A training stage under way: all that a step and a save need, opened in the order in which it can be refused."""

    def __init__(self, stage: TrainStage, run: RunFolder, world: World, fencing_epoch: int, stack: ExitStack) -> None:
        self.stage, self.run, folder = stage, run, run.stage_folder(stage.name)
        self.timeline = Timeline(folder, enabled=world.rank == 0)
        self.timeline.event("joined")
        dataset, config = open_split(run, stage), architecture(run, stage)
        self.shards_root = run.shards_root(stage.data_from)
        if world.size > len(dataset):
            raise ValueError(
                f"{world.size} ranks share split {dataset.split}, which holds {len(dataset)} records: "
                "lower parallel.nproc, or the number of nodes"
            )
        batches = batches_of(stage, config, world, dataset)
        if world.rank == 0:
            keep_tokenizer(config, folder)
        said = dispatch.choose(stage.parallel.kernels, world.device)
        if world.rank == 0:
            print(said, flush=True)
        self.backend = build_model(
            lambda: build_module(config),
            world,
            stage.parallel,
            stage.optim,
            microbatch_size=stage.train.microbatch_size,
            # A private stage computes in bf16 on fp32 weights, so that clipped gradients are summed in fp32 throughout.
            bf16=stage.train.precision == "bf16" and not isinstance(stage, FinetuneStage),
            max_grad_norm=stage.train.max_grad_norm,
        )
        average = ExponentialMovingAverage(self.backend, stage.optim.ema_decay)
        self.saves = Saves(stage, run, self.backend, average, fencing_epoch, self.timeline)
        checkpoint = self.saves.recover()
        if checkpoint is not None:
            _require_same_origin(checkpoint, stage, self.shards_root)
        self.mechanism: Mechanism | None = None
        self.clipper: Clipper | None = None
        if isinstance(stage, FinetuneStage):
            self.mechanism = stack.enter_context(open_mechanism(stage, run, world, dataset, fencing_epoch, checkpoint))
        self.first = _fill(self.backend, average, stage, run, checkpoint)
        self.health = Health(stage, folder, world, checkpoint)
        self.take_step: PublicStep | PrivateStep
        if isinstance(stage, FinetuneStage):
            assert self.mechanism is not None
            self.clipper = stage_clipper(stage, config, self.backend, checkpoint)
            self.take_step = PrivateStep(stage, batches, self.backend, average, self.clipper, self.mechanism)
        else:
            prefetcher = stack.enter_context(_prefetcher(stage, batches))
            self.take_step = PublicStep(stage, batches, self.backend, average, prefetcher, self.health)
        stack.enter_context(self.saves.open())
        self.log = stack.enter_context(_Log(stage, folder, batches, self.first, self.mechanism, self.timeline))
        resumed = {} if checkpoint is None else {"tier": checkpoint.where, "save": checkpoint.save.name}
        self.timeline.event("loaded", step=self.first, **resumed)
        if self.first == stage.train.steps and resumed.get("tier") != "disk":  # it died before the disk had its end
            self.saves.take(self.first, self._state(), durable=True)

    def step(self, step: int) -> None:
        """Take one step, or leave it out where it was found to be bad."""
        if self.health.skips(step):
            self.log.skipped(step)
            return
        report = self.take_step(step)
        if self.mechanism is not None:
            self.health.judge_loss(step, report.loss)
        self.log.step(step, report)

    def save_if_due(self, done: int, *, stopping: bool) -> None:
        """Begin a save of the state after `done` steps, if the weights are fit for one and it is time."""
        durable = self.saves.due(done) or done == self.stage.train.steps or stopping
        due = durable or self.saves.due_in_memory(done)
        self.health.judge_weights(done - 1, self.backend, saving=due)
        if due:
            self.saves.take(done, self._state(), durable=durable)
            failpoint("checkpoint.saved", step=done)

    def trained(self, saved: Path) -> Trained:
        """What the stage has to say of itself."""
        metrics = self.log.summary() | {"skipped_steps": self.health.skipped, "saves": self.saves.report()}
        if self.mechanism is None:
            return Trained(saved, metrics, None)
        return Trained(saved, metrics | self.mechanism.summary(), _within(self.run, self.mechanism.statement()))

    def _state(self) -> dict[str, Any]:
        """What a save holds beside tensors: the same on every rank, for any rank's copy may be the one that is left."""
        broadcast = self.backend.world.broadcast
        return {
            "stage": self.stage.name,
            "config_sha256": self.stage.sha256(),
            "model": written(self.backend.module.config),  # type: ignore[arg-type]
            "num_updates": self.backend.num_updates,
            "ledger_head": None if self.mechanism is None else broadcast(self.mechanism.head),
            "shards_root": self.shards_root,
            **clipping_state(self.clipper),
            **self.health.state(),
        }


def _within(run: RunFolder, statement: dict[str, Any] | None) -> dict[str, Any] | None:
    """The ledger's statement with a path that still holds when the run folder is moved or copied."""
    if statement is None or not Path(statement["path"]).is_relative_to(run.path):
        return statement
    return statement | {"path": str(Path(statement["path"]).relative_to(run.path))}


def load_average(run: RunFolder, stage_name: str) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """A finished training stage's architecture, its EMA weights (fp32, CPU), and the checkpoint they come from."""
    checkpoint = _finished_checkpoint(run, stage_name, None)
    weights = {
        name: checkpoint.read("ema", name).view(shape)
        for (kind, name), shape in checkpoint.tensors().items()
        if kind == "ema"
    }
    return read_config(checkpoint.state["model"], run.path / stage_name), weights, checkpoint.folder


def _finished_checkpoint(run: RunFolder, stage_name: str, world: World | None) -> Checkpoint:
    """The last save of a finished training stage, every byte verified: by rank 0 for all where there is a world."""
    manifest = run.read_manifest(stage_name)
    if manifest is None:
        raise ValueError(f"stage {stage_name} is not finished: run it first")
    root = run.path / stage_name / CHECKPOINTS
    checkpoint = latest(root) if world is None or world.rank == 0 else None
    if world is not None:
        save = world.broadcast(None if checkpoint is None else checkpoint.save)
        if save is not None and checkpoint is None:
            checkpoint = Checkpoint.open(open_place(root), save)
    steps = manifest["metrics"]["steps"]
    if checkpoint is None or checkpoint.step != steps:
        found = "none" if checkpoint is None else f"step {checkpoint.step}"
        raise ValueError(
            f"stage {stage_name} finished at step {steps}, but the newest whole checkpoint in its folder is {found}: "
            f"restore it from a copy, or remove {run.manifest_path(stage_name)} and run the stage again"
        )
    return checkpoint


class _Log:
    """What a training stage tells, on rank 0: progress on every step, metrics on some, curves at the end."""

    def __init__(
        self,
        stage: TrainStage,
        folder: Path,
        batches: Batches,
        first: int,
        mechanism: Mechanism | None,
        timeline: Timeline,
    ) -> None:
        world = batches.world
        self.stage, self.folder, self.mechanism, self.last = stage, folder, mechanism, stage.train.steps
        self.batches, self.private = batches, isinstance(stage, FinetuneStage)
        self.operator = isinstance(stage, FinetuneStage) and stage.privacy.operator_metrics
        self.progress, self.timeline = Progress(folder), timeline
        self.told, self.told_at = first, time.monotonic()  # up to which step, and when, the timeline was told
        hardware = find_hardware(stage.parallel.hardware, _device_name(world))
        peak = getattr(hardware.peak_flops, stage.train.precision) if hardware else None
        self.throughput = Throughput(peak * world.size if peak else None)
        self.metrics = (
            MetricsLogger(
                folder,
                stage.name,
                stage.model_dump(mode="json"),
                wandb_mode=stage.log.wandb,
                resume_step=first,
                operator=self.operator,
            )
            if world.rank == 0
            else None
        )
        if self.operator and self.metrics is not None and (facts := batches.facts()):
            self.metrics.log_operator_only(first, **facts)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def skipped(self, step: int) -> None:
        """Tell of a step that was left out."""
        if self.metrics is not None:
            self.metrics.log(step, skipped=True)
            self.tell(step + 1)

    def step(self, step: int, values: StepReport) -> None:
        """Tell of a step that is done."""
        done = step + 1
        due = done % self.stage.log.every == 0 or done == self.last
        # raw figures, which all ranks make together; of private data they are made for the operator alone
        figures = self.batches.figures() if due and (self.operator or not self.private) else {}
        if self.metrics is None:
            return
        self.throughput.count(values.images, values.flops)
        text = f"loss {values.loss:.3f}"
        if due:
            epsilon = {} if self.mechanism is None else {"epsilon": self.mechanism.spent()}
            public = {} if self.private else figures
            # how long a private step takes tells its true batch size: only the whole stage's mean is shown
            speed = self.throughput.read() if not self.private or done == self.last else {}
            self.metrics.log(step, loss=values.loss, **public, **epsilon, **speed)
            if self.private and figures:
                self.metrics.log_operator_only(step, **figures)
            text += "".join(f"  epsilon {value:.3f}" for value in epsilon.values())
        self.progress(done, self.last, text)
        self.tell(done)

    def tell(self, done: int, *, at_once: bool = False) -> None:
        """Put into the timeline the steps that were taken since it was last told, every few seconds or at once."""
        now = time.monotonic()
        if done > self.told and (at_once or now - self.told_at >= _TIMELINE_S or done == self.last):
            self.timeline.event("steps", first=self.told, last=done, seconds=round(now - self.told_at, 3))
            self.told, self.told_at = done, now

    def summary(self) -> dict[str, Any]:
        """The stage's figures for its manifest; draws the curves."""
        if self.metrics is None:
            return {}
        plot_curves(self.folder)
        *_, last = (row for row in read_metrics(self.folder) if "loss" in row)
        figures = {key: last[key] for key in _FIGURES if key in last}
        if not self.private:
            self.batches.draw(self.folder)
            figures |= self.batches.facts()
        return {"steps": self.last, **figures}


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set: the loop ends at the next step's end, on all ranks together."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_same_origin(checkpoint: Checkpoint, stage: TrainStage, shards_root: str | None) -> None:
    saved = checkpoint.state["config_sha256"]
    if saved != stage.sha256():
        raise ValueError(
            f"stage {stage.name} is half done under another configuration ({saved[:8]}.., not {stage.sha256()[:8]}..): "
            f"set it back, or give another --run-dir (its checkpoints: {checkpoint.folder.parent})"
        )
    trained_on = checkpoint.state.get("shards_root", shards_root)  # older saves have none
    if trained_on != shards_root:
        raise ValueError(
            f"stage {stage.name} is half done on the shards of root {trained_on}, and {stage.data_from} now has "
            f"{shards_root}: put its shards back, or give another --run-dir"
        )


def _prefetcher(stage: TrainStage, batches: Batches) -> Prefetcher[Any]:
    def load(step: int) -> Any:
        records = public_batch(stage.train.seed, step, stage.train.batch_size, len(batches.dataset))
        return batches.load(step, records[:, None])

    return Prefetcher(load, stage.train.steps)


def _device_name(world: World) -> str | None:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None


def _fill(
    backend: Backend,
    average: ExponentialMovingAverage,
    stage: TrainStage,
    run: RunFolder,
    checkpoint: Checkpoint | None,
) -> int:
    """Give the model its state, of a save, of the stage to start from, or new; returns the step that comes next."""
    if checkpoint is not None:
        restore(checkpoint, backend, average)
        return checkpoint.step
    if stage.init_from is None:
        initialise(backend, stage.train.seed)
    else:
        load_weights(_finished_checkpoint(run, stage.init_from, backend.world), backend)
    average.restart()
    return 0
