import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from train import ROOT
from train.config import FilterStage
from train.heartbeat import RankWatch, pages_folder
from train.launch import needs_own_key
from train.launchers import free_port
from train.recipe import load_recipe
from train.run_folder import RunFolder, now
from train.timeline import read_timeline

DIGITS = ROOT / "configs" / "digits"
XL2 = ROOT / "configs" / "imagenet_dit_xl2"
SCRIPT = ROOT / "scripts" / "launch.py"


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`main` of scripts/launch.py, in an empty working directory and without secrets in the environment."""
    spec = importlib.util.spec_from_file_location("launch_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)
    for name in ("SFUMATO_SECRET", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)

    def main(*arguments: object) -> int:
        return script.main([str(argument) for argument in arguments])

    return main


def finish(run: RunFolder, names: Sequence[str], metrics: dict[str, Any] | None = None) -> None:
    """Write the manifests of the named stages, as the stages would."""
    recipe = load_recipe(DIGITS)
    for name in names:
        stage = recipe.stage(name)
        run.write_manifest(
            stage, inputs=run.input_hashes(stage), started=now(), seconds=2.5, metrics=metrics or {}, outputs={}
        )


ALL = ("ingest", "filter", "pretrain", "finetune_dp", "eval", "audit", "export")


def test_help_names_every_option_and_needs_no_torch() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "script = sys.argv[1]; sys.argv = [script, '--help']; runpy.run_path(script, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True, check=True)
    for option in (
        "--run-dir", "--only", "--from", "--until", "--set", "--launcher", "--nproc", "--nnodes", "--dry-run", "--port",
        "--submit",
    ):  # fmt: skip
        assert option in done.stdout


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(XL2, "--dry-run") == 0
    shown = capsys.readouterr().out
    for figure in ("674.8 M", "target 10", "at delta 1e-07", "-m train.torchrun", "--nproc-per-node 8", "fits on"):
        assert figure in shown
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_overrides_and_the_stages_asked_for(
    launch: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        launch(DIGITS, "--dry-run", "--only", "finetune_dp", "--set", "privacy.target_epsilon=4", "--nproc", "1") == 0
    )
    shown = capsys.readouterr().out
    assert "target 4" in shown and "--set privacy.target_epsilon=4 --set parallel.nproc=1" in shown
    assert "30_pretrain.yaml" not in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "finetune"], "no stage named 'finetune' (did you mean finetune_dp?)"),
        (["--only", "eval", "--from", "filter"], "--only names one stage: leave out --from and --until"),
        (["--from", "eval", "--until", "filter"], "--from eval comes after --until filter"),
        (["--set", "train.stepz=1"], "did you mean train.steps?"),
        (["--nnodes", "0"], "--nnodes is 0"),
        (["--nnodes", "2"], "MASTER_ADDR, the first node's address, is not set"),
        (["--only", "export"], "stage finetune_dp is not finished"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_starts(
    launch: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert launch(DIGITS, *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_refused(launch: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(ROOT / "configs" / "digit") == 2
    assert "no such recipe folder" in capsys.readouterr().err


def test_a_run_folder_of_another_recipe_is_refused(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder.open(tmp_path / "x", "fashion")
    assert launch(DIGITS, "--run-dir", tmp_path / "x") == 2
    assert "is a run of recipe fashion, not of digits" in capsys.readouterr().err


def test_a_second_launch_is_refused(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder.open(tmp_path / "x", "digits").launch_lock():
        assert launch(DIGITS, "--run-dir", tmp_path / "x") == 2
    assert f"in use by another launch (process {os.getpid()} on " in capsys.readouterr().err


def test_a_port_in_use_is_refused(launch: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert launch(DIGITS, "--port", taken.getsockname()[1]) == 2
    assert "cannot be used (Address already in use)" in capsys.readouterr().err


def test_a_stage_finished_with_another_config_is_refused(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(RunFolder.open(tmp_path / "x", "digits"), ALL)
    assert launch(DIGITS, "--run-dir", tmp_path / "x", "--set", "eval.guidance=7.5") == 2
    assert "but the recipe now says 7.5: set it back, or give another --run-dir" in capsys.readouterr().err


def test_a_finished_run_is_not_run_again_and_shows_what_it_made(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.open(tmp_path / "x", "digits")
    rows = [{"name": "class_fidelity", "value": 0.9, "unit": "1", "target": 0.8, "ok": True}]
    finish(run, ALL, {"headline": {"grid": "x/eval/[grid].png"}, "rows": rows, "loss": 0.25, "by_class": {"3": 7}})
    assert launch(DIGITS, "--run-dir", run.path) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished before, skipped") == len(ALL)
    assert "grid: x/eval/[grid].png" in shown and "2.5 s" in shown
    summary = json.loads((run.path / "summary.json").read_text())
    assert {"machine", "versions", "commit", "rows"} <= set(summary)
    assert {"name": "eval.loss", "value": 0.25, "unit": "1", "target": None, "ok": None} in summary["rows"]
    assert {"name": "eval.by_class.3", "value": 7, "unit": "1", "target": None, "ok": None} in summary["rows"]
    assert rows[0] in summary["rows"]


def test_a_figure_that_missed_its_target_makes_the_exit_status_1(launch: Callable[..., int], tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "x", "digits")
    finish(run, ALL, {"rows": [{"name": "class_fidelity", "value": 0.1, "unit": "1", "target": 0.8, "ok": False}]})
    assert launch(DIGITS, "--run-dir", run.path) == 1


def test_a_ledger_without_its_key_is_refused_and_no_new_key_is_made(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.open(tmp_path / "x", "digits")
    finish(run, ("ingest", "filter", "pretrain"))
    (run.path / "ledger.jsonl").touch()
    assert launch(DIGITS, "--run-dir", run.path, "--only", "finetune_dp") == 2
    assert "secret.key is missing. Put it back" in capsys.readouterr().err
    assert not (run.path / "secret.key").exists()


@pytest.mark.distributed
def test_a_key_is_made_for_a_private_stage_and_a_refusal_of_its_ranks_is_shown(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.open(tmp_path / "x", "digits")
    finish(run, ("ingest", "filter", "pretrain"))  # but there are no shards
    assert launch(DIGITS, "--run-dir", run.path, "--only", "finetune_dp") == 2
    shown = capsys.readouterr()
    assert f"made {run.path / 'secret.key'} (mode 0600)" in shown.out
    assert (run.path / "secret.key").stat().st_mode & 0o777 == 0o600
    assert "error: stage finetune_dp refused: " in shown.err
    assert not (run.path / "finetune_dp" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("overrides", "own"),
    [
        ({"policy": {"captions": {"email": "pseudonymise"}}}, True),
        ({"policy": {"captions": {"email": "pseudonymise"}, "pseudonyms": {"key_id": "0" * 16}}}, False),
        ({"policy": {"captions": {"email": "pseudonymise"}}, "key_file": "mine.key"}, False),
        ({"policy": {}}, False),
    ],
    ids=["pseudonyms", "a key that is named by its id", "a key file", "none"],
)
def test_a_filter_stage_gets_a_key_of_the_run_s_own_only_where_it_makes_pseudonyms(
    overrides: dict[str, Any], own: bool
) -> None:
    stage = FilterStage.model_validate({"name": "filter", "stage": "filter", "data_from": "ingest", **overrides})
    assert needs_own_key(stage) == own


def test_one_stage_runs_and_its_time_and_attempts_are_in_the_summary(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(DIGITS, "--run-dir", tmp_path / "x", "--only", "ingest") == 0
    assert "ingest: done in" in capsys.readouterr().out
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert [attempt["exit_code"] for attempt in summary["attempts"]["ingest"]] == [0]
    assert {"ingest.seconds", "ingest.restarts"} <= {row["name"] for row in summary["rows"]}


@pytest.mark.distributed
def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_end(tmp_path: Path) -> None:
    shorter = ["train.steps=40", "checkpoint.every=1000", "optim.warmup_steps=0", "log.wandb=disabled"]
    command = [sys.executable, str(SCRIPT), str(DIGITS), "--run-dir", str(tmp_path / "x"), "--until", "pretrain"]
    for override in shorter:
        command += ["--set", f"pretrain.{override}"]
    progress = tmp_path / "x" / "pretrain" / "progress.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launch:
        while not progress.exists():
            assert launch.poll() is None
            time.sleep(0.05)
        launch.send_signal(signal.SIGINT)
        shown, _ = launch.communicate(timeout=60)
    assert launch.returncode == 130
    assert "pretrain: stopped. It goes on from where it was with:" in shown
    (saved,) = (tmp_path / "x" / "pretrain" / "checkpoints").glob("step-*/MANIFEST.json")
    assert saved.parent.name < "step-00000040"
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ingest: finished before, skipped" in done.stdout
    manifest = RunFolder(tmp_path / "x", "digits").read_manifest("pretrain")
    assert manifest is not None and manifest["metrics"]["steps"] == 40


def test_slurm_gets_a_script_that_runs_the_same_command_on_every_node(
    launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--launcher", "slurm", "--nnodes", "2", "--until", "pretrain", "--set", "log.every=5"]
    assert launch(DIGITS, "--run-dir", tmp_path / "x", *arguments) == 0
    script = (tmp_path / "x" / "sfumato.sbatch").read_text()
    assert f"{SCRIPT} {DIGITS} --run-dir {tmp_path / 'x'} --until pretrain --set log.every=5 --nnodes 2" in script
    assert "#SBATCH --nodes=2" in script
    assert "submit it with: sbatch" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="would submit a job")
def test_submitting_without_sbatch_is_refused(launch: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(DIGITS, "--launcher", "slurm", "--submit") == 2
    assert "--submit needs sbatch, which is not on PATH here" in capsys.readouterr().err


def command(run: Path, *arguments: str, **overrides: object) -> list[str]:
    """The launch of a short pretraining on two ranks."""
    settings: dict[str, object] = {
        "train.steps": 60, "checkpoint.every": 1000, "optim.warmup_steps": 0, "log.wandb": "disabled"
    }  # fmt: skip
    found = [sys.executable, str(SCRIPT), str(DIGITS), "--run-dir", str(run), "--until", "pretrain", *arguments]
    for key, value in (settings | overrides).items():
        found += ["--set", f"pretrain.{key}={value}"]
    return found


def rank_at_step(run: Path, rank: int, step: int, node: int = 0) -> int:
    """The process id of a rank of the pretraining, once it has done `step` steps."""
    pages = pages_folder(run / "pretrain", node)
    deadline = time.monotonic() + 120
    while not (pages / f"rank-{rank:05d}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    watch = RankWatch(pages, [rank], {})
    while rank not in watch.signs or (watch.signs[rank].step or 0) < step:
        assert time.monotonic() < deadline
        watch.look()
        time.sleep(0.01)
    watch.close()
    return watch.signs[rank].pid


@pytest.mark.distributed
def test_a_killed_rank_costs_a_few_steps_and_the_launch_says_where_its_time_went(tmp_path: Path) -> None:
    run = tmp_path / "x"
    with subprocess.Popen(command(run, "--nproc", "2"), stdout=subprocess.PIPE, text=True) as launch:
        os.kill(rank_at_step(run, 1, 25), signal.SIGKILL)
        shown, _ = launch.communicate(timeout=120)
    assert launch.returncode == 0, shown
    assert "pretrain: attempt 1 died by SIGKILL at step" in shown and "(rank 1); restarting at once" in shown
    assert "pretrain: training again" in shown and "pretrain: effective training time" in shown
    events = {event["event"]: event for event in read_timeline(run / "pretrain")}
    assert events["loaded"]["step"] >= 20 and events["loaded"]["tier"] == "memory"
    rows = {row["name"]: row["value"] for row in json.loads((run / "summary.json").read_text())["rows"]}
    kinds = ("productive", "saving", "lost", "detecting", "starting", "restarting", "loading", "other")
    assert sum(rows[f"pretrain.time.{kind}"] for kind in kinds) == pytest.approx(rows["pretrain.time.wall_clock"])
    attempts = json.loads((run / "summary.json").read_text())["attempts"]["pretrain"]
    assert rows["pretrain.time.wall_clock"] == pytest.approx(sum(a["seconds"] for a in attempts), rel=0.1)
    assert rows["pretrain.restarts"] == 1 and rows["pretrain.time.restarting"] > 0


@pytest.mark.distributed
@pytest.mark.slow
def test_two_launches_are_two_nodes_and_a_killed_one_is_taken_back(tmp_path: Path) -> None:
    run, port = tmp_path / "x", str(free_port())
    subprocess.run([*command(run)[:5], "--until", "filter"], check=True, capture_output=True)

    def start(node: int) -> subprocess.Popen[str]:
        env = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": str(node)}
        arguments = command(run, "--nproc", "1", "--nnodes", "2")
        return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    nodes = [start(0), start(1)]
    rank_at_step(run, 1, 15, node=1)
    nodes[1].kill()  # its ranks are told by the kernel, and save
    nodes[1].wait()
    nodes[1] = start(1)
    shown = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], shown
    assert "pretrain: attempt 1" in shown[0] and "restarting at once" in shown[0]
    loaded = [event["step"] for event in read_timeline(run / "pretrain") if event["event"] == "loaded"]
    assert loaded[0] == 0 and loaded[-1] >= 10


@pytest.mark.distributed
def test_a_rank_that_hangs_again_and_again_is_given_up_with_a_status_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "x"
    hang = {"supervision.step_s": 2, "supervision.stalled_restarts": 0}
    with subprocess.Popen(command(run, "--nproc", "2", **hang), stderr=subprocess.PIPE, text=True) as launch:
        os.kill(rank_at_step(run, 1, 5), signal.SIGSTOP)
        _, said = launch.communicate(timeout=120)
    assert launch.returncode == 4
    assert "error: stage pretrain failed, given up (hang): attempt 1 hung at step" in said
    assert "is stopped by a signal" in said
    stacks = (run / "pretrain" / "log-1-stacks.txt").read_text()
    assert "train/loop.py" in stacks.split("== rank 1")[0]
