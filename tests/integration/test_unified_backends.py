"""The unified model's private step under six backends: one clipped sum, whoever holds which shard."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.integration.unified_step import BOUND

ROOT = Path(__file__).resolve().parents[2]
SHARDED = ("ddp", "fsdp2", "fsdp2+checkpointed", "zero1", "zero2", "zero3")
KINDS = ("dense", "both")
ENGINES = ("two_pass", "group_wise")


def run(folder: Path, nproc: int, cases: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    done = subprocess.run(
        [*command, "tests/integration/unified_step.py", str(folder), *cases],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def whole(folder: Path, case: str) -> Tensor:
    """Every parameter's clipped sum, by name and offset, put together from the ranks that own it."""
    pieces: dict[tuple[str, int], Tensor] = {}
    for path in folder.glob(f"{case}.*.pt"):
        pieces |= {(name, offset): values for name, offset, values in torch.load(path)}
    return torch.cat([pieces[key] for key in sorted(pieces)])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_sums_the_same_clipped_gradients(kind: str, tmp_path: Path) -> None:
    run(tmp_path, 1, [f"{kind}:{engine}:single" for engine in ENGINES])
    run(tmp_path, 2, [f"{kind}:{engine}:{backend}" for engine in ENGINES for backend in SHARDED])
    for engine in ENGINES:
        expected = whole(tmp_path, f"{kind}-{engine}-single")
        assert BOUND / 10 < expected.norm() <= 4 * BOUND
        for backend in SHARDED:
            found = whole(tmp_path, f"{kind}-{engine}-{backend}")
            assert (found - expected).norm() / expected.norm() < 1e-6, f"{engine} {backend}"
