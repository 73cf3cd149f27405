"""Where a job's tasks are done: in this process and others beside it, in a Slurm array, or on a Ray cluster.

Each starts workers, watches them, and tells how far they are. All run the same tasks under the same leases and commit
in the same way (`train.tasks`), so the output is the same to the byte, and a job that one of them began another ends.
What workers share is a file system: on several machines the run folder must be at one path on all of them, and so must
this repository and the key file.
"""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from train import ROOT
from train.processes import SUPERVISOR, TOKEN, ProcessTree
from train.tasks import LEASE_S, WORK, Job, Task, finish, work

Progress = Callable[[int, int | None, str], object]

DEATHS = 3  # of workers, with nothing done in between, that end the job
_POLL_S = 0.2
_TELL_S = 0.5
_RATE_OVER_S = 60.0
_RECORDS_A_WORKER = 1000
SQUEUE_S = 5.0  # between two questions to Slurm
_ERROR = "error: "
_SBATCH_OPTION = re.compile(r"[a-z][a-z0-9-]*")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SlurmOptions(_Section):
    """What sbatch is told. options: any other of its long options, such as {mem: 8G, account: ours}."""

    partition: str | None = None
    time: str | None = None  # limit of an array task, as sbatch takes it; the array is queued again while it gets on
    options: dict[str, str | int] = {}

    @model_validator(mode="after")
    def _are_options(self) -> Self:
        for name in self.options:
            if not _SBATCH_OPTION.fullmatch(name) or name in ("array", "output", "wrap", "wait"):
                raise ValueError(f"options holds {name!r}: name a long option of sbatch without --, that is not ours")
        return self

    def arguments(self) -> list[str]:
        """As sbatch takes them."""
        given = {"partition": self.partition, "time": self.time, **self.options}
        return [f"--{name}={value}" for name, value in given.items() if value is not None]


class RayOptions(_Section):
    """address: of a cluster that is up, such as ray://head:10001; auto: the one that this machine belongs to."""

    address: str = "auto"


class Executor(_Section):
    """Who does the work. It decides nothing of the result, so a stage may go on with another.

    workers: processes at once; null: as many as there are cores and thousands of records (local), or as the cluster has
    room for (ray).
    """

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: Annotated[int, Field(gt=0)] | None = None
    lease_s: Annotated[float, Field(ge=1)] = LEASE_S  # without a sign of life, until another takes a shard over
    slurm: SlurmOptions = SlurmOptions()
    ray: RayOptions = RayOptions()

    @model_validator(mode="after")
    def _slurm_is_told_how_many(self) -> Self:
        if self.kind == "slurm" and self.workers is None:
            raise ValueError("workers is null, and kind is slurm: say how many array tasks there shall be")
        return self


class ExecutableJob(Job, Protocol):
    """A job that workers elsewhere can do. It pickles, for Ray."""

    @property
    def path(self) -> Path:
        """Its file, which `python -m train.tasks` reads."""
        ...

    def counts(self) -> Mapping[str, int]:
        """Records by outcome in the tasks that are done."""
        ...


def run_job(job: ExecutableJob, executor: Executor, progress: Progress) -> None:
    """Do every task of a job that is not done, telling `progress(done, total, text)`; return when all are.

    Raises ValueError for what a person can mend: what a task raised, workers that die, a scheduler that is not there.
    What was done stands, and another call goes on from there.
    """
    teller = _Teller(job, progress)
    EXECUTORS[executor.kind](job, executor, teller)
    teller.tell()


class _Teller:
    """Tells, at most twice a second, how many records all workers have done, how fast, and what became of them."""

    def __init__(self, job: ExecutableJob, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.furthest, self.total = 0, 1
        self._seen = deque[tuple[float, int]]()  # when, how many: of the last minute

    def __call__(self) -> None:
        if not self._seen or time.monotonic() - self._seen[-1][0] >= _TELL_S:
            self.tell()

    def tell(self) -> None:
        """Tell now. Raises what `job.look` raises: there is no point in going on."""
        done, self.total = self.job.look()
        now = time.monotonic()
        self.furthest = max(done, self.furthest)
        self._seen.append((now, done))
        while self._seen[0][0] < now - _RATE_OVER_S:
            self._seen.popleft()
        since, first = self._seen[0]
        parts = [f"{name} {count:,}" for name, count in self.job.counts().items()]
        if done > first:
            parts.insert(0, f"{(done - first) / (now - since):,.1f} records/s")
        self.progress(done, self.total, ", ".join(parts))

    def all_done(self) -> bool:
        """Whether every task is done; asked of the disk only where all records are."""
        return self.furthest >= self.total and all(map(self.job.done, self.job.tasks()))


def _workers(job: Job, wanted: int) -> int:
    """So many, or fewer where no round has as many tasks."""
    return min(wanted, max(map(len, _rounds(job).values()), default=1))


def _worthwhile(job: Job) -> int:
    """A worker a core, but none for less than it takes to start one."""
    records = max((sum(task.records for task in tasks) for tasks in _rounds(job).values()), default=0)
    return max(1, min(len(os.sched_getaffinity(0)), records // _RECORDS_A_WORKER))


def _rounds(job: Job) -> dict[int, list[Task]]:
    """The tasks by round, in order."""
    rounds: dict[int, list[Task]] = {}
    for task in sorted(job.tasks(), key=lambda task: task.round):
        rounds.setdefault(task.round, []).append(task)
    return rounds


# --- processes of this machine -------------------------------------------------------------------------------------


def _local(job: ExecutableJob, executor: Executor, tell: _Teller) -> None:
    """One worker works in this process; several are processes of their own, started again where they die."""
    count = _workers(job, executor.workers or _worthwhile(job))
    if count == 1:
        work(job, lease_s=executor.lease_s, tell=tell)
        return
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(_Worker(job, executor))) for _ in range(count)]
        deaths, done = 0, 0
        while workers and not tell.all_done():  # then what they still do is to end
            time.sleep(_POLL_S)
            tell()
            for worker in [worker for worker in workers if worker.ended()]:
                if worker.finished():
                    workers.remove(worker)
                    continue
                deaths, done = (deaths + 1, done) if tell.furthest <= done else (1, tell.furthest)
                if deaths >= DEATHS:
                    raise ValueError(f"{deaths} workers died with nothing done in between, the last {worker.fate()}")
                worker.start()


class _Worker:
    """`python -m train.tasks` in a process that ends when this one does, and its own child with it."""

    def __init__(self, job: ExecutableJob, executor: Executor) -> None:
        self._command = _command(job, executor)
        self._tree: ProcessTree
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the worker
        self.start()

    def start(self) -> None:
        """Start it, or start it again once it has ended."""
        self._log.seek(0)
        self._log.truncate()
        # As many workers as cores: what a library would do on several threads, it does on one.
        self._tree = ProcessTree(self._command, {"OMP_NUM_THREADS": "1", **os.environ}, self._log)

    def ended(self) -> bool:
        """Whether it is over."""
        return self._tree.leader.poll() is not None

    def finished(self) -> bool:
        """Whether it ended because all tasks are done. ValueError where it met what a person must mend."""
        status = self._tree.leader.returncode
        if status == 2:
            raise ValueError(self._last_line().removeprefix(_ERROR))
        return status == 0

    def fate(self) -> str:
        """How it died, and what may mend it: never in its own words, which may hold a record's."""
        status = self._tree.leader.returncode
        if status < 0:
            return f"by signal {-status}: give executor.workers less, or the machine more memory"
        cause = self._last_line().partition(":")[0] or f"exit status {status}"
        return f"of {cause}: set executor.workers to 1 and SFUMATO_TRACEBACK=1 to see where"

    def close(self) -> None:
        """End it at once; what it was doing is done again."""
        self._tree.kill()
        self._log.close()

    def _last_line(self) -> str:
        self._log.seek(0)
        return _last_line(self._log.read())


def _command(job: ExecutableJob, executor: Executor) -> list[str]:
    return [sys.executable, "-m", "train.tasks", str(job.path.resolve()), f"{executor.lease_s:g}"]


def _last_line(log: bytes) -> str:
    lines = log.decode("utf-8", errors="replace").splitlines()
    return lines[-1] if lines else ""


# --- Slurm ---------------------------------------------------------------------------------------------------------


def _slurm(job: ExecutableJob, executor: Executor, tell: _Teller) -> None:
    """An array of workers, queued again for as long as it brings the job on: a time limit may end it."""
    for command in ("sbatch", "squeue", "scancel"):
        if shutil.which(command) is None:
            raise ValueError(f"executor.kind is slurm, and {command} is not on PATH here: launch from a login node")
    logs = job.folder / WORK / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    tell.tell()
    while not tell.all_done():
        before = tell.furthest
        with _ending_in_order():
            array = _submit(job, executor, logs)
            try:
                _wait(array, logs, tell)
            finally:
                _run("scancel", array)  # what is left of it: all is done, or nobody waits for it any more
        tell.tell()
        if not tell.all_done() and tell.furthest <= before:
            raise ValueError(
                f"Slurm's job {array} ended and brought nothing on: read {logs}, and look at executor.slurm"
            )


def _submit(job: ExecutableJob, executor: Executor, logs: Path) -> str:
    """The id of a new array."""
    assert executor.workers is not None  # checked by Executor
    last = _workers(job, executor.workers) - 1
    submitted = _run(
        *(
            "sbatch",
            "--parsable",
            f"--job-name=sfumato-{job.folder.name}",
            f"--array=0-{last}",
            f"--output={logs}/%A_%a.txt",
        ),
        *("--open-mode=append", f"--chdir={ROOT}", *executor.slurm.arguments()),
        f"--wrap=exec {shlex.join(_command(job, executor))}",
    )
    if submitted.returncode != 0:
        raise ValueError(f"sbatch refuses the array: {submitted.stderr.strip()}: mend executor.slurm")
    return submitted.stdout.strip().partition(";")[0]  # ID or ID;CLUSTER


def _wait(array: str, logs: Path, tell: _Teller) -> None:
    """Return when every task is done or the array is over; ValueError where one of its workers met what is to mend."""
    asked, over = time.monotonic(), False
    while not over and not tell.all_done():
        time.sleep(_POLL_S)
        tell()
        if time.monotonic() - asked >= SQUEUE_S:
            over = _is_over(array)  # asked first: what it ended with is then in the logs
            for log in sorted(logs.glob(f"{array}_*.txt")):
                if (line := _last_line(log.read_bytes())).startswith(_ERROR):
                    raise ValueError(line.removeprefix(_ERROR))
            asked = time.monotonic()


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM ends this process as an exception does: what it started elsewhere is ended too."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_over(array: str) -> bool:
    queue = _run("squeue", "--noheader", f"--jobs={array}", "--format=%T")
    if queue.returncode != 0:  # forgotten after some minutes; or Slurm does not answer just now
        return "invalid job id" in queue.stderr.lower()
    return not queue.stdout.strip()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    ours = (TOKEN, SUPERVISOR)  # by which this machine's launch finds its processes
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# --- Ray -----------------------------------------------------------------------------------------------------------


def _ray(job: ExecutableJob, executor: Executor, tell: _Teller) -> None:
    """A Ray task a shard, round by round. One whose node is lost Ray runs again; its lease ends by itself."""
    try:
        import ray
    except ImportError:
        raise ValueError("executor.kind is ray, which is absent: pip install 'sfumato[ray]'") from None
    if not ray.is_initialized():
        try:
            host, _, port = executor.ray.address.removeprefix("ray://").rpartition(":")
            if host:  # else Ray would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=executor.ray.address, log_to_driver=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no Ray cluster is at executor.ray.address {executor.ray.address}: start one with `ray start --head`, "
                f"or set executor.kind to local ({type(error).__name__})"
            ) from None
    remote = ray.remote(num_cpus=1, max_retries=DEATHS)(_finish_on_ray)
    placed = ray.put(pickle.dumps(job))
    for tasks in _rounds(job).values():
        waiting, running = [task for task in tasks if not job.done(task)], list[Any]()
        try:
            while waiting or running:
                room = len(waiting) if executor.workers is None else executor.workers - len(running)
                running += [remote.remote(placed, task, executor.lease_s) for task in waiting[: max(0, room)]]
                waiting = waiting[max(0, room) :]
                ended, running = ray.wait(running, timeout=_POLL_S)
                for one in ended:
                    _result_of(ray, one)
                tell()
        finally:
            for one in running:
                ray.cancel(one, force=True)


_held: dict[bytes, ExecutableJob] = {}  # in a worker of Ray: the job of its last task, whose detectors stay open


def _finish_on_ray(pickled: bytes, task: Task, lease_s: float) -> None:
    """In a worker of Ray: see to it that one task is done, by this process or by whoever has it."""
    if pickled not in _held:
        for job in _held.values():
            job.close()
        _held.clear()
        _held[pickled] = pickle.loads(pickled)
    while not finish(_held[pickled], task, lease_s):
        time.sleep(_TELL_S)


def _result_of(ray: Any, one: Any) -> None:
    try:
        ray.get(one)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from None
        raise RuntimeError(f"a task ended with {type(error.cause).__name__} on Ray") from None
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"a task was lost on Ray more than {DEATHS} times ({type(error).__name__}): look at the cluster's memory"
        ) from None


EXECUTORS: Mapping[str, Callable[[ExecutableJob, Executor, _Teller], None]] = {
    "local": _local,
    "slurm": _slurm,
    "ray": _ray,
}
