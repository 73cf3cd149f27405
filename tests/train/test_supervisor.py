import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train import ROOT
from train.supervisor import Outcome, RestartPolicy, StopRequest, run_stage, signal_of, stop_on_signals

WORKER = Path(__file__).with_name("stage_worker.py")
QUICK = RestartPolicy(first_wait_s=0.02, longest_wait_s=0.1, grace_s=5, poll_s=0.02)


class Screen:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.lines: list[str] = []

    def progress(self, step: int, steps: int | None, text: str) -> None:
        assert (steps, text) == (10, "loss 0.5")
        self.steps.append(step)

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A stage folder whose processes, found by its path on their command lines, must all be gone in the end."""
    stage = tmp_path / "pretrain"
    yield stage
    assert not processes_of(stage)


def processes_of(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(folder) in arguments:
            found.append(entry.name)
    return found


def run(
    behaviour: str,
    folder: Path,
    screen: Screen,
    *,
    policy: RestartPolicy = QUICK,
    stop: StopRequest | None = None,
    launcher: tuple[str, ...] = (),
) -> Outcome:
    command = [sys.executable, *launcher, str(WORKER), behaviour, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return run_stage(
        "pretrain", folder, lambda: command, env=env, watcher=screen, stop=stop or StopRequest(), policy=policy
    )


def when(condition: str, folder: Path, act: object) -> threading.Thread:
    """Call `act` once `folder`/`condition` is there."""

    def wait() -> None:
        while not (folder / condition).exists():
            time.sleep(0.02)
        act()  # type: ignore[operator]

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_stage_that_finishes_is_started_once(folder: Path, screen: Screen) -> None:
    outcome = run("finishes", folder, screen)
    assert (outcome.status, outcome.restarts) == ("finished", 0)
    assert screen.steps == [10]


def test_a_killed_process_is_restarted_and_the_stage_finishes(folder: Path, screen: Screen) -> None:
    outcome = run("dies once", folder, screen)
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    assert outcome.attempts[0].signal == "SIGKILL"
    assert "died by SIGKILL at step 3" in screen.lines[0]


def test_every_attempt_is_recorded_and_keeps_its_log(folder: Path, screen: Screen) -> None:
    run("dies once", folder, screen)
    records = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [(record["number"], record["signal"], record["exit_code"]) for record in records] == [
        (1, "SIGKILL", -9),
        (2, None, 0),
    ]
    assert all(Path(record["log"]).read_text().startswith("$ ") for record in records)


def test_a_stage_that_never_progresses_is_given_up_after_three_restarts(folder: Path, screen: Screen) -> None:
    outcome = run("never progresses", folder, screen)
    assert (outcome.status, outcome.restarts) == ("failed", 3)
    assert "the disk is on fire" in outcome.message
    waits = [line.split("restarting in ")[1].split(" s")[0] for line in screen.lines]
    assert waits == ["0.02", "0.04", "0.08"]


def test_a_stage_that_commits_something_between_deaths_is_not_given_up(folder: Path, screen: Screen) -> None:
    outcome = run("commits and dies", folder, screen)
    assert (outcome.status, outcome.restarts) == ("finished", 6)


def test_a_refusal_is_shown_and_not_restarted(folder: Path, screen: Screen) -> None:
    outcome = run("refuses", folder, screen)
    assert (outcome.status, outcome.restarts) == ("refused", 0)
    assert outcome.message == "40_finetune_dp.yaml: privacy.target_epsilon is 1, but 1.2 is spent"


def test_a_clean_exit_without_a_manifest_is_a_failure(folder: Path, screen: Screen) -> None:
    outcome = run("ends without a manifest", folder, screen)
    assert outcome.status == "failed"
    assert "ended without writing its manifest" in outcome.message


def test_a_stop_lets_the_stage_save(folder: Path, screen: Screen) -> None:
    stop = StopRequest()
    when("progress.jsonl", folder, lambda: stop.signals.append(signal.SIGINT))
    outcome = run("saves when told", folder, screen, stop=stop)
    assert (outcome.status, outcome.attempts[0].exit_code) == ("interrupted", 75)
    assert screen.steps == [4, 5]


def test_a_preempted_stage_nobody_here_asked_to_stop_is_restarted(folder: Path, screen: Screen) -> None:
    stop = StopRequest()

    def preempt_then_stop() -> None:
        (pid,) = processes_of(folder)
        os.kill(int(pid), signal.SIGTERM)
        when("log-2.txt", folder, lambda: stop.signals.append(signal.SIGTERM))

    when("progress.jsonl", folder, preempt_then_stop)
    outcome = run("saves when told", folder, screen, stop=stop)
    assert (outcome.status, outcome.restarts) == ("interrupted", 1)
    assert "saved and stopped as it was told" in screen.lines[0]


def test_a_stage_that_ignores_a_stop_is_killed_after_the_grace(folder: Path, screen: Screen) -> None:
    stop = StopRequest()
    when("progress.jsonl", folder, lambda: stop.signals.append(signal.SIGTERM))
    outcome = run("ignores SIGTERM", folder, screen, stop=stop, policy=RestartPolicy(grace_s=0.3, poll_s=0.02))
    assert (outcome.status, outcome.attempts[0].signal) == ("interrupted", "SIGKILL")


def test_a_second_stop_does_not_wait_for_the_grace(folder: Path, screen: Screen) -> None:
    stop = StopRequest()
    when("progress.jsonl", folder, lambda: stop.signals.extend([signal.SIGINT, signal.SIGINT]))
    begun = time.monotonic()
    run("ignores SIGTERM", folder, screen, stop=stop, policy=RestartPolicy(grace_s=60, poll_s=0.02))
    assert time.monotonic() - begun < 20


def test_no_child_outlives_an_attempt_even_in_a_session_of_its_own(folder: Path, screen: Screen) -> None:
    run("leaves a child in another session", folder, screen, policy=RestartPolicy(stalled_restarts=0, poll_s=0.02))
    assert not processes_of(folder)


def test_ctrl_c_becomes_a_stop_request_and_the_old_handler_returns() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and not stop.urgent
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.urgent
    assert signal.getsignal(signal.SIGINT) is before


SUPERVISOR = """
import os, sys
from pathlib import Path
from train.supervisor import StopRequest, run_stage
class Silent:
    def progress(self, step, steps, text): pass
    def say(self, text): pass
folder = Path(sys.argv[2])
run_stage("s", folder, lambda: [sys.executable, *sys.argv[1:]], env=os.environ, watcher=Silent(), stop=StopRequest())
"""


def test_a_stage_ends_when_its_launch_is_killed(tmp_path: Path) -> None:
    follower = tmp_path / "follower.py"
    follower.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "from train.processes import follow_supervisor\n"
        "if len(sys.argv) > 2:  # the worker, under a launcher that does not pass signals on\n"
        "    follow_supervisor(grace_s=1)\n"
        "    Path(sys.argv[1], 'pid').write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "import subprocess\n"
        "subprocess.run([sys.executable, __file__, sys.argv[1], 'worker'], start_new_session=True)\n"
    )
    folder = tmp_path / "stage"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(follower), str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    wait_for(lambda: (folder / "pid").exists() and bool((folder / "pid").read_text()))
    supervisor.kill()
    supervisor.wait()
    wait_for(lambda: not processes_of(folder))


def wait_for(condition: object, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("exit_code", "name"),
    [
        (-9, "SIGKILL"),
        (137, "SIGKILL"),
        (247, "SIGKILL"),
        (-11, "SIGSEGV"),
        (1, None),
        (2, None),
        (75, None),
        (255, None),
    ],
)
def test_an_exit_status_tells_the_signal_whoever_passed_it_on(exit_code: int, name: str | None) -> None:
    assert signal_of(exit_code) == name


TORCHRUN = ("-m", "train.torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "0")


@pytest.mark.distributed
def test_under_torchrun_a_killed_rank_is_seen_and_the_stage_restarted(folder: Path, screen: Screen) -> None:
    outcome = run("dies once", folder, screen, launcher=TORCHRUN)
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    assert outcome.attempts[0].signal == "SIGKILL"


@pytest.mark.distributed
def test_under_torchrun_the_killed_rank_is_named_and_not_the_peer_it_brought_down(folder: Path, screen: Screen) -> None:
    outcome = run("loses a peer once", folder, screen, launcher=TORCHRUN)
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    assert outcome.attempts[0].signal == "SIGKILL"


@pytest.mark.parametrize(
    ("exit_codes", "why"),
    [([1, -9], -9), ([-9, 1, -15], -9), ([1, 2, -9], 2), ([-15, 1], 1), ([-15, 75], 75), ([-15, -15], -15)],
)
def test_of_all_ranks_exit_codes_the_telling_one_is_passed_on(exit_codes: list[int], why: int) -> None:
    from train.torchrun import cause

    assert cause(exit_codes) == why


@pytest.mark.distributed
def test_under_torchrun_a_ranks_refusal_is_still_a_refusal(folder: Path, screen: Screen) -> None:
    outcome = run("refuses", folder, screen, launcher=TORCHRUN)
    assert (outcome.status, outcome.restarts) == ("refused", 0)
    assert outcome.message == "40_finetune_dp.yaml: privacy.target_epsilon is 1, but 1.2 is spent"


@pytest.mark.distributed
def test_under_torchrun_a_stop_reaches_the_ranks(folder: Path, screen: Screen) -> None:
    stop = StopRequest()
    when("progress.jsonl", folder, lambda: stop.signals.append(signal.SIGINT))
    outcome = run("saves when told", folder, screen, stop=stop, launcher=TORCHRUN)
    assert outcome.status == "interrupted"
    assert screen.steps == [4, 5]
