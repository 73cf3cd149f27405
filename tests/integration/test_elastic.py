"""A stage stopped and resumed: bit for bit at the same world size; on the same records, from the same bits, at any."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpointing.sharded import Checkpoint, latest
from models.dit import DiT, DiTConfig
from privacy.ledger import read_ledger
from tests.integration import private_stage
from tests.integration.elastic_stage import BATCH, STEPS, checkpoints, stage_for, steps_of
from tests.integration.test_backends import prepare
from train.data import public_batch
from train.images import encode_png
from train.recipe import load_stage
from train.run_folder import RunFolder, now
from train.shards import Record, write_shards

ROOT = Path(__file__).resolve().parents[2]
WORKER = "tests/integration/elastic_stage.py"
NUM_RECORDS = 44
SHARDED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PRIVATE = ("single", "fsdp2", "zero3")

# Run, and its backend at 1, 2, 3 and again 1 rank, each up to a step of RUNGS.
LADDERS = {
    "ladder_a": ("single", "fsdp2", "zero3", "ddp"),
    "ladder_b": ("zero1", "ddp", "fsdp2", "single"),
    "ladder_c": ("zero3", "zero2", "zero1", "fsdp2"),
    "private_ladder": ("single", "zero1", "fsdp2", "zero3"),
}
RUNGS = {"public": (2, 4, 6, STEPS), "private": (2, 3, 4, private_stage.STEPS)}
# Each loads what the one before saved, in one chain: every backend reads and writes at every world size.
CHAIN = {
    1: ("ddp", "fsdp2", "zero1", "zero2", "zero3"),
    2: ("fsdp2", "ddp", "zero2", "zero3", "zero1"),
    3: ("zero3", "ddp", "zero1", "fsdp2", "zero2"),
    4: ("single",),  # one rank again
}
STOP, END = 1, 3  # rungs at which a run stops that is resumed at the same world size
SEED = 7

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def run_workers(base: Path, nproc: int, tasks: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), WORKER]
    done = subprocess.run(
        [*command, str(base), *tasks],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def prepare_public(folder: Path) -> None:
    run = RunFolder.open(folder, "digits")
    shades = np.random.default_rng(0).integers(0, 256, (NUM_RECORDS, 8, 8), dtype=np.uint8)
    records = (
        Record(f"r{i:02d}", f"r{i:02d}", encode_png(Image.fromarray(x)), i % 10, None) for i, x in enumerate(shades)
    )
    written = write_shards(run.stage_folder("filter") / "public", "public", records, shard_size=16)
    config = load_stage(ROOT / "configs/digits/20_filter.yaml")
    metrics = {"splits": {"public": {"root": written.root}}}
    run.write_manifest(config, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})


def rungs(run: str) -> tuple[int, ...]:
    return RUNGS["private" if run.startswith("private") else "public"]


def links(part: int) -> list[str]:
    """The tasks of the chain at its `part`-th world size, and a new model under each of its backends."""
    tasks, before = [], "public_single" if part == 1 else f"chain_{part - 1}_{CHAIN[part - 1][-1]}"
    for backend in CHAIN[part]:
        tasks.append(f"copy:{before}:{backend}:chain_{part}_{backend}")
        before = f"chain_{part}_{backend}"
    return tasks + [f"new:{SEED}:{backend}:new_{part}_{backend}" for backend in CHAIN[part]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders in which everything has been run that the tests look at."""
    base = tmp_path_factory.mktemp("elastic")
    prepare_public(base / "public")
    prepare(base / "private", "two_pass")
    runs = [
        f"{kind}_{b}" for kind, backends in (("public", ("single", *SHARDED)), ("private", PRIVATE)) for b in backends
    ]
    for run in [*LADDERS, *runs, *(f"{run}_stopped" for run in runs)]:
        shutil.copytree(base / ("private" if run.startswith("private") else "public"), base / run)

    def each(nproc: int, name: str, rung: int) -> list[str]:
        """Every run that has `nproc` ranks, under another name, up to a rung."""
        of_size = [run for run in runs if run.endswith("_single") == (nproc == 1)]
        return [f"train:{run}{name}:{run.split('_')[1]}:{rungs(run)[rung]}" for run in of_size]

    def climb(rung: int) -> list[str]:
        return [f"train:{run}:{backends[rung]}:{rungs(run)[rung]}" for run, backends in LADDERS.items()]

    run_workers(base, 1, [*each(1, "", END), *each(1, "_stopped", STOP), *links(1), *climb(0)])
    run_workers(base, 2, [*each(2, "", END), *each(2, "_stopped", STOP), *links(2), *climb(1)])
    run_workers(base, 2, each(2, "_stopped", END))
    run_workers(base, 3, [*links(3), *climb(2)])
    run_workers(base, 1, [*each(1, "_stopped", END), *links(4), *climb(3)])
    return base


def newest(base: Path, run: str) -> Checkpoint:
    checkpoint = latest(checkpoints(base, run))
    assert checkpoint is not None and checkpoint.step == steps_of(run)
    return checkpoint


def state(base: Path, run: str) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = newest(base, run)
    return {key: checkpoint.read(*key) for key in checkpoint.tensors()}


def metrics(base: Path, run: str) -> list[tuple[int, float, float | None]]:
    rows = map(json.loads, (checkpoints(base, run).parent / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row.get("epsilon")) for row in rows if "loss" in row]


def samples(base: Path, run: str) -> dict[int, list[int]]:
    """The records of each step, over all ranks and microbatches."""
    seen = dict[int, list[int]]()
    for line in map(json.loads, (base / run / "samples.jsonl").read_text().splitlines()):
        seen.setdefault(line["step"], []).extend(line["records"])
    return {step: sorted(records) for step, records in seen.items()}


def furthest(first: dict[tuple[str, str], torch.Tensor], second: dict[tuple[str, str], torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    off = {
        key: (first[key] - second[key]).norm() / (first[key].norm() + 1e-12) for key in first if key[0] != "exp_avg_sq"
    }
    return float(max(off.values()))


RESUMED = [*(f"public_{b}" for b in ("single", *SHARDED)), *(f"private_{b}" for b in PRIVATE)]


@pytest.mark.parametrize("run", RESUMED)
def test_a_resume_at_the_same_world_size_is_bit_identical(base: Path, run: str) -> None:
    unbroken, resumed = state(base, run), state(base, f"{run}_stopped")
    assert {kind for kind, _ in unbroken} == {"param", "exp_avg", "exp_avg_sq", "ema"}
    assert unbroken.keys() == resumed.keys()
    assert [key for key in unbroken if not torch.equal(unbroken[key], resumed[key])] == []
    assert metrics(base, run) == metrics(base, f"{run}_stopped")
    assert [step for step, *_ in metrics(base, run)] == list(range(steps_of(run)))
    assert newest(base, f"{run}_stopped").state["num_updates"] == steps_of(run)


@pytest.mark.parametrize("run", LADDERS)
def test_a_stage_that_changes_ranks_and_backend_reads_the_same_records(base: Path, run: str) -> None:
    unbroken = "private_single" if run.startswith("private") else "public_single"
    assert samples(base, run) == samples(base, unbroken)
    # the records are the same, and so is all but the order of sums
    assert furthest(state(base, unbroken), state(base, run)) < 1e-4
    assert [step for step, *_ in metrics(base, run)] == list(range(steps_of(run)))


def test_the_records_are_those_that_the_step_decides(base: Path) -> None:
    seed = stage_for("public", "single").train.seed
    for run in ("public_single", "ladder_a"):
        expected = {step: sorted(public_batch(seed, step, BATCH, NUM_RECORDS).tolist()) for step in range(STEPS)}
        assert samples(base, run) == expected


def test_the_comparison_would_see_another_batch(base: Path) -> None:
    """What the tolerance is worth: one step more moves the weights by far more."""
    place = checkpoints(base, "public_single")
    moved = {key: value * (1 + 1e-3 * (key[0] == "param")) for key, value in state(base, "public_single").items()}
    assert place.exists() and furthest(state(base, "public_single"), moved) > 5e-4


EVERYWHERE = [f"{part}_{backend}" for part in CHAIN for backend in CHAIN[part]]


@pytest.mark.parametrize("where", EVERYWHERE)
def test_fp32_state_loads_bit_for_bit_under_every_backend_and_world_size(base: Path, where: str) -> None:
    expected, got = state(base, "public_single"), state(base, f"chain_{where}")
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_new_model_has_the_same_weights_under_every_backend_and_world_size(base: Path, where: str) -> None:
    stage = stage_for("public", "single")
    assert stage.model is not None
    whole = DiT(DiTConfig(**stage.model.model_dump()))
    whole.init_weights(torch.Generator().manual_seed(SEED))
    checkpoint = latest(checkpoints(base, f"new_{where}"))
    assert checkpoint is not None
    for name, parameter in whole.named_parameters():
        for kind in ("param", "ema"):
            assert torch.equal(checkpoint.read(kind, name), parameter.detach().flatten()), (kind, name)


def test_a_private_stage_on_changing_ranks_is_charged_once_a_step_and_draws_the_same(base: Path) -> None:
    def digests(run: str) -> list[str]:
        lines = map(json.loads, (base / run / "ledger.jsonl").read_text().splitlines())
        return [line["digest"] for line in lines if line["type"] == "done"]

    view = read_ledger(base / "private_ladder" / "ledger.jsonl")
    (tally,) = view.stages.values()
    assert tally.attempts == dict.fromkeys(range(private_stage.STEPS), 1)
    assert digests("private_ladder") == digests("private_single")
