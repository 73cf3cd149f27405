"""Experts spread over ranks: the losses, gradients and states of one rank that has them all."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpointing.sharded import Checkpoint, latest
from tests.integration.expert_parallel_steps import CLIPPED, KINDS, Case, config_of, run
from train.config import Parallel, TrainStage
from train.parallel import join_world
from train.plan import count_parameters, plan_memory
from train.recipe import load_stage

ROOT = Path(__file__).resolve().parents[2]


def alone(folder: Path, *cases: str) -> None:
    """In this process, all experts in one place."""
    for said in cases:
        run(Case.of(said), folder, join_world())


def together(folder: Path, nproc: int, cases: Sequence[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    done = subprocess.run(
        [*command, "tests/integration/expert_parallel_steps.py", str(folder), *cases],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def state_of(folder: Path, name: str) -> Checkpoint:
    checkpoint = latest(folder / name)
    assert checkpoint is not None
    return checkpoint


def gradients_of(folder: Path, name: str) -> Tensor:
    """The first step's, clipped, whole: put together from the ranks that have a part."""
    parts: dict[tuple[str, int], Tensor] = {}
    for path in folder.glob(f"{name}.*.pt"):
        for parameter, offset, values in torch.load(path)["gradients"]:
            seen = parts.setdefault((parameter, offset), values)
            assert torch.equal(seen, values), f"two ranks that hold {parameter} disagree"
    return torch.cat([parts[key] for key in sorted(parts)])


def require_equal(folder: Path, said: str, expected: str) -> None:
    """Losses, gradients, weights, moments and averages, to rounding."""
    require_equal_gradients(folder, said, expected, tolerance=1e-6)
    found, whole = (state_of(folder, Case.of(each).name) for each in (said, expected))
    assert found.tensors() == whole.tensors()
    for kind, parameter in whole.tensors():
        ours, theirs = found.read(kind, parameter), whole.read(kind, parameter)
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm() + 1e-9, f"{said}: {kind} {parameter}"


def require_equal_gradients(folder: Path, said: str, expected: str, tolerance: float) -> None:
    """Every step's loss, and the first one's gradients."""
    name, expected = Case.of(said).name, Case.of(expected).name
    losses, wanted = (torch.load(folder / f"{each}.0.pt")["losses"] for each in (name, expected))
    assert losses == pytest.approx(wanted, rel=tolerance), said
    gradients, wanted = gradients_of(folder, name), gradients_of(folder, expected)
    assert wanted.norm() == pytest.approx(CLIPPED, rel=1e-4)
    assert (gradients - wanted).norm() < tolerance * CLIPPED, said


@pytest.mark.distributed
def test_two_ranks_that_share_the_experts_are_one_rank_that_has_them_all(tmp_path: Path) -> None:
    """One of them gets no token, and half of the experts are chosen by none."""
    alone(tmp_path, "four:single:1:starved")
    together(tmp_path, 2, ["four:ddp:2:starved", "four:fsdp2:2:starved"])
    for backend in ("ddp", "fsdp2"):
        require_equal(tmp_path, f"four:{backend}:2:starved", "four:single:1:starved")
        first = torch.load(tmp_path / f"four-{backend}-2-starved.1.pt")["gradients"]
        assert all(not values.any() for name, _, values in first if "experts" in name)
    require_planned(tmp_path, "four:ddp:2:starved", 2, tolerance=0)
    require_planned(tmp_path, "four:fsdp2:2:starved", 2, tolerance=0.01)  # a norm's one row is on one rank


def require_planned(folder: Path, said: str, nproc: int, tolerance: float) -> None:
    """The rank that holds most holds what the plan says, part by part."""
    case = Case.of(said)
    stage, model = load_stage(ROOT / "configs/shapes/30_pretrain.yaml"), config_of(case.kind)
    assert isinstance(stage, TrainStage)
    parallel = Parallel(backend=case.backend, nproc=nproc, expert_parallel=case.parts)  # type: ignore[arg-type]
    stage = stage.model_copy(update={"parallel": parallel, "model": model})
    planned = asdict(plan_memory(stage, model, count_parameters(model), nproc))
    held = [torch.load(folder / f"{case.name}.{rank}.pt")["held"] for rank in range(nproc)]
    for part in held[0]:
        assert max(of_rank[part] for of_rank in held) == pytest.approx(planned[part], rel=tolerance), (said, part)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_are_two_replicas_of_two_parts(kind: str, tmp_path: Path) -> None:
    """Of `modalities` a part is one expert: under fsdp2 one of its replicas holds none of it."""
    cases = [f"{kind}:{backend}:2{how}" for backend in ("ddp", "fsdp2") for how in ("", ":checkpointed")]
    alone(tmp_path, f"{kind}:single:1")
    together(tmp_path, 4, cases if kind == "modalities" else [*cases, f"{kind}:ddp:4", f"{kind}:fsdp2:4"])
    for case in cases:
        require_equal(tmp_path, case, f"{kind}:single:1")
        require_planned(tmp_path, case, 4, tolerance=0.02)


@pytest.mark.slow
@pytest.mark.distributed
def test_experts_travel_in_compiled_blocks_and_in_bf16(tmp_path: Path) -> None:
    """In bf16 a router may choose otherwise once weights differ by rounding: the first gradients are what compares."""
    alone(tmp_path, "four:single:1")
    cases = ("four:ddp:2:compiled", "four:fsdp2:2:compiled")
    bf16 = [f"four:{backend}:{parts}:bf16" for backend in ("ddp", "fsdp2") for parts in (1, 2)]
    together(tmp_path, 2, [*cases, *bf16])
    for case in cases:
        require_equal(tmp_path, case, "four:single:1")
    for backend in ("ddp", "fsdp2"):
        require_equal_gradients(tmp_path, f"four:{backend}:2:bf16", f"four:{backend}:1:bf16", tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("source", ["single:1", "ddp:2", "fsdp2:2", "zero2:1"])
def test_a_save_of_any_spreading_goes_on_under_any_other(source: str, tmp_path: Path) -> None:
    alone(tmp_path, "four:single:1")
    together(tmp_path, 2, [f"four:{source}"] if source != "single:1" else ["four:ddp:2"])
    (tmp_path / Case.of(f"four:{source}").name).rename(tmp_path / "start")
    alone(tmp_path, "four:single:1:onward")
    cases = [f"four:{target}:onward" for target in ("ddp:2", "fsdp2:2", "ddp:1", "fsdp2:1", "zero3:1")]
    together(tmp_path, 2, cases)
    for case in cases:
        require_equal(tmp_path, case, "four:single:1:onward")
