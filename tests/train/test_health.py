"""Bad steps are seen before they are saved, named, and answered as the policy says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.sharded import latest
from tests.train.test_loop import again, pretrain
from train import loop
from train.config import FinetuneStage
from train.health import BadStep, read_bad_steps
from train.metrics import read_metrics
from train.recipe import load_stage
from train.run_folder import RunFolder
from train.step import PublicStep, StepReport

ROOT = Path(__file__).resolve().parents[2]
TWELVE = ("train.steps=12", "checkpoint.memory_every=4", "checkpoint.every=4")


class Poisoned(PublicStep):
    """The public step, with one pixel of step 6 infinite, as a broken decoder or a flipped bit leaves it."""

    def __call__(self, step: int) -> StepReport:
        if step == 6:
            self.prefetcher.fetch = lambda step, fetch=self.prefetcher.fetch: poisoned(fetch(step))  # type: ignore[method-assign]
        return super().__call__(step)


class Corrupted(PublicStep):
    """The public step, which leaves one weight NaN after step 5."""

    def __call__(self, step: int) -> StepReport:
        report = super().__call__(step)
        if step == 5:
            self.backend.shards[3].value[1] = torch.nan
        return report


def poisoned(batch: Any) -> Any:
    batch.records.images[0, 0, 0, 0] = torch.inf
    return batch


def all_finite(run: RunFolder) -> bool:
    saved = latest(run.path / "pretrain" / "checkpoints")
    assert saved is not None
    return all(bool(saved.read(*key).isfinite().all()) for key in saved.tensors())


def test_a_loss_that_explodes_stops_the_stage_before_the_weights_do(run: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"step \d+ of pretrain is bad: loss (nan|inf), from rank 0.*Lower optim"):
        pretrain(run, "optim.learning_rate=1e30", "train.steps=12")
    saved = latest(run.path / "pretrain" / "checkpoints")
    assert saved is None or all_finite(run)


def test_a_bad_step_is_replayed_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = (*TWELVE, "supervision.bad_steps=replay")
    monkeypatch.setattr(loop, "PublicStep", Poisoned)
    with pytest.raises(BadStep, match=r"step 6 of pretrain is bad: loss (nan|inf).*to replay it"):
        pretrain(run, *replay)
    with pytest.raises(ValueError, match=r"step 6 .* and it was before"):
        pretrain(run, *replay)
    assert all_finite(run)
    assert [entry["step"] for entry in read_bad_steps(run.path / "pretrain")] == [6, 6]


def test_a_passing_fault_leaves_no_trace(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = (*TWELVE, "supervision.bad_steps=replay")
    unbroken = pretrain(again(run, tmp_path, "unbroken"), *replay)
    with monkeypatch.context() as once:
        once.setattr(loop, "PublicStep", Poisoned)
        with pytest.raises(BadStep):
            pretrain(run, *replay)
    got = pretrain(run, *replay)
    assert all(torch.equal(unbroken[key], got[key]) for key in unbroken)


def test_a_skipped_step_is_left_out_and_said(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    skip = (*TWELVE, "supervision.bad_steps=skip")
    monkeypatch.setattr(loop, "PublicStep", Poisoned)
    with pytest.raises(BadStep, match="to skip it"):
        pretrain(run, *skip)
    pretrain(run, *skip)
    assert all_finite(run)
    rows = read_metrics(run.path / "pretrain")
    assert [row["step"] for row in rows if row.get("skipped")] == [6]
    saved = latest(run.path / "pretrain" / "checkpoints")
    assert saved is not None
    assert (saved.step, saved.state["num_updates"], saved.state["skipped_steps"]) == (12, 11, [6])


def test_bad_weights_are_named_and_never_saved(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = (*TWELVE, "supervision.bad_steps=replay")
    monkeypatch.setattr(loop, "PublicStep", Corrupted)
    with pytest.raises(BadStep, match=r"step \d of pretrain is bad: .*not finite|loss nan"):
        pretrain(run, *replay)
    assert all_finite(run)


def test_a_spike_is_a_bad_step_only_where_it_is_asked_for(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spiking(PublicStep):
        def __call__(self, step: int) -> StepReport:
            self.stage.objective  # noqa: B018
            if step == 14:
                self.health.judge_loss(step, 100.0, 100.0)
            return super().__call__(step)

    monkeypatch.setattr(loop, "PublicStep", Spiking)
    long = ("train.steps=16", "supervision.bad_steps=replay")
    pretrain(again(run, tmp_path, "unasked"), *long)
    with pytest.raises(BadStep, match=r"step 14 of pretrain is bad: loss 100, over 5 times the median"):
        pretrain(run, *long, "supervision.spike=5")


def test_a_private_stage_cannot_skip() -> None:
    with pytest.raises(ValueError, match=r"supervision\.bad_steps is skip in a private stage"):
        load_stage(ROOT / "configs/digits/40_finetune_dp.yaml", ["supervision.bad_steps=skip"])
    assert FinetuneStage.kind == "finetune_dp"
