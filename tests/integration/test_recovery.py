"""A rank dies by SIGKILL in the middle of a stage: the launch ends by itself, with every step done and charged."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from checkpointing.sharded import latest
from privacy.audit import audit_run
from privacy.ledger import read_ledger
from tests.integration.short_run import ROOT, STEPS, launch, launch_command


def state(run: Path, stage: str) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = latest(run / stage / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == STEPS[stage]
    return {key: checkpoint.read(*key) for key in checkpoint.tensors()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    launch(run, "--until", "finetune_dp")
    return run


def copy_of_inputs(unbroken: Path, run: Path, *stages: str) -> None:
    """A run folder with the given stages finished, as the unbroken run left them."""
    run.mkdir()
    for name in ("run.json", "fencing_epoch"):
        shutil.copy(unbroken / name, run / name)
    for stage in stages:
        shutil.copytree(unbroken / stage, run / stage)


@pytest.mark.distributed
def test_pretraining_killed_in_mid_step_ends_bit_identical(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy_of_inputs(unbroken, run, "ingest", "filter")
    failpoint = {
        "SFUMATO_FAILPOINT": "step.computed@rank=1,step=27",
        "SFUMATO_FAILPOINT_ONCE": str(tmp_path / "killed"),
    }
    said = launch(run, "--until", "pretrain", **failpoint)
    assert (tmp_path / "killed").exists(), "the failpoint was never reached, so nothing was tested"
    assert "attempt 1 died" in said
    expected, got = state(unbroken, "pretrain"), state(run, "pretrain")
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    rows = [(run / "pretrain" / "metrics.jsonl").read_text().count(f'"step": {step},') for step in range(9, 40, 10)]
    assert rows == [1, 1, 1, 1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "place", ["ledger.synced@rank=0,step=7", pytest.param("noise.added@rank=1,step=8", marks=pytest.mark.slow)]
)
def test_private_training_killed_in_mid_step_charges_its_replays(unbroken: Path, tmp_path: Path, place: str) -> None:
    run = tmp_path / "run"
    copy_of_inputs(unbroken, run, "ingest", "filter", "pretrain")
    killed = tmp_path / "killed"
    said = launch(run, "--until", "finetune_dp", SFUMATO_FAILPOINT=place, SFUMATO_FAILPOINT_ONCE=str(killed))
    assert killed.exists()
    assert "attempt 1 died" in said
    state(run, "finetune_dp")
    view = read_ledger(run / "ledger.jsonl")
    (tally,) = view.stages.values()
    last = int(place.rsplit("=", 1)[1])
    # steps 0 to 4 are in the checkpoint of step 5; those after it ran again, on fresh draws, and were charged again
    assert tally.attempts == {step: 2 if 5 <= step <= last else 1 for step in range(12)}
    assert tally.finished == set(range(12))
    report = audit_run(run)
    assert report.exit_code == 0, report.claims
    assert report.spending is not None
    assert report.spending.replayed == last - 4


@pytest.mark.slow  # by default tests/scripts/test_launch.py alone interrupts a launch
@pytest.mark.distributed
def test_ctrl_c_saves_and_the_next_launch_goes_on(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy_of_inputs(unbroken, run, "ingest", "filter")
    progress = run / "pretrain" / "progress.jsonl"
    process = subprocess.Popen(
        launch_command(run, "--until", "pretrain"), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not (progress.exists() and '"loss' in progress.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 130, said
    saved = latest(run / "pretrain" / "checkpoints")
    assert saved is not None
    assert 0 < saved.step < 40
    assert not (run / "pretrain" / "manifest.json").exists()
    launch(run, "--until", "pretrain")
    expected, got = state(unbroken, "pretrain"), state(run, "pretrain")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.distributed
def test_a_lost_ledger_stops_the_resume(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    (run / "finetune_dp" / "manifest.json").unlink()
    (run / "ledger.jsonl").unlink()
    done = subprocess.run(
        launch_command(run, "--until", "finetune_dp"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    assert "restore the ledger" in done.stdout + done.stderr
    assert not (run / "ledger.jsonl").exists()
