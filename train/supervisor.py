"""One stage, seen to its end: started under its launcher, watched, restarted when a process dies, stopped in order.

The worker tells two things through its folder: how far it is, as JSON lines {"step", "steps", "text", "time"} in
`progress.jsonl`, and that it is done, by its manifest. Everything else is read from the exit status.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from train.processes import ProcessTree

EXIT_USER_ERROR = 2  # a bad config, data or budget: running it again would end the same
EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75: told to stop, saved, and can go on

LAST_LINES = 15  # of a failed attempt's log, shown on the terminal


@dataclass(frozen=True)
class RestartPolicy:
    """When to give up, and how long to wait: 1, 2, 4, ... s after each restart that brought nothing."""

    stalled_restarts: int = 3
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    grace_s: float = 30.0  # from SIGTERM to SIGKILL: what saving may take
    poll_s: float = 0.1
    manifest_wait_s: float = 0.0  # after a clean exit


@dataclass(frozen=True)
class Attempt:
    """One run of a stage's processes; `step` is the newest it reported."""

    number: int
    exit_code: int
    signal: str | None
    seconds: float
    step: int | None
    log: str


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. "refused": the user must mend something; "failed": restarts brought it no further."""

    stage: str
    status: Literal["finished", "refused", "failed", "interrupted"]
    seconds: float
    attempts: tuple[Attempt, ...]
    message: str = ""

    @property
    def restarts(self) -> int:
        """Attempts after the first."""
        return max(len(self.attempts) - 1, 0)


class Watcher(Protocol):
    """Who is told how the stage goes."""

    def progress(self, step: int, steps: int | None, text: str) -> None:
        """A worker came to `step` of `steps`, where it knows how many there are."""
        ...

    def say(self, text: str) -> None:
        """Something worth a line happened."""
        ...


@dataclass
class StopRequest:
    """Set by a signal: the first asks for an orderly end, the second for an immediate one."""

    signals: list[int] = field(default_factory=list)

    @property
    def requested(self) -> bool:
        """Whether the user, or the machine's scheduler, asked to stop."""
        return bool(self.signals)

    @property
    def urgent(self) -> bool:
        """Whether they asked again."""
        return len(self.signals) > 1


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into a StopRequest for the length of the block."""
    stop = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        stop.signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_stage(
    stage: str,
    folder: Path,
    command: Callable[[], Sequence[str]],
    *,
    env: Mapping[str, str],
    watcher: Watcher,
    stop: StopRequest,
    policy: RestartPolicy = RestartPolicy(),
    log_name: str = "log",
) -> Outcome:
    """Run `command()` until the stage's manifest is written, restarting after failures; call it from the main thread.

    `command` is asked anew for each attempt. The output of attempt N goes to `log_name`-N.txt, and a line on it to
    attempts.jsonl, in `folder`. The stage is given up after `policy.stalled_restarts` restarts in a row that committed
    nothing new; status 2 is never restarted. Guarantee: on every way out, an exception included, no process of the
    stage is left alive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    attempts: list[Attempt] = []
    best, stalled = _committed(folder, None), 0

    def outcome(status: Literal["finished", "refused", "failed", "interrupted"], message: str = "") -> Outcome:
        return Outcome(stage, status, time.monotonic() - begun, tuple(attempts), message)

    while True:
        attempt = _attempt(folder, log_name, command(), env=env, watcher=watcher, stop=stop, policy=policy)
        attempts.append(attempt)
        with (folder / "attempts.jsonl").open("a", encoding="utf-8") as record:
            record.write(json.dumps(asdict(attempt)) + "\n")
        log = Path(attempt.log)
        if attempt.exit_code == 0 and _appears(folder / "manifest.json", policy):
            return outcome("finished")
        if stop.requested:
            return outcome("interrupted", _how(attempt))
        if attempt.exit_code == EXIT_USER_ERROR:
            return outcome("refused", _refusal(log))
        reached = _committed(folder, attempt.step)
        if reached > best:
            best, stalled = reached, 0
        if stalled == policy.stalled_restarts:
            return outcome(
                "failed",
                f"{_how(attempt)}; {stalled} restarts brought it no further. The end of {log}:\n{_last_lines(log)}",
            )
        wait_s = min(policy.first_wait_s * 2**stalled, policy.longest_wait_s)
        stalled += 1
        watcher.say(f"{stage}: {_how(attempt)}; restarting in {wait_s:g} s (log: {log})\n{_last_lines(log)}")
        _sleep(wait_s, stop, policy.poll_s)
        if stop.requested:
            return outcome("interrupted", _how(attempt))


def _appears(manifest: Path, policy: RestartPolicy) -> bool:
    # On a shared disk another node's rank writes it, and this node may see it a little later.
    deadline = time.monotonic() + policy.manifest_wait_s
    while not manifest.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(policy.poll_s)
    return True


def signal_of(exit_code: int) -> str | None:
    """The signal that an exit status tells of: -9 (Popen), 137 (shells and train.torchrun) or 247 (deepspeed)."""
    deadly = (
        signal.SIGINT,
        signal.SIGILL,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGKILL,
        signal.SIGSEGV,
        signal.SIGTERM,
    )
    for number in (-exit_code, exit_code - 128, 256 - exit_code):
        if number in deadly:
            return signal.Signals(number).name
    return None


def _attempt(
    folder: Path,
    log_name: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    watcher: Watcher,
    stop: StopRequest,
    policy: RestartPolicy,
) -> Attempt:
    earlier = (path.stem.removeprefix(f"{log_name}-") for path in folder.glob(f"{log_name}-*.txt"))
    number = 1 + max((int(number) for number in earlier if number.isdigit()), default=0)
    log = folder / f"{log_name}-{number}.txt"
    tail = _Tail(folder / "progress.jsonl", watcher)
    begun = time.monotonic()
    with log.open("wb") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        tree = ProcessTree(command, env, file)
        try:
            while tree.leader.poll() is None and not stop.requested:
                tail.read()
                time.sleep(policy.poll_s)
            if tree.leader.poll() is None:
                watcher.say("stopping: the stage saves and ends (again to stop at once, without saving)")
                _stop(tree, stop, policy)
        finally:
            tree.kill()
    tail.read()
    exit_code = tree.leader.wait()
    return Attempt(number, exit_code, signal_of(exit_code), time.monotonic() - begun, tail.step, str(log))


def _stop(tree: ProcessTree, stop: StopRequest, policy: RestartPolicy) -> None:
    tree.terminate()
    deadline = time.monotonic() + policy.grace_s
    while tree.alive() and time.monotonic() < deadline and not stop.urgent:
        time.sleep(policy.poll_s)


class _Tail:
    """Reads what is appended to progress.jsonl from now on; a line not yet whole waits for its end."""

    def __init__(self, path: Path, watcher: Watcher) -> None:
        self.path = path
        self.watcher = watcher
        self.offset = path.stat().st_size if path.exists() else 0
        self.step: int | None = None

    def read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                step, steps, text = record["step"], record["steps"], record["text"]
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill in mid-write; a later line tells more
            self.step = step
            self.watcher.progress(step, steps, text)


def _committed(folder: Path, step: int | None) -> int:
    """What a restart can build on: the newest committed checkpoint's step or, where there is none, the step reached."""
    marks = folder.glob("checkpoints/step-*/MANIFEST.json")
    steps = [int(match[1]) for mark in marks if (match := re.match(r"step-(\d+)", mark.parent.name))]
    return max(steps, default=step if step is not None else -1)


def _how(attempt: Attempt) -> str:
    if attempt.exit_code == 0:
        how = "ended without writing its manifest"
    elif attempt.exit_code == EXIT_PREEMPTED:
        how = "saved and stopped as it was told"
    else:
        how = f"died by {attempt.signal}" if attempt.signal else f"died with status {attempt.exit_code}"
    at = f" at step {attempt.step}" if attempt.step is not None else ""
    return f"attempt {attempt.number} {how}{at} after {attempt.seconds:.1f} s"


def _refusal(log: Path) -> str:
    """What the ranks said they refuse, once each; launchers add lines of their own after it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = dict.fromkeys(line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return "\n".join(errors) or _last_lines(log)


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]  # the first is the command
    return "\n".join(lines[-LAST_LINES:])


def _sleep(seconds: float, stop: StopRequest, poll_s: float) -> None:
    deadline = time.monotonic() + seconds
    while not stop.requested and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, poll_s))
