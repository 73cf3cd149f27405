"""What a backend must not do to the machine it runs on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BUILD = """
from functools import partial
from models.dit import DiT, DiTConfig
from train.config import Optim, Parallel
from train.parallel import build_model, join_world

optim = Optim(learning_rate=1e-3)
config = DiTConfig(width=32, depth=1, heads=2, image_size=8, channels=1, num_classes=10)
build_model(partial(DiT, config), join_world(), Parallel(backend="{backend}"), optim, microbatch_size=2, bf16=False)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["zero1", "zero3"])
def test_a_start_under_deepspeed_compiles_nothing(tmp_path: Path, backend: str) -> None:
    """What compiles holds a lock file, and whoever is killed meanwhile leaves it: every later start would hang."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", BUILD.format(backend=backend)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
