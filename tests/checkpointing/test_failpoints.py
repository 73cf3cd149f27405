"""Failpoints kill for real, where and when they are told to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.failpoints import failpoint

_STEPS = """
from checkpointing.failpoints import failpoint
for step in range(5):
    print(step, flush=True)
    failpoint("step.computed", step=step)
"""


def run(specification: str, **environment: str) -> tuple[int, int]:
    """Exit status and number of steps begun by a process with this failpoint."""
    environment = {**os.environ, "SFUMATO_FAILPOINT": specification, **environment}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _STEPS], env=environment, cwd=root, capture_output=True, check=False)
    return done.returncode, len(done.stdout.split())


@pytest.mark.parametrize(
    ("specification", "steps"),
    [
        ("step.computed", 1),
        ("step.computed:3", 3),
        ("step.computed@step=3", 4),
        ("step.computed@rank=2,step=1", 2),
    ],
)
def test_a_process_dies_at_the_place_named(specification: str, steps: int) -> None:
    assert run(specification, RANK="2") == (-signal.SIGKILL, steps)


@pytest.mark.parametrize("specification", ["another.place", "step.computed@rank=1", "step.computed:6"])
def test_a_process_lives_where_place_rank_or_visit_differ(specification: str) -> None:
    assert run(specification, RANK="0") == (0, 5)


def test_with_a_marker_file_only_the_first_run_dies(tmp_path: Path) -> None:
    marker = str(tmp_path / "died")
    assert run("step.computed", SFUMATO_FAILPOINT_ONCE=marker) == (-signal.SIGKILL, 1)
    assert run("step.computed", SFUMATO_FAILPOINT_ONCE=marker) == (0, 5)


@pytest.mark.parametrize("specification", ["step.computed@", "step.computed:0", "step.computed@stpe=3"])
def test_a_mistyped_failpoint_is_refused_and_not_passed_over(
    specification: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", specification)
    with pytest.raises(ValueError, match="SFUMATO_FAILPOINT"):
        failpoint("step.computed", step=1)
