"""A launched stage of which one process is killed, stopped or told to end: it ends with the unbroken run's bits."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpointing import store
from checkpointing.store import LocalPlace
from privacy.audit import audit_run
from tests.integration.short_run import ROOT, STEPS, launch, launch_command

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

LIMIT_S = 8
_STEP = re.compile(r'"step": (\d+),')
LIMITS = [word for key in ("supervision.step_s", "supervision.save_s") for word in ("--set", f"{key}={LIMIT_S}")]
LIMITS += ["--set", "pretrain.train.steps=120"]
WHO = ("rank 0", "rank 1", "writer of rank 0", "agent", "launch")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    launch(run, "--until", "pretrain", *LIMITS)
    return run


def digest(run: Path) -> str:
    """Of the newest save's shards, every byte of which is verified."""
    found = store.newest_whole(LocalPlace(run / "pretrain" / "checkpoints"))
    assert found is not None and found.step == 120
    shards = sorted((run / "pretrain" / "checkpoints" / found.save.name).glob("rank-*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()


def processes_of(run: Path) -> dict[str, int]:
    """The stage's processes by what they are."""
    found = dict[str, int]()
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
            environment = dict(
                pair.split("=", 1) for pair in (entry / "environ").read_bytes().decode().split("\0") if "=" in pair
            )
        except (OSError, UnicodeDecodeError):
            continue
        if "scripts/launch.py" in command and str(run) in command:
            found["launch"] = int(entry.name)
        if environment.get("CHAOS_RUN") != str(run):
            continue
        if "checkpointing.writer" in command:
            found[f"writer of rank {environment['RANK']}"] = int(entry.name)
        elif "train.torchrun" in command:
            found["agent"] = int(entry.name)
        elif "train" in command and "RANK" in environment:
            found[f"rank {environment['RANK']}"] = int(entry.name)
    return found


@contextmanager
def started(run: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A launch, of which nothing is left after the block."""
    process = subprocess.Popen(
        launch_command(run, *arguments), cwd=ROOT, env={**os.environ, "CHAOS_RUN": str(run)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in processes_of(run).values():
            os.kill(pid, signal.SIGKILL)


def wait_for_step(run: Path, stage: str, step: int) -> None:
    progress, deadline = run / stage / "progress.jsonl", time.monotonic() + 120
    while not (progress.exists() and any(int(told) >= step for told in _STEP.findall(progress.read_text()))):
        assert time.monotonic() < deadline, "the stage never came so far"
        time.sleep(0.05)


def nothing_is_left_of(run: Path) -> bool:
    deadline = time.monotonic() + 40  # ranks whose launch is gone have their grace time to save
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not processes_of(run)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("who", WHO)
def test_whichever_process_of_a_launch_is_struck_the_stage_ends_with_the_same_bits(
    unbroken: Path, tmp_path: Path, who: str, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "fencing_epoch"):
        shutil.copy(unbroken / name, run / name)
    for stage in ("ingest", "filter"):
        shutil.copytree(unbroken / stage, run / stage)
    arguments = ("--until", "pretrain", *LIMITS)
    with started(run, *arguments) as process:
        wait_for_step(run, "pretrain", 25)
        os.kill(processes_of(run)[who], number)
        if who == "launch" and number == signal.SIGSTOP:
            time.sleep(5)
            process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=200)
        assert nothing_is_left_of(run), processes_of(run)
    launches = 1
    if who == "launch" and number != signal.SIGSTOP:
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM), said
        launch(run, *arguments)
        launches = 2
    else:
        assert process.returncode == 0, said
    assert digest(run) == digest(unbroken)
    with capsys.disabled():
        attempts = len((run / "pretrain" / "attempts.jsonl").read_text().splitlines())
        print(f"\n{number.name:<8} {who:<18} {launches} launches, {attempts} attempts, the unbroken run's bits")


@pytest.mark.parametrize("who", ["rank 0", "rank 1", "writer of rank 0"])
def test_whichever_process_of_private_training_is_killed_the_audit_holds(
    unbroken: Path, tmp_path: Path, who: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    with started(run, "--until", "finetune_dp", *LIMITS) as process:
        wait_for_step(run, "finetune_dp", 7)
        os.kill(processes_of(run)[who], signal.SIGKILL)
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    report = audit_run(run)
    assert report.exit_code == 0, report.claims
    found = store.newest_whole(LocalPlace(run / "finetune_dp" / "checkpoints"))
    assert found is not None and found.step == STEPS["finetune_dp"]
