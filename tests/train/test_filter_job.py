"""Whatever ends a worker, and wherever: no record is lost, none comes twice, and each byte is as in an unbroken run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpointing import disk
from privacy.pii.duplicates import DuplicatesConfig
from privacy.pii.manifests import SUFFIX, read_manifest
from privacy.pii.policy import Policy
from tests.train.small_filter import Inline, captioned, do, left, picture, plan, png, run, write
from train import ROOT
from train.filter_job import FilterJob
from train.filtering import filter_shards
from train.shards import Record
from train.tasks import main, read_job, work

DROP = Policy(captions={"email": "drop"})
COPIES = DuplicatesConfig(smallest_side=8)
PLACES = ("task.leased", "task.synced", "task.renamed", "task.renamed:2", "task.placed", "task.marked")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.filter_job.Sandbox", Inline)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process loses nothing that it has written
    monkeypatch.delenv("SFUMATO_SECRET", raising=False)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Six shards of four: the third is dropped whole, the fifth is copies of the first, and one record is damaged."""
    captions: list[str | None] = [f"a {word} by jane@example.org" for word in ("cat", "dog", "hen", "cow")]
    made = [Record(f"a{n}", "u", picture(n), n, f"{n} of {n * n} {n + 5} animals") for n in range(4)]
    made += [Record(f"b{n}", "u", picture(n + 4), n, f"picture {n} has {n} words {n}") for n in range(4)]
    made += [Record(f"c{n}", "u", png(), n, caption) for n, caption in enumerate(captions)]
    made += [Record(f"d{n}", "u", png(n)[: -1 if n == 2 else None], n, f"shade {n}") for n in range(4)]
    made += [Record(f"e{n}", "u", picture(n), n, f"{n} of {n * n} {n + 5} animals") for n in range(4)]
    return [*made, *(Record(f"f{n}", "u", png(n + 9), n, None) for n in range(4))]


@pytest.fixture
def folder(tmp_path: Path, records: list[Record]) -> Path:
    write(tmp_path, records, shard_size=4)
    return tmp_path


def job_of(folder: Path, duplicates: DuplicatesConfig | None = COPIES, policy: Policy = DROP) -> FilterJob:
    return plan(folder, policy=policy, duplicates=duplicates)


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record]
) -> dict[bool, tuple[Any, dict[str, bytes]]]:
    """The metrics and files of a run that nothing happens to, with copies left out and without."""
    found: dict[bool, tuple[Any, dict[str, bytes]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.filter_job.Sandbox", Inline)
        for copies in (False, True):
            folder = tmp_path_factory.mktemp("unbroken")
            write(folder, records, shard_size=4)
            metrics = filter_shards(job_of(folder, COPIES if copies else None), do)
            told = metrics["splits"]["private"]
            assert (told["in"], told["kept"], told["shards"]) == ((24, 15, 4) if copies else (24, 19, 5))
            found[copies] = metrics, left(folder)
    return found


def forked(job: FilterJob, failpoint: str = "", **options: Any) -> int:
    """Work in a process of its own, whose id this gives."""
    pid = os.fork()
    if pid == 0:  # SIGKILL, or _exit: nothing of the tests' runs in the child
        status = 1
        try:
            os.environ["SFUMATO_FAILPOINT"] = failpoint or "nowhere"
            work(job, **options)
            status = 0
        finally:
            os._exit(status)
    return pid


def in_a_fork(job: FilterJob, failpoint: str) -> int:
    """The exit status, or -signal."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(job, failpoint), 0)[1])


def nothing_false_stands(folder: Path) -> None:
    """Each manifest in its place speaks of files that are there."""
    for path in (*(folder / "out").glob(f"private/*{SUFFIX}"), *(folder / "out").glob(f".staged/private/*{SUFFIX}")):
        manifest, stem = read_manifest(path), str(path).removesuffix(SUFFIX)
        for suffix, digest in ((".tar", manifest.tar), (".index.jsonl", manifest.index)):
            assert Path(stem + suffix).exists() == (digest is not None)
        records = len(Path(stem + ".index.jsonl").read_bytes().splitlines()) if manifest.index else 0
        assert records == manifest.counts["kept"]


# --- killed ---


@pytest.mark.parametrize("copies", [False, True], ids=["all", "unique"])
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_each_step_of_the_commit_nothing_is_lost_or_done_twice(
    folder: Path, unbroken: Any, place: str, copies: bool
) -> None:
    job = job_of(folder, COPIES if copies else None)
    job.begin()
    name, _, visit = place.partition(":")
    for shard in (0, 3):  # the same step of a later task, too
        last = (int(visit or 1) + shard * (2 + copies if name == "task.renamed" else 1)) if shard else visit or 1
        assert in_a_fork(job, f"{name}:{last}") == -signal.SIGKILL
        nothing_false_stands(folder)
    assert filter_shards(job_of(folder, COPIES if copies else None), do) == unbroken[copies][0]
    assert left(folder) == unbroken[copies][1]


@pytest.mark.parametrize("round_", [1, 2])
def test_killed_while_copies_are_found_or_left_out_nothing_is_lost(folder: Path, unbroken: Any, round_: int) -> None:
    job = job_of(folder)
    job.begin()
    before = {1: 6, 2: 7}[round_]
    for place in ("task.leased", "task.synced", "task.placed", "task.marked"):
        done = sum(map(job_of(folder).done, job.tasks()))
        assert in_a_fork(job, f"{place}:{max(1, before + 1 - done)}") == -signal.SIGKILL
    assert filter_shards(job_of(folder), do) == unbroken[True][0]
    assert left(folder) == unbroken[True][1]


def test_killed_where_an_older_output_is_cleared_away(folder: Path, unbroken: Any) -> None:
    filter_shards(job_of(folder, None, Policy()), do)
    job = job_of(folder, None)
    job.begin()
    assert in_a_fork(job, "task.cleared:3") == -signal.SIGKILL
    nothing_false_stands(folder)
    assert filter_shards(job_of(folder, None), do) == unbroken[False][0]
    assert left(folder) == unbroken[False][1]


def test_what_is_done_is_not_done_again(folder: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(folder)
    job.begin()
    assert in_a_fork(job, "task.marked:5") == -signal.SIGKILL
    ran: list[str] = []

    class Counted(FilterJob):
        def run(self, task: Any, beat: Any) -> None:
            ran.append(task.name)
            super().run(task, beat)

    again = Counted.model_validate_json(job.model_dump_json())
    filter_shards(again, do)
    assert ran[:3] == [".staged/private/private-00005", "private.duplicates", "private/private-00000"]
    ran.clear()
    assert filter_shards(Counted.model_validate_json(job.model_dump_json()), do) == unbroken[True][0]
    assert ran == []


@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True], ids=["all", "unique"])
def test_killed_at_100_random_times_nothing_is_lost_or_done_twice(folder: Path, unbroken: Any, copies: bool) -> None:
    """One worker or two, SIGKILL whenever it comes; and once all is done, again from nothing."""
    chance, duplicates = random.Random(6), COPIES if copies else None
    kills = finished = 0
    while kills < 100:
        job = job_of(folder, duplicates)
        job.begin()
        workers = [forked(job) for _ in range(chance.choice([1, 2]))]
        time.sleep(chance.uniform(0, 0.5))
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
        kills += statuses.count(-signal.SIGKILL)
        nothing_false_stands(folder)
        if 0 in statuses:
            assert filter_shards(job_of(folder, duplicates), nothing_left) == unbroken[copies][0]
            assert left(folder) == unbroken[copies][1]
            finished += 1
            shutil.rmtree(folder / "out")
    assert finished
    assert filter_shards(job_of(folder, duplicates), do) == unbroken[copies][0]
    assert left(folder) == unbroken[copies][1]


@pytest.mark.slow
def test_the_program_killed_at_random_times_with_its_child_loses_nothing(folder: Path, unbroken: Any) -> None:
    chance = random.Random(7)
    for _ in range(20):
        job = job_of(folder)
        job.begin()
        process, deadline = worker(job), time.monotonic() + 30
        while not list((folder / "out").rglob("*.lease")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 2))  # the child takes one of them to start
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        nothing_false_stands(folder)
    assert filter_shards(job_of(folder), do) == unbroken[True][0]
    assert left(folder) == unbroken[True][1]


def nothing_left(job: FilterJob) -> None:
    """What `do` is for a job that is done."""
    assert all(map(job.done, job.tasks()))


def worker(job: FilterJob, lease_s: float = 30, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.tasks", str(job.path), str(lease_s)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stderr=subprocess.PIPE,
    )


# --- several at once ---


def test_two_workers_share_the_work_of_one_folder(folder: Path, unbroken: Any) -> None:
    job = job_of(folder)
    job.begin()
    mine = read_job(job.path)
    other = threading.Thread(target=work, args=[read_job(job.path)])
    other.start()
    do(mine)
    other.join()
    assert filter_shards(job_of(folder), do) == unbroken[True][0]
    assert left(folder) == unbroken[True][1]


def test_the_program_of_a_worker_does_a_job_and_says_what_is_to_mend(
    folder: Path, unbroken: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(folder)
    job.begin()
    process = worker(job)
    assert process.communicate()[1] == b"" and process.returncode == 0
    assert all(map(job.done, job.tasks()))
    assert filter_shards(job, do) == unbroken[True][0]
    assert left(folder) == unbroken[True][1]
    assert main([str(job.path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"error: {job.path} is missing: the job is finished, or another run")


def test_a_worker_that_is_stopped_loses_its_task_and_does_no_harm_when_it_goes_on(folder: Path, unbroken: Any) -> None:
    job = job_of(folder, None)
    job.begin()
    pid = forked(job, "task.renamed:3!stop", lease_s=0.5)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    begun = time.monotonic()
    work(job_of(folder, None), lease_s=0.5)
    assert time.monotonic() - begun < 10
    before = left(folder)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert {name: content for name, content in left(folder).items() if ".work" not in name} == {
        name: content for name, content in before.items() if ".work" not in name and not name.endswith(".lease")
    }
    assert filter_shards(job_of(folder, None), do) == unbroken[False][0]
    assert left(folder) == unbroken[False][1]


@pytest.mark.parametrize("at_work", [False, True])
def test_a_worker_of_a_job_whose_place_another_took_stops(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at_work: bool
) -> None:
    old, new = job_of(folder, None, Policy()), job_of(folder, None)
    old.begin()

    class Interrupted(Inline):
        def run(self, records: Sequence[Record]) -> list[Any]:
            new.begin()
            return super().run(records)

    if at_work:
        monkeypatch.setattr("train.filter_job.Sandbox", Interrupted)
    else:
        new.begin()
    with pytest.raises(ValueError, match=r"job-[0-9a-f]{16}\.json is gone: the job is finished, or another run"):
        work(old)
    assert not list((folder / "out").glob(f"*/*{SUFFIX}"))


def test_damage_counts_over_all_workers(tmp_path: Path) -> None:
    """Each shard has one damaged record of four, and none of two workers meets more than a fifth of all."""
    write(
        tmp_path, [Record(f"r{n:02d}", "u", png(n)[: None if n % 4 else -1], 0, None) for n in range(16)], shard_size=4
    )
    job = plan(tmp_path, max_quarantine_fraction=0.2)
    job.begin()
    assert in_a_fork(job, "task.leased:4") == -signal.SIGKILL
    assert read_job(job.path).look() == (12, 16)
    with pytest.raises(ValueError, match=r"4 of the first 16 records \(of 16\) are damaged.*\(malformed_png 4\): see"):
        work(read_job(job.path))


# --- what stands is not taken on trust ---


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
@pytest.mark.parametrize("suffix", [".tar", ".index.jsonl", SUFFIX])
def test_an_output_that_was_harmed_is_done_again(folder: Path, unbroken: Any, harm: str, suffix: str) -> None:
    filter_shards(job_of(folder, None), do)
    path = folder / "out" / "private" / f"private-00001{suffix}"
    if harm == "flip":
        flip(path)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    # A worker looks at manifest and size, a start of the stage at every byte.
    seen = suffix == SUFFIX or harm == "remove" or (suffix, harm) == (".tar", "cut")
    assert job_of(folder, None).done(job_of(folder, None).tasks()[1]) != seen
    assert filter_shards(job_of(folder, None), do) == unbroken[False][0]
    assert left(folder) == unbroken[False][1]


@pytest.mark.parametrize(
    "name",
    [
        ".staged/private/private-00001.tar", ".staged/private/private-00001.signatures", "private.duplicates.json",
        "private/private-00000.tar",
    ],
)  # fmt: skip
def test_harm_in_the_midst_of_leaving_copies_out_is_mended(folder: Path, unbroken: Any, name: str) -> None:
    job = job_of(folder)
    job.begin()
    assert in_a_fork(job, "task.leased:9") == -signal.SIGKILL  # of the second pass one shard is done
    flip(folder / "out" / name)
    again = job_of(folder)
    again.begin()
    (harmed,) = (task for task in again.tasks() if name.startswith(task.name))
    assert not again.done(harmed)
    assert filter_shards(job_of(folder), do) == unbroken[True][0]
    assert left(folder) == unbroken[True][1]


def test_a_staged_shard_that_is_harmed_while_the_stage_runs_is_never_passed_on(folder: Path, unbroken: Any) -> None:
    job = job_of(folder)
    job.begin()
    assert in_a_fork(job, "task.leased:9") == -signal.SIGKILL
    flip(folder / "out" / ".staged" / "private" / "private-00001.tar")
    with pytest.raises(ValueError, match=r"private-00001\.tar: record b\d was changed: run the stage again"):
        work(job)
    assert filter_shards(job_of(folder), do) == unbroken[True][0]
    assert left(folder) == unbroken[True][1]


def test_shards_of_another_policy_or_input_are_made_anew(folder: Path, unbroken: Any) -> None:
    filter_shards(job_of(folder, COPIES, Policy()), do)
    (folder / "in").rename(folder / "ours")
    write(folder, [*captioned([f"cat {n}" for n in range(40)])], shard_size=4)
    run(folder)
    assert len([name for name in left(folder) if name.endswith(".tar")]) == 10
    (folder / "in").rename(folder / "others")
    (folder / "ours").rename(folder / "in")
    (folder / "out" / "public").mkdir()
    (folder / "out" / "private" / "private-00002.tar").rename(folder / "out" / "public" / "public-00000.tar")
    for copies in (False, True, False):
        assert filter_shards(job_of(folder, COPIES if copies else None), do) == unbroken[copies][0]
        assert left(folder) == unbroken[copies][1]


# --- a disk that does not take it ---


@pytest.mark.parametrize("place", ["task.leased", "task.synced", "task.renamed:2", "task.placed"])
def test_a_full_disk_ends_the_work_with_the_mend_and_another_run_goes_on(
    folder: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", f"{place}!enospc")
    with pytest.raises(ValueError, match=r"No space left .*: make room there, and run again: it goes on where it was"):
        filter_shards(job_of(folder, None), do)
    nothing_false_stands(folder)
    assert filter_shards(job_of(folder, None), do) == unbroken[False][0]
    assert left(folder) == unbroken[False][1]


def test_a_folder_that_may_not_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(disk, "create", forbidden)
    with pytest.raises(ValueError, match=rf"{folder}/out.*: Permission denied: let this user write there, and run"):
        filter_shards(job_of(folder, None), do)


def test_a_job_is_told_as_json_and_holds_no_secret(folder: Path) -> None:
    job = job_of(folder)
    job.begin()
    assert read_job(job.path) == job
    assert json.loads(job.path.read_bytes())["shards"][0]["name"] == "private-00000"
    job.path.write_text("{}")
    with pytest.raises(ValueError, match=r"is no job of a stage as it is now: start the stage again"):
        read_job(job.path)
