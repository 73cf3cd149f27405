"""The crash truth table: a private stage is killed between any two of its events, and no release goes uncharged.

What was released is counted from the account that `crash_worker` keeps, not from the ledger.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from checkpointing.sharded import latest
from privacy.accounting import epsilon
from privacy.audit import audit_run
from privacy.ledger import Ledger, read_ledger
from privacy.mechanism import Mechanism
from privacy.secrets import create_key_file, load_master_secret, signing_seed
from tests.integration import crash_worker
from tests.integration.crash_worker import BATCH, LOSS_BOUND, MAX_GRAD_NORM, NUM_RECORDS, ROOT, STEPS, stage_for
from train.config import OPERATIONAL
from train.data import ShardDataset
from train.images import encode_png
from train.private import ledger_name, mechanism_terms
from train.recipe import load_stage
from train.run_folder import RunFolder, now
from train.shards import Record, write_shards

# Where the process dies, in the order of events: in step 3, which begins a write of charges either way, or while the
# state after step 4 is saved; the checkpoint before that holds 2 steps. Then, with each step charged by itself and with
# three at once: how many charges are wasted (nothing was released on them), and how many there are in the end.
TABLE: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "charge.torn@step=3": ((0, 7), (1, 8)),  # of three charges one line is whole, and counts
    "charge.appended@step=3": ((1, 8), (3, 10)),
    "charge.synced@step=3": ((1, 8), (3, 10)),
    "ledger.synced@step=3": ((1, 8), (3, 10)),
    "batch.drawn@step=3": ((1, 8), (3, 10)),
    "step.computed@step=3": ((1, 8), (3, 10)),
    "noise.drawn:2@step=3": ((0, 8), (2, 10)),
    "noise.whole@step=3": ((0, 8), (2, 10)),
    "noise.added@step=3": ((0, 8), (2, 10)),
    "loss.released@step=3": ((0, 8), (2, 10)),
    "done.appended@step=3": ((0, 8), (2, 10)),
    "attempt.opened@step=4": ((0, 8), (2, 10)),
    "shard.half_written@step=4": ((0, 8), (2, 10)),
    "shard.synced@step=4": ((0, 8), (2, 10)),
    "index.renamed@step=4": ((0, 8), (2, 10)),
    "manifest.half_written@step=4": ((0, 8), (2, 10)),
    "manifest.synced@step=4": ((0, 8), (2, 10)),
    "manifest.renamed@step=4": ((0, 6), (2, 8)),  # committed: 2 steps fewer are run again
    "pointer.half_written:2": ((0, 6), (2, 8)),
    "pointer.synced:2": ((0, 6), (2, 8)),
    "pointer.renamed:2": ((0, 6), (2, 8)),
    "checkpoint.saved@step=4": ((0, 6), (2, 8)),
}
ONLY_RANK_0 = ("charge.", "done.", "attempt.", "manifest.", "pointer.")
WAIT_S = 60

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([crash_worker.__name__])

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a private split, a secret, and a ledger that holds the stage's plan, calibrated once."""
    folder = tmp_path_factory.mktemp("crash") / "prepared"
    run = RunFolder.open(folder, "digits")
    shades = np.random.default_rng(0).integers(0, 256, (NUM_RECORDS, 8, 8), dtype=np.uint8)
    records = (
        Record(f"r{i:04d}", f"r{i:04d}", encode_png(Image.fromarray(image)), i % 10, None)
        for i, image in enumerate(shades)
    )
    written = write_shards(run.stage_folder("filter") / "private", "private", records, shard_size=40)
    filtered = load_stage(ROOT / "configs/digits/20_filter.yaml")
    metrics = {"splits": {"private": {"root": written.root}}}
    run.write_manifest(filtered, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})
    create_key_file(folder / "secret.key")
    secret, stage = load_master_secret(folder / "secret.key"), stage_for(1, 1)
    dataset = ShardDataset(folder / "filter" / "private", "private")
    with Ledger.open(
        folder / "ledger.jsonl",
        delta=stage.privacy.delta,
        unit="record",
        dataset_root=dataset.root,
        signing_seed=signing_seed(secret),
        fencing_epoch=1,
    ) as ledger:
        terms = mechanism_terms(stage, ledger_name(run, stage), len(dataset))
        Mechanism(
            terms, secret, ledger, lambda value: value, code_version="test", config_sha256=stage.sha256(),
            operational=OPERATIONAL,
        )  # fmt: skip
    return folder


# --- running and dying ---


def run_ranks(folder: Path, nproc: int, charge_ahead: int, epoch: int, **environment: str) -> list[int]:
    """Start a rank each, wait, and end those left behind when one died, as the supervisor does. Exit codes by rank."""
    ranks = list[BaseProcess]()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])} if nproc > 1 else {}
    for rank in range(nproc):
        placed = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc), **where, **environment}
        ranks.append(processes.Process(target=crash_worker.run, args=(folder, charge_ahead, placed, epoch)))
    for process in ranks:
        process.start()
    deadline = time.monotonic() + WAIT_S
    while any(process.is_alive() for process in ranks):
        if time.monotonic() > deadline or any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(0.2)
            for process in ranks:
                process.kill()
        multiprocessing.connection.wait([process.sentinel for process in ranks if process.is_alive()], timeout=1)
    for process in ranks:
        process.join()
    return [process.exitcode if process.exitcode is not None else -1 for process in ranks]


def logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("log-*.txt")))


def kill(folder: Path, failpoint: str, nproc: int, charge_ahead: int) -> None:
    """Run the stage until one of its ranks dies there."""
    marker = folder / "killed"
    codes = run_ranks(folder, nproc, charge_ahead, 1, SFUMATO_FAILPOINT=failpoint, SFUMATO_FAILPOINT_ONCE=str(marker))
    assert marker.exists(), f"{failpoint} was never reached, so nothing was tested\n{logs(folder)}"
    # A writer that dies when all is written but rank 0's commit may well not be missed: a new one takes its place.
    not_missed = failpoint.startswith("index.renamed") and "rank=0" not in failpoint
    assert any(codes) or not_missed, "it went on as if nothing had happened"  # killed, or ended by its writer's death


def lose_what_was_not_synced(folder: Path) -> int:
    """Cut the ledger to what its writer had made durable, as a machine that loses its power does. Bytes lost."""
    ledger = folder / "ledger.jsonl"
    synced = max(line["synced"] for line in accounts(folder, "account-1-0.jsonl") if "synced" in line)
    lost = ledger.stat().st_size - synced
    os.truncate(ledger, synced)
    return lost


# --- what was released, and what was charged ---


def accounts(folder: Path, pattern: str = "account-*.jsonl") -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(pattern)):
        yield from map(json.loads, path.read_text().splitlines())


@dataclass(frozen=True)
class Truth:
    """What happened, counted from the workers' own account and from the ledger's lines."""

    released: frozenset[tuple[int, int]]  # (step, attempt) of which any element was noised
    charged: frozenset[tuple[int, int]]
    released_epsilon: float
    ledger_epsilon: float

    @property
    def wasted(self) -> int:
        return len(self.charged - self.released)


@functools.cache
def cost(rate: float, noise: float, number: int) -> float:
    event = {"mechanism": "poisson_sampled_gaussian", "sampling_rate": rate, "noise_multiplier": noise}
    return epsilon([(event, number)], 1e-5) if number else 0.0


def truth(folder: Path) -> Truth:
    released = set[tuple[int, int]]()
    inputs, stds = dict[tuple[Any, ...], str](), dict[str, float]()
    for line in accounts(folder):
        if "released" not in line:
            continue
        one = line["released"]
        released.add((one["step"], one["attempt"]))
        key = one["step"], one["attempt"], one["name"], one["offset"], one["length"]
        assert inputs.setdefault(key, one["input"]) == one["input"], f"noise key {key} met two inputs"
        kind = "loss" if one["name"] == "released loss" else "gradient"
        assert stds.setdefault(kind, one["std"]) == one["std"]
    sensitivity = {"gradient": MAX_GRAD_NORM, "loss": LOSS_BOUND}
    noise = sum((sensitivity[kind] / std) ** 2 for kind, std in stds.items()) ** -0.5 if len(stds) == 2 else np.inf
    whole_lines = [
        line for line in (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"
    ]
    records = [json.loads(line) for line in whole_lines]
    charges = [(record["step"], record["attempt"]) for record in records if record["type"] == "charge"]
    assert not (twice := [charge for charge, times in Counter(charges).items() if times > 1]), f"{twice} charged twice"
    done = [record for record in records if record["type"] == "done"]
    assert len({record["digest"] for record in done}) == len(done), "two attempts put in the same records"
    return Truth(
        frozenset(released),
        frozenset(charges),
        cost(BATCH / NUM_RECORDS, round(noise, 9), len(released)) if noise < np.inf else 0.0,
        epsilon(read_ledger(folder / "ledger.jsonl").counts, 1e-5),
    )


def resume(folder: Path, charge_ahead: int) -> Truth:
    """Run the stage to its end in what a crash left, and see that nothing was released uncharged, then or now."""
    before = truth(folder)
    assert before.released <= before.charged, "something was released whose charge a crash can lose"
    codes = run_ranks(folder, len(list(folder.glob("account-1-*.jsonl"))), charge_ahead, 2)
    assert set(codes) == {0}, logs(folder)
    after = truth(folder)
    assert after.released <= after.charged
    assert after.ledger_epsilon >= after.released_epsilon * (1 - 1e-6) > 0
    assert after.wasted <= charge_ahead
    assert {step for step, _ in after.released} == set(range(STEPS))
    checkpoint = latest(folder / "finetune_dp" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == STEPS
    assert (folder / "finetune_dp" / "manifest.json").exists()
    return after


def crash(prepared: Path, folder: Path, failpoint: str, charge_ahead: int, nproc: int = 1) -> Path:
    """A copy of the prepared run, whose stage died there."""
    shutil.copytree(prepared, folder)
    kill(folder, failpoint, nproc, charge_ahead)
    return folder


def require_audit(folder: Path) -> None:
    report = audit_run(folder)
    assert report.exit_code == 0, report.claims


def rows(*quick: str, ranks: int = 1) -> list[Any]:
    """Every place on each rank that comes by; the quick ones always, the others in `make test-slow`."""
    return [
        pytest.param(
            f"{place}{',' if '@' in place else '@'}rank={rank}",
            marks=() if place.startswith(quick) else pytest.mark.slow,
            id=place.replace("@step=", "-") + (f"-rank{rank}" if ranks > 1 else ""),
        )
        for place in TABLE
        for rank in range(ranks)
        if rank == 0 or not place.startswith(ONLY_RANK_0)
    ]


# --- the table ---


@pytest.mark.parametrize("place", rows("charge.torn", "charge.appended", "noise.drawn", "noise.added"))
def test_three_steps_charged_at_once_a_process_killed_anywhere_has_paid_for_what_it_released(
    prepared: Path, tmp_path: Path, place: str
) -> None:
    seen = resume(crash(prepared, tmp_path / "run", place, 3), 3)
    assert (seen.wasted, len(seen.charged)) == TABLE[place.removesuffix("rank=0")[:-1]][1]
    require_audit(tmp_path / "run")


@pytest.mark.parametrize("place", rows("charge.synced", "noise.whole", "manifest.renamed"))
def test_each_step_charged_by_itself_a_process_killed_anywhere_has_paid_for_what_it_released(
    prepared: Path, tmp_path: Path, place: str
) -> None:
    seen = resume(crash(prepared, tmp_path / "run", place, 1), 1)
    assert (seen.wasted, len(seen.charged)) == TABLE[place.removesuffix("rank=0")[:-1]][0]
    require_audit(tmp_path / "run")


@pytest.mark.parametrize("charge_ahead", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("place", rows("noise.added"))
def test_a_machine_that_loses_what_was_not_synced_has_paid_for_what_it_released(
    prepared: Path, tmp_path: Path, place: str, charge_ahead: int
) -> None:
    folder = crash(prepared, tmp_path / "run", place, charge_ahead)
    lost = lose_what_was_not_synced(folder)
    assert lost > 0 or not place.startswith(("charge.torn", "charge.appended", "done.appended"))
    resume(folder, charge_ahead)
    require_audit(folder)


@pytest.mark.parametrize("place", rows("noise.drawn", ranks=2))
def test_two_ranks_of_which_one_is_killed_anywhere_have_paid_for_what_they_released(
    prepared: Path, tmp_path: Path, place: str
) -> None:
    resume(crash(prepared, tmp_path / "run", place, 3, nproc=2), 3)
    require_audit(tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_dies_again_and_again_pays_each_time_and_ends(prepared: Path, tmp_path: Path) -> None:
    folder = crash(prepared, tmp_path / "run", "noise.added@step=3", 1)
    for epoch, failpoint in ((2, "noise.added@step=2"), (3, "batch.drawn@step=4")):
        assert run_ranks(folder, 1, 1, epoch, SFUMATO_FAILPOINT=failpoint) == [-signal.SIGKILL]
    assert run_ranks(folder, 1, 1, 4) == [0], logs(folder)
    seen = truth(folder)
    assert Counter(step for step, _ in seen.charged) == {0: 1, 1: 1, 2: 3, 3: 2, 4: 2, 5: 1}
    assert seen.released <= seen.charged and seen.wasted == 1
    audited = subprocess.run(
        [sys.executable, "scripts/audit.py", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert audited.returncode == 0, audited.stdout + audited.stderr
