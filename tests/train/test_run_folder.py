import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from train import ROOT
from train.recipe import load_stage
from train.run_folder import RunFolder, RunFolderError, code_version, digests, now, write_json

PRETRAIN = ROOT / "configs" / "digits" / "30_pretrain.yaml"
FILTER = ROOT / "configs" / "digits" / "20_filter.yaml"
FINETUNE = ROOT / "configs" / "digits" / "40_finetune_dp.yaml"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run in which ingest and filter are finished."""
    run = RunFolder.open(tmp_path / "x", "digits")
    for path in (FILTER.with_name("10_ingest.yaml"), FILTER):
        finish(run, path)
    return run


def finish(run: RunFolder, path: Path, *overrides: str) -> None:
    stage = load_stage(path, overrides)
    run.write_manifest(
        stage, inputs=run.input_hashes(stage), started=now(), seconds=1.5, metrics={"records": 3}, outputs={}
    )


def test_a_new_folder_says_which_recipe_it_is_of(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "deep" / "x", "digits")
    marker = json.loads((tmp_path / "deep" / "x" / "run.json").read_text())
    assert (marker["recipe"], marker["format"], marker["code_version"]) == ("digits", 1, code_version())


def test_a_folder_of_another_recipe_is_refused_and_left_as_it_was(run: RunFolder) -> None:
    before = sorted(run.path.rglob("*"))
    with pytest.raises(RunFolderError, match="is a run of recipe digits, not of fashion: give another --run-dir"):
        RunFolder.open(run.path, "fashion")
    assert sorted(run.path.rglob("*")) == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="holds something that is not a run"):
        RunFolder.open(tmp_path, "digits")


def test_a_stage_without_a_manifest_is_unfinished(run: RunFolder) -> None:
    run.stage_folder("pretrain").joinpath("metrics.jsonl").touch()
    assert not run.finished(load_stage(PRETRAIN))
    assert run.read_manifest("pretrain") is None


def test_a_finished_stage_is_known_by_its_manifest(run: RunFolder) -> None:
    finish(run, PRETRAIN)
    stage = load_stage(PRETRAIN)
    assert run.finished(stage)
    manifest = run.read_manifest("pretrain")
    assert manifest is not None
    assert manifest["config_sha256"] == stage.sha256()
    assert manifest["inputs"] == {"filter": run.manifest_sha256("filter")}
    assert set(manifest) == {
        "format", "stage", "kind", "inputs", "config", "config_sha256", "code_version", "seeds", "metrics", "outputs",
        "ledger", "started", "finished", "seconds",
    }  # fmt: skip


@pytest.mark.parametrize("content", ["{}", '{"stage": "filter"}', "[]", "{"])
def test_a_manifest_that_is_not_the_stages_is_refused(run: RunFolder, content: str) -> None:
    finish(run, PRETRAIN)
    run.manifest_path("pretrain").write_text(content)
    with pytest.raises(RunFolderError, match=r"manifest\.json"):
        run.read_manifest("pretrain")


def test_a_stage_finished_at_another_world_size_is_finished(run: RunFolder) -> None:
    finish(run, PRETRAIN)
    assert run.finished(load_stage(PRETRAIN, ["parallel.nproc=1"]))


def test_a_stage_finished_with_another_config_is_refused_naming_the_key_and_both_values(run: RunFolder) -> None:
    finish(run, PRETRAIN, "optim.learning_rate=0.5", "optim.eps=0.25")
    with pytest.raises(
        RunFolderError,
        match=r"is finished with optim.learning_rate = 0.5, but the recipe now says 0.75: set it back, or give",
    ):
        run.finished(load_stage(PRETRAIN, ["optim.learning_rate=0.75"]))


def test_a_stage_whose_input_changed_since_is_stale(run: RunFolder) -> None:
    finish(run, PRETRAIN)
    finish(run, FILTER)  # again: another time of writing, so another hash
    with pytest.raises(RunFolderError, match=r"stage pretrain is stale: it was made from filter/manifest.json"):
        run.finished(load_stage(PRETRAIN))


def test_a_stage_whose_input_is_unfinished_cannot_start(run: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"stage pretrain is not finished.*--from pretrain"):
        run.input_hashes(load_stage(FINETUNE))


def test_a_broken_manifest_is_an_error_and_not_an_unfinished_stage(run: RunFolder) -> None:
    run.manifest_path("filter").write_text('{"format": 1, "sta')
    with pytest.raises(RunFolderError, match=r"filter/manifest.json is not JSON"):
        run.finished(load_stage(FILTER))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


HOLDER = """
import sys, time
from pathlib import Path
from train.run_folder import RunFolder
with RunFolder.open(Path(sys.argv[1]), "digits").launch_lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_launch_is_refused_with_the_holders_process_id_until_it_dies(run: RunFolder) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(RunFolderError, match=rf"in use by another launch \(process {holder.pid} on "),
            run.launch_lock(),
        ):
            pass
        holder.kill()
    with run.launch_lock():
        pass


def test_a_stage_waits_for_its_dying_predecessor(run: RunFolder) -> None:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with run.stage_lock("pretrain"):
            held.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with pytest.raises(RunFolderError, match=f"being run by another process .process {os.getpid()} on"):  # noqa: SIM117
        with run.stage_lock("pretrain", wait_s=0):
            pass
    leave.set()
    with run.stage_lock("pretrain", wait_s=10):
        thread.join()


def test_fencing_epochs_rise_and_survive_the_process(run: RunFolder) -> None:
    assert [run.next_fencing_epoch() for _ in range(3)] == [1, 2, 3]
    assert RunFolder.open(run.path, "digits").next_fencing_epoch() == 4


def test_runs_that_share_a_ledger_share_its_epochs(run: RunFolder, tmp_path: Path) -> None:
    ledger = tmp_path / "shared.jsonl"
    other = RunFolder.open(tmp_path / "y", "digits")
    assert run.next_fencing_epoch(ledger) == 1
    assert other.next_fencing_epoch(ledger) == 2


def test_the_ledger_lies_where_the_stage_says(run: RunFolder) -> None:
    assert run.ledger_path(load_stage(FINETUNE)) == run.path / "ledger.jsonl"
    assert run.ledger_path(load_stage(FINETUNE, ["privacy.ledger=/shared/l.jsonl"])) == Path("/shared/l.jsonl")
    assert run.ledger_path(load_stage(PRETRAIN)) is None


def test_a_digest_names_its_algorithm(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # the BLAKE3 test vector for "abc"
    assert digests([path]) == {path: "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"}


def test_the_code_version_names_a_commit_or_a_release() -> None:
    assert re.fullmatch(r"git:[0-9a-f]{40}(\+dirty)?|sfumato==.+|unknown", code_version())


def test_another_distributions_kernels_are_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = "from train import check_packages; check_packages()"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"`import kernels` finds {tmp_path}" in done.stderr.decode()
