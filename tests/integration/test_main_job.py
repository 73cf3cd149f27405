"""The whole recipe, short: what it leaves behind is what its three readers need, and what it must refuse it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from PIL import Image
from safetensors.torch import load_file

from checkpointing.sharded import latest
from privacy.ledger import read_ledger
from privacy.pii.manifests import merkle_root, read_manifests, verify_shards
from tests.integration.short_run import ROOT, launch, launch_command
from train.config import EvalStage
from train.generation import build, generate, objective_of
from train.loop import load_average
from train.recipe import load_stage
from train.run_folder import RunFolder

EVAL = ("--set", "eval.samples_per_class=10", "--set", "eval.sampler_steps=6", "--set", "eval.minimum_fidelity={}")

pytestmark = pytest.mark.distributed


def refused(run: Path, *arguments: str) -> str:
    """What a launch says that must be refused as the user's to mend, with nothing started."""
    done = subprocess.run(
        launch_command(run, *arguments), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("main_job") / "run"
    launch(run, *EVAL)
    return run


def test_every_stage_leaves_a_manifest_and_the_summary_has_the_figures(finished: Path) -> None:
    for stage in ("ingest", "filter", "pretrain", "finetune_dp", "eval", "audit", "export"):
        assert (finished / stage / "manifest.json").is_file()
    rows = {row["name"]: row["value"] for row in json.loads((finished / "summary.json").read_text())["rows"]}
    assert 0 < rows["finetune_dp.epsilon"] <= 10
    assert 0 <= rows["eval.pretrain.class_fidelity"] <= 1
    grid = Image.open(finished / "eval" / "finetune_dp.png")
    assert min(grid.size) > 400


def test_the_manifest_names_every_file_of_the_last_save(finished: Path) -> None:
    outputs = json.loads((finished / "finetune_dp" / "manifest.json").read_text())["outputs"]
    (save,) = {(finished / path).parent for path in outputs if path.endswith("MANIFEST.json")}
    assert {str(path.relative_to(finished)) for path in save.iterdir()} < set(outputs)
    for path, digest in outputs.items():
        assert digest == "blake3:" + blake3((finished / path).read_bytes()).hexdigest()


def test_an_auditor_repeats_the_figure_without_torch(finished: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['audit.py', sys.argv[1], '--json']\n"
        "try: runpy.run_path('scripts/audit.py', run_name='__main__')\n"
        "except SystemExit as end: assert 'torch' not in sys.modules; sys.exit(end.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((finished / "finetune_dp" / "manifest.json").read_text())
    assert json.loads(done.stdout)["spending"]["epsilon"] == pytest.approx(manifest["metrics"]["epsilon"], rel=1e-9)


def test_one_root_binds_the_filtered_shards_to_the_saves_the_ledger_and_the_cards(finished: Path) -> None:
    metrics = json.loads((finished / "filter" / "manifest.json").read_text())["metrics"]
    manifests = read_manifests(finished / "filter")
    root = merkle_root([manifest.leaf() for manifest in manifests])
    assert metrics["shards_root"] == root
    assert verify_shards(finished / "filter", manifests)["private"] == metrics["splits"]["private"]["root"]
    for stage in ("pretrain", "finetune_dp"):
        saved = latest(finished / stage / "checkpoints")
        assert saved is not None and saved.state["shards_root"] == root
    (plan,) = read_ledger(finished / "ledger.jsonl").plans.values()
    assert plan["shards_root"] == root
    card = json.loads((finished / "export" / "model" / "privacy_card.json").read_text())
    assert [filter["shards_root"] for filter in card["filter"]] == [root]
    assert root in (finished / "export" / "model" / "MODEL_CARD.md").read_text()
    claims = {claim["claim"]: claim for claim in json.loads((finished / "audit" / "audit.json").read_text())["claims"]}
    assert "every byte of the" in claims["the shards of filter are those that its Merkle root binds"]["evidence"]
    assert claims["the ledger and the checkpoints of finetune_dp name the filtered shards it was trained on"]["holds"]


def test_the_export_samples_the_same_images_in_a_new_process(finished: Path, tmp_path: Path) -> None:
    stage = load_stage(ROOT / "configs/digits/50_eval.yaml")
    assert isinstance(stage, EvalStage)
    run, labels = RunFolder.open(finished, "digits"), torch.arange(10)
    config, weights, _ = load_average(run, "finetune_dp")
    settings = {"seed": 3, "sampler": "heun", "steps": 4, "guidance": 2.0}
    expected = generate(build(config, weights), objective_of(run, "finetune_dp", config), labels, **settings)
    code = f"""
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from train.generation import generate, load_export
model, objective, _ = load_export(Path(sys.argv[1]))
save_file({{"images": generate(model, objective, torch.arange(10), **{settings})}}, sys.argv[2])
"""
    out = tmp_path / "images.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [sys.executable, "-c", code, str(finished / "export" / "model"), str(out)],
        env=environment,
        check=True,
        timeout=60,
    )
    assert torch.equal(load_file(out)["images"], expected)


def test_nothing_personal_or_secret_is_left_in_what_the_run_shows(finished: Path) -> None:
    secret = (finished / "secret.key").read_text().strip()
    for path in finished.rglob("*"):
        if path.is_file() and path.name != "secret.key" and "ingest" not in path.parts:
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert b"@example." not in content, f"{path} shows a planted e-mail address"


def test_a_second_run_of_the_same_command_starts_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")}
    said = launch(finished, *EVAL)
    assert said.count("finished before, skipped") == 7
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")} == before


def test_a_changed_config_is_refused_for_a_finished_stage(finished: Path) -> None:
    said = refused(finished, *EVAL, "--set", "pretrain.train.seed=5")
    assert "train.seed" in said
    assert "--run-dir" in said


def test_a_stage_whose_input_was_changed_is_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = run / "filter" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kept"', '"Kept"'))
    assert "stale" in refused(run, *EVAL)


def test_a_tampered_ledger_stops_the_export(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "export")
    ledger = run / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:5] + lines[6:]))
    assert "line 6" in refused(run, *EVAL, "--only", "export")
    assert not (run / "export" / "model").exists()


def test_a_spent_budget_refuses_the_next_stage_before_it_charges(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "other"
    shared = [
        "--set", f"privacy.ledger={finished / 'ledger.jsonl'}", "--set", f"privacy.key_file={finished / 'secret.key'}"
    ]  # fmt: skip
    before = (finished / "ledger.jsonl").read_bytes()
    said = refused(run, *EVAL, "--until", "finetune_dp", *shared, "--set", "privacy.target_epsilon=2")
    assert "already spent" in said
    assert (finished / "ledger.jsonl").read_bytes() == before


def test_a_record_that_rots_on_disk_stops_the_training_that_reads_it(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("pretrain", "finetune_dp", "eval", "audit", "export"))
    shard = run / "filter" / "public" / "public-00000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"\x89PNG") + 40] ^= 1
    shard.write_bytes(content)
    assert "public-00000.tar" in refused(run, "--only", "pretrain")
