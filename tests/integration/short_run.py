"""The digits recipe made short, launched as a person launches it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    "pretrain.train.steps=40",
    "pretrain.optim.warmup_steps=5",
    "pretrain.checkpoint.every=10",
    "finetune_dp.train.steps=12",
    "finetune_dp.train.batch_size=32",
    "finetune_dp.optim.warmup_steps=2",
    "finetune_dp.checkpoint.every=5",
    "privacy.replay_steps=6",
    "log.wandb=disabled",
)
STEPS = {"pretrain": 40, "finetune_dp": 12}


def launch_command(run: Path, *arguments: str) -> list[str]:
    settings = [word for setting in SHORT for word in ("--set", setting)]
    base = [sys.executable, "scripts/launch.py", "configs/digits", "--run-dir", str(run), "--nproc", "2"]
    return [*base, *settings, *arguments]


def launch(run: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        launch_command(run, *arguments), cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout
