"""What travels with the weights says on which filtered shards they were trained, by a root that can be recomputed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.export import write_export
from models.unified_objective import UnifiedObjective
from models.vae import VAE, VAEConfig
from privacy.audit import AuditReport
from tests.train.unified_models import IMAGE_SIZE, config, filled
from train import ROOT
from train.autoencoding import Decoder
from train.card import model_card, privacy_card
from train.config import LatentsStage
from train.generation import exported
from train.recipe import load_stage
from train.run_folder import RunFolder, now

SHARDS_ROOT = f"blake3:{'a' * 64}"
POLICY = "b" * 64


def finish(run: RunFolder, stage: str, **metrics: object) -> None:
    config = load_stage(ROOT / f"configs/digits/{stage}.yaml")
    run.write_manifest(config, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})


def test_the_cards_name_the_merkle_root_and_the_policy_of_every_filter_that_was_read(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "run", "digits")
    detectors = {"patterns": "1"}
    finish(run, "20_filter", shards_root=SHARDS_ROOT, policy_sha256=POLICY, detectors=detectors, entities={"email": 3})
    finish(run, "30_pretrain", steps=7)
    manifest = run.read_manifest("pretrain")
    assert manifest is not None
    card = privacy_card(AuditReport(str(run.path)), manifest, run)
    assert card["filter"] == [
        {"stage": "filter", "shards_root": SHARDS_ROOT, "policy_sha256": POLICY, "detectors": detectors}
    ]
    assert card["trained_on"][0]["data_from"] == "filter"
    json.dumps(card)
    page = model_card({"model": manifest["config"]["model"]}, card, manifest, run)
    assert f"Merkle root over its shards' manifests: `{SHARDS_ROOT}`" in page and POLICY in page


def test_a_run_filtered_before_there_were_roots_has_a_card_too(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "run", "digits")
    finish(run, "20_filter")
    finish(run, "30_pretrain", steps=7)
    manifest = run.read_manifest("pretrain")
    assert manifest is not None
    card = privacy_card(AuditReport(str(run.path)), manifest, run)
    assert card["filter"][0]["shards_root"] is None
    assert "Merkle" not in model_card({"model": manifest["config"]["model"]}, card, manifest, run)


@pytest.mark.parametrize("latents", [False, True])
def test_a_card_says_how_the_weights_are_used_and_what_it_says_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latents: bool
) -> None:
    """Of a model of latents, too, which needs its VAE for images in and images out."""
    run = RunFolder.open(tmp_path / "run", "shapes")
    kind = LatentsStage(name="latents", stage="latents", data_from="filter", init_from="vae")
    data = kind if latents else load_stage(ROOT / "configs/shapes/20_filter.yaml")
    run.write_manifest(data, inputs={}, started=now(), seconds=0.0, metrics={}, outputs={})
    trained = load_stage(ROOT / "configs/shapes/30_pretrain.yaml").model_copy(update={"data_from": data.name})
    run.write_manifest(trained, inputs={}, started=now(), seconds=0.0, metrics={"steps": 7}, outputs={})
    manifest = run.read_manifest("pretrain")
    assert manifest is not None
    model = filled(config(channels=4, image_size=IMAGE_SIZE // 2, patch_size=4) if latents else config())
    described = {"model": exported(model.config)[0], "objective": UnifiedObjective().model_dump(), "source": "test"}
    write_export(tmp_path / "model", model.state_dict(), described)
    if latents:
        vae = VAE(VAEConfig(image_size=IMAGE_SIZE, channels=3, latent_channels=4, widths=(4, 8), norm_groups=2))
        vae.init_weights(torch.Generator().manual_seed(0))
        Decoder(vae.eval(), (0.0,) * 4, (1.0,) * 4).write(tmp_path / "model" / "vae")
    page = model_card(described, privacy_card(AuditReport(str(run.path)), manifest, run), manifest, run)
    assert ("4 x 8 x 8 latents of images" if latents else "3 x 16 x 16 images") in page
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0].replace('"steps": 30', '"steps": 1'), made)
    assert made["images"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE) and len(made["captions"]) == 1
