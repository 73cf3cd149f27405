"""One stage, seen to its end: started under its launcher, watched, restarted when it dies or hangs, stopped in order.

The workers tell how far they are, as JSON lines {"step", "steps", "text", "time"} in `progress.jsonl`; that they live,
by their heartbeats (train/heartbeat.py); and that the stage is done, by its manifest. Everything else is read from exit
statuses. What happened goes to `attempts.jsonl`, a line an attempt, and to `timeline.jsonl`.
"""

# One file: what is decided between attempts and what is watched during one follow the same policy and the same stop.

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from train.heartbeat import HEARTBEATS, Finding, RankWatch, Section, StragglerWatch, make_folder
from train.processes import ProcessTree
from train.rendezvous import OneNode, Rendezvous, Team
from train.timeline import ATTEMPT, Timeline, read_timeline

EXIT_USER_ERROR = 2  # a bad config, data or budget: running it again would end the same
EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75: told to stop, saved, and can go on
EXIT_BAD_STEP = 76  # a loss or weight that is not finite, or a loss spike: go on from the newest save
EXIT_BAD_STEPS = 77  # the same, and the stage's policy is that a person looks at it first

LAST_LINES = 15  # of a failed attempt's log, shown on the terminal

_PEERS_S = 0.3  # after a rank's end, before its peers are killed: torchrun notes within 0.1 s which was the first
_TALK_S = 3.0  # the same where each rank has something to say before it ends
_REPORT_S = 5.0  # for the launcher to say which signal it was

Cause = Literal["finished", "refused", "stopped", "preempted", "bad step", "bad steps", "hang", "crash"]
Reason = Literal["", "crash", "hang", "bad steps"]
_REASONS: dict[Cause, Reason] = {"hang": "hang", "bad step": "bad steps"}


@dataclass(frozen=True)
class RestartPolicy:
    """When to restart with how many ranks, when to give up, and what counts as a hang.

    A restart after progress waits for nothing; after one that brought nothing 1, 2, 4, ... s. `nproc` ranks a node are
    wanted; of fewer than `min_ranks`, over all nodes, nothing is started (None: of fewer than are wanted).
    """

    stalled_restarts: int = 3
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    grace_s: float = 30.0  # from SIGTERM to SIGKILL: what saving may take
    poll_s: float = 0.1
    manifest_wait_s: float = 0.0  # after a clean exit
    nproc: int = 1
    min_ranks: int | None = None
    limits: Mapping[Section, float] = field(default_factory=dict)  # seconds without a sign of life; none: no limit
    straggler: float = 1.5  # times the others' median


@dataclass(frozen=True)
class Attempt:
    """One run of a stage's processes; `step` is the newest it reported, `rank` the one that `what` is about."""

    number: int
    exit_code: int
    signal: str | None
    seconds: float
    step: int | None
    log: str
    cause: Cause
    nproc: int
    rank: int | None = None
    what: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. "refused": the user must mend something; "failed": restarts brought it no further.

    `reason` is the last failure's kind, where it failed.
    """

    stage: str
    status: Literal["finished", "refused", "failed", "interrupted"]
    seconds: float
    attempts: tuple[Attempt, ...]
    message: str = ""
    reason: Reason = ""

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
    command: Callable[[Team], Sequence[str]],
    *,
    env: Mapping[str, str],
    watcher: Watcher,
    stop: StopRequest,
    policy: RestartPolicy = RestartPolicy(),
    rendezvous: Rendezvous | None = None,
    devices: Callable[[], int | None] = lambda: None,
    log_name: str = "log",
) -> Outcome:
    """Run `command(team)` until the stage's manifest is written, restarting after failures; from the main thread only.

    Each attempt's team comes from `rendezvous`; `devices` says how many of its ranks this node can run now, where that
    is known. The output of attempt N goes to `log_name`-N.txt, in `folder`, and the stacks of a hang beside it. The
    stage is given up after `policy.stalled_restarts` restarts in a row that brought nothing new; a refusal (status 2)
    is never restarted. Guarantee: on every way out, an exception included, no process of the stage is left alive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    supervisor = _Supervisor(stage, folder, command, env, watcher, stop, policy, rendezvous or OneNode(), log_name)
    return supervisor.run(devices)


@dataclass
class _Failure:
    """When the newest failure happened and was seen, on the clock of `time.monotonic`, to say what a restart took."""

    happened: float
    seen: float


class _Supervisor:
    """Sees one stage to its end, on this node."""

    def __init__(
        self,
        stage: str,
        folder: Path,
        command: Callable[[Team], Sequence[str]],
        env: Mapping[str, str],
        watcher: Watcher,
        stop: StopRequest,
        policy: RestartPolicy,
        rendezvous: Rendezvous,
        log_name: str,
    ) -> None:
        self.stage, self.folder, self.command, self.env = stage, folder, command, env
        self.watcher, self.stop, self.policy = watcher, stop, policy
        self.rendezvous, self.log_name = rendezvous, log_name
        self.begun = time.monotonic()
        self.launch = uuid.uuid4().hex[:8]  # tells the attempts of this launch from an earlier one's
        self.attempts: list[Attempt] = []
        self.best, self.stalled = _reached(folder, None), 0
        self.missing = 0  # ranks to do without, after restarts that brought nothing
        self.failure: _Failure | None = None

    def run(self, devices: Callable[[], int | None]) -> Outcome:
        """Attempts until one of them, or what became of them, ends the stage."""
        told = self._outcome("interrupted", "the launch of node 0 ended by an error")
        try:
            while (outcome := self._round(devices)) is None:
                pass
            told = outcome
        finally:
            if self.rendezvous.leads:
                self.rendezvous.conclude({"status": told.status, "message": told.message, "reason": told.reason})
        return told

    def _round(self, devices: Callable[[], int | None]) -> Outcome | None:
        """One attempt, and what follows from it; None: another one."""
        team = self._assemble(devices())
        if isinstance(team, Outcome):
            return team
        attempt = self._attempt(team)
        self.attempts.append(attempt)
        with (self.folder / "attempts.jsonl").open("a", encoding="utf-8") as record:
            record.write(json.dumps(asdict(attempt)) + "\n")
        if attempt.cause == "finished":
            return self._outcome("finished")
        if self.stop.requested:
            return self._outcome("interrupted", _how(attempt))
        if not self.rendezvous.leads:
            self._say(_how(attempt))
            return None  # node 0 decides what comes next
        return self._judge(attempt)

    def _assemble(self, devices: int | None) -> Team | Outcome:
        wanted = self.policy.nproc
        here = wanted if devices is None else min(wanted, devices)
        fewest = wanted if self.policy.min_ranks is None else 1
        if here < fewest:
            return self._outcome(
                "refused",
                f"parallel.nproc is {wanted}, but this machine has {here} devices now: mend them, or set "
                "parallel.min_ranks to go on with fewer",
            )
        team = self.rendezvous.assemble(
            max(here - self.missing, fewest), self.policy.min_ranks, lambda: self.stop.requested
        )
        if team is None:
            if self.stop.requested:
                return self._outcome("interrupted", "stopped before it was started")
            verdict = self.rendezvous.verdict() or {"status": "interrupted", "message": "", "reason": ""}
            return self._outcome(**verdict)  # pyright: ignore[reportArgumentType]
        before = self.attempts[-1].nproc if self.attempts else wanted
        if team.nproc != before:
            ranks = f"all {wanted} ranks" if team.nproc == wanted else f"{team.nproc} of {wanted} ranks"
            self._say(f"goes on with {ranks} a node (parallel.min_ranks is {self.policy.min_ranks})")
        return team

    def _judge(self, attempt: Attempt) -> Outcome | None:
        """What follows from a failed attempt: an end or, after the back-off, another attempt."""
        log = Path(attempt.log)
        if attempt.cause == "refused":
            return self._outcome("refused", _refusal(log))
        if attempt.cause == "bad steps":
            return self._gave_up("bad steps", _refusal(log))
        reached = _reached(self.folder, attempt.step)
        if reached > self.best:
            self.best, self.stalled, self.missing = reached, 0, 0
        elif self.stalled and attempt.cause != "bad step" and self.policy.min_ranks is not None:
            self.missing += 1  # the same ranks brought nothing twice: one of them may be what is broken
        if self.stalled == self.policy.stalled_restarts:
            reason = _REASONS.get(attempt.cause, "crash")
            message = f"{_how(attempt)}; {self.stalled} restarts brought it no further. The end of {log}:"
            return self._gave_up(reason, f"{message}\n{_last_lines(log)}")
        wait_s = (
            min(self.policy.first_wait_s * 2 ** (self.stalled - 1), self.policy.longest_wait_s) if self.stalled else 0
        )
        self.stalled += 1
        when = f"in {wait_s:g} s" if wait_s else "at once"
        self._say(f"{_how(attempt)}; restarting {when} (log: {log})\n{_last_lines(log)}")
        _sleep(wait_s, self.stop, self.policy.poll_s)
        return self._outcome("interrupted", _how(attempt)) if self.stop.requested else None

    def _gave_up(self, reason: Reason, message: str) -> Outcome:
        Timeline(self.folder, attempt=self.attempts[-1].number).event("gave_up", cause=reason)
        return self._outcome("failed", message, reason)

    def _outcome(
        self,
        status: Literal["finished", "refused", "failed", "interrupted"],
        message: str = "",
        reason: Reason = "",
    ) -> Outcome:
        return Outcome(self.stage, status, time.monotonic() - self.begun, tuple(self.attempts), message, reason)

    def _say(self, text: str) -> None:
        self.watcher.say(f"{self.stage}: {text}")

    def _attempt(self, team: Team) -> Attempt:
        number = _next_number(self.folder, self.log_name)
        log = self.folder / f"{self.log_name}-{number}.txt"
        timeline = Timeline(self.folder, attempt=number, enabled=self.rendezvous.leads)
        pages = make_folder(self.folder, team.node_rank)
        watch = RankWatch(pages, team.ranks, self.policy.limits)
        command = self.command(team)
        env = {**self.env, HEARTBEATS: str(pages), ATTEMPT: str(number)}
        begun = time.monotonic()
        try:
            with log.open("wb") as file:
                file.write(f"$ {' '.join(command)}\n".encode())
                file.flush()
                timeline.event("launched", nproc=team.nproc, nnodes=team.nnodes, launch=self.launch)
                tree = ProcessTree(command, env, file)
                running = _Running(self, team, tree, watch, timeline, log)
                try:
                    running.watch_to_the_end()
                finally:
                    tree.kill()
        finally:
            watch.close()
            shutil.rmtree(pages, ignore_errors=True)
        running.tail.read()
        exit_code = running.exit_code()
        cause = self._cause(exit_code, running)
        if cause != "finished" and running.trouble is None:
            self.rendezvous.report(team, cause, running.what or f"node {team.node_rank}: status {exit_code}")
        timeline.event("ended", exit_code=exit_code, cause=cause)
        if cause != "finished":
            seen = running.seen or time.monotonic()
            self.failure = _Failure(seen - (running.finding.since_s if running.finding else 0.0), seen)
        return Attempt(
            number,
            exit_code,
            signal_of(exit_code) if running.hang is None else None,
            time.monotonic() - begun,
            running.tail.step,
            str(log),
            cause,
            team.nproc,
            None if running.finding is None else running.finding.rank,
            running.what,
        )

    def _cause(self, exit_code: int, running: _Running) -> Cause:
        if running.hang is not None:
            return "hang"
        if running.trouble is not None:
            return running.trouble[0]
        if exit_code == 0 and _appears(self.folder / "manifest.json", self.policy):
            return "finished"
        if self.stop.requested:
            return "stopped"
        causes: dict[int, Cause] = {
            EXIT_USER_ERROR: "refused",
            EXIT_PREEMPTED: "preempted",
            EXIT_BAD_STEP: "bad step",
            EXIT_BAD_STEPS: "bad steps",
        }
        return causes.get(exit_code, "crash")


class _Running:
    """One attempt while it runs: what is seen of it, and what is done about it."""

    def __init__(
        self, supervisor: _Supervisor, team: Team, tree: ProcessTree, watch: RankWatch, timeline: Timeline, log: Path
    ) -> None:
        self.supervisor, self.team, self.tree, self.watch = supervisor, team, tree, watch
        self.policy, self.stop, self.timeline, self.log = supervisor.policy, supervisor.stop, timeline, log
        self.tail = _Tail(supervisor.folder / "progress.jsonl", supervisor.watcher)
        self.stragglers = StragglerWatch(self.policy.straggler)
        self.finding: Finding | None = None  # the first thing that was seen to be wrong
        self.trouble: tuple[Cause, str] | None = None  # what another node saw
        self.seen: float | None = None
        self.what = ""
        self._stopped: set[int] = set()
        self._resumed = supervisor.failure is None

    @property
    def hang(self) -> Finding | None:
        """The finding, where it is a hang."""
        return self.finding if self.finding is not None and self.finding.kind == "hang" else None

    def exit_code(self) -> int:
        """The status the attempt ended with: the rank's that is to blame, where it said one, or else the launcher's."""
        code = self.tree.leader.wait()
        if self.finding is not None and self.finding.kind == "exited" and self.finding.status is not None:
            return self.finding.status
        return code

    def watch_to_the_end(self) -> None:
        """Returns when the attempt is over or has to be ended; the caller kills what is left."""
        while self.tree.leader.poll() is None and not self.stop.requested:
            if self._look():
                return
            self.watch.wait(self.policy.poll_s)
        if self.tree.leader.poll() is None:
            self.supervisor.watcher.say("stopping: the stage saves and ends (again to stop at once, without saving)")
            self._stop()
        elif self.tree.leader.returncode != 0:
            if (finding := self.watch.look()) is not None:  # which rank it was
                self._note(finding)
            elif self.watch.pids:
                self.what, since_s = "the launcher of its ranks ended before them", self.policy.poll_s
                self.timeline.event("detected", cause="died", rank=None, since_s=since_s, text=self.what)
            self.seen = self.seen or time.monotonic()

    def _look(self) -> bool:
        """Whether it is over."""
        self.tail.read()
        finding = self.watch.look()
        self._tell_resumed()
        self._tell_stopped()
        for rank, own_s, others_s in self.stragglers.look(self.watch.signs):
            self.supervisor._say(
                f"rank {rank} is slow: its own part of a step takes {own_s:.3f} s, the others' {others_s:.3f} s"
            )
            self.timeline.event("straggler", rank=rank, own_s=round(own_s, 4), others_s=round(others_s, 4))
        if finding is not None:
            self._note(finding)
            if finding.kind == "hang":
                self._dump_stacks()
            else:
                self._end_peers(finding)
            return True
        if self.watch.all_ended:  # all with status 0, so the launcher should follow
            if not self._wait_for_leader(self.policy.grace_s):
                self.what = "the launcher did not end after its ranks"
            return True
        self.trouble = self.supervisor.rendezvous.trouble(self.team)
        if self.trouble is not None:
            self.what = f"ended because of another node: {self.trouble[1]}"
            self.seen = time.monotonic()
            return True
        return False

    def _note(self, finding: Finding) -> None:
        self.finding, self.seen, self.what = finding, time.monotonic(), finding.text
        self.timeline.event(
            "detected", cause=finding.kind, rank=finding.rank, since_s=round(finding.since_s, 3), text=finding.text
        )

    def _end_peers(self, finding: Finding) -> None:
        """A rank has ended: its peers can do nothing without it, and the launcher knows how it ended."""
        patience_s = {EXIT_PREEMPTED: self.policy.grace_s, None: _PEERS_S, 1: _PEERS_S}
        if not self._wait_for_leader(patience_s.get(finding.status, _TALK_S)):
            for pid in self.watch.pids.values():
                _signal(pid, signal.SIGKILL)
            self._wait_for_leader(_REPORT_S)
        code = self.tree.leader.returncode
        if finding.kind == "died" and code is not None and signal_of(code) is None:
            # Two had ended when we looked, and it was the launcher that ended the one that said nothing.
            for rank, status in self.watch.statuses().items():
                if status == code:
                    self.what = f"rank {rank} ended with status {status}"
                    self.finding = replace(finding, kind="exited", rank=rank, status=status, text=self.what)
                    return

    def _wait_for_leader(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.tree.leader.poll() is None:
            if time.monotonic() >= deadline or self.stop.urgent:
                return False
            self.tail.read()
            self.watch.look()
            time.sleep(min(self.policy.poll_s, 0.05))
        return True

    def _dump_stacks(self) -> None:
        path = self.log.with_name(f"{self.log.stem}-stacks.txt")
        path.write_text(self.watch.describe(), encoding="utf-8")
        self.what += f" (stacks of all ranks: {path})"

    def _tell_resumed(self) -> None:
        watch, failure = self.watch, self.supervisor.failure
        if self._resumed or failure is None or watch.first_step is None:
            return
        self._resumed, self.supervisor.failure = True, None
        load, step = watch.entered["load"], watch.entered["step"]
        took = {
            "detect_s": failure.seen - failure.happened,
            "start_s": load - failure.seen,
            "load_s": step - load,
            "step_s": watch.first_step - step,
        }
        self.timeline.event("resumed", **{name: round(seconds, 3) for name, seconds in took.items()})
        self.supervisor._say(
            f"training again {watch.first_step - failure.happened:.1f} s after the failure: "
            f"{took['detect_s']:.1f} s until it was seen, {took['start_s']:.1f} s to start, "
            f"{took['load_s']:.1f} s to load, {took['step_s']:.1f} s for the first step"
        )

    def _tell_stopped(self) -> None:
        for rank in self.watch.stopped():
            if rank not in self._stopped:
                self._stopped.add(rank)
                pid = self.watch.pids[rank]
                self.supervisor._say(
                    f"rank {rank} (process {pid}) is stopped by a signal; kill -CONT {pid} lets it go on"
                )

    def _stop(self) -> None:
        # Told one by one: torchrun would give its ranks 30 s, whatever the grace.
        if len(self.watch.pids) == len(self.watch.ranks):
            for pid in self.watch.pids.values():
                _signal(pid, signal.SIGTERM)
        else:
            self.tree.terminate()
        deadline = time.monotonic() + self.policy.grace_s
        while self.tree.alive() and time.monotonic() < deadline and not self.stop.urgent:
            self.watch.look()
            time.sleep(self.policy.poll_s)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _next_number(folder: Path, log_name: str) -> int:
    names = (path.stem.removeprefix(f"{log_name}-") for path in folder.glob(f"{log_name}-*.txt"))
    return 1 + max((int(name) for name in names if name.isdigit()), default=0)


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


def _reached(folder: Path, step: int | None) -> int:
    """What a restart can build on: the newest step committed or loaded so far or, where there is none, the one done."""
    marks = folder.glob("checkpoints/step-*/MANIFEST.json")
    steps = [int(match[1]) for mark in marks if (match := re.match(r"step-(\d+)", mark.parent.name))]
    steps += [event["step"] for event in read_timeline(folder) if event["event"] == "loaded" and event.get("step")]
    return max(steps, default=step if step is not None else -1)


def _how(attempt: Attempt) -> str:
    at = f" at step {attempt.step}" if attempt.step is not None else ""
    after = f"{at} after {attempt.seconds:.1f} s"
    match attempt.cause:
        case "hang":
            how = f"hung{after}: {attempt.what}"
        case "preempted":
            how = f"saved and stopped as it was told{after}"
        case "bad step":
            how = f"met a bad step{after} and goes back to the newest save"
        case _ if attempt.exit_code == 0:
            how = f"ended without writing its manifest{after}"
        case _:
            died = f"died by {attempt.signal}" if attempt.signal else f"died with status {attempt.exit_code}"
            who = (
                f" (rank {attempt.rank})" if attempt.rank is not None else f" ({attempt.what})" if attempt.what else ""
            )
            how = f"{died}{after}{who}"
    return f"attempt {attempt.number} {how}"


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
