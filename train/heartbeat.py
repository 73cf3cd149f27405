"""Signs of life: each rank keeps one small page in shared memory, which the launch on its node watches.

The page says where the rank is (a section of the stage), how many steps it has done, and changes with every sign of
life. The launch keeps the clock: a page that has not changed for the section's limit belongs to a rank that hangs,
whatever it waits for, and whether or not it still runs. Without a launch (a stage started by hand) all of it does
nothing.
"""

# One file: who writes the page and who reads it share its layout.

from __future__ import annotations

import faulthandler
import hashlib
import mmap
import os
import select
import shutil
import signal
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

HEARTBEATS = "SFUMATO_HEARTBEATS"  # the folder, on a file system in memory, that the launch makes for an attempt

Section = Literal["start", "load", "step", "save", "evaluate", "finish"]
SECTIONS: tuple[Section, ...] = ("start", "load", "step", "save", "evaluate", "finish")

_PAGE_BYTES = 4096
_UNKNOWN = -1
# Every field is 8 aligned bytes, stored at once: a reader never sees half of one, and needs no two of them to agree.
_PID, _BEATS, _SECTION, _STEP, _STATUS, _OWN_NS, _OWN_STEPS = range(0, 56, 8)
_FIELDS = struct.Struct("=7q")


class Heartbeat:
    """The page of rank `rank`; a store to memory for each sign of life, and nothing at all where no launch watches."""

    def __init__(self, rank: int) -> None:
        self._page: mmap.mmap | None = None
        self._beats, self._own_ns, self._own_steps = 0, 0, 0
        self._section: Section = "start"
        self._step_began: int | None = None
        folder = os.environ.get(HEARTBEATS)
        if folder is None:
            return
        path = _page_path(Path(folder), rank)
        aside = path.with_suffix(".new")
        with aside.open("w+b") as file:
            file.truncate(_PAGE_BYTES)
            self._page = mmap.mmap(file.fileno(), _PAGE_BYTES)
        self._store(_STEP, _UNKNOWN)
        self._store(_STATUS, _UNKNOWN)
        self._store(_PID, os.getpid())
        aside.rename(path)  # seen whole or not at all

    def section(self, name: Section) -> _Until:
        """The rank is in section `name` from now on; as a context manager, until the block ends."""
        before = self._section
        self._enter(name)
        return _Until(self, before)

    def beat(self, step: int | None = None) -> None:
        """A sign of life; with `step`, so many steps of the stage are done."""
        if self._page is None:
            return
        if step is not None:
            self._store(_STEP, step)
            self._step_began = time.monotonic_ns()
        self._beats += 1
        self._store(_BEATS, self._beats)

    def waiting(self) -> None:
        """This rank has done its own part of the step and now waits for its peers: call it before the first collective.

        A step takes all ranks the same time; what each needs for its own part tells the slow one from those that wait.
        """
        if self._page is None or self._step_began is None:
            return
        self._own_ns += time.monotonic_ns() - self._step_began
        self._own_steps += 1
        self._step_began = None  # counted once a step
        self._store(_OWN_NS, self._own_ns)
        self._store(_OWN_STEPS, self._own_steps)

    def exiting(self, status: int) -> None:
        """The process ends by itself with `status`; one that goes without a word was killed, or crashed."""
        self._store(_STATUS, status)
        self.beat()

    def _enter(self, name: Section) -> None:
        self._section = name
        self._step_began = time.monotonic_ns() if name == "step" else None
        self._store(_SECTION, SECTIONS.index(name))
        self.beat()

    def _store(self, offset: int, value: int) -> None:
        if self._page is not None:
            struct.pack_into("=q", self._page, offset, value)


class _Until:
    """Puts a heartbeat back into the section it was in; after an error it stays where the error happened."""

    def __init__(self, heartbeat: Heartbeat, before: Section) -> None:
        self.heartbeat = heartbeat
        self.before: Section = before

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.heartbeat.section(self.before)


def install() -> Heartbeat:
    """This process's heartbeat, called once and as early as can be; from now on SIGUSR1 writes all threads' stacks."""
    rank = int(os.environ.get("RANK", "0"))
    folder = os.environ.get(HEARTBEATS)
    if folder is not None:
        handle = os.open(_stack_path(Path(folder), rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        faulthandler.register(signal.SIGUSR1, file=handle, all_threads=True)
    return Heartbeat(rank)


# What follows runs in the launch.


@dataclass(frozen=True)
class Sign:
    """What a rank's page said when it was read."""

    pid: int
    beats: int
    section: Section
    step: int | None
    status: int | None  # with which it said that it ends
    own_ns: int
    own_steps: int


@dataclass(frozen=True)
class Finding:
    """What is wrong with a rank: "died" without a word, "exited" with `status`, or "hang"s."""

    kind: Literal["died", "exited", "hang"]
    rank: int
    since_s: float  # how long ago it happened, at most: since the last look or, of a hang, since its last sign of life
    text: str
    status: int | None = None


def pages_folder(stage_folder: Path, node_rank: int = 0) -> Path:
    """Where the pages of the stage's ranks on a node are: in memory, under a name that follows from the stage's."""
    memory = Path("/dev/shm")
    root = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    name = hashlib.sha256(str(stage_folder.resolve()).encode()).hexdigest()[:16]
    return root / f"sfumato-{os.getuid()}" / f"heartbeats-{name}-{node_rank}"


def make_folder(stage_folder: Path, node_rank: int) -> Path:
    """`pages_folder`, made anew and empty, for this user alone; what a killed launch left there is gone."""
    folder = pages_folder(stage_folder, node_rank)
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder.parent} belongs to another user: have its owner remove it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


class RankWatch:
    """Watches the pages of `ranks` in `folder`; `limits` are seconds without a sign of life, by section.

    A section without a limit may last for ever.
    """

    def __init__(self, folder: Path, ranks: Sequence[int], limits: Mapping[Section, float]) -> None:
        self.folder, self.ranks, self.limits = folder, ranks, limits
        self.entered: dict[Section, float] = {}  # when the last rank was in each section, or past it, at first
        self.first_step: float | None = None  # when the first step of this attempt was done
        self.signs: dict[int, Sign] = {}
        self._raw: dict[int, bytes] = {}
        self._changed = dict.fromkeys(ranks, time.monotonic())
        self._files: dict[int, mmap.mmap] = {}
        self._handles: dict[int, int] = {}
        self._ended: set[int] = set()
        self._looked = time.monotonic()

    def close(self) -> None:
        """Let go of the pages and processes."""
        for handle in self._handles.values():
            os.close(handle)
        for page in self._files.values():
            page.close()
        self._handles, self._files = {}, {}

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that have a page and have not ended."""
        return {rank: sign.pid for rank, sign in self.signs.items() if rank not in self._ended}

    @property
    def all_ended(self) -> bool:
        """Whether every rank began and ended."""
        return len(self._ended) == len(self.ranks)

    def statuses(self) -> dict[int, int | None]:
        """With what the ended ranks ended; None for one that did so without a word."""
        return {rank: self.signs[rank].status for rank in sorted(self._ended)}

    def look(self) -> Finding | None:
        """Read all pages and say what is wrong: the first rank that ended since the last look, or one that hangs.

        An end with status 0 is nothing wrong.
        """
        now = time.monotonic()
        for rank in self.ranks:
            self._read(rank, now)
        self._note_progress(now)
        ended = [self._finding(rank, now) for rank in sorted(self.pids) if self._has_ended(rank)]
        self._looked = now
        # One that died without a word took its peers along, whose own words may be seen in the same look.
        told = sorted(filter(None, ended), key=lambda finding: finding.kind != "died")
        return told[0] if told else self._hanging(now)

    def _finding(self, rank: int, now: float) -> Finding | None:
        self._ended.add(rank)
        self._read(rank, now)  # its last word came before its end
        status, since_s = self.signs[rank].status, now - self._looked
        if status is None:
            return Finding("died", rank, since_s, f"rank {rank} died without a word")
        return Finding("exited", rank, since_s, f"rank {rank} ended with status {status}", status) if status else None

    def wait(self, seconds: float) -> None:
        """Sleep, until a rank ends at most: so the first of several to end is seen alone, and at once."""
        poll = select.poll()
        for rank in self.pids:
            if rank in self._handles:
                poll.register(self._handles[rank], select.POLLIN)
        poll.poll(seconds * 1000)

    def stopped(self) -> list[int]:
        """The ranks that a signal has stopped (SIGSTOP, a debugger): alive, but not running."""
        return [rank for rank, pid in self.pids.items() if process_state(pid) in {"T", "t"}]

    def describe(self, wait_s: float = 2.0) -> str:
        """Every rank's state and the stacks of all its threads; a process that cannot answer says where it sleeps."""
        before = {rank: _size(_stack_path(self.folder, rank)) for rank in self.ranks}
        asked = {rank: pid for rank, pid in self.pids.items() if process_state(pid) not in {"T", "t", "Z", None}}
        for pid in asked.values():
            try:
                os.kill(pid, signal.SIGUSR1)
            except ProcessLookupError:
                continue
        _settle(lambda: [_size(_stack_path(self.folder, rank)) for rank in asked], [before[r] for r in asked], wait_s)
        return "\n".join(self._describe(rank, before[rank]) for rank in self.ranks)

    def _describe(self, rank: int, skip: int) -> str:
        sign = self.signs.get(rank)
        if sign is None:
            return f"== rank {rank}: gave no sign of life since it was started\n"
        age = time.monotonic() - self._changed[rank]
        head = f"== rank {rank} (process {sign.pid}): section {sign.section}, {sign.step or 0} steps done, "
        head += f"last sign of life {age:.1f} s ago, {_state_in_words(sign.pid)}\n"
        path = _stack_path(self.folder, rank)
        stacks = path.read_bytes()[skip:].decode(errors="replace") if path.exists() else ""
        return head + (stacks or "no stack: the process does not answer\n")

    def _read(self, rank: int, now: float) -> None:
        page = self._files.get(rank)
        if page is None:
            try:
                with _page_path(self.folder, rank).open("rb") as file:
                    page = mmap.mmap(file.fileno(), _PAGE_BYTES, prot=mmap.PROT_READ)
            except FileNotFoundError:
                return
            self._files[rank] = page
        raw = page[: _FIELDS.size]
        if raw == self._raw.get(rank):
            return
        pid, beats, section, step, status, own_ns, own_steps = _FIELDS.unpack(raw)
        self._raw[rank], self._changed[rank] = raw, now
        self.signs[rank] = Sign(
            pid,
            beats,
            SECTIONS[section],
            None if step == _UNKNOWN else step,
            None if status == _UNKNOWN else status,
            own_ns,
            own_steps,
        )

    def _has_ended(self, rank: int) -> bool:
        if rank not in self._handles:
            try:
                self._handles[rank] = os.pidfd_open(self.signs[rank].pid)
            except ProcessLookupError:
                return True
        poll = select.poll()
        poll.register(self._handles[rank], select.POLLIN)  # readable once the process has ended
        return bool(poll.poll(0))

    def _note_progress(self, now: float) -> None:
        if len(self.signs) < len(self.ranks):
            return
        signs = self.signs.values()
        for section in ("load", "step"):
            position = SECTIONS.index(section)
            if section not in self.entered and all(SECTIONS.index(sign.section) >= position for sign in signs):
                self.entered[section] = now
        if self.first_step is None and "step" in self.entered and all(sign.step is not None for sign in signs):
            self.first_step = now

    def _hanging(self, now: float) -> Finding | None:
        overdue: dict[int, float] = {}
        for rank in self.ranks:
            if rank in self._ended:
                continue
            section: Section = self.signs[rank].section if rank in self.signs else "start"
            age = now - self._changed[rank]
            if age > self.limits.get(section, float("inf")):
                overdue[rank] = age
        if not overdue:
            return None
        stopped = self.stopped()
        # All wait for the one that stands; it is stopped, or else it is the one that got least far.
        rank = stopped[0] if stopped else min(overdue, key=lambda r: (r in self.signs, self._position(r)))
        sign = self.signs.get(rank)
        age = now - self._changed[rank]
        if sign is None:
            text = f"rank {rank} gave no sign of life within {age:.0f} s of its start"
        else:
            limit = self.limits.get(sign.section, float("inf"))
            text = f"rank {rank} gave no sign of life for {age:.1f} s in section {sign.section} (limit {limit:g} s)"
        if stopped:
            names = ", ".join(f"rank {r} (process {self.pids[r]})" for r in stopped)
            text += f"; {names} {'is' if len(stopped) == 1 else 'are'} stopped by a signal"
        return Finding("hang", rank, age, text)

    def _position(self, rank: int) -> tuple[int, int]:
        sign = self.signs.get(rank)
        return (0, 0) if sign is None else (sign.step or 0, sign.beats)


class StragglerWatch:
    """Names ranks that need `factor` times the median of the others for their own part of a step.

    Judged over windows of `steps` steps and said once a rank, after two such windows in a row: one may be chance.
    """

    def __init__(self, factor: float, steps: int = 20) -> None:
        self.factor, self.steps = factor, steps
        self._since: dict[int, Sign] = {}
        self._suspects: set[int] = set()
        self._named: set[int] = set()

    def look(self, signs: Mapping[int, Sign]) -> list[tuple[int, float, float]]:
        """(rank, its seconds, the others' median seconds) for each rank that is named for the first time."""
        if len(signs) < 2:
            return []
        if set(self._since) != set(signs):
            self._since = dict(signs)
            return []
        if any(sign.own_steps - self._since[rank].own_steps < self.steps for rank, sign in signs.items()):
            return []
        own_s = {
            rank: (sign.own_ns - self._since[rank].own_ns) / (sign.own_steps - self._since[rank].own_steps) / 1e9
            for rank, sign in signs.items()
        }
        self._since = dict(signs)
        others_s = {rank: statistics.median(s for other, s in own_s.items() if other != rank) for rank in own_s}
        slow = {rank for rank in own_s if own_s[rank] > self.factor * others_s[rank]}
        named = sorted((slow & self._suspects) - self._named)
        self._suspects = slow
        self._named |= set(named)
        return [(rank, own_s[rank], others_s[rank]) for rank in named]


def process_state(pid: int) -> str | None:
    """The kernel's letter for the process's state (R running, S sleeping, D in the kernel, T stopped, Z ended)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat[stat.rindex(")") + 2]


def _state_in_words(pid: int) -> str:
    state = process_state(pid)
    words = {"R": "running", "S": "sleeping", "D": "in the kernel", "T": "stopped by a signal", "t": "traced"}
    text = "ended" if state in {None, "Z"} else words.get(state or "", f"state {state}")
    try:
        place = Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8")
    except OSError:
        place = "0"
    return text if place in {"", "0"} else f"{text} at {place}"


def _settle(read: Callable[[], list[int]], before: list[int], wait_s: float) -> None:
    """Wait until every number of `read` has grown past `before` and stopped growing, `wait_s` seconds at most."""
    deadline, last = time.monotonic() + wait_s, before
    while time.monotonic() < deadline:
        time.sleep(0.1)
        sizes = read()
        if sizes == last and all(now > then for now, then in zip(sizes, before, strict=True)):
            return
        last = sizes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _page_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}"


def _stack_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.stack"
