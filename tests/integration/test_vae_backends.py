"""A VAE trained in a real stage under every backend: resumed to the same bits, and to rounding what one rank trains."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.integration.elastic_stage import STEPS
from tests.integration.test_elastic import SHARDED, prepare_public, run_workers, state


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_every_backend_trains_a_vae_and_goes_on_from_where_it_was(tmp_path: Path) -> None:
    prepare_public(tmp_path / "vae")
    for run in ("vae_single", *(f"vae_{backend}{name}" for backend in SHARDED for name in ("", "_stopped"))):
        shutil.copytree(tmp_path / "vae", tmp_path / run)
    run_workers(tmp_path, 1, [f"train:vae_single:single:{STEPS}"])
    run_workers(
        tmp_path,
        2,
        [
            f"train:vae_{backend}{name}:{backend}:{until}"
            for backend in SHARDED
            for name, until in (("", STEPS), ("_stopped", STEPS // 2))
        ],
    )
    run_workers(tmp_path, 2, [f"train:vae_{backend}_stopped:{backend}:{STEPS}" for backend in SHARDED])
    alone = state(tmp_path, "vae_single")
    for backend in SHARDED:
        unbroken, resumed = state(tmp_path, f"vae_{backend}"), state(tmp_path, f"vae_{backend}_stopped")
        assert unbroken.keys() == resumed.keys() == alone.keys()
        for key, value in unbroken.items():
            assert torch.equal(value, resumed[key]), f"{backend} {key}"
            assert (value - alone[key]).abs().max() < 2e-4, f"{backend} {key}"
