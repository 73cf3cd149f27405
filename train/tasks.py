"""Tasks that any number of processes, on any number of machines, do together through one folder.

    NAME.lease        who does the task now: made with O_EXCL, beaten each second, stolen when it is not
    NAME.*            its output; the file that comes last is its mark: without the right one the task is done again
    .work/            what is being written, and the job's own file while it may be worked on

A task's output is a function of the job alone, so leases only save work: two holders at once write the same bytes under
names of their own, and whoever renames last changes nothing. All that must hold is `commit`.

    python -m train.tasks JOB.json [LEASE_S]    does what is left of a job; any number of these may run at once

Exit status: 0 every task is done; 2 something a person must mend, told on the last line; 1 anything else.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from blake3 import blake3
from pydantic import ValidationError

from checkpointing import disk
from checkpointing.failpoints import failpoint
from checkpointing.store import write_durably

LEASE_S = 30.0  # without a beat, until a lease may be stolen
LEASE = ".lease"
WORK = ".work"
_BEAT_S = 1.0
_PAUSE_S = 0.5  # between two looks at tasks that others hold
# A person's to mend; other errors of a disk may pass.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class LeaseLost(Exception):
    """Another process took the task over, for this one gave no sign of life for too long."""


@dataclass(frozen=True)
class Task:
    """One piece of work. round: it may begin when all tasks of earlier rounds are done. name: of its output in the
    job's folder, such as private/private-00003. records: how much of the whole it is.
    """

    round: int
    name: str
    records: int


class Job(Protocol):
    """What there is to do. Each method may be called in any process, and on any machine that sees the folder."""

    @property
    def folder(self) -> Path:
        """Where outputs, leases and `.work` lie."""
        ...

    def tasks(self) -> list[Task]:
        """All tasks, by round."""
        ...

    def done(self, task: Task) -> bool:
        """Whether the task's output stands; the rounds before are done."""
        ...

    def run(self, task: Task, beat: Callable[[int], None]) -> None:
        """Do the task to its commit. `beat(records)` says how far it is, and raises LeaseLost; call it last before the
        commit, too.
        """
        ...

    def look(self) -> tuple[int, int]:
        """How many records of how many are done; ValueError where it is known by now that the job cannot be done."""
        ...

    def close(self) -> None:
        """End what the job holds in this process, such as a child."""
        ...


def work(job: Job, *, lease_s: float = LEASE_S, tell: Callable[[], object] = lambda: None) -> None:
    """Do every task that is not done and that nobody else does, until all are done, by whomever.

    `tell` is called between pieces of work and while waiting. Raises what a task raises, and ValueError where the
    output cannot be written (no space, no permission) or `job.look` says that there is no point in going on.
    """
    try:
        with mendable(job.folder):
            for _, tasks in itertools.groupby(job.tasks(), key=lambda task: task.round):
                left = list(tasks)
                while left := [task for task in left if not finish(job, task, lease_s, tell)]:
                    job.look()
                    tell()
                    time.sleep(min(_PAUSE_S, lease_s / 4))
    finally:
        job.close()


def finish(job: Job, task: Task, lease_s: float, tell: Callable[[], object] = lambda: None) -> bool:
    """Whether the task is done: by another, or now, by this process; not, where another has it."""
    if job.done(task):
        return True
    lease = Lease.take(job.folder, task.name, lease_s)
    if lease is None:
        return False

    def beat(records: int) -> None:
        lease.beat(records)
        tell()

    with lease:
        if not job.done(task):  # its last holder may have just ended
            try:
                job.run(task, beat)
            except LeaseLost:
                return False
    job.look()
    tell()
    return True


@contextmanager
def mendable(folder: Path) -> Iterator[None]:
    """Say what a person can mend of the disk, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL | _FORBIDDEN:
            raise
        mend = "make room there" if error.errno in _FULL else "let this user write there"
        raise ValueError(
            f"{error.filename or folder}: {error.strerror}: {mend}, and run again: it goes on where it was"
        ) from error


# --- a job's file and what binds its outputs -------------------------------------------------------------------------


def open_job(path: Path, content: bytes) -> None:
    """Open the folder of the job whose file is `.work/job-ID.json` to its workers, and to those of no other job."""
    disk.make_folder(path.parent)
    sweep(path.parent.parent)
    for other in path.parent.glob("job-*.json"):
        if other != path:
            other.unlink()
    write_durably(path, content)


def require_open(path: Path) -> None:
    """ValueError where the folder was given to another job meanwhile, or the job is finished."""
    if not path.exists():
        raise ValueError(f"{path} is gone: the job is finished, or another run has taken its place")


def digest_of(*parts: Any) -> str:
    """BLAKE3 of what JSON can say: the id of a task, of all that decides its output."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return f"blake3:{blake3(canonical.encode()).hexdigest()}"


def file_digest(path: Path) -> str:
    """BLAKE3 of a file."""
    return f"blake3:{blake3(max_threads=1).update_mmap(path).hexdigest()}"


# --- committing ----------------------------------------------------------------------------------------------------


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A new folder of this process's own on the job's file system, gone afterwards, whatever was left in it."""
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{_this_process()}.", dir=folder / WORK))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def commit(files: Path, output: Path, mark: str) -> None:
    """Put the files of the folder `files` beside `output`, of which their names begin; `output` + `mark` comes last.

    Guarantee, where rename is atomic and fsync honest: a process killed anywhere, or a power loss, leaves either no
    mark, or the old one with nothing changed, or the new one with every file that it speaks of, whole and durable.
    Committing the same bytes again leaves the mark standing throughout. What an older output had more is removed.
    """
    folder = output.parent
    disk.make_folder(folder)
    for path in files.iterdir():
        descriptor = disk.open_to_read(path)
        try:
            disk.sync_file(descriptor)
        finally:
            disk.close(descriptor)
    failpoint("task.synced")
    new, standing = files / f"{output.name}{mark}", folder / f"{output.name}{mark}"
    if standing.exists() and standing.read_bytes() != new.read_bytes():
        disk.unlink(standing)
        disk.sync_folder(folder)
        failpoint("task.cleared")
    parts = [path for path in sorted(files.iterdir()) if path != new]
    named = {new.name, f"{output.name}{LEASE}", *(path.name for path in parts)}
    for path in folder.glob(f"{output.name}.*"):
        if path.name not in named:
            disk.unlink(path)
    for path in parts:
        disk.rename(path, folder / path.name)
        failpoint("task.renamed")
    disk.sync_folder(folder)
    failpoint("task.placed")
    disk.rename(new, standing)
    failpoint("task.marked")
    disk.sync_folder(folder)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that are gone left in `.work`."""
    for path in (folder / WORK).glob("*.*"):
        if path.is_dir() and _gone(path.name.rsplit(".", 1)[0]):
            shutil.rmtree(path, ignore_errors=True)


# --- leases --------------------------------------------------------------------------------------------------------


class Lease:
    """That one process does a task, as the others see it: {"holder", "done": records}, beaten by a thread of its own.

    It is stale when the file system's clock says that no beat came for `lease_s`, or at once where its holder was a
    process of this machine that is gone.
    """

    def __init__(self, path: Path, lease_s: float) -> None:
        self.path, self.holder = path, f"{_this_process()}.{secrets.token_hex(4)}"
        self._done, self._lost, self._ended = 0, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, args=[min(_BEAT_S, lease_s / 4)], daemon=True, name="lease")

    @classmethod
    def take(cls, folder: Path, name: str, lease_s: float) -> Lease | None:
        """The lease of a task that nobody has, or whose holder gives no sign of life; None where somebody has it."""
        lease = cls(folder / f"{name}{LEASE}", lease_s)
        lease.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = disk.create(lease.path)
        except FileExistsError:
            if not _stale(lease.path, folder, lease_s):
                return None
            return lease._steal(folder)
        try:
            disk.append(descriptor, lease._content())
            failpoint("task.leased")
        except OSError:  # a full disk: nobody is to wait for it
            disk.unlink(lease.path)
            raise
        finally:
            disk.close(descriptor)
        return lease

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if self._mine():
                disk.unlink(self.path)

    def beat(self, records: int) -> None:
        """Say how many of the task's records are done. Raises LeaseLost where another has taken the task over."""
        self._done = records
        if self._lost.is_set() or not self._mine():
            raise LeaseLost(f"{self.path} was taken over: this process gave no sign of life for too long")

    def _steal(self, folder: Path) -> Lease | None:
        """Rename over the stale one; of two thieves the last one has it, and the other sees that at its next beat."""
        with aside(folder) as mine, suppress(FileNotFoundError):
            (mine / "lease").write_bytes(self._content())
            disk.rename(mine / "lease", self.path)
            return self
        return None

    def _content(self) -> bytes:
        return f"{json.dumps({'holder': self.holder, 'done': self._done}):<256}\n".encode("ascii")

    def _mine(self) -> bool:
        return _read(self.path).get("holder") == self.holder

    def _beat(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            try:
                if not self._mine():
                    self._lost.set()
                    return
                with self.path.open("r+b", buffering=0) as file:  # in place: one write, and the lease's time
                    file.write(self._content())
            except OSError:  # a full disk, say: then others may take it for stale, which does no harm
                continue


def leases(folder: Path, names: Iterable[str]) -> int:
    """How many records are done of these tasks, as their holders say."""
    done = (_read(folder / f"{name}{LEASE}").get("done") for name in names)
    return sum(number for number in done if isinstance(number, int))


def _read(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # gone, or just made
        return {}
    return content if isinstance(content, dict) else {}


def _stale(path: Path, folder: Path, lease_s: float) -> bool:
    holder = str(_read(path).get("holder", ""))
    if holder and _gone(holder.rsplit(".", 1)[0]):
        return True
    try:
        beaten = path.stat().st_mtime
    except FileNotFoundError:
        return False  # released: it is tried again soon
    with aside(folder) as probe:
        (probe / "probe").touch()  # the file system's clock, not this machine's
        return (probe / "probe").stat().st_mtime - beaten > lease_s


@functools.cache
def _machine() -> str:
    """What tells the set of processes whose ids this process sees from every other."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    return f"{socket.gethostname()}_{boot}_{Path('/proc/self/ns/pid').stat().st_ino}"


def _this_process() -> str:
    return f"{_machine()}_{os.getpid()}_{_begun(os.getpid())}"


def _gone(process: str) -> bool:
    """Whether it ran on this machine and does no longer."""
    machine, _, rest = process.rpartition("_")
    machine, _, pid = machine.rpartition("_")
    return machine == _machine() and pid.isdigit() and _begun(int(pid)) != rest


def _begun(pid: int) -> str:
    """When the process began, for ids come again; empty where there is none, or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def read_job(path: Path) -> Job:
    """The job of a file, of the kind that it says it is; ValueError where it is none."""
    try:
        kind = json.loads(path.read_bytes())["kind"]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the job is finished, or another run has taken its place") from None
    except (ValueError, KeyError, TypeError):
        kind = None
    try:
        if kind == "filter":
            from train.filter_job import FilterJob  # which imports no torch: a worker is up within a second

            return FilterJob.model_validate_json(path.read_bytes())
        if kind == "latents":
            from train.latents import LatentsJob

            return LatentsJob.model_validate_json(path.read_bytes())
    except ValidationError:
        pass
    raise ValueError(f"{path} is no job of a stage as it is now: start the stage again")


def main(arguments: list[str]) -> int:
    """What the module's text says."""
    if len(arguments) not in (1, 2):
        sys.stderr.write("error: give the job's file: python -m train.tasks JOB.json [LEASE_S]\n")
        return 2
    try:
        work(read_job(Path(arguments[0])), lease_s=float(arguments[1]) if arguments[1:] else LEASE_S)
    except ValueError as error:
        if os.environ.get("SFUMATO_TRACEBACK"):
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
