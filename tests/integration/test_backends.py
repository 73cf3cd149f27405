"""The same private step under six backends and several world sizes: one draw, one noise, one result."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpointing.sharded import latest
from privacy.ledger import Ledger, read_ledger
from privacy.mechanism import Mechanism
from privacy.secrets import create_key_file, load_master_secret, signing_seed
from tests.integration.private_stage import STEPS, stage_for
from train.data import ShardDataset
from train.images import encode_png
from train.private import ledger_name, mechanism_terms
from train.recipe import load_stage
from train.run_folder import RunFolder, now
from train.shards import Record, write_shards

SHARDED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ROOT = Path(__file__).resolve().parents[2]
WORKER = "tests/integration/private_stage.py"


def run_workers(base: Path, nproc: int, backends: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    done = subprocess.run(
        [*command, WORKER, str(base), *backends],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of every backend at 1 and 2 ranks."""
    base = tmp_path_factory.mktemp("backends")
    prepare(base / "prepared")
    run_workers(base, 1, ("single", *SHARDED))
    run_workers(base, 2, SHARDED)
    return base


def prepare(folder: Path) -> None:
    """A run folder with a private split, a secret, and a ledger whose plan is made, so that every copy shares them."""
    run = RunFolder.open(folder, "digits")
    generator = np.random.default_rng(0)
    records = (
        Record(f"r{i:04d}", f"r{i:04d}", encode_png(Image.fromarray(shades)), i % 10, None)
        for i, shades in enumerate(generator.integers(0, 256, (100, 8, 8), dtype=np.uint8))
    )
    written = write_shards(run.stage_folder("filter") / "private", "private", records, shard_size=40)
    filtered = load_stage(ROOT / "configs/digits/20_filter.yaml")
    metrics = {"splits": {"private": {"root": written.root}}}
    run.write_manifest(filtered, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})
    create_key_file(folder / "secret.key")
    stage, dataset = stage_for("single", 1), ShardDataset(folder / "filter" / "private", "private")
    secret = load_master_secret(folder / "secret.key")
    with Ledger.open(
        folder / "ledger.jsonl",
        delta=1e-5,
        unit="record",
        dataset_root=dataset.root,
        signing_seed=signing_seed(secret),
        fencing_epoch=1,
    ) as ledger:
        terms = mechanism_terms(stage, ledger_name(run, stage), len(dataset))
        Mechanism(terms, secret, ledger, lambda value: value, code_version="test", config_sha256=stage.sha256())


@functools.cache
def state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = latest(folder / "finetune_dp" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    return {key: checkpoint.read(*key) for key in checkpoint.tensors()}


def distance(first: dict, second: dict, kind: str) -> float:
    names = [key for key in first if key[0] == kind]
    assert first.keys() == second.keys()
    off = sum((first[key].double() - second[key].double()).square().sum() for key in names)
    return float((off / sum(first[key].double().square().sum() for key in names)).sqrt())


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["ddp-1", "fsdp2-1", "zero1-1", "zero2-1", "zero3-1", *(f"{b}-2" for b in SHARDED)])
@pytest.mark.parametrize("kind", ["param", "exp_avg", "exp_avg_sq", "ema"])
def test_five_private_steps_agree_under_every_backend(results: Path, where: str, kind: str) -> None:
    assert distance(state(results / "single-1"), state(results / where), kind) < 1e-5


@pytest.mark.distributed
def test_the_comparison_would_see_another_noise(results: Path) -> None:
    """What the tolerance is worth: one step's learning rate moves the parameters by far more."""
    reference = state(results / "single-1")
    moved = {key: value + 3e-4 * torch.sign(value) if key[0] == "param" else value for key, value in reference.items()}
    assert distance(reference, moved, "param") > 1e-4


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["single-1", *(f"{b}-2" for b in SHARDED)])
def test_every_backend_charges_each_step_once(results: Path, where: str) -> None:
    view = read_ledger(results / where / "ledger.jsonl")
    (tally,) = view.stages.values()
    assert tally.attempts == dict.fromkeys(range(STEPS), 1)
    assert not view.unfinished


@pytest.mark.distributed
def test_the_ledger_digests_do_not_depend_on_the_world_size(results: Path) -> None:
    def digests(where: str) -> list[str]:
        lines = (results / where / "ledger.jsonl").read_text().splitlines()
        return [line.split('"digest":"')[1].split('"')[0] for line in lines if '"type":"done"' in line]

    assert digests("single-1") == digests("zero3-2") == digests("fsdp2-2")
    assert len(set(digests("single-1"))) == STEPS
