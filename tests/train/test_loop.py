"""The training loop in one process, on a few invented images: what it resumes, and what it refuses."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from checkpointing.sharded import latest
from kernels import dispatch
from train.heartbeat import Heartbeat
from train.loop import train
from train.parallel import join_world
from train.recipe import load_stage
from train.run_folder import RunFolder, write_json

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model={name: dit, width: 32, depth: 2, heads: 2, image_size: 8, channels: 1, patch_size: 2, num_classes: 10}",
    "train.steps=4",
    "train.batch_size=12",
    "train.microbatch_size=12",
    "optim.warmup_steps=0",
    "checkpoint.every=2",
    "log.every=1",
    "log.wandb=disabled",
    "parallel={backend: single, nproc: 1}",
)


def pretrain(run: RunFolder, *overrides: str) -> dict[tuple[str, str], torch.Tensor]:
    """Run the stage and return everything its last checkpoint holds."""
    stage = load_stage(ROOT / "configs/digits/30_pretrain.yaml", [*SMALL, *overrides])
    train(stage, run, join_world(), run.next_fencing_epoch(), Heartbeat(0))
    checkpoint = latest(run.path / "pretrain" / "checkpoints")
    assert checkpoint is not None
    return {key: checkpoint.read(*key) for key in checkpoint.tensors()}


def again(run: RunFolder, tmp_path: Path, name: str) -> RunFolder:
    """Another run on the same shards."""
    other = RunFolder.open(tmp_path / name, "digits")
    (other.path / "filter").symlink_to(run.path / "filter")
    return other


def furthest(first: dict, second: dict) -> float:
    return max(float((first[key] - second[key]).abs().max()) for key in first if key[0] == "param")


def test_microbatches_add_up_to_the_batch(run: RunFolder, tmp_path: Path) -> None:
    whole = pretrain(run)
    parts = pretrain(again(run, tmp_path, "parts"), "train.microbatch_size=3")
    other = pretrain(again(run, tmp_path, "other"), "train.seed=9")
    assert furthest(whole, parts) < 1e-5
    assert furthest(whole, other) > 1e-3


def test_activation_checkpointing_changes_nothing(run: RunFolder, tmp_path: Path) -> None:
    recomputed = "parallel={backend: single, nproc: 1, activation_checkpointing: true}"
    assert furthest(pretrain(run), pretrain(again(run, tmp_path, "recomputed"), recomputed)) < 1e-6


def test_bf16_stays_near_fp32_and_keeps_fp32_weights(run: RunFolder, tmp_path: Path) -> None:
    full, half = pretrain(run), pretrain(again(run, tmp_path, "half"), "train.precision=bf16")
    assert 0 < furthest(full, half) < 2e-2


def test_the_kernels_that_run_are_said_and_train_as_the_reference_does(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = (SMALL[0].replace("heads: 2", "heads: 1"), "train.batch_size=4", "train.microbatch_size=4", "train.steps=2")
    reference = pretrain(run, *small)
    assert "kernels: reference (on the CPU)" in capsys.readouterr().out
    triton = "parallel={backend: single, nproc: 1, kernels: triton}"
    try:
        kernels = pretrain(again(run, tmp_path, "triton"), *small, triton)
    finally:
        dispatch.choose("auto", torch.device("cpu"))
    assert f"kernels: triton {version('triton')} on the interpreter" in capsys.readouterr().out
    assert 0 < furthest(reference, kernels) < 1e-5


def test_a_half_done_stage_is_not_resumed_under_another_configuration(run: RunFolder) -> None:
    pretrain(run)
    with pytest.raises(ValueError, match="half done under another configuration"):
        pretrain(run, "optim.learning_rate=1e-4")


def test_a_save_names_the_shards_it_was_trained_on_and_others_are_refused(run: RunFolder) -> None:
    manifest = json.loads(run.manifest_path("filter").read_text())
    before, after = f"blake3:{'a' * 64}", f"blake3:{'b' * 64}"
    for root in (before, after):
        manifest["metrics"]["shards_root"] = root
        write_json(run.manifest_path("filter"), manifest)
        if root == before:
            pretrain(run)
        else:
            with pytest.raises(ValueError, match=f"half done on the shards of root {before}, and filter now has"):
                pretrain(run)
    saved = latest(run.path / "pretrain" / "checkpoints")
    assert saved is not None and saved.state["shards_root"] == before


def test_a_half_done_stage_is_resumed_with_another_microbatch(run: RunFolder) -> None:
    pretrain(run)
    pretrain(run, "train.microbatch_size=3")


def test_a_class_the_model_does_not_have_is_refused(run: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"holds class 9, but model\.num_classes is 7"):
        pretrain(run, SMALL[0].replace("num_classes: 10", "num_classes: 7"))


def test_a_split_that_was_changed_after_its_manifest_is_refused(run: RunFolder) -> None:
    folder = run.path / "filter" / "public"
    for name in ("public-00002.tar", "public-00002.index.jsonl"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="a shard was changed or lost"):
        pretrain(run)
