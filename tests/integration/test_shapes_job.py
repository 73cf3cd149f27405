"""The shapes recipe made short, launched as a person launches it: a unified model through every training stage."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpointing.sharded import latest
from train.loop import load_average
from train.metrics import read_metrics
from train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    "ingest.source.records={public: 200, private: 100, test: 40}",
    "pretrain.train.steps=24",
    "pretrain.train.batch_size=8",
    "pretrain.train.microbatch_size=1",
    "pretrain.optim.warmup_steps=4",
    "pretrain.checkpoint.every=6",
    "finetune_dp.train.steps=4",
    "finetune_dp.train.batch_size=10",
    "finetune_dp.optim.warmup_steps=0",
    "finetune_dp.objective.noise_draws=2",
    "finetune_dp.documents.row_tokens=80",
    "privacy.replay_steps=4",
    "log={every: 4, wandb: disabled}",
)


def command(run: Path, *arguments: str) -> list[str]:
    settings = [word for setting in SHORT for word in ("--set", setting)]
    return [sys.executable, "scripts/launch.py", "configs/shapes", "--run-dir", str(run), *settings, *arguments]


def launch(run: Path, *arguments: str) -> None:
    done = subprocess.run(
        command(run, *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def state(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = latest(run / "pretrain" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 24
    return {key: checkpoint.read(*key) for key in checkpoint.tensors()}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_unified_model_is_trained_in_public_and_in_private_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    unbroken, stopped, alone = (tmp_path / name for name in ("unbroken", "stopped", "alone"))
    launch(unbroken, "--until", "finetune_dp")
    metrics = json.loads((unbroken / "finetune_dp" / "manifest.json").read_text())["metrics"]
    assert 0 < metrics["epsilon"] <= 8
    assert not any("text_loss" in row for row in read_metrics(unbroken / "finetune_dp"))
    config, weights, _ = load_average(RunFolder.open(unbroken, "shapes"), "finetune_dp")
    assert config.name == "unified" and all(weight.isfinite().all() for weight in weights.values())
    outputs = json.loads((unbroken / "pretrain" / "manifest.json").read_text())["outputs"]
    assert "pretrain/expert_load.png" in outputs

    process = subprocess.Popen(command(stopped, "--until", "pretrain"), cwd=ROOT, stdout=subprocess.DEVNULL)
    progress, deadline = stopped / "pretrain" / "progress.jsonl", time.monotonic() + 200
    while not (progress.exists() and '"loss' in progress.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    saved = latest(stopped / "pretrain" / "checkpoints")
    assert saved is not None and 0 < saved.step < 24
    launch(stopped, "--until", "pretrain")
    expected, found = state(unbroken), state(stopped)
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    # one rank reads the same records and meets the same noise: only the order of sums differs
    launch(alone, "--until", "pretrain", "--set", "pretrain.parallel={backend: single, nproc: 1}")
    other = state(alone)
    off = sum((expected[key] - other[key]).double().square().sum() for key in expected if key[0] == "param")
    assert (off / sum(expected[key].double().square().sum() for key in expected if key[0] == "param")) ** 0.5 < 1e-3
