import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from train import ROOT
from train.launchers import agent_command
from train.rendezvous import OneNode, Team
from train.supervisor import Outcome, RestartPolicy, StopRequest, run_stage, signal_of, stop_on_signals
from train.timeline import read_timeline

WORKER = Path(__file__).with_name("stage_worker.py")
QUICK = RestartPolicy(first_wait_s=0.02, longest_wait_s=0.1, grace_s=5, poll_s=0.02)
TWO = replace(QUICK, nproc=2)  # ranks, under torchrun


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
    devices: Callable[[], int | None] = lambda: None,
) -> Outcome:
    """Run the worker alone or, where the policy says so, on several ranks under torchrun."""
    together = policy.nproc > 1

    def command(team: Team) -> list[str]:
        launcher = agent_command(team, "pretrain", 60) if together else [sys.executable]
        return [*launcher, str(WORKER), behaviour, str(folder)]

    return run_stage(
        "pretrain",
        folder,
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        watcher=screen,
        stop=stop or StopRequest(),
        policy=policy,
        rendezvous=OneNode(together=together),
        devices=devices,
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
    waits = [line.split("restarting in ")[1].split(" s")[0] for line in screen.lines[1:]]
    assert "restarting at once" in screen.lines[0]
    assert waits == ["0.02", "0.04"]


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
command = [sys.executable, *sys.argv[1:]]
run_stage("s", folder, lambda team: command, env=os.environ, watcher=Silent(), stop=StopRequest())
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


@pytest.mark.distributed
def test_under_torchrun_a_killed_rank_is_seen_and_the_stage_restarted(folder: Path, screen: Screen) -> None:
    outcome = run("dies once", folder, screen, policy=TWO)
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    assert outcome.attempts[0].signal == "SIGKILL"


@pytest.mark.distributed
def test_under_torchrun_the_killed_rank_is_named_and_not_the_peer_it_brought_down(folder: Path, screen: Screen) -> None:
    outcome = run("loses a peer once", folder, screen, policy=TWO)
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
    outcome = run("refuses", folder, screen, policy=TWO)
    assert (outcome.status, outcome.restarts) == ("refused", 0)
    assert outcome.message == "40_finetune_dp.yaml: privacy.target_epsilon is 1, but 1.2 is spent"


@pytest.mark.distributed
def test_under_torchrun_a_stop_reaches_the_ranks(folder: Path, screen: Screen) -> None:
    stop = StopRequest()
    when("progress.jsonl", folder, lambda: stop.signals.append(signal.SIGINT))
    outcome = run("saves when told", folder, screen, stop=stop, policy=TWO)
    assert outcome.status == "interrupted"
    assert screen.steps == [4, 5]


def test_a_hang_is_seen_within_its_limit_its_stacks_are_kept_and_the_stage_is_restarted(
    folder: Path, screen: Screen
) -> None:
    policy = replace(QUICK, limits={"save": 0.5})
    outcome = run("hangs in a save once", folder, screen, policy=policy)
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    hung = outcome.attempts[0]
    assert (hung.cause, hung.rank, hung.signal) == ("hang", 0, None)
    assert "rank 0 gave no sign of life for 0.5 s in section save (limit 0.5 s)" in hung.what
    assert "wait_for_a_peer_that_never_comes" in (folder / "log-1-stacks.txt").read_text()
    assert "attempt 1 hung at step 3" in screen.lines[0]


def test_hangs_without_progress_are_given_up_as_hangs(folder: Path, screen: Screen) -> None:
    outcome = run("hangs", folder, screen, policy=replace(QUICK, stalled_restarts=1, limits={"step": 0.3}))
    assert (outcome.status, outcome.reason, outcome.restarts) == ("failed", "hang", 1)


def test_a_stage_that_never_begins_is_ended_too(folder: Path, screen: Screen) -> None:
    outcome = run("never begins", folder, screen, policy=replace(QUICK, stalled_restarts=0, limits={"start": 0.5}))
    assert (outcome.status, outcome.reason) == ("failed", "hang")
    assert "rank 0 gave no sign of life within" in outcome.message


def test_a_bad_step_goes_back_and_one_that_needs_a_person_does_not(folder: Path, screen: Screen) -> None:
    outcome = run("meets a bad step once", folder, screen)
    assert (outcome.status, outcome.attempts[0].cause) == ("finished", "bad step")
    assert "met a bad step at step 3" in screen.lines[0]


def test_bad_steps_without_progress_are_given_up_as_such(folder: Path, screen: Screen) -> None:
    outcome = run("meets bad steps", folder, screen)
    assert (outcome.status, outcome.reason, outcome.restarts) == ("failed", "bad steps", 3)


def test_a_bad_step_that_needs_a_person_is_not_restarted(folder: Path, screen: Screen) -> None:
    outcome = run("needs a person", folder, screen)
    assert (outcome.status, outcome.reason, outcome.restarts) == ("failed", "bad steps", 0)
    assert outcome.message == "step 7 of pretrain is bad: loss nan"


def test_a_restart_says_what_it_took(folder: Path, screen: Screen) -> None:
    run("is stopped once", folder, screen, policy=replace(QUICK, limits={"step": 0.5}))
    (said,) = (line for line in screen.lines if "training again" in line)
    for part in ("s until it was seen", "s to start", "s to load", "s for the first step"):
        assert part in said
    (resumed,) = (event for event in read_timeline(folder) if event["event"] == "resumed")
    assert resumed["detect_s"] >= 0.5
    assert resumed["attempt"] == 2


@pytest.mark.distributed
def test_peers_of_a_killed_rank_do_not_hold_up_the_restart(folder: Path, screen: Screen) -> None:
    outcome = run("loses a peer and waits", folder, screen, policy=TWO)  # and would not end on SIGTERM
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    assert (outcome.attempts[0].cause, outcome.attempts[0].rank, outcome.attempts[0].signal) == ("crash", 1, "SIGKILL")
    assert outcome.attempts[0].seconds < 15


@pytest.mark.distributed
def test_the_status_of_a_rank_that_fails_is_told_though_its_peers_had_to_be_killed(
    folder: Path, screen: Screen
) -> None:
    outcome = run("fails and leaves its peers waiting", folder, screen, policy=TWO)
    first = outcome.attempts[0]
    assert (outcome.status, first.exit_code, first.rank) == ("finished", 1, 1)
    assert "died with status 1 at step 3" in screen.lines[0]


@pytest.mark.distributed
def test_a_stopped_rank_is_named_at_once_and_restarted_after_the_limit(folder: Path, screen: Screen) -> None:
    outcome = run("is stopped once", folder, screen, policy=replace(TWO, limits={"step": 2}))
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    assert (outcome.attempts[0].cause, outcome.attempts[0].rank) == ("hang", 1)
    assert "rank 1" in screen.lines[0] and "kill -CONT" in screen.lines[0]
    assert "is stopped by a signal" in outcome.attempts[0].what
    stacks = (folder / "log-1-stacks.txt").read_text()
    assert "wait_for_a_peer_that_never_comes" in stacks and "stopped by a signal" in stacks
    assert outcome.attempts[0].seconds < 15


@pytest.mark.distributed
def test_a_slow_rank_is_named(folder: Path, screen: Screen) -> None:
    run("has a slow rank", folder, screen, policy=TWO)
    (said,) = (line for line in screen.lines if "is slow" in line)
    assert "rank 1 is slow: its own part of a step takes 0.03" in said


@pytest.mark.distributed
@pytest.mark.parametrize("who", ["agent", "rank 0", pytest.param("rank 1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_whoever_is_killed_or_told_to_stop_the_stage_goes_on(
    folder: Path, screen: Screen, who: str, number: signal.Signals
) -> None:
    def strike() -> None:
        rank = (
            int((folder / "rank-0-of-2").read_text()) if who != "rank 1" else int((folder / "rank-1-of-2").read_text())
        )
        os.kill(parent_of(rank) if who == "agent" else rank, number)

    when("rank-1-of-2", folder, lambda: (time.sleep(0.3), strike()))
    outcome = run("takes a while", folder, screen, policy=replace(TWO, grace_s=3))
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    assert outcome.attempts[0].cause == ("crash" if number == signal.SIGKILL else "preempted")
    if number == signal.SIGKILL:
        assert outcome.attempts[0].signal == "SIGKILL"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.distributed
def test_after_two_failures_without_progress_a_rank_is_left_out_and_taken_back_after_progress(
    folder: Path, screen: Screen
) -> None:
    outcome = run("needs fewer ranks", folder, screen, policy=replace(TWO, min_ranks=1))
    assert outcome.status == "finished"
    assert [attempt.nproc for attempt in outcome.attempts] == [2, 2, 1, 2]
    assert any("goes on with 1 of 2 ranks" in line for line in screen.lines)
    assert any("goes on with all 2 ranks" in line for line in screen.lines)


@pytest.mark.distributed
def test_a_lost_device_is_done_without_and_used_again_once_it_is_back(folder: Path, screen: Screen) -> None:
    devices = iter([2, 1, 2, 2])
    outcome = run("needs fewer ranks", folder, screen, policy=replace(TWO, min_ranks=1), devices=lambda: next(devices))
    assert outcome.status == "finished"
    assert [attempt.nproc for attempt in outcome.attempts] == [2, 1, 2]


def test_too_few_devices_are_refused_where_no_fewer_ranks_are_allowed(folder: Path, screen: Screen) -> None:
    outcome = run("finishes", folder, screen, policy=TWO, devices=lambda: 1)
    assert (outcome.status, outcome.attempts) == ("refused", ())
    assert "parallel.nproc is 2, but this machine has 1 devices now" in outcome.message
