"""The same private step under six backends and several world sizes: one draw, one noise, one result."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
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
from train.private import ledger_name, mechanism_terms, num_units
from train.recipe import load_stage
from train.run_folder import RunFolder, now
from train.shards import Record, write_shards

SHARDED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ROOT = Path(__file__).resolve().parents[2]
WORKER = "tests/integration/private_stage.py"


def run_workers(base: Path, nproc: int, cases: Iterable[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    done = subprocess.run(
        [*command, WORKER, str(base), *cases],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


# case:backend by number of ranks. Each is compared to its case on one process without sharding.
QUICK = {
    1: ["two_pass:single", "kept_gradients:single", "group_wise:single", "two_pass:fsdp2", "two_pass:zero3"],
    2: [
        *(f"two_pass:{backend}" for backend in SHARDED),
        *("kept_gradients:ddp", "kept_gradients:zero2", "group_wise:fsdp2", "group_wise:zero3"),
    ],
}
UNIFIED = ("unified", "unified_groups")
FLAT = ("two_pass", "kept_gradients", "sparse", "checkpointed", "banded", "users")
THOROUGH = {
    1: [
        *(f"{case}:single" for case in (*FLAT, *UNIFIED, "group_wise", "bf16", "compiled")),
        *(f"{case}:{backend}" for case in ("two_pass", "group_wise") for backend in SHARDED),
    ],
    2: [f"{case}:{b}" for case in ("group_wise", "sparse", "banded", "users", "bf16", *UNIFIED) for b in SHARDED]
    + [f"{case}:{b}" for case in ("kept_gradients", "checkpointed") for b in SHARDED if b != "zero3"]
    + [f"compiled:{backend}" for backend in ("ddp", "fsdp2", "zero2")],
    3: [f"{case}:{backend}" for case in ("two_pass", "group_wise", "sparse", "unified") for backend in SHARDED]
    + [f"kept_gradients:{backend}" for backend in SHARDED if backend != "zero3"],
}
TOLERANCE = {"bf16": 2e-2}  # products of eight bits are summed in another order; everything else is fp32


def finished(base: Path, plan: Mapping[int, Sequence[str]]) -> Path:
    for case in sorted({token.split(":")[0] for tokens in plan.values() for token in tokens}):
        prepare(base / f"prepared-{case}", case)
    for nproc, tokens in plan.items():
        run_workers(base, nproc, tokens)
    return base


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of every backend and engine, at 1 and 2 ranks."""
    return finished(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def thorough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of the whole matrix, at 1, 2 and 3 ranks."""
    return finished(tmp_path_factory.mktemp("thorough"), THOROUGH)


def prepare(folder: Path, case: str) -> None:
    """A run folder with a private split, a secret, and a ledger whose plan is made, so that every copy shares them."""
    run = RunFolder.open(folder, "digits")
    generator = np.random.default_rng(0)
    records = (
        Record(
            f"r{i:04d}",
            f"u{i // 4:04d}" if case == "users" else f"r{i:04d}",
            encode_png(Image.fromarray(shades)),
            i % 10,
            "words of any length"[: 3 + i % 13] if case.startswith("unified") else None,
        )
        for i, shades in enumerate(generator.integers(0, 256, (100, 8, 8), dtype=np.uint8))
    )
    written = write_shards(run.stage_folder("filter") / "private", "private", records, shard_size=40)
    filtered = load_stage(ROOT / "configs/digits/20_filter.yaml")
    metrics = {"splits": {"private": {"root": written.root}}}
    run.write_manifest(filtered, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})
    create_key_file(folder / "secret.key")
    stage, dataset = stage_for(case, "single", 1), ShardDataset(folder / "filter" / "private", "private")
    secret = load_master_secret(folder / "secret.key")
    with Ledger.open(
        folder / "ledger.jsonl",
        delta=1e-5,
        unit=stage.privacy.unit,
        dataset_root=dataset.root,
        signing_seed=signing_seed(secret),
        fencing_epoch=1,
    ) as ledger:
        terms = mechanism_terms(stage, ledger_name(run, stage), num_units(stage, dataset))
        unit_of = dataset.unit_of if terms.unit == "user" else None
        here = {"code_version": "test", "config_sha256": stage.sha256(), "unit_of": unit_of}
        Mechanism(terms, secret, ledger, lambda value: value, **here)


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


def agree(base: Path, where: str) -> None:
    """Parameters, AdamW's states and averages of a run against its case on one process."""
    case = where.partition("-")[0]
    for kind in ("param", "exp_avg", "exp_avg_sq", "ema"):
        off = distance(state(base / f"{case}-single-1"), state(base / where), kind)
        assert off < TOLERANCE.get(case, 1e-5), f"{kind} of {where} is {off:.1e} off"


def places(plan: Mapping[int, Sequence[str]]) -> list[str]:
    every = (f"{token.replace(':', '-')}-{nproc}" for nproc, tokens in plan.items() for token in tokens)
    return [where for where in every if "-single-" not in where]


@pytest.mark.distributed
@pytest.mark.parametrize("where", places(QUICK))
def test_five_private_steps_agree_under_every_backend_and_engine(quick: Path, where: str) -> None:
    agree(quick, where)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.distributed
@pytest.mark.parametrize("where", places(THOROUGH))
def test_the_whole_matrix_agrees(thorough: Path, where: str) -> None:
    agree(thorough, where)


@pytest.mark.distributed
def test_adaptive_bounds_move_and_are_the_same_on_every_backend(quick: Path) -> None:
    bounds = {
        where: latest(quick / where / "finetune_dp" / "checkpoints").state["group_bounds"]  # type: ignore[union-attr]
        for where in ("group_wise-single-1", "group_wise-fsdp2-2", "group_wise-zero3-2")
    }
    first, *others = bounds.values()
    assert len(set(first)) > 1, "no bound moved"
    assert all(other == pytest.approx(first, rel=1e-9) for other in others)


@pytest.mark.distributed
def test_the_comparison_would_see_another_noise(quick: Path) -> None:
    """What the tolerance is worth: one step's learning rate moves the parameters by far more."""
    reference = state(quick / "two_pass-single-1")
    moved = {key: value + 3e-4 * torch.sign(value) if key[0] == "param" else value for key, value in reference.items()}
    assert distance(reference, moved, "param") > 1e-4


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["two_pass-single-1", *(f"two_pass-{b}-2" for b in SHARDED)])
def test_every_backend_charges_each_step_once(quick: Path, where: str) -> None:
    view = read_ledger(quick / where / "ledger.jsonl")
    (tally,) = view.stages.values()
    assert tally.attempts == dict.fromkeys(range(STEPS), 1)
    assert not view.unfinished


@pytest.mark.distributed
def test_the_ledger_digests_do_not_depend_on_the_world_size(quick: Path) -> None:
    def digests(where: str) -> list[str]:
        lines = (quick / where / "ledger.jsonl").read_text().splitlines()
        return [line.split('"digest":"')[1].split('"')[0] for line in lines if '"type":"done"' in line]

    assert digests("two_pass-single-1") == digests("two_pass-zero3-2") == digests("two_pass-fsdp2-2")
    assert len(set(digests("two_pass-single-1"))) == STEPS
