"""From drawn shapes to a unified model on their latents, through the real stages to what a person draws with it."""

from pathlib import Path

import pytest
import torch
from PIL import Image as Picture

from models.packed import Image
from models.unified import Unified
from tests.integration.recipe_run import run_recipe
from train.autoencoding import decoder_of
from train.generation import draw, objective_of, write
from train.run_folder import RunFolder
from train.sampling import Opened, open_model
from train.unified_evaluation import Source, prompt

EVERYWHERE = "parallel: {backend: single}, log: {wandb: disabled}"
DOCUMENTS = "documents: {row_tokens: 96}"
RECIPE = {
    "10_ingest": "{stage: ingest, source: {kind: shapes, records: {public: 96, private: 64, test: 64}, image_size: 16, "
    "max_count: 1}}",
    "20_vae": "{stage: pretrain, data_from: ingest, split: public, model: {name: vae, image_size: 16, channels: 3, "
    "latent_channels: 4, widths: [8, 16]}, train: {steps: 10, batch_size: 16, microbatch_size: 16, seed: 0}, "
    f"optim: {{learning_rate: 4e-3}}, {EVERYWHERE}}}",
    "30_latents": "{stage: latents, init_from: vae, data_from: ingest}",
    "40_pretrain": "{stage: pretrain, data_from: latents, split: public, model: {name: unified, width: 32, depth: 1, "
    "heads: 2, channels: 4, image_size: 8, patch_size: 2, max_caption_tokens: 40, modality_experts: true}, "
    f"{DOCUMENTS}, objective: {{noise_draws: 2}}, train: {{steps: 8, batch_size: 16, microbatch_size: 32, seed: 0}}, "
    f"optim: {{learning_rate: 1e-3}}, {EVERYWHERE}}}",
    "50_finetune_dp": "{stage: finetune_dp, init_from: pretrain, data_from: latents, split: private, "
    f"{DOCUMENTS}, train: {{steps: 3, batch_size: 16, microbatch_size: 32, seed: 0}}, optim: {{learning_rate: 1e-3}}, "
    f"privacy: {{target_epsilon: 8, max_grad_norm: 1, replay_steps: 1, clipping: two_pass}}, {EVERYWHERE}}}",
    "60_eval": "{stage: eval_unified, init_from: [pretrain, finetune_dp], data_from: latents, captions: 8, images: 4, "
    "sampler_steps: 2, reference_images: 40, retrieval: true}",
    "70_audit": "{stage: audit, init_from: finetune_dp, data_from: latents, extraction: {samples: 8, sampler_steps: 2},"
    " empirical: {canaries: 200, guesses: 100, steps: 10, sampling_rate: 0.5}}",
    "80_export": "{stage: export, init_from: finetune_dp}",
}
HOW = {"seed": 1, "sampler": "heun", "steps": 3, "guidance": 2.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_recipe(tmp_path_factory.mktemp("unified_latents"), RECIPE)


def drawn_by(opened: Opened, captions: list[str]) -> torch.Tensor:
    assert isinstance(opened.model, Unified)
    prompts = [prompt(opened.model, caption) for caption in captions]
    return draw(opened.model, opened.objective, prompts, decode=opened.decode, **HOW)  # type: ignore[arg-type]


@pytest.mark.slow
def test_figures_are_of_decoded_images_and_real_ones_of_pixels(run: RunFolder) -> None:
    manifest = run.read_manifest("eval")
    assert manifest is not None
    rows = {row["name"]: row["value"] for row in manifest["metrics"]["rows"]}
    for model in ("pretrain", "finetune_dp"):
        assert rows[f"eval.{model}.shapes_recognised_real.test"] == 1, "real images are the pixels, not their latents"
        assert rows[f"eval.{model}.bits_per_byte.test"] > 0
        assert f"eval.{model}.recall_at_1.test" in rows
        assert min(Picture.open(run.path / "eval" / f"{model}_test_images.png").size) > 100


@pytest.mark.slow
def test_the_audit_attacks_the_engine_on_latents_and_searches_the_decoded_samples(run: RunFolder) -> None:
    manifest = run.read_manifest("audit")
    assert manifest is not None, "which would be missing where a claim is false"
    assert manifest["metrics"]["empirical"]["holds"], manifest["metrics"]["empirical"]["verdict"]
    assert manifest["metrics"]["extraction"]["samples"]["num_images"] == 8


@pytest.mark.slow
def test_the_run_and_its_export_draw_and_tell_alike(run: RunFolder) -> None:
    mine, theirs = (open_model(f"{run.path}{stage}") for stage in ("", ":export"))
    assert isinstance(mine.model, Unified) and isinstance(theirs.model, Unified)
    assert theirs.objective == objective_of(run, "finetune_dp", mine.model.config)
    assert theirs.decode is not None and theirs.decode.image_shape == (3, 16, 16)
    assert decoder_of(run, "ingest") is None
    records = Source.of(run, "latents").records("test", 3, 0, mine.model.config)
    assert records.inputs.shape == (3, 4, 8, 8) and records.pixels.shape == (3, 3, 16, 16)
    images = [drawn_by(opened, records.captions) for opened in (mine, theirs)]
    assert images[0].shape == (3, 3, 16, 16) and torch.equal(*images)
    texts = [write(opened.model, [[Image(image)] for image in records.inputs]) for opened in (mine, theirs)]  # type: ignore[arg-type]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_person_draws_from_the_export_of_a_model_of_latents(run: RunFolder, tmp_path: Path) -> None:
    from scripts.sample import main

    out = tmp_path / "sample.png"
    given = ["--model", str(run.path / "export" / "model"), "--prompt", "a red circle", "--out", str(out)]
    assert main([*given, "--steps", "2"]) == 0
    assert min(Picture.open(out).size) > 16
