"""A real job of two ranks and their writers under every fault: it ends with every bit right, or says what is broken."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.chaos.harness import Fault, Signal, Trial
from tests.chaos.matrix import MATRIX, Result, drawn, row, strike, summary

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]

WHOLE = [fault for part in MATRIX.values() for fault in part()]
# A stopped process is found by a time-out, which takes long: one is enough outside `make test-slow`.
QUICK = random.Random(4).sample([fault for fault in WHOLE if "stop" not in fault.name.lower()], 16)
QUICK += [Fault("SIGSTOP to the writer of rank 0", signal=Signal(signal.SIGSTOP, 0, True, 7))]


def require_all_hold(results: Iterable[Result], capsys: pytest.CaptureFixture[str]) -> list[Result]:
    results = list(results)
    with capsys.disabled():
        print("", *map(row, results), summary(results), sep="\n")
    assert not [row(result) for result in results if result[1].broken]
    return results


@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.name)
def test_a_job_that_meets_this_fault_ends_right_or_refuses(fault: Fault, tmp_path: Path) -> None:
    outcome = Trial(tmp_path / "job", fault).run()
    assert not outcome.broken, outcome
    assert outcome.struck, "the fault never came, so nothing was tested"


@pytest.mark.slow
@pytest.mark.parametrize("part", MATRIX)
def test_whatever_fault_strikes_wherever_a_job_ends_right_or_refuses(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = require_all_hold(strike(MATRIX[part](), tmp_path), capsys)
    assert all(outcome.struck for _, outcome in results), "a fault never came, so nothing was tested"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_of_five_hundred_random_faults_none_corrupts_silently(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_all_hold(strike(drawn(seed), tmp_path, until=50), capsys)
