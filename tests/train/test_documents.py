"""Captioned images as documents in rows: what a step's losses are, whoever shares them, and what is refused."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from checkpointing.sharded import latest
from models.registry import build_module
from models.tokenizer import open_tokenizer
from models.unified import Unified, UnifiedConfig
from privacy.clipping import make_clipper
from privacy.ledger import read_ledger
from privacy.sampling import PoissonSampler
from privacy.secrets import create_key_file
from tests.privacy.clipped_sums import OneProcess
from train.config import TrainStage
from train.data import ShardDataset
from train.documents import Documents, layout_of
from train.families import batches_of
from train.generation import exported
from train.heartbeat import Heartbeat
from train.images import encode_png
from train.loop import Preempted, load_average, train
from train.metrics import read_metrics
from train.parallel import World, join_world
from train.recipe import load_stage
from train.run_folder import RunFolder, now
from train.sampling import open_model
from train.shapes import SCENES
from train.shards import Record, write_shards
from train.stages import run_stage
from train.step import PublicStep

ROOT = Path(__file__).resolve().parents[2]
NUM_RECORDS, LONGEST = 30, 20
MODEL = (
    "model={name: unified, width: 16, depth: 2, heads: 2, image_size: 8, channels: 3, patch_size: 4, "
    f"max_caption_tokens: {LONGEST}, num_experts: 2}}"
)
SMALL = (
    MODEL,
    "documents={row_tokens: 70}",
    "objective={label_dropout: 0.3}",
    "train={steps: 4, batch_size: 12, microbatch_size: 2, seed: 0}",
    "optim.warmup_steps=0",
    "checkpoint.every=2",
    "log={every: 2, wandb: disabled}",
    "parallel={backend: single, nproc: 1}",
)
PRIVATE = ("init_from=null", "privacy.target_epsilon=40", "privacy.replay_steps=4", "train.batch_size=6")


def caption(index: int) -> str:
    return "words of a caption"[: 3 + index % 15]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a secret, and thirty captioned images of ten users, public and private alike."""
    folder = tmp_path_factory.mktemp("documents") / "run"
    run, metrics = RunFolder.open(folder, "shapes"), {}
    colours = np.random.default_rng(0).integers(0, 256, (NUM_RECORDS, 8, 8, 3), dtype=np.uint8)
    for split in ("public", "private"):
        records = (
            Record(f"r{i:02d}", f"u{i % 10}", encode_png(Image.fromarray(colours[i])), None, caption(i))
            for i in range(NUM_RECORDS)
        )
        metrics[split] = {"root": write_shards(run.stage_folder("filter") / split, split, records, shard_size=20).root}
    filtered = load_stage(ROOT / "configs/shapes/20_filter.yaml")
    run.write_manifest(filtered, inputs={}, started=now(), seconds=0.0, metrics={"splits": metrics}, outputs={})
    create_key_file(folder / "secret.key")
    return folder


def pretrain(*overrides: str) -> TrainStage:
    stage = load_stage(ROOT / "configs/shapes/30_pretrain.yaml", [*SMALL, *overrides])
    assert isinstance(stage, TrainStage)
    return stage


def finetune(*overrides: str) -> TrainStage:
    stage = load_stage(ROOT / "configs/shapes/40_finetune_dp.yaml", [*SMALL, *PRIVATE, *overrides])
    assert isinstance(stage, TrainStage)
    return stage


class AsRank(World):
    """One of several ranks, of which there is no other: none of these captions has to be read to know its length."""

    def gather(self, value: object) -> list[Any]:
        return [value]

    def sum(self, values: Tensor) -> Tensor:
        return values


def documents(prepared: Path, stage: TrainStage, rank: int = 0, size: int = 1) -> Documents:
    dataset = ShardDataset(prepared / "filter" / stage.split, stage.split)
    assert isinstance(stage.model, UnifiedConfig)
    batches = batches_of(stage, stage.model, AsRank(rank, size, torch.device("cpu")), dataset)
    assert isinstance(batches, Documents)
    return batches


def network(stage: TrainStage) -> nn.Module:
    assert stage.model is not None
    model, generator = build_module(stage.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def by_one(*records: int) -> np.ndarray:
    return np.array(records, np.int64)[:, None]


# --- what a step's losses are ---


def step_over(batches: list[Documents], model: nn.Module, step: int, slots: np.ndarray) -> tuple[float, list[Tensor]]:
    """The step's loss and gradients, its ranks one after another."""
    model.zero_grad()
    loss, counts = 0.0, set[int]()
    for of_rank in batches:
        loaded = of_rank.load(step, slots)
        counts.add(len(loaded.laid))
        for batch in of_rank.of(loaded):
            losses_B = batch.losses(model) * batch.present_B
            (losses_B.sum() / len(slots)).backward()
            loss += float(losses_B.detach().sum() / len(slots))
    assert len(counts) == 1, "all ranks run equally many microbatches"
    return loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("overrides", [(), ("objective.noise_draws=2", "train.microbatch_size=1")])
def test_a_public_step_is_the_same_on_any_number_of_ranks(prepared: Path, overrides: tuple[str, ...]) -> None:
    stage = pretrain(*overrides, "objective.balancing=row")
    model, slots = network(stage), by_one(*range(3, 16))
    loss, gradients = step_over([documents(prepared, stage)], model, 1, slots)
    for size in (2, 3):
        ranks = [documents(prepared, stage, rank, size) for rank in range(size)]
        other_loss, others = step_over(ranks, model, 1, slots)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for mine, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_public_steps_loss_is_over_its_tokens_wherever_they_lie(prepared: Path) -> None:
    stage = pretrain("objective.patches_weight=3", "objective.z_weight=0", "train.microbatch_size=100")
    model, slots = network(stage), by_one(4, 9, 17)
    alone, packed = documents(prepared, stage), documents(prepared, stage)
    with torch.no_grad():
        loss = sum(float(batch.losses(model).sum()) for batch in packed.of(packed.load(0, slots))) / 3
        text = patches = 0.0
        for record in (4, 9, 17):
            (batch,) = alone.of(alone.load(0, by_one(record)))
            batch.losses(model)
            figures = alone.figures()
            text += figures["text_loss"] * (len(caption(record)) + 1)
            patches += figures["patches_loss"] * 4
    expected = text / sum(len(caption(record)) + 1 for record in (4, 9, 17)) + 3 * patches / 12
    assert loss == pytest.approx(expected, rel=1e-5)


def test_every_record_gives_a_document_for_each_task_and_some_are_drawn_without_their_caption(prepared: Path) -> None:
    loaded = documents(prepared, pretrain("train.microbatch_size=100")).load(2, by_one(*range(20)))
    (laid,) = loaded.laid
    lengths = [int((row == number).sum()) for row in laid.batch.document_BN for number in range(int(row.max()) + 1)]
    told = Counter(len(caption(record)) + 8 for record in range(20))
    drawn = Counter(lengths) - told
    bare = drawn.pop(8)
    assert bare + drawn.total() == 20 and drawn <= told and 1 <= bare <= 12
    assert sorted(set(laid.slots_BR[laid.slots_BR >= 0].tolist())) == list(range(20))
    config = documents(prepared, pretrain()).config
    assert loaded.flops == sum(config.forward_flops(1, length) for length in lengths)


def test_draws_of_noise_share_a_document_and_are_the_records_own(prepared: Path) -> None:
    (one,) = documents(prepared, pretrain()).load(3, by_one(5)).laid
    (three,) = documents(prepared, pretrain("objective.noise_draws=3")).load(3, by_one(5, 6)).laid[:1]
    noise_1, noise_3 = (laid.noise_BNF[laid.batch.learnt_patches_BN].view(-1, 4, 48) for laid in (one, three))
    assert (len(noise_1), len(noise_3)) == (1, 6)
    assert torch.equal(noise_1[0], noise_3[0]) or torch.equal(noise_1[0], noise_3[3])
    assert len(set(three.times_BI[three.batch.noised_BI].tolist())) == 6


def test_a_stage_may_teach_one_task_alone(prepared: Path) -> None:
    stage = pretrain("documents={row_tokens: 70, tasks: [text_to_image]}")
    batches, model = documents(prepared, stage), network(stage)
    for batch in batches.of(batches.load(0, by_one(1, 2))):
        batch.losses(model)
    figures = batches.figures()
    assert figures["text_loss"] == 0 < figures["patches_loss"]


def test_the_experts_load_is_told_in_public(prepared: Path) -> None:
    stage = pretrain()
    batches, model = documents(prepared, stage), network(stage)
    for batch in batches.of(batches.load(0, by_one(*range(12)))):
        batch.losses(model)
    assert 0 < batches.figures()["expert_load_cv"] <= 1
    assert set(batches.figures()) == {"text_loss", "patches_loss"}  # nothing since


# --- private steps ---

USERS = ("privacy.unit=user", "privacy.max_records_per_user=3", "documents={row_tokens: 200}")


def clipped_sum(batches: list[Documents], model: nn.Module, slots: np.ndarray) -> Tensor:
    """What a private step over these units would hand to the noise, from one rank after another."""
    model.zero_grad()
    for of_rank in batches:
        clipper = make_clipper("two_pass", model, 0.05)
        for batch in of_rank.of(of_rank.load(0, slots)):
            clipper.accumulate(OneProcess(model), batch.losses, batch.present_B, last=batch.last)  # type: ignore[arg-type]
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def test_a_clipped_sum_is_the_same_on_any_number_of_ranks_and_with_any_bounds(prepared: Path) -> None:
    stage = finetune("objective.noise_draws=2")
    bounded = finetune("objective.noise_draws=2", "documents={row_tokens: 70, bounds: [36, 44, 70]}")
    model, slots = network(stage), by_one(0, 3, 7, 14, 15, 22, 29)
    expected = clipped_sum([documents(prepared, stage)], model, slots)
    found = clipped_sum([documents(prepared, bounded, rank, 3) for rank in range(3)], model, slots)
    assert 0.1 < expected.norm() <= 7 * 0.05
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_a_unit_that_leaves_the_split_changes_nothing_of_the_others(prepared: Path, tmp_path: Path) -> None:
    """Nor what noise, times and dropped captions they meet, though all of them move up by a place."""
    stage = finetune("objective.noise_draws=2")
    model, whole = network(stage), ShardDataset(prepared / "filter/private", "private")
    left = (whole.read(index) for index in range(1, NUM_RECORDS))
    write_shards(tmp_path / "filter/private", "private", left, shard_size=20)
    expected = clipped_sum([documents(prepared, stage)], model, by_one(*range(1, NUM_RECORDS)))
    found = clipped_sum([documents(tmp_path, stage)], model, by_one(*range(NUM_RECORDS - 1)))
    assert expected.norm() > 0.5
    assert (found - expected).norm() < 1e-5 * expected.norm(), "draws by place move it by twice the bound"


def test_a_units_loss_is_its_records_mean_and_nobody_elses_matter(prepared: Path) -> None:
    stage = finetune(*USERS, "train.microbatch_size=4")
    batches, model = documents(prepared, stage), network(stage)
    slots = np.array([[3, -1, -1], [10, 7, 5], [20, 21, -1]])
    with torch.no_grad():
        together = {
            tuple(slots_R.tolist()): loss
            for batch in batches.of(batches.load(0, slots))
            for slots_R, loss in zip(batch.slots_BR, batch.losses(model).tolist(), strict=True)
        }
        for slots_R in slots:
            alone = list(batches.of(batches.load(0, slots_R[None])))
            assert alone[0].losses(model).tolist() == pytest.approx([together[tuple(slots_R.tolist())]], rel=1e-5)
            records = [list(batches.of(batches.load(0, by_one(n)))) for n in slots_R[slots_R >= 0]]
            each = [float(batch.losses(model).sum()) for (batch,) in records]
            assert together[tuple(slots_R.tolist())] == pytest.approx(np.mean(each), rel=1e-5)


def test_what_finds_no_room_in_a_users_row_is_left_out_and_told_the_operator(prepared: Path) -> None:
    stage = finetune(*USERS[:2], "documents={row_tokens: 60}", "objective.label_dropout=0")
    batches = documents(prepared, stage)
    (batch,) = batches.of(batches.load(0, np.array([[10, 11, 12]])))
    assert batch.present_B.tolist() == [True]
    assert batches.figures()["documents_left_out"] == 4


def test_a_draw_of_nobody_is_one_microbatch_of_padding(prepared: Path) -> None:
    stage = finetune()
    batches, model = documents(prepared, stage), network(stage)
    (batch,) = batches.of(batches.load(0, np.empty((0, 1), np.int64)))
    assert (batch.present_B.tolist(), batch.last) == ([False], True)
    assert clipped_sum([batches], model, np.empty((0, 1), np.int64)).abs().max() == 0


# --- captions that do not fit, and what is refused ---

SHORT = MODEL.replace(f"max_caption_tokens: {LONGEST}", "max_caption_tokens: 8")


def test_captions_too_long_are_cut_or_left_out_and_counted(prepared: Path) -> None:
    too_long = sum(len(caption(index)) > 8 for index in range(NUM_RECORDS))
    cut = documents(prepared, pretrain(SHORT, "train.microbatch_size=100"))
    assert cut.facts() == {"captions_truncated": too_long, "records_left_out": 0}
    (laid,) = cut.load(0, by_one(9)).laid  # "words of a c"
    learnt = laid.batch.targets_BN[laid.batch.weights_BN > 0]
    assert bytes(learnt.tolist()) == b"words of"  # and no end: there is none
    without = documents(prepared, pretrain(SHORT, "documents={row_tokens: 70, too_long: leave_out}"))
    assert without.facts() == {"captions_truncated": 0, "records_left_out": too_long}
    assert sum(float(laid.batch.weights_BN.sum()) for laid in without.load(0, by_one(9, 2)).laid) == len(caption(2)) + 1
    assert [batch.present_B.tolist() for batch in without.of(without.load(0, by_one(9)))] == [[False]]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("documents={row_tokens: 27}",), "row_tokens is 27, and a document may have 28 tokens"),
        (("documents=null",), "documents is missing, and the model is unified"),
        (("documents={row_tokens: 70, bounds: [40, 60]}",), "bounds are \\[40, 60\\]"),
        (("model={name: dit, size: nano, image_size: 8, channels: 3, num_classes: 3}",), "documents is given"),
        ((MODEL.replace("image_size: 8", "image_size: 9"),), "image_size 9 is not a multiple of patch_size 4"),
        ((MODEL.replace("num_experts", "vocab_size: 9, num_experts"),), "vocab_size is 9, but tokenizer bytes has 261"),
        ((MODEL.replace("num_experts", "tokenizer: none.json, num_experts"),), "none.json is no tokenizers file"),
    ],
)
def test_what_does_not_go_together_is_refused(prepared: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        documents(prepared, pretrain(*overrides))


def test_a_balance_that_couples_records_is_refused_before_any_is_read(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardDataset, "read", lambda *_: pytest.fail("a private record was read"))
    with pytest.raises(ValueError, match="couples records"):
        documents(prepared, finetune(SHORT, "objective.balancing=batch"))


@pytest.mark.parametrize("private", [False, True])
def test_records_without_a_caption_are_refused_by_name_before_anything_is_trained_or_charged(
    prepared: Path, tmp_path: Path, private: bool
) -> None:
    stage = finetune() if private else pretrain()
    run, image = copy_of(prepared, tmp_path / "run"), encode_png(Image.new("RGB", (8, 8)))
    texts = [None if index == 7 else "" if index == 9 else "words" for index in range(NUM_RECORDS)]
    records = (Record(f"r{index}", f"r{index}", image, None, text) for index, text in enumerate(texts))
    root = write_shards(run.path / "filter" / stage.split, stage.split, records, shard_size=20).root
    content = json.loads(run.manifest_path("filter").read_text())
    content["metrics"]["splits"][stage.split]["root"] = root
    run.manifest_path("filter").write_text(json.dumps(content))
    said = f"2 of 30 records of split {stage.split} have no caption, or an empty one, such as r7: ingest them with"
    with pytest.raises(ValueError, match=said):
        trained(run, stage)
    assert not (run.path / "ledger.jsonl").exists() and not (run.path / stage.name / "checkpoints").exists()


def test_the_recipes_tokenizer_has_a_token_for_each_word_that_tells_of_a_scene() -> None:
    tokenizer = open_tokenizer(str(ROOT / "configs/shapes/tokenizer.json"))
    encoded = [tokenizer.encode(scene.caption).tokens for scene in SCENES]
    assert [tokenizer.decode(tokens) for tokens in encoded] == [scene.caption for scene in SCENES]
    assert {len(tokens) for tokens in encoded} == {7}
    assert not set(tokenizer.specials.values()).intersection(tokenizer.encode("<|pad|> red").tokens)


# --- whole stages ---


def trained(run: RunFolder, stage: TrainStage) -> dict[tuple[str, str], Tensor]:
    train(stage, run, join_world(), run.next_fencing_epoch(run.ledger_path(stage)), Heartbeat(0))
    checkpoint = latest(run.path / stage.name / "checkpoints")
    assert checkpoint is not None and checkpoint.step == stage.train.steps
    assert checkpoint.state["model"]["name"] == "unified"
    return {key: checkpoint.read(*key) for key in checkpoint.tensors()}


def copy_of(run: Path, to: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(run, to)), "shapes")


def test_a_stop_and_a_resume_end_bit_for_bit_as_a_run_without(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = pretrain()
    expected = trained(copy_of(prepared, tmp_path / "unbroken"), stage)
    rows = list(read_metrics(tmp_path / "unbroken" / "pretrain"))
    assert [row["step"] for row in rows] == [1, 3]
    assert all(row[name] > 0 for row in rows for name in ("text_loss", "patches_loss", "expert_load_cv"))
    assert (tmp_path / "unbroken" / "pretrain" / "expert_load.png").is_file()
    stopped, step_once = copy_of(prepared, tmp_path / "stopped"), PublicStep.__call__

    def stop_after_the_second(self: PublicStep, step: int) -> Any:
        report = step_once(self, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patched:
        patched.setattr(PublicStep, "__call__", stop_after_the_second)
        with pytest.raises(Preempted):
            trained(stopped, stage)
    found = trained(stopped, stage)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_model_with_a_tokenizers_file_is_opened_from_anywhere_by_the_stages_own_copy(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its recipe names the file from where it was trained, and that is gone."""
    original = ROOT / "configs/shapes/tokenizer.json"
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    shutil.copy(original, "words.json")
    run = copy_of(prepared, tmp_path / "run")
    stage = pretrain(MODEL.replace("num_experts", "tokenizer: words.json, num_experts"), "train.steps=1")
    run_stage(stage, run, None, Heartbeat(0))
    onward = stage.model_copy(update={"name": "onward", "init_from": "pretrain", "model": None})
    (tmp_path / "there").rename(tmp_path / "gone")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_stage(onward, run, None, Heartbeat(0))
    moved = RunFolder.open(run.path.rename(tmp_path / "moved"), "shapes")
    for name in ("pretrain", "onward"):
        manifest, copy = moved.read_manifest(name), moved.path / name / "tokenizer.json"
        assert manifest is not None and f"{name}/tokenizer.json" in manifest["outputs"]
        assert copy.read_bytes() == original.read_bytes()
        opened = open_model(f"{moved.path}:{name}")
        assert isinstance(opened.model, Unified)
        assert len(layout_of(opened.model.config).tokenizer.encode("two red rings").tokens) == 3
    config, _, _ = load_average(moved, "onward")
    section, files = exported(config)
    assert section["tokenizer"] == "tokenizer.json" and files == {"tokenizer.json": original.read_bytes()}
    copy.write_bytes(copy.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=f"tokenizer_sha256 is .*, but tokenizer {copy} has .*: restore that file"):
        open_model(str(moved.path))
    copy.unlink()
    with pytest.raises(ValueError, match=f"{copy} is no tokenizers file"):
        open_model(str(moved.path))


def test_a_tokenizers_file_that_changes_while_a_stage_begins_is_refused(prepared: Path, tmp_path: Path) -> None:
    words = Path(shutil.copy(ROOT / "configs/shapes/tokenizer.json", tmp_path / "words.json"))
    stage = pretrain(MODEL.replace("num_experts", f"tokenizer: {words}, num_experts"))
    words.write_bytes(words.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"words\.json was changed since it was read"):
        trained(copy_of(prepared, tmp_path / "run"), stage)


@pytest.mark.parametrize("operator", [False, True])
def test_a_private_stage_shows_raw_figures_to_the_operator_alone(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operator: bool
) -> None:
    draws = [np.array([4, 9]), np.empty(0, np.int64), np.array([1]), np.array([2, 3, 5])]
    monkeypatch.setattr(PoissonSampler, "draw", lambda _, step, *rest: draws[step])
    run = copy_of(prepared, tmp_path / "run")
    trained(run, finetune(f"privacy.operator_metrics={str(operator).lower()}"))
    rows = list(read_metrics(run.path / "finetune_dp"))
    shown = {name for row in rows if not row.get("operator_only") for name in row}
    assert shown == {"step", "loss", "epsilon", "images_per_s", "tflops", "mfu"}
    assert [row["step"] for row in rows if "images_per_s" in row] == [3], "a step's time tells how many units it had"
    raw = {name for row in rows if row.get("operator_only") for name in row} - {"step", "operator_only"}
    counted = {"captions_truncated", "records_left_out", "documents_left_out"}
    assert raw == ({"text_loss", "patches_loss", "expert_load_cv", *counted} if operator else set())
    assert not (run.path / "finetune_dp" / "expert_load.png").exists()
    assert read_ledger(run.path / "ledger.jsonl").num_charges == 4  # the empty draw too
