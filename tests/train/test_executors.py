"""The same shards to the byte from every executor, whatever happens to its workers; all of these are real."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from privacy.pii.duplicates import DuplicatesConfig
from privacy.pii.policy import Policy
from train import ROOT, executors
from train.executors import Executor, run_job
from train.filtering import FilterJob, filter_shards, plan_filter
from train.recipe import load_stage
from train.shards import Record, write_shards

SPLITS = ["public", "private"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ingested split of three shards and one of one, of invented records, copies and a damaged one among them."""
    folder = tmp_path_factory.mktemp("in")
    for split, num_records in (("public", 4), ("private", 22)):
        records = []
        for i in range(num_records):
            image = io.BytesIO()
            Image.radial_gradient("L").resize((16, 16)).rotate(11 * (i % 9)).save(image, "PNG")
            content = image.getvalue()[:-20] if i == 7 else image.getvalue()
            records.append(Record(f"r{i}", f"r{i}", content, i % 3, f"write to someone{i % 9}@example.org"))
        write_shards(folder / split, split, records, shard_size=8)
    return folder


def job(shards: Path, out: Path, *, duplicates: bool = False, **changed: Any) -> FilterJob:
    config = DuplicatesConfig() if duplicates else None
    planned = plan_filter(shards, out, SPLITS, Policy(), out / "no.key", duplicates=config, max_quarantine_fraction=0.5)
    return planned.model_copy(update=changed)


def run(planned: FilterJob, executor: Executor) -> tuple[dict[str, str], list[tuple[int, int | None, str]]]:
    """What the stage leaves, file -> digest, and what it told."""
    told: list[tuple[int, int | None, str]] = []
    metrics = filter_shards(planned, lambda job: run_job(job, executor, lambda *what: told.append(what)))
    left = {
        str(path.relative_to(planned.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(planned.folder.rglob("*"))
        if path.is_file()
    }
    return left | {"shards_root": metrics["shards_root"]}, told


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one worker in this process makes."""
    made, told = run(job(shards, tmp_path_factory.mktemp("plain")), Executor(workers=1))
    assert told[-1][:2] == (26, 26) and "records/s, kept 25, dropped 0, quarantined 1" in told[-1][2]
    return made


# --- this machine ---------------------------------------------------------------------------------------------------


def test_several_workers_of_which_one_is_killed_make_the_same_bytes(
    shards: Path, plain: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "task.renamed")
    monkeypatch.setenv("SFUMATO_FAILPOINT_ONCE", str(tmp_path / "once"))
    made, told = run(job(shards, tmp_path / "out"), Executor(workers=2))
    assert made == plain and (tmp_path / "once").exists()
    assert told[-1][:2] == (26, 26)


@pytest.mark.slow
def test_workers_that_die_again_and_again_are_an_error_that_says_how(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "task.synced")
    with pytest.raises(ValueError, match=r"workers died with nothing done in between, the last by signal 9: give exec"):
        run(job(shards, tmp_path / "out"), Executor(workers=2))


@pytest.mark.slow
def test_what_a_worker_finds_wrong_is_told_as_this_process_would(shards: Path, tmp_path: Path) -> None:
    other = {"patterns": "another version"}
    with pytest.raises(ValueError, match=r"^detector patterns is version .*, and the stage began with another version"):
        run(job(shards, tmp_path / "out", detectors=other), Executor(workers=2))


@pytest.mark.slow
def test_all_executors_make_the_same_of_copies_too(shards: Path, tmp_path: Path) -> None:
    one, _ = run(job(shards, tmp_path / "one", duplicates=True), Executor(workers=1))
    two, told = run(job(shards, tmp_path / "two", duplicates=True), Executor(workers=2))
    assert two == one and told[-1][:2] == (26, 26)
    assert "dropped 0" not in told[-1][2]


@pytest.mark.slow
def test_a_launch_that_is_killed_leaves_no_worker_and_another_executor_ends_its_job(
    shards: Path, plain: dict[str, str], tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.train.test_executors import *\n"
        "run(job(Path(sys.argv[1]), Path(sys.argv[2])), Executor(workers=2))\n"
    )
    environment = {**os.environ, "SFUMATO_FAILPOINT": "task.renamed:2!stop", "MARK": str(tmp_path)}
    command = [sys.executable, "-c", program, str(shards), str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, cwd=ROOT) as launch:
        wait_for(lambda: len(living(str(tmp_path))) >= 5)  # the launch, two workers, and a child of each
        wait_for(lambda: any((tmp_path / "out").glob("*/*.tar")))
        launch.kill()
    for pid in living(str(tmp_path)):  # a stopped one dies when it goes on
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not living(str(tmp_path)))
    made, _ = run(job(shards, tmp_path / "out"), Executor(workers=1, lease_s=1))
    assert made == plain


def living(mark: str) -> list[int]:
    """Processes with MARK=mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if f"MARK={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- Slurm ----------------------------------------------------------------------------------------------------------

# Slurm's commands as far as they are used: sbatch starts each task of the array, squeue says whether any is left.
SLURM = {
    "sbatch": r"""echo "$*" >> "$SLURM_FOLDER/calls"
[ -z "$SLURM_REFUSES" ] || { echo "sbatch: error: invalid partition specified" >&2; exit 1; }
id=$(($(cat "$SLURM_FOLDER/id" 2>/dev/null || echo 41) + 1)); echo "$id" > "$SLURM_FOLDER/id"
for argument in "$@"; do case "$argument" in
  --array=0-*) last=${argument#--array=0-} ;;
  --output=*) output=${argument#--output=} ;;
  --chdir=*) cd "${argument#--chdir=}" ;;
  --wrap=*) wrap=${argument#--wrap=} ;;
esac; done
for task in $(seq 0 "$last"); do
  log=${output//%A/$id}; log=${log//%a/$task}
  (SLURM_ARRAY_TASK_ID=$task exec bash -c "$wrap") > "$log" 2>&1 < /dev/null &
  echo $! >> "$SLURM_FOLDER/$id"
done
echo "$id;cluster" """,
    "squeue": r"""id=${2#--jobs=}
[ -e "$SLURM_FOLDER/$id" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
for pid in $(cat "$SLURM_FOLDER/$id"); do kill -0 "$pid" 2>/dev/null && echo RUNNING; done
exit 0""",
    "scancel": r"""echo "scancel $1" >> "$SLURM_FOLDER/calls"
kill $(cat "$SLURM_FOLDER/$1") 2>/dev/null; rm -f "$SLURM_FOLDER/$1"; exit 0""",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with those commands on PATH; `calls` holds what they were told."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, body in SLURM.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_FOLDER", str(folder))
    monkeypatch.setattr(executors, "SQUEUE_S", 0.5)
    return folder


def calls(slurm: Path) -> list[str]:
    return (slurm / "calls").read_text().splitlines()


def test_an_array_makes_the_same_bytes(shards: Path, plain: dict[str, str], slurm: Path, tmp_path: Path) -> None:
    options = {"partition": "cpu", "time": "4:00:00", "options": {"mem": "4G"}}
    made, told = run(job(shards, tmp_path / "an out"), Executor(kind="slurm", workers=2, slurm=options))
    assert made == plain and told[-1][:2] == (26, 26)
    submitted, ended = calls(slurm)
    assert ended == "scancel 42"
    for argument in ("--parsable", "--array=0-1 ", "--partition=cpu --time=4:00:00 --mem=4G", "--wrap=exec "):
        assert argument in submitted


@pytest.mark.slow
def test_an_array_that_its_time_limit_ends_is_queued_again_while_it_gets_on(
    shards: Path, plain: dict[str, str], slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "task.synced:2")  # each worker ends in its second shard
    made, _ = run(job(shards, tmp_path / "out"), Executor(kind="slurm", workers=1))
    assert made == plain
    assert [call for call in calls(slurm) if call.startswith("scancel")][:2] == ["scancel 42", "scancel 43"]


@pytest.mark.slow
def test_an_array_that_brings_nothing_on_is_an_error_and_so_is_what_a_worker_says(
    shards: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"patterns": "another version"}
    with pytest.raises(ValueError, match="and the stage began with another version"):
        run(job(shards, tmp_path / "one", detectors=other), Executor(kind="slurm", workers=2))
    assert calls(slurm)[-1] == "scancel 42", "the others are not left to find the same"
    monkeypatch.setenv("SFUMATO_FAILPOINT", "task.leased")
    with pytest.raises(ValueError, match=r"Slurm's job 43 ended and brought nothing on: read .*/slurm"):
        run(job(shards, tmp_path / "two"), Executor(kind="slurm", workers=1))


@pytest.mark.slow
def test_a_launch_that_is_told_to_end_takes_its_array_with_it(shards: Path, slurm: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.train.test_executors import *\n"
        "run(job(Path(sys.argv[1]), Path(sys.argv[2])), Executor(kind='slurm', workers=2))\n"
    )
    environment = {**os.environ, "SFUMATO_FAILPOINT": "task.leased!delay=60", "MARK": str(tmp_path)}
    command = [sys.executable, "-c", program, str(shards), str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, cwd=ROOT) as launch:
        wait_for(lambda: len(list((tmp_path / "out").glob("*/*.lease"))) == 2)
        launch.terminate()
    assert launch.returncode == 128 + signal.SIGTERM
    assert calls(slurm)[-1] == "scancel 42"
    wait_for(lambda: not living(str(tmp_path)))


def test_a_cluster_that_refuses_or_is_not_there_says_so(
    shards: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_REFUSES", "1")
    executor = Executor(kind="slurm", workers=2)
    with pytest.raises(ValueError, match="sbatch refuses the array: sbatch: error: invalid partition specified: mend"):
        run(job(shards, tmp_path / "out"), executor)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"sbatch is not on PATH here: launch from a login node"):
        run(job(shards, tmp_path / "out"), executor)


# --- Ray ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_cluster_makes_the_same_bytes_and_passes_on_what_is_wrong(
    shards: Path, plain: dict[str, str], tmp_path: Path
) -> None:
    made, told = run(job(shards, tmp_path / "all"), Executor(kind="ray"))
    assert made == plain and told[-1][:2] == (26, 26)
    one, _ = run(job(shards, tmp_path / "one", duplicates=True), Executor(kind="ray", workers=1))
    here, _ = run(job(shards, tmp_path / "here", duplicates=True), Executor(workers=1))
    assert one == here
    other = {"patterns": "another version"}
    with pytest.raises(ValueError, match=r"^detector patterns is version .*, and the stage began with another version"):
        run(job(shards, tmp_path / "other", detectors=other), Executor(kind="ray"))


@pytest.mark.slow
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_ray_cluster_that_is_not_there_is_said_at_once(shards: Path, tmp_path: Path, address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=rf"no Ray cluster is at executor\.ray\.address {address}: start one with"):
        run(job(shards, tmp_path / "out"), Executor(kind="ray", ray={"address": address}))


def test_without_ray_the_mend_is_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'sfumato\[ray\]'"):
        run(job(shards, tmp_path / "out"), Executor(kind="ray"))


# --- what a recipe says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"kind": "slurm"}, "workers is null, and kind is slurm"),
        ({"kind": "kubernetes"}, "kind"),
        ({"workers": 0}, "workers"),
        ({"lease_s": 0.1}, "lease_s"),
        ({"slurm": {"options": {"array": "0-9"}}}, "options holds 'array'"),
        ({"slurm": {"options": {"mem 4G --wrap": "x"}}}, "options holds 'mem 4G --wrap'"),
    ],
)
def test_an_executor_that_cannot_be_is_refused(section: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Executor(**section)


def test_the_executor_is_no_part_of_what_a_filter_stage_is() -> None:
    stage = ROOT / "configs/digits/20_filter.yaml"
    here, there = load_stage(stage), load_stage(stage, ["executor={kind: slurm, workers: 64}"])
    assert here.sha256() == there.sha256() and here != there
