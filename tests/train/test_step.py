"""The private step on real shards, with a real ledger: its order of events, its units, and what a resume repeats."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpointing.sharded import latest
from models.dit import DiT, DiTConfig
from privacy.clipping import GroupWiseClipper
from privacy.ledger import Ledger, read_ledger
from privacy.noise import GaussianNoise
from privacy.sampling import PoissonSampler
from privacy.secrets import create_key_file, load_master_secret, signing_seed
from train.config import FinetuneStage
from train.data import ShardDataset
from train.heartbeat import Heartbeat
from train.images import encode_png
from train.labelled_images import LabelledImages
from train.loop import Preempted, train
from train.optim import ExponentialMovingAverage
from train.parallel import World, join_world, shard_model
from train.private import ledger_name, mechanism_terms, num_units, open_mechanism, stage_clipper
from train.recipe import load_stage
from train.run_folder import RunFolder, now
from train.shards import Record, write_shards
from train.step import PrivateStep

ROOT = Path(__file__).resolve().parents[2]
NOISE, BOUND, MICROBATCH = 2.0, 0.01, 3
SMALL = (
    "init_from=null",
    "model={name: dit, width: 16, depth: 1, heads: 2, image_size: 8, channels: 1, patch_size: 4, num_classes: 10}",
    "train.steps=4",
    "train.batch_size=6",
    f"train.microbatch_size={MICROBATCH}",
    "optim.warmup_steps=0",
    "checkpoint.every=2",
    "log={every: 1, wandb: disabled}",
    "parallel={backend: single, nproc: 1}",
    f"privacy.max_grad_norm={BOUND}",
    "privacy.target_epsilon=40",
    "privacy.replay_steps=4",
)
USERS = ("privacy.unit=user", "privacy.max_records_per_user=4")
ADAPTIVE = ("privacy.clipping=group_wise", "privacy.adaptive_bounds={quantile: 0.7, rate: 0.3, share: 0.1}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a secret and a private split: 60 images of 20 users, who have from one to five."""
    folder = tmp_path_factory.mktemp("step") / "run"
    run = RunFolder.open(folder, "digits")
    shades = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    users = np.random.default_rng(1).permutation(np.repeat(np.arange(20), np.arange(20) % 5 + 1))
    records = (
        Record(f"r{i:02d}", f"u{users[i]:02d}", encode_png(Image.fromarray(shades[i])), i % 10, None) for i in range(60)
    )
    written = write_shards(run.stage_folder("filter") / "private", "private", records, shard_size=25)
    metrics = {"splits": {"private": {"root": written.root}}}
    filtered = load_stage(ROOT / "configs/digits/20_filter.yaml")
    run.write_manifest(filtered, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})
    create_key_file(folder / "secret.key")
    return folder


def stage_of(*overrides: str) -> FinetuneStage:
    stage = load_stage(ROOT / "configs/digits/40_finetune_dp.yaml", [*SMALL, *overrides])
    assert isinstance(stage, FinetuneStage)
    return stage


def run_with_plan(prepared: Path, folder: Path, stage: FinetuneStage) -> RunFolder:
    """A copy of the prepared run whose ledger holds a plan of the stage, with a noise of the test's choice."""
    shutil.copytree(prepared, folder)
    run = RunFolder.open(folder, "digits")
    dataset = dataset_of(run)
    terms = mechanism_terms(stage, ledger_name(run, stage), num_units(stage, dataset))
    with Ledger.open(
        folder / "ledger.jsonl",
        delta=stage.privacy.delta,
        unit=stage.privacy.unit,
        dataset_root=dataset.root,
        signing_seed=signing_seed(load_master_secret(folder / "secret.key")),
        fencing_epoch=1,
    ) as ledger:
        event = terms.sampler(bytes(32)).event(0, NOISE)
        ledger.plan(terms.stage, steps=terms.steps, event=event, config_sha256=stage.sha256())
    return run


def dataset_of(run: RunFolder) -> ShardDataset:
    return ShardDataset(run.path / "filter" / "private", "private")


def model_of(stage: FinetuneStage) -> tuple[DiTConfig, DiT]:
    assert isinstance(stage.model, DiTConfig)
    config, model = stage.model, DiT(stage.model)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():  # adaLN-Zero starts with layers that get no gradient
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return config, model


@contextmanager
def private_step(run: RunFolder, stage: FinetuneStage) -> Iterator[PrivateStep]:
    world, dataset = join_world(), dataset_of(run)
    config, model = model_of(stage)
    with open_mechanism(stage, run, world, dataset, 1, None) as mechanism:
        backend = shard_model(
            model, world, stage.parallel, stage.optim, microbatch_size=stage.train.microbatch_size, bf16=False
        )
        average = ExponentialMovingAverage(backend, stage.optim.ema_decay)
        clipper = stage_clipper(stage, config, backend, None)
        batches = LabelledImages(stage, config, world, dataset)
        yield PrivateStep(stage, batches, backend, average, clipper, mechanism)


def calling(told: list[str], name: str, method: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """The method, telling of each call; once only where calls follow each other."""

    def call(*arguments: Any, **named: Any) -> Any:
        result = method(*arguments, **named) if after else None
        if told[-1:] != [name]:
            told.append(name)
        return result if after else method(*arguments, **named)

    return call


def test_a_step_charges_then_draws_then_adds_noise_then_updates_and_then_says_it_is_done(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()
    for owner, method, name in (
        (os, "fsync", "sync"),
        (PoissonSampler, "draw", "draw"),
        (ShardDataset, "batch", "read"),
        (GaussianNoise, "add_", "noise"),
        (Ledger, "done", "done"),
    ):
        monkeypatch.setattr(owner, method, calling(told, name, getattr(owner, method)))
    monkeypatch.setattr(torch.optim.AdamW, "step", calling(told, "update", torch.optim.AdamW.step, after=True))
    stage = stage_of("privacy.charge_ahead=2")
    with private_step(run_with_plan(prepared, tmp_path / "run", stage), stage) as step_once:
        for step in range(3):
            told.clear()
            step_once(step)
            paid = ["sync"] if step % 2 == 0 else []  # two steps at once, and nothing in the second
            assert told == [*paid, "draw", "read", "noise", "update", "noise", "done"]


def test_a_step_that_draws_nobody_is_charged_and_releases_noise_alone(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoissonSampler, "draw", lambda *_: np.empty(0, np.int64))
    seen = list[float]()
    add = GaussianNoise.add_

    def look(noise: GaussianNoise, shard: torch.Tensor, **where: Any) -> None:
        seen.append(float(shard.abs().max()))
        add(noise, shard, **where)

    monkeypatch.setattr(GaussianNoise, "add_", look)
    for number, unit in enumerate(((), USERS)):
        stage = stage_of(*unit)
        run = run_with_plan(prepared, tmp_path / f"run-{number}", stage)
        with private_step(run, stage) as step_once:
            step_once(0)
        assert seen and set(seen) == {0.0}
        assert read_ledger(run.path / "ledger.jsonl").num_charges == 1


# --- units ---


def clipped_sum(step_once: PrivateStep, slots: np.ndarray) -> dict[str, torch.Tensor]:
    """What a step over these slots would hand to the noise."""
    backend, batches = step_once.backend, step_once.batches
    backend.module.zero_grad()
    for batch in batches.of(batches.load(0, slots)):
        step_once.clipper.accumulate(backend, batch.losses, batch.present_B, last=batch.last)
    return {name: parameter.grad.clone() for name, parameter in backend.module.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("clipping", ["two_pass", "kept_gradients", "group_wise"])
def test_adding_one_user_moves_the_clipped_sum_by_no_more_than_the_bound(
    prepared: Path, tmp_path: Path, clipping: str
) -> None:
    stage = stage_of(*USERS, f"privacy.clipping={clipping}")
    with private_step(run_with_plan(prepared, tmp_path / "run", stage), stage) as step_once:
        unit_of, users = step_once.batches.dataset.unit_of, step_once.mechanism._users  # pyright: ignore[reportPrivateUsage]
        assert users is not None
        slots = users.draw(np.arange(7), 0, 0)
        assert (slots >= 0).sum(1).tolist() == [min(4, int((unit_of == user).sum())) for user in range(7)]
        everyone = clipped_sum(step_once, slots)
        for user in range(7):
            without = clipped_sum(step_once, np.delete(slots, user, 0))
            moved = sum((everyone[name] - without[name]).double().square().sum() for name in everyone) ** 0.5
            # All of a user's records together, and every user here is clipped: to the whole bound where it is one.
            assert moved <= BOUND * (1 + 1e-6)
            assert moved > BOUND * (0.9999 if clipping != "group_wise" else 0.5)


def test_a_users_loss_is_the_mean_over_its_records_and_padding_counts_for_nothing(
    prepared: Path, tmp_path: Path
) -> None:
    stage = stage_of(*USERS, "objective.noise_draws=2")
    with private_step(run_with_plan(prepared, tmp_path / "run", stage), stage) as step_once:
        slots = np.array([[3, -1, -1, -1], [10, 7, 5, -1], [20, 21, 22, 23], [30, 31, -1, -1]])
        loaded, model = step_once.batches.load(2, slots), step_once.backend.model
        batches = list(step_once.batches.of(loaded))
        assert [batch.present_B.tolist() for batch in batches] == [[True, True], [True, True]]
        of_users = torch.cat([batch.losses(model) for batch in batches])
        each = dict[int, float]()
        for record in loaded.records.indices.tolist():
            (batch,) = step_once.batches.of(step_once.batches.load(2, np.array([[record]])))
            each[record] = batch.losses(model).item()
        expected = [np.mean([each[record] for record in row[row >= 0].tolist()]) for row in slots]
        assert of_users.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_units_loss_is_the_same_where_another_leaves_the_split(prepared: Path, tmp_path: Path) -> None:
    """All behind it move up by a place, and meet the same times, noise and dropped labels."""
    stage, world, whole = stage_of(), join_world(), dataset_of(RunFolder.open(prepared, "digits"))
    config, model = model_of(stage)
    left = (whole.read(index) for index in range(1, len(whole)))
    write_shards(tmp_path, "private", left, shard_size=25)
    losses = list[list[float]]()
    for dataset, first in ((whole, 1), (ShardDataset(tmp_path, "private"), 0)):
        batches = LabelledImages(stage, config, world, dataset)
        loaded = batches.load(2, np.arange(first, first + 9)[:, None])
        with torch.no_grad():
            losses.append([loss for batch in batches.of(loaded) for loss in batch.losses(model).tolist()])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [0, 1, 5, 7])
def test_ranks_of_unequal_draw_run_equally_many_microbatches_of_one_size(prepared: Path, number: int) -> None:
    stage, dataset = stage_of(*USERS), dataset_of(RunFolder.open(prepared, "digits"))
    config, _ = model_of(stage)
    records = iter(np.random.default_rng(number).permutation(60).tolist())
    slots = np.array(
        [[next(records) if place <= unit % 3 else -1 for place in range(3)] for unit in range(number)], np.int64
    ).reshape(number, 3)
    shapes, present = set[tuple[int, ...]](), 0
    for rank in range(3):
        batches = LabelledImages(stage, config, World(rank, 3, torch.device("cpu")), dataset)
        parts = list(batches.of(batches.load(0, slots)))
        shapes.add(tuple(len(part.present_B) for part in parts))
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        present += sum(int(part.present_B.sum()) for part in parts)
    assert len(shapes) == 1
    assert max(shapes.pop()) <= MICROBATCH
    assert present == number


# --- resuming ---


def trained(run: RunFolder, stage: FinetuneStage) -> dict[tuple[str, str], torch.Tensor]:
    train(stage, run, join_world(), run.next_fencing_epoch(run.ledger_path(stage)), Heartbeat(0))
    checkpoint = latest(run.path / stage.name / "checkpoints")
    assert checkpoint is not None and checkpoint.step == stage.train.steps
    return {key: checkpoint.read(*key) for key in checkpoint.tensors()}


@pytest.mark.parametrize(
    "overrides",
    [
        ADAPTIVE,
        USERS,
        ("privacy.sampling={method: shuffled}", "privacy.clipping=kept_gradients"),
        ("privacy.sampling={method: cyclic_poisson, cycle: 3}",),
    ],
    ids=["adaptive bounds", "users", "shuffled", "cyclic"],
)
def test_a_stop_and_a_resume_end_bit_for_bit_as_a_run_without(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    stage = stage_of(*overrides)
    unbroken = run_with_plan(prepared, tmp_path / "unbroken", stage)
    stopped = RunFolder.open(Path(shutil.copytree(unbroken.path, tmp_path / "stopped")), "digits")
    expected = trained(unbroken, stage)
    step_once = PrivateStep.__call__

    def stop_after_the_second(self: PrivateStep, step: int) -> Any:
        report = step_once(self, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patched:
        patched.setattr(PrivateStep, "__call__", stop_after_the_second)
        with pytest.raises(Preempted):
            train(stage, stopped, join_world(), stopped.next_fencing_epoch(stopped.ledger_path(stage)), Heartbeat(0))
    got = trained(stopped, stage)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    (tally,) = read_ledger(stopped.path / "ledger.jsonl").stages.values()
    assert tally.attempts == dict.fromkeys(range(4), 1)


def test_noised_bounds_are_in_the_checkpoint_and_come_back_bit_for_bit(prepared: Path, tmp_path: Path) -> None:
    stage = stage_of(*ADAPTIVE)
    run = run_with_plan(prepared, tmp_path / "run", stage)
    trained(run, stage)
    checkpoint = latest(run.path / stage.name / "checkpoints")
    assert checkpoint is not None
    saved = checkpoint.state["group_bounds"]
    config, model = model_of(stage)
    backend = shard_model(
        model, join_world(), stage.parallel, stage.optim, microbatch_size=stage.train.microbatch_size, bf16=False
    )
    clipper = stage_clipper(stage, config, backend, checkpoint)
    assert isinstance(clipper, GroupWiseClipper)
    assert clipper.bounds == saved
    assert (clipper.quantile, clipper.rate) == (0.7, 0.3)
    assert sum(bound**2 for bound in saved) ** 0.5 == pytest.approx(BOUND)
    assert len(set(saved)) > 1  # they moved, not all alike


def test_adaptive_bounds_read_their_counts_with_noise_that_the_step_is_charged_for(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stds = dict[str, float]()
    add = GaussianNoise.add_

    def look(noise: GaussianNoise, shard: torch.Tensor, **where: Any) -> None:
        stds[where["name"]] = where["std"]
        add(noise, shard, **where)

    monkeypatch.setattr(GaussianNoise, "add_", look)
    stage = stage_of(*ADAPTIVE)
    with private_step(run_with_plan(prepared, tmp_path / "run", stage), stage) as step_once:
        step_once(0)
        assert isinstance(step_once.clipper, GroupWiseClipper)
        num_groups = len(step_once.clipper.bounds)
    loss, counts = stds.pop("released loss"), stds.pop("released counts")
    (gradient,) = set(stds.values())
    shares = (BOUND / gradient) ** 2, (stage.privacy.loss_bound / loss) ** 2, num_groups / 4 / counts**2
    assert sum(shares) == pytest.approx(NOISE**-2, rel=1e-6)
    assert sum(shares) <= NOISE**-2
