"""The child dies as records make children die, for real, and this process and the other records go on."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.sandbox_worker import SECRET, broken, dying, opened
from train.sandbox import Died, Sandbox

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox[str, str]]:
    with Sandbox(opened, timeout_s=1) as sandbox:
        yield sandbox


def test_results_come_back_in_order_from_one_child(sandbox: Sandbox[str, str]) -> None:
    assert sandbox.run([]) == []
    assert sandbox.run(["a", "b"]) == ["A", "B"]
    child = sandbox.pid
    assert child not in (None, os.getpid())
    assert sandbox.run(["c"]) == ["C"] and sandbox.pid == child


@pytest.mark.parametrize("command", ["segfault", "exit"])
def test_a_record_that_ends_its_child_is_given_up_and_the_others_are_not(
    sandbox: Sandbox[str, str], command: str
) -> None:
    assert sandbox.run(["a", command, "b"]) == ["A", Died("crashed"), "B"]
    assert sandbox.run([command]) == [Died("crashed")]
    assert sandbox.run(["c"]) == ["C"]


def test_a_record_that_hangs_is_given_up_and_its_child_is_gone(sandbox: Sandbox[str, str]) -> None:
    sandbox.run(["a"])
    child = sandbox.pid
    begun = time.monotonic()
    assert sandbox.run(["hang"]) == [Died("timed_out")]
    assert 2 <= time.monotonic() - begun < 10, "twice as long as one may take"
    assert not Path(f"/proc/{child}").exists() and sandbox.pid is None
    assert sandbox.run(["b"]) == ["B"]


def test_a_child_that_is_stopped_is_ended_even_where_it_takes_nothing_from_the_pipe(sandbox: Sandbox[str, str]) -> None:
    sandbox.run(["a"])
    assert sandbox.pid is not None
    os.kill(sandbox.pid, signal.SIGSTOP)
    long = "x" * 10_000_000
    assert sandbox.run([long, "b"]) == [long.upper(), "B"]


def test_of_an_exception_only_its_type_or_reason_comes_out(
    sandbox: Sandbox[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    sandbox.run(["a"])
    child = sandbox.pid
    answers = sandbox.run(["a", "raise", "refuse"])
    assert answers == ["A", Died("failed_KeyError"), Died("too_many_pixels")]
    assert sandbox.pid == child, "an exception ends no child"
    assert SECRET not in repr(answers) + "".join(capfd.readouterr())


def test_a_child_killed_from_outside_costs_no_record(sandbox: Sandbox[str, str], tmp_path: Path) -> None:
    word = f"killed_once {tmp_path / 'marker'}"
    assert sandbox.run(["a", word, "b"]) == ["A", "alive", "B"]
    alone = f"killed_once {tmp_path / 'another'}"
    assert sandbox.run([alone]) == ["alive"]
    assert sandbox.pid is not None
    os.kill(sandbox.pid, signal.SIGKILL)  # between two batches
    assert sandbox.run(["c", "d"]) == ["C", "D"]


def test_a_record_gets_no_more_memory_than_it_may_take() -> None:
    with Sandbox(opened, timeout_s=20, memory_bytes=200_000_000) as sandbox:
        answers = sandbox.run(["allocate 100000000", "allocate 1000000000"])
    assert answers == ["100000000", Died("out_of_memory")]


def test_what_opening_the_tools_raises_is_the_callers_to_mend() -> None:
    with (
        Sandbox(functools.partial(broken, ValueError("no such model: get it")), timeout_s=9) as sandbox,
        pytest.raises(ValueError, match=r"^no such model: get it$"),
    ):
        sandbox.run(["a"])
    with (
        Sandbox(functools.partial(broken, ZeroDivisionError("ours")), timeout_s=9) as sandbox,
        pytest.raises(RuntimeError, match="ZeroDivisionError: ours"),
    ):
        sandbox.run(["a"])


def test_a_child_that_never_gets_ready_is_an_error_and_no_records() -> None:
    with Sandbox(dying, timeout_s=9) as sandbox, pytest.raises(RuntimeError, match="dies before its first record"):
        sandbox.run(["a"])


def test_a_parent_that_is_killed_leaves_no_child_behind_even_one_that_hangs() -> None:
    program = (
        "import sys, threading, time\n"
        "from tests.train.sandbox_worker import opened\n"
        "from train.sandbox import Sandbox\n"
        "sandbox = Sandbox(opened, timeout_s=60)\n"
        "sandbox.run(['a'])\n"
        "print(sandbox.pid, flush=True)\n"
        "sandbox.run(['hang'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie that nobody has waited for yet."""
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
