"""A unified model from drawn shapes to its export through the real stages: what is measured, attacked, handed out."""

import json

import pytest
import torch
from PIL import Image as Picture

from models.packed import Image
from models.unified import Unified
from tests.integration.recipe_run import run_recipe
from train.generation import build, draw, load_export, objective_of, write
from train.loop import load_average
from train.run_folder import RunFolder
from train.sampling import open_model
from train.unified_evaluation import Source, prompt

EVERYWHERE = "parallel: {backend: single}, log: {wandb: disabled}"
DOCUMENTS = "documents: {row_tokens: 64}"
RECIPE = {
    "10_ingest": "{stage: ingest, source: {kind: shapes, records: {public: 96, private: 64, test: 64}, image_size: 16, "
    "max_count: 1}}",
    "20_pretrain": "{stage: pretrain, data_from: ingest, split: public, model: {name: unified, width: 32, depth: 1, "
    "heads: 2, channels: 3, image_size: 16, patch_size: 8, max_caption_tokens: 40, modality_experts: true}, "
    f"{DOCUMENTS}, train: {{steps: 8, batch_size: 16, microbatch_size: 32, seed: 0}}, optim: {{learning_rate: 1e-3}}, "
    f"{EVERYWHERE}}}",
    "30_finetune_dp": "{stage: finetune_dp, init_from: pretrain, data_from: ingest, split: private, "
    f"{DOCUMENTS}, train: {{steps: 3, batch_size: 16, microbatch_size: 32, seed: 0}}, optim: {{learning_rate: 1e-3}}, "
    f"privacy: {{target_epsilon: 8, max_grad_norm: 1, replay_steps: 1, clipping: two_pass}}, {EVERYWHERE}}}",
    "40_eval": "{stage: eval_unified, init_from: [pretrain, finetune_dp], data_from: ingest, captions: 8, images: 4, "
    "sampler_steps: 2, reference_images: 40, at_least: {finetune_dp: {captions_exact.test: 0.9}}}",
    "50_audit": "{stage: audit, init_from: finetune_dp, data_from: ingest, extraction: {samples: 8, sampler_steps: 2}, "
    "empirical: {canaries: 200, guesses: 100, steps: 10, sampling_rate: 0.5}}",
    "60_export": "{stage: export, init_from: finetune_dp}",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_recipe(tmp_path_factory.mktemp("unified_job"), RECIPE)


@pytest.mark.slow
def test_both_models_are_measured_side_by_side_and_a_missed_threshold_is_said(run: RunFolder) -> None:
    manifest = json.loads(run.manifest_path("eval").read_text())
    rows = {row["name"]: row for row in manifest["metrics"]["rows"]}
    for model in ("pretrain", "finetune_dp"):
        for split in ("test", "public"):
            assert rows[f"eval.{model}.shapes_recognised_real.{split}"]["value"] == 1
            assert rows[f"eval.{model}.bits_per_byte.{split}"]["value"] > 0
            for picture in ("images", "captions"):
                assert min(Picture.open(run.path / "eval" / f"{model}_{split}_{picture}.png").size) > 100
    assert [name for name, row in rows.items() if row.get("ok") is False] == ["eval.finetune_dp.captions_exact.test"]
    assert manifest["metrics"]["headline"]["bits_per_byte.test"].startswith("pretrain ")
    assert len(manifest["metrics"]["classifier_sha256"]) == 64


@pytest.mark.slow
def test_the_audit_attacks_the_engine_and_searches_the_samples(run: RunFolder) -> None:
    metrics = json.loads(run.manifest_path("audit").read_text())["metrics"]
    assert metrics["empirical"]["holds"], metrics["empirical"]["verdict"]
    assert metrics["extraction"]["split"] == "public" and metrics["extraction"]["samples"]["num_images"] == 8


@pytest.mark.slow
def test_the_export_has_its_cards_and_gives_the_same_samples_and_captions(run: RunFolder) -> None:
    folder = run.path / "export" / "model"
    config, weights, _ = load_average(run, "finetune_dp")
    mine = build(config, weights)
    theirs, objective, _ = load_export(folder)
    assert isinstance(mine, Unified) and isinstance(theirs, Unified)
    assert objective == objective_of(run, "finetune_dp", config)
    records = Source.of(run, "ingest").records("test", 3, 0, mine.config)
    how = {"seed": 1, "sampler": "heun", "steps": 3, "guidance": 2.0}
    images = [
        draw(model, objective, [prompt(model, caption) for caption in records.captions], **how)
        for model in (mine, theirs)
    ]
    assert torch.equal(*images)
    texts = [write(model, [[Image(image)] for image in records.inputs]) for model in (mine, theirs)]
    assert texts[0] == texts[1]
    page = (folder / "MODEL_CARD.md").read_text()
    assert page.startswith("# Unified model of text and images\n") and "(ε, δ) = " in page
    assert json.loads((folder / "privacy_card.json").read_text())["guarantee"]["epsilon"] <= 8


@pytest.mark.slow
def test_a_person_opens_the_last_model_a_named_one_or_the_export(run: RunFolder) -> None:
    last, first, export = (open_model(f"{run.path}{stage}").name for stage in ("", ":pretrain", ":export"))
    assert last == "recipe, stage finetune_dp" and first == "recipe, stage pretrain" and "export/model" in export
    with pytest.raises(ValueError, match="finished stages with a model are pretrain, finetune_dp, export"):
        open_model(f"{run.path}:ingest")
