"""Leases are taken, kept alive, lost and stolen; a commit is whole or is not there, also where the power goes."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointing import disk
from tests.chaos.power_loss import Operation, states
from train import tasks
from train.tasks import Lease, LeaseLost, Task, aside, commit, leases, sweep, work

ELSEWHERE = "node-7_0123abcd_1_4242_99.f00d"


class Squares:
    """A job: NAME.part holds the square of the task's records, and NAME.mark says so."""

    def __init__(self, folder: Path, numbers: range) -> None:
        self.folder, self.numbers = folder, numbers
        self.ran: list[int] = []
        self.closed = False
        self.each: Callable[[int], None] = lambda number: None

    def tasks(self) -> list[Task]:
        squares = [Task(0, f"n/{number}", number) for number in self.numbers]
        return [*squares, Task(1, "sum", 0)]

    def done(self, task: Task) -> bool:
        return (self.folder / f"{task.name}.mark").exists()

    def run(self, task: Task, beat: Callable[[int], None]) -> None:
        self.ran.append(task.records)
        with aside(self.folder) as files:
            output = self.folder / task.name
            if task.round:
                value = sum(int((self.folder / f"n/{number}.part").read_text()) for number in self.numbers)
            else:
                value = task.records**2
            (files / f"{output.name}.part").write_text(str(value))
            (files / f"{output.name}.mark").write_text("done")
            self.each(task.records)
            beat(task.records)
            commit(files, output, ".mark")

    def look(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        self.closed = True


def hold(path: Path, holder: str, age_s: float, done: int = 0) -> None:
    """A lease of another process."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"holder": holder, "done": done}))
    beaten = time.time() - age_s
    os.utime(path, (beaten, beaten))


# --- leases ---


def test_every_task_is_done_once_and_in_the_order_of_the_rounds(tmp_path: Path) -> None:
    jobs = [Squares(tmp_path, range(1, 30)) for _ in range(3)]
    workers = [threading.Thread(target=work, args=[job], kwargs={"lease_s": 2}) for job in jobs]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert sorted(number for job in jobs for number in job.ran) == list(range(30))
    assert (tmp_path / "sum.part").read_text() == str(sum(n * n for n in range(1, 30)))
    assert all(job.closed for job in jobs)
    assert not list(tmp_path.rglob("*.lease")) and not list((tmp_path / ".work").iterdir())


def test_a_task_that_another_holds_is_waited_for(tmp_path: Path) -> None:
    job = Squares(tmp_path, range(1, 3))
    lease = tmp_path / "n" / "2.lease"
    hold(lease, ELSEWHERE, age_s=0)
    told: list[int] = []

    def tell() -> None:
        told.append(len(job.ran))
        if job.ran == [1]:  # the other ends its task
            (tmp_path / "n" / "2.part").write_text("4")
            (tmp_path / "n" / "2.mark").write_text("done")
            lease.unlink(missing_ok=True)

    work(job, tell=tell, lease_s=30)
    assert job.ran == [1, 0] and told


def test_a_lease_without_a_beat_is_stolen_by_the_file_systems_clock(tmp_path: Path, monkeypatch: Any) -> None:
    hold(tmp_path / "n" / "1.lease", ELSEWHERE, age_s=20)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's clock is not asked
    assert Lease.take(tmp_path, "n/1", lease_s=30) is None
    stolen = Lease.take(tmp_path, "n/1", lease_s=10)
    assert stolen is not None
    with stolen:
        assert Lease.take(tmp_path, "n/1", lease_s=10) is None
    assert not (tmp_path / "n" / "1.lease").exists()


def test_a_lease_of_a_dead_process_of_this_machine_is_stolen_at_once(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        Lease.take(tmp_path, "1", lease_s=30)
        os._exit(0)
    time.sleep(0.2)  # not waited for yet: a zombie
    assert Lease.take(tmp_path, "1", lease_s=30) is not None
    os.waitpid(pid, 0)


def test_the_lease_of_a_process_with_a_dead_ones_id_is_not_kept_for_it(tmp_path: Path) -> None:
    holder = json.loads((_taken(tmp_path, "1").path).read_bytes())["holder"]
    process, token = holder.rsplit(".", 1)
    hold(tmp_path / "2.lease", f"{process}7.{token}", age_s=0)  # this process's id, and another time of start
    hold(tmp_path / "3.lease", f"{process}.{token}", age_s=0)
    assert Lease.take(tmp_path, "2", lease_s=30) is not None
    assert Lease.take(tmp_path, "3", lease_s=30) is None


def _taken(folder: Path, name: str, lease_s: float = 30) -> Lease:
    lease = Lease.take(folder, name, lease_s)
    assert lease is not None
    return lease


def test_a_held_lease_is_beaten_and_says_how_far_it_is(tmp_path: Path) -> None:
    with _taken(tmp_path, "1", lease_s=0.4) as lease:
        lease.beat(7)
        time.sleep(0.7)
        assert Lease.take(tmp_path, "1", lease_s=0.4) is None
        assert leases(tmp_path, ["1", "2"]) == 7


def test_a_holder_hears_that_it_was_robbed_and_leaves_the_thiefs_lease_alone(tmp_path: Path) -> None:
    with _taken(tmp_path, "1", lease_s=0.2) as lease:
        hold(lease.path, ELSEWHERE, age_s=0, done=3)
        time.sleep(0.15)  # a beat, and another
        with pytest.raises(LeaseLost):
            lease.beat(5)
    assert leases(tmp_path, ["1"]) == 3


def test_a_robbed_worker_does_not_commit_and_comes_back_to_the_task(tmp_path: Path) -> None:
    job = Squares(tmp_path, range(1, 2))
    lease = tmp_path / "n" / "1.lease"

    def rob(number: int) -> None:
        if job.ran == [1]:
            hold(lease, ELSEWHERE, age_s=50)

    job.each = rob
    work(job, lease_s=0.4)
    assert job.ran == [1, 1, 0]


def test_of_two_thieves_one_has_it(tmp_path: Path) -> None:
    hold(tmp_path / "1.lease", ELSEWHERE, age_s=50)
    first, second = Lease(tmp_path / "1.lease", 30), Lease(tmp_path / "1.lease", 30)
    assert first._steal(tmp_path) is first and second._steal(tmp_path) is second
    second.beat(1)
    with pytest.raises(LeaseLost):
        first.beat(1)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"done": "x"}'])
def test_a_lease_that_cannot_be_read_ages_as_any_other(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1.lease").write_bytes(content)
    assert leases(tmp_path, ["1"]) == 0
    assert Lease.take(tmp_path, "1", lease_s=30) is None
    os.utime(tmp_path / "1.lease", (0, 0))
    assert Lease.take(tmp_path, "1", lease_s=30) is not None


def test_what_the_dead_left_is_swept_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        aside(tmp_path).__enter__()
        os._exit(0)
    os.waitpid(pid, 0)
    (tmp_path / ".work" / ELSEWHERE).mkdir()
    (tmp_path / ".work" / "job-1.json").touch()
    with aside(tmp_path) as mine:
        sweep(tmp_path)
        assert {path.name for path in (tmp_path / ".work").iterdir()} == {mine.name, ELSEWHERE, "job-1.json"}


def test_what_cannot_be_mended_by_room_or_rights_is_not_called_so(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tasks, "commit", broken)
    job = Squares(tmp_path, range(1, 2))
    job.each = broken
    with pytest.raises(OSError, match="Input/output error"):
        work(job)
    assert job.closed and not list(tmp_path.rglob("*.lease"))


# --- the commit ---


def _write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for suffix, content in files.items():
        (folder / f"x.{suffix}").write_text(content)
    return folder


class Recorder:
    """The disk as `commit` uses it, each operation done and written down."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.operations = root, list[Operation]()
        self._open: dict[int, Path] = {}
        for name in ("open_to_read", "sync_file", "sync_folder", "rename", "unlink"):
            monkeypatch.setattr(disk, name, self._recorded(name, getattr(disk, name)))

    def _recorded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def record(subject: Any, *more: Any) -> Any:
            result = real(subject, *more)
            if name == "open_to_read":
                self._open[result] = subject
            else:
                path = self._open[subject] if name == "sync_file" else subject
                self.add(name, path, *more)
            return result

        return record

    def add(self, kind: Any, path: Path, target: Path | None = None, data: bytes = b"") -> None:
        named = str(path.relative_to(self.root))
        self.operations.append(
            Operation(kind, named, target=str(target.relative_to(self.root)) if target else "", data=data)
        )

    def written(self, folder: Path) -> None:
        """What somebody wrote into a new folder, and did not sync."""
        self.add("mkdir", folder)
        for path in sorted(folder.iterdir()):
            self.add("create", path)
            self.add("write", path, data=path.read_bytes())


OLD = {"a": "old a", "gone": "old only", "mark": "old " * 300}
NEW = {"a": "new a " * 400, "b": "new b", "mark": "new"}


@pytest.mark.parametrize("before", [None, OLD, NEW], ids=["nothing", "another", "the same"])
def test_whenever_the_power_goes_a_mark_speaks_of_files_that_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str] | None
) -> None:
    recorder = Recorder(tmp_path, monkeypatch)
    output = tmp_path / "out" / "x"
    output.parent.mkdir()
    recorder.add("mkdir", output.parent)
    recorder.add("sync_folder", tmp_path)
    for number, files in enumerate((before, NEW)):
        if files is not None:
            begun = len(recorder.operations)
            recorder.written(_write(tmp_path / f"aside{number}", **files))
            commit(tmp_path / f"aside{number}", output, ".mark")
    recorder.operations.append(Operation("mark", "end"))
    assert {path.name: path.read_text() for path in output.parent.iterdir()} == {f"x.{s}": t for s, t in NEW.items()}
    whole = [{f"out/x.{suffix}": text.encode() for suffix, text in files.items()} for files in (OLD, NEW)]
    found: set[int] = set()
    for crash in states(recorder.operations):
        if crash.after < begun:
            continue
        mark = crash.tree.get("out/x.mark")
        if mark is None:
            assert before != NEW, "the mark of the same output stands throughout"
            continue
        stands = next(number for number, files in enumerate(whole) if mark == files["out/x.mark"])
        assert whole[stands].items() <= crash.tree.items(), f"{crash.how} after {recorder.operations[crash.after - 1]}"
        found.add(stands)
        if crash.after == len(recorder.operations):
            assert stands == 1
    assert 1 in found and (before != OLD or 0 in found)


def test_a_lease_beside_the_output_and_other_outputs_are_left_alone(tmp_path: Path) -> None:
    for name in ("x.lease", "x.old", "x2.a", "xy.mark"):
        (tmp_path / name).touch()
    commit(_write(tmp_path / "aside", **NEW), tmp_path / "x", ".mark")
    assert {path.name for path in tmp_path.iterdir()} == {"x.a", "x.b", "x.mark", "x.lease", "x2.a", "xy.mark", "aside"}


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]
