"""What travels with the weights says on which filtered shards they were trained, by a root that can be recomputed."""

import json
from pathlib import Path

from privacy.audit import AuditReport
from train import ROOT
from train.card import model_card, privacy_card
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
