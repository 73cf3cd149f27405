"""Failpoints act for real, where and when they are told to."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpointing.failpoints import failpoint

ROOT = Path(__file__).resolve().parents[2]
_STEPS = """
from checkpointing.failpoints import failpoint
for step in range(5):
    print(step, flush=True)
    failpoint("step.computed", step=step)
"""


def run(specification: str, **environment: str) -> tuple[int, int]:
    """Exit status and number of steps begun by a process with this failpoint."""
    environment = {**os.environ, "SFUMATO_FAILPOINT": specification, **environment}
    done = subprocess.run([sys.executable, "-c", _STEPS], env=environment, cwd=ROOT, capture_output=True, check=False)
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


def test_of_several_failpoints_each_happens_once_whatever_the_others_did(tmp_path: Path) -> None:
    marker, both = tmp_path / "died", "step.computed@step=3;another.place;step.computed:2"
    assert run(both, SFUMATO_FAILPOINT_ONCE=str(marker)) == (-signal.SIGKILL, 2)
    assert run(both, SFUMATO_FAILPOINT_ONCE=str(marker)) == (-signal.SIGKILL, 4)
    assert run(both, SFUMATO_FAILPOINT_ONCE=str(marker)) == (0, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["died", "died-2"]


def test_a_process_told_to_end_by_a_failpoint_can_answer_the_signal() -> None:
    assert run("step.computed:2!term") == (-signal.SIGTERM, 2)


def test_a_stopped_process_goes_on_where_it_stood_when_it_is_told_to() -> None:
    environment = {**os.environ, "SFUMATO_FAILPOINT": "step.computed@step=1!stop"}
    process = subprocess.Popen([sys.executable, "-c", _STEPS], env=environment, cwd=ROOT, stdout=subprocess.PIPE)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # returns once it is stopped, and not before
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=10)
    assert (process.returncode, len(said.split())) == (0, 5)


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_a_disk_that_fails_at_a_failpoint_does_so_once(
    action: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", f"file.synced:2!{action}")
    failpoint("file.synced")
    with pytest.raises(OSError, match="by SFUMATO_FAILPOINT") as caught:
        failpoint("file.synced")
    assert caught.value.errno == number
    failpoint("file.synced")


def test_a_slow_place_takes_as_long_as_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "file.written!delay=0.15")
    begun = time.monotonic()
    failpoint("file.written")
    assert time.monotonic() - begun >= 0.15


MISTYPED = [
    "step.computed@",
    "step.computed:0",
    "step.computed@stpe=3",
    "step.computed!explode",
    "step.computed!kill=3",
    "another.place;",
    "another.place;step.computed!",
]


@pytest.mark.parametrize("specification", MISTYPED)
def test_a_mistyped_failpoint_is_refused_and_not_passed_over(
    specification: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", specification)
    with pytest.raises(ValueError, match="SFUMATO_FAILPOINT"):
        failpoint("step.computed", step=1)
