"""What a backend must not do to the machine it runs on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.moe import MixtureOfExperts
from train.config import Optim, Parallel
from train.parallel import join_world, shard_model

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


def test_ranks_that_experts_do_not_fall_on_evenly_are_refused() -> None:
    """Of one rank, which only the world's size at the start can tell."""
    parallel, optim = Parallel(backend="ddp", nproc=2, expert_parallel=2), Optim(learning_rate=1e-3)
    module = MixtureOfExperts(8, 8, num_experts=2, top_k=1, num_modalities=1)
    with pytest.raises(ValueError, match="expert_parallel is 2, which does not divide the 1 ranks: choose 1"):
        shard_model(module, join_world(), parallel, optim, microbatch_size=1, bf16=False)
