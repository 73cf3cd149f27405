"""The training stages' loop: start or resume, step, log, save, stop in order when told to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpointing.failpoints import failpoint
from checkpointing.sharded import Checkpoint, Chunk, Kind, latest, save
from checkpointing.store import prune
from models.dit import DiT, DiTConfig
from privacy.clipping import Clipper
from privacy.mechanism import Mechanism
from train.config import FinetuneStage, TrainStage
from train.data import Indices, Prefetcher, ShardDataset, public_batch
from train.hardware import find_hardware
from train.metrics import MetricsLogger, Throughput, plot_curves, read_metrics
from train.optim import ExponentialMovingAverage
from train.parallel import Backend, Shard, World, shard_model
from train.private import clipping_state, open_mechanism, stage_clipper
from train.progress import Progress
from train.run_folder import RunFolder
from train.step import Batches, PrivateStep, PublicStep, StepReport

CHECKPOINTS = "checkpoints"


class Preempted(Exception):
    """Told to stop: everything done so far is saved, and the stage can go on from there."""


@dataclass(frozen=True)
class Trained:
    """What a finished training stage has to say of itself."""

    checkpoint: Path
    metrics: dict[str, Any]
    ledger: dict[str, Any] | None


def architecture(run: RunFolder, stage: TrainStage) -> DiTConfig:
    """The model's configuration: the stage's own, or that of the stage it starts from."""
    section, source = stage.model, stage.init_from
    while section is None:
        assert source is not None, "checked when the stage was loaded"
        manifest = run.read_manifest(source)
        if manifest is None:
            raise ValueError(f"stage {stage.name} starts from {source}, which is not finished: run it first")
        config = manifest["config"]
        section, source = config["model"], config["init_from"]
    values = section if isinstance(section, dict) else section.model_dump()
    return DiTConfig(**{key: value for key, value in values.items() if key != "name"})


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


def train(stage: TrainStage, run: RunFolder, world: World, fencing_epoch: int) -> Trained:
    """Run `stage` to its last step, from its newest whole checkpoint where it has one.

    Raises Preempted after SIGTERM or SIGINT, with the state saved.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_on_signal())
        folder = run.stage_folder(stage.name)
        dataset = open_split(run, stage)
        config = architecture(run, stage)
        _require_classes(dataset, config)
        checkpoint = _newest(folder / CHECKPOINTS, world)
        if checkpoint is not None:
            _require_same_config(checkpoint, stage)
        mechanism = None
        if isinstance(stage, FinetuneStage):
            mechanism = stack.enter_context(open_mechanism(stage, run, world, dataset, fencing_epoch, checkpoint))
        model = DiT(config)
        _load_weights(model, stage, run, checkpoint)
        backend = shard_model(
            model,
            world,
            stage.parallel,
            stage.optim,
            microbatch_size=stage.train.microbatch_size,
            # A private stage computes in bf16 on fp32 weights, so that clipped gradients are summed in fp32 throughout.
            bf16=stage.train.precision == "bf16" and mechanism is None,
            max_grad_norm=stage.train.max_grad_norm,
        )
        average = ExponentialMovingAverage(backend, stage.optim.ema_decay)
        first = 0
        if checkpoint is not None:
            first = checkpoint.step
            _restore(checkpoint, backend, average)
        batches = Batches(stage, config, world)
        clipper = None
        if mechanism is None:
            prefetcher = stack.enter_context(_prefetcher(stage, dataset, batches))
            step_once = PublicStep(stage, batches, backend, average, prefetcher)
        else:
            assert isinstance(stage, FinetuneStage)
            clipper = stage_clipper(stage, config, backend, checkpoint)
            step_once = PrivateStep(stage, batches, backend, average, clipper, mechanism, dataset)

        log = stack.enter_context(_Log(stage, folder, world, model, first, mechanism))
        saved = checkpoint.folder if checkpoint is not None else None
        for step in range(first, stage.train.steps):
            log.step(step, step_once(step))
            done = step + 1
            stopping = world.any(stop.is_set())
            if done % stage.checkpoint.every == 0 or done == stage.train.steps or stopping:
                saved = _save(folder / CHECKPOINTS, done, stage, backend, average, mechanism, clipper)
                failpoint("checkpoint.saved", step=done)
            if stopping and done < stage.train.steps:
                raise Preempted(f"stage {stage.name} was told to stop: step {done} of {stage.train.steps} is saved")
        assert saved is not None
        metrics = log.summary()
        if mechanism is None:
            return Trained(saved, metrics, None)
        return Trained(saved, metrics | mechanism.summary(), _within(run, mechanism.statement()))


def _within(run: RunFolder, statement: dict[str, Any] | None) -> dict[str, Any] | None:
    """The ledger's statement with a path that still holds when the run folder is moved or copied."""
    if statement is None or not Path(statement["path"]).is_relative_to(run.path):
        return statement
    return statement | {"path": str(Path(statement["path"]).relative_to(run.path))}


def load_average(run: RunFolder, stage_name: str) -> tuple[DiTConfig, dict[str, torch.Tensor], Path]:
    """A finished training stage's architecture, its EMA weights (fp32, CPU), and the checkpoint they come from."""
    manifest = run.read_manifest(stage_name)
    if manifest is None:
        raise ValueError(f"stage {stage_name} is not finished: run it first")
    checkpoint = latest(run.path / stage_name / CHECKPOINTS)
    steps = manifest["metrics"]["steps"]
    if checkpoint is None or checkpoint.step != steps:
        found = "none" if checkpoint is None else f"step {checkpoint.step}"
        raise ValueError(
            f"stage {stage_name} finished at step {steps}, but the newest whole checkpoint in its folder is {found}: "
            f"restore it from a copy, or remove {run.manifest_path(stage_name)} and run the stage again"
        )
    weights = {
        name: checkpoint.read("ema", name).view(shape)
        for (kind, name), shape in checkpoint.tensors().items()
        if kind == "ema"
    }
    return DiTConfig(**checkpoint.state["model"]), weights, checkpoint.folder


class _Log:
    """What a training stage tells, on rank 0: progress on every step, metrics on some, curves at the end."""

    def __init__(
        self, stage: TrainStage, folder: Path, world: World, model: DiT, first: int, mechanism: Mechanism | None
    ) -> None:
        self.stage, self.folder, self.mechanism, self.last = stage, folder, mechanism, stage.train.steps
        self.progress = Progress(folder)
        hardware = find_hardware(stage.parallel.hardware, _device_name(world))
        peak = getattr(hardware.peak_flops, stage.train.precision) if hardware else None
        self.throughput = Throughput(model.forward_flops(), peak * world.size if peak else None)
        self.metrics = (
            MetricsLogger(
                folder,
                stage.name,
                stage.model_dump(mode="json"),
                wandb_mode=stage.log.wandb,
                resume_step=first,
                operator=isinstance(stage, FinetuneStage) and stage.privacy.operator_metrics,
            )
            if world.rank == 0
            else None
        )

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def step(self, step: int, values: StepReport) -> None:
        """Tell of a step that is done."""
        if self.metrics is None:
            return
        self.throughput.count(values.images)
        done = step + 1
        text = f"loss {values.loss:.3f}"
        if done % self.stage.log.every == 0 or done == self.last:
            epsilon = {} if self.mechanism is None else {"epsilon": self.mechanism.spent()}
            self.metrics.log(step, loss=values.loss, **epsilon, **self.throughput.read())
            text += "".join(f"  epsilon {value:.3f}" for value in epsilon.values())
        self.progress(done, self.last, text)

    def summary(self) -> dict[str, Any]:
        """The stage's figures for its manifest; draws the curves."""
        if self.metrics is None:
            return {}
        plot_curves(self.folder)
        *_, last = (row for row in read_metrics(self.folder) if "loss" in row)
        figures = {key: last[key] for key in ("loss", "images_per_s", "tflops", "mfu")}
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


def _require_classes(dataset: ShardDataset, config: DiTConfig) -> None:
    beyond = int(dataset.labels.max(initial=-1))
    if beyond >= config.num_classes:
        raise ValueError(f"split {dataset.split} holds class {beyond}, but model.num_classes is {config.num_classes}")


def _require_same_config(checkpoint: Checkpoint, stage: TrainStage) -> None:
    saved = checkpoint.state["config_sha256"]
    if saved != stage.sha256():
        raise ValueError(
            f"stage {stage.name} is half done under another configuration ({saved[:8]}.., not {stage.sha256()[:8]}..): "
            f"set it back, or give another --run-dir (its checkpoints: {checkpoint.folder.parent})"
        )


def _prefetcher(stage: TrainStage, dataset: ShardDataset, batches: Batches) -> Prefetcher:
    def draw(step: int) -> Indices:
        return batches.share(public_batch(stage.train.seed, step, stage.train.batch_size, len(dataset)))

    return Prefetcher(dataset, draw, batches.model.channels, batches.model.image_size, stage.train.steps)


def _device_name(world: World) -> str | None:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None


def _newest(root: Path, world: World) -> Checkpoint | None:
    """The newest whole checkpoint: rank 0 verifies every byte, the others open what it found."""
    found = latest(root) if world.rank == 0 else None
    folder = world.broadcast(None if found is None else found.folder)
    return None if folder is None else found or Checkpoint.open(folder)


def _load_weights(model: DiT, stage: TrainStage, run: RunFolder, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        weights = {name: checkpoint.read("param", name).view(p.shape) for name, p in model.named_parameters()}
    elif stage.init_from is not None:
        _, weights, _ = load_average(run, stage.init_from)
    else:
        model.init_weights(torch.Generator().manual_seed(stage.train.seed))
        return
    model.load_state_dict(weights, strict=True)


def _restore(checkpoint: Checkpoint, backend: Backend, average: ExponentialMovingAverage) -> None:
    backend.restore_optimizer(num_updates=checkpoint.step)
    for kind, shard, state in backend.optimizer_tensors():
        state.copy_(checkpoint.read(kind, shard.name, shard.offset, shard.numel))
    for shard, value in average.averages:
        value.copy_(checkpoint.read("ema", shard.name, shard.offset, shard.numel))


def _save(
    root: Path,
    step: int,
    stage: TrainStage,
    backend: Backend,
    average: ExponentialMovingAverage,
    mechanism: Mechanism | None,
    clipper: Clipper | None,
) -> Path:
    world = backend.world
    tensors: list[tuple[Kind, Shard, torch.Tensor]] = [
        *(("param", shard, shard.value) for shard in backend.shards),
        *backend.optimizer_tensors(),
        *(("ema", shard, value) for shard, value in average.averages),
    ]
    chunks = []
    for kind, shard, tensor in tensors:
        start, stop = backend.stored_range(shard)
        data = tensor[start:stop].detach().to("cpu", torch.float32).contiguous()
        chunks.append(Chunk(kind, shard.name, shard.offset + start, shard.shape, data))
    state = {
        "stage": stage.name,
        "config_sha256": stage.sha256(),
        "model": backend.module.config.model_dump(),  # type: ignore[union-attr]
        "ledger_head": None if mechanism is None else mechanism.head,
        **clipping_state(clipper),
    }
    folder = save(root, step, chunks, state, rank=world.rank, world_size=world.size, gather=world.gather)
    if world.rank == 0:
        prune(root, stage.checkpoint.keep)
    return folder
