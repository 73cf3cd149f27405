"""The audit recomputes a filter stage's Merkle root from its shards, and holds ledger and checkpoints against it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from privacy.audit import AuditReport, audit_run
from privacy.pii.manifests import manifest_path, read_manifest
from tests.privacy.audited_run import (
    STAGE,
    edit_manifest,
    public_stages,
    save_checkpoint,
    train_privately,
    write_manifest,
)
from tests.privacy.filtered_shards import digest, put, root_now, write_filtered

BINDS = "the shards of filter are those that its Merkle root binds"
NAMES = f"the ledger and the checkpoints of {STAGE} name the filtered shards it was trained on"


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose filter stage has shards; its private stage, trained on them, names their root."""
    run = public_stages(tmp_path_factory.mktemp("filtered") / "run")
    metrics = write_filtered(run / "filter")
    write_manifest(run, "filter", "filter", ("ingest",), metrics=metrics)
    named = {"shards_root": metrics["shards_root"]}
    train_privately(run, plan=named, saved=named, dataset_root=metrics["splits"]["private"]["root"])
    return run


@pytest.fixture
def run(filtered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filtered, tmp_path / "run"))


def claims(report: AuditReport) -> dict[str, tuple[bool, str]]:
    return {claim.claim: (claim.holds, claim.evidence) for claim in report.claims}


def test_a_whole_run_holds_and_says_that_every_byte_was_read(run: Path) -> None:
    report = audit_run(run)
    assert report.exit_code == 0, report.verdict
    holds, evidence = claims(report)[BINDS]
    assert holds and "from 4 shard manifests, and from every byte of the 7 records" in evidence
    assert "2 checkpoints name it" in claims(report)[NAMES][1]


def test_one_bit_of_one_record_makes_it_false_and_names_the_shard(run: Path) -> None:
    tar = run / "filter" / "private" / "private-00001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    holds, evidence = claims(audit_run(run))[BINDS]
    assert not holds and "private-00001.tar" in evidence
    assert claims(audit_run(run, shards=False))[BINDS][0], "the manifests alone are whole"


def test_shards_that_are_elsewhere_leave_the_manifests_to_be_checked(run: Path) -> None:
    for path in (run / "filter").glob("*/*.tar"):
        path.unlink()
    holds, evidence = claims(audit_run(run))[BINDS]
    assert holds and "the shards were not read: they are not here" in evidence
    manifest_path(run / "filter", "private", "private-00002").unlink()
    holds, evidence = claims(audit_run(run))[BINDS]
    assert not holds and "the 3 shard manifests" in evidence


def test_one_shard_that_is_gone_is_named(run: Path) -> None:
    (run / "filter" / "private" / "private-00000.tar").unlink()
    holds, evidence = claims(audit_run(run))[BINDS]
    assert not holds and "private-00000.tar cannot be read" in evidence


def test_manifests_rewritten_together_with_the_stages_are_shown_by_the_ledger(run: Path) -> None:
    """Who changes a shard's manifest and the stage's, so that they agree, has the ledger and the saves against them."""
    path = manifest_path(run / "filter", "private", "private-00002")
    put(run / "filter", **read_manifest(path).model_dump() | {"policy_sha256": "f" * 64})
    edit_manifest(run, "filter", lambda manifest: manifest["metrics"].update(shards_root=root_now(run / "filter")))
    found = claims(audit_run(run))
    assert found[BINDS][0]
    holds, evidence = found[NAMES]
    assert not holds and "planned blake3:" in evidence and "step-00000002" in evidence


@pytest.mark.parametrize(
    ("edit", "seen"),
    [
        (lambda metrics: metrics["splits"]["private"].update(kept=6), "says 6 records of private kept"),
        (lambda metrics: metrics["splits"]["private"].update(root=digest(b"other")), "split private have root"),
        (lambda metrics: metrics["splits"].pop("public"), "its shard manifests name others"),
        (lambda metrics: metrics.update(shards_root=digest(b"other")), "and not blake3:"),
    ],
)
def test_a_stage_manifest_that_says_something_else_is_found_out(run: Path, edit: Any, seen: str) -> None:
    edit_manifest(run, "filter", lambda manifest: edit(manifest["metrics"]))
    holds, evidence = claims(audit_run(run))[BINDS]
    assert not holds and seen in evidence


def test_a_run_from_before_there_were_roots_has_nothing_to_claim(tmp_path: Path) -> None:
    run = public_stages(tmp_path / "run")
    train_privately(run)
    report = audit_run(run)
    assert report.exit_code == 0 and BINDS not in claims(report) and NAMES not in claims(report)


def test_a_save_that_names_other_shards_is_named(run: Path) -> None:
    save_checkpoint(run, 3, None)
    assert claims(audit_run(run))[NAMES][0], "one of a stage that charges nothing says nothing"
    head = json.loads((run / STAGE / "manifest.json").read_text())["ledger"]["head"]
    save_checkpoint(run, 4, head, shards_root=digest(b"other"))
    holds, evidence = claims(audit_run(run))[NAMES]
    assert not holds and "names blake3:" in evidence
