"""The privacy benchmark compares like with like, by the real steps."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.dit import DiTConfig
from train import benchmarks_privacy
from train.benchmarks import fixed_losses, interleaved, one_process, ratio

ROOT = Path(__file__).resolve().parents[2]
TINY = DiTConfig(width=32, depth=1, heads=2, image_size=8, channels=3, num_classes=10)


def test_each_round_begins_with_another_work() -> None:
    called: list[str] = []

    def work(name: str) -> Callable[[], None]:
        return lambda: called.append(name)

    times = interleaved({name: work(name) for name in "abc"}, rounds=4)
    assert "".join(called) == "abc" + "bca" + "cab" + "abc"
    assert [len(times[name]) for name in "abc"] == [4, 4, 4]


def test_a_ratio_is_the_median_over_rounds_so_that_a_slow_round_slows_both() -> None:
    assert ratio({"ours": [3.0, 30.0, 2.0], "theirs": [2.0, 20.0, 2.0]}, "ours", "theirs") == 1.5


def test_opacus_gives_our_clipped_sum_and_a_rival_that_does_not_is_not_timed() -> None:
    backend = one_process(TINY)
    losses = fixed_losses(TINY, benchmarks_privacy.MICROBATCH, torch.device("cpu"))
    ours = {
        name: benchmarks_privacy._microbatch(name, backend, losses) for name in ("two_pass", "kept_gradients")
    }  # fmt: skip
    rivals = benchmarks_privacy._opacus(TINY, losses, torch.device("cpu"))
    ghost = rivals["opacus_ghost"]

    def unclipped() -> None:
        ghost.parameters[0].grad = None
        losses(backend.model).sum().backward()

    impostor = replace(ghost, parameters=list(backend.module.parameters()), work=unclipped)
    timed = benchmarks_privacy._timeable({**rivals, "impostor": impostor}, backend, ours)
    assert set(timed) == {"kept_gradients", "opacus_ghost", "opacus_per_sample"}


def test_public_and_private_steps_read_the_same_eight_microbatches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks_privacy, "RUN_STEPS", 4)  # quicker to calibrate
    with benchmarks_privacy._logical_steps(TINY, tmp_path) as works:
        reports = {name: work() for name, work in works.items()}
    assert list(reports) == ["non_private", "auto", "two_pass", "group_wise"]
    assert {report.images for report in reports.values()} == {128}


def test_a_process_knows_the_most_memory_it_held() -> None:
    """In a process of its own: this one may have kept as much from earlier tests."""
    code = """
import torch
from train.benchmarks_privacy import _memory
before = _memory(peak=False)
ballast = torch.ones(1 << 27)
size = ballast.nbytes
del ballast
print((_memory(peak=True) - before) / size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) > 0.95
