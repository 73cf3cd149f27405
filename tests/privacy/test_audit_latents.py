"""The audit holds a latents stage against the shards it encoded: what was not among them cannot have come in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.vae import VAE, VAEConfig
from privacy.audit import AuditReport, audit_run
from privacy.audit.evidence import read_run
from privacy.audit.latents import latent_claims
from privacy.pii.latent_manifests import LatentManifest
from privacy.pii.manifests import merkle_root, read_leaf, read_leaves
from tests.privacy.audited_run import CONFIG, STAGE, edit_manifest, public_stages, train_privately, write_manifest
from tests.privacy.filtered_shards import digest, write_filtered
from train.latents import encode_shards, plan_latents
from train.shards import Record, index_name, read_shard, root_of, write_shard
from train.tasks import work

ROOT = Path(__file__).resolve().parents[2]
OF_FILTER = "the latents of latents are of the records of filter, each once, and of no others"
NAMES = f"the ledger and the checkpoints of {STAGE} name the latents it was trained on"
LEDGER = f"the ledger is for the data that {STAGE} trained on"


def vae(seed: int = 0) -> VAE:
    model = VAE(VAEConfig(image_size=4, channels=1, latent_channels=2, widths=(4, 8), norm_groups=2))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def encode(run: Path, source: str, model: VAE | None = None) -> dict[str, Any]:
    metrics = encode_shards(plan_latents(run / source, run / "latents", ["public", "private"], model or vae()), work)
    write_manifest(run, "latents", "latents", (source,), metrics=metrics, config={"data_from": source})
    return metrics


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that filtered, encoded, and trained privately on the latents."""
    run = public_stages(tmp_path_factory.mktemp("encoded") / "run")
    write_manifest(run, "filter", "filter", ("ingest",), metrics=write_filtered(run / "filter"))
    metrics = encode(run, "filter")
    named, root = {"shards_root": metrics["shards_root"]}, metrics["splits"]["private"]["root"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIG, "data_from", "latents")
        train_privately(run, plan=named, saved=named, dataset_root=root)
    return run


@pytest.fixture
def run(encoded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "run"))


def claims(report: AuditReport) -> dict[str, tuple[bool, str]]:
    return {claim.claim: (claim.holds, claim.evidence) for claim in report.claims}


def of_latents(run: Path, *, shards: bool = True, claim: str = OF_FILTER) -> tuple[bool, str]:
    """What the audit says of the latents, without what it says of all else."""
    (found,) = latent_claims(read_run(run), shards=shards)
    assert found.claim == claim
    return found.holds, found.evidence


def refused(run: Path) -> str:
    """What it says against them, which it must."""
    holds, evidence = of_latents(run)
    assert not holds
    return evidence


def rewrite(
    run: Path, change: Callable[[list[Record]], list[Record]], shard: str = "private-00000", **fields: Any
) -> None:
    """Change a latent shard's records, and all of the latents stage that says what they are, as somebody might who can
    write the whole folder.
    """
    tar = run / "latents" / shard.split("-", maxsplit=1)[0] / f"{shard}.tar"
    made = read_leaf(LatentManifest, tar.with_suffix(".latents.json"))
    digests = write_shard(tar, change([record for _, record in read_shard(tar) if record is not None]))
    files = {"tar": digest(tar.read_bytes()), "index": digest(Path(index_name(str(tar))).read_bytes())}
    told = {"records": len(digests), "bytes": tar.stat().st_size, "root": root_of(digests), **files, **fields}
    put(run, LatentManifest(**made.model_dump() | told))


def put(run: Path, manifest: LatentManifest) -> None:
    """A manifest in its place, and the stage's own so that it agrees."""
    folder = run / "latents"
    (folder / manifest.split / f"{manifest.shard}.latents.json").write_bytes(manifest.leaf())
    found = read_leaves(LatentManifest, folder)
    tars = sorted((folder / manifest.split).glob("*.tar"))
    root = root_of(record_digest for tar in tars for record_digest in digests_in(tar))

    def agree(content: dict[str, Any]) -> None:
        content["metrics"]["shards_root"] = merkle_root([one.leaf() for one in found])
        content["metrics"]["splits"][manifest.split]["root"] = root

    edit_manifest(run, "latents", agree)


def digests_in(tar: Path) -> list[str]:
    return [json.loads(line)["digest"] for line in Path(index_name(str(tar))).read_text().splitlines()]


def test_a_whole_run_holds_and_says_what_was_compared(run: Path) -> None:
    report = audit_run(run)
    assert report.exit_code == 0, [claim for claim in report.claims if not claim.holds]
    holds, evidence = claims(report)[OF_FILTER]
    assert (
        holds and "3 shard manifests, each of which names the index of its shard of filter; every byte of 7" in evidence
    )
    assert "2 checkpoints name it" in claims(report)[NAMES][1]


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda found: [replace(found[0], caption="Ann, 4 High St"), *found[1:]], "private0 has another class,"),
        (lambda found: [replace(found[0], unit="u9"), *found[1:]], "record private0 has another unit"),
        (lambda found: [found[0], replace(found[1], label=9), *found[2:]], "record private1 has another label"),
        (lambda found: [*found, replace(found[0], key="dropped")], "record dropped is none of those"),
        (lambda found: [replace(found[0], key="dropped"), *found[1:]], "dropped stands in the place of private0"),
        (lambda found: found[:-1], "record private2 of those that it was made from is not in it"),
        (lambda found: [found[1], found[0], *found[2:]], "record private1 stands in the place of private0"),
        (lambda found: [replace(found[0], svg=b"<svg/>"), *found[1:]], "or something else beside its latents"),
    ],
    ids=["caption", "unit", "class", "more", "another", "fewer", "order", "drawing"],
)  # fmt: skip
def test_a_record_that_was_not_encoded_from_its_like_is_named_though_all_manifests_agree(
    run: Path, change: Callable[[list[Record]], list[Record]], seen: str
) -> None:
    rewrite(run, change)
    evidence = refused(run)
    assert "latents/private/private-00000.tar" in evidence and seen in evidence
    assert of_latents(run, shards=False)[0], "the manifests alone agree"


def test_a_false_claim_ends_with_1_and_the_ledger_tells_of_what_was_rewritten_whole(run: Path) -> None:
    """Somebody who changes caption, manifests and stage alike has the source's bytes, ledger and saves against them."""
    rewrite(run, lambda found: [replace(found[0], caption="Ann, 4 High St"), *found[1:]])
    report = audit_run(run)
    assert report.exit_code == 1
    assert not any(claims(report)[claim][0] for claim in (OF_FILTER, NAMES, LEDGER))


def test_latents_of_what_the_filter_has_not_seen_are_known_by_their_source(run: Path) -> None:
    """Images that the filter has never seen, of the same keys and captions: the index tells them from the filter's."""
    shutil.copytree(run / "filter", run / "before")
    tar = run / "before" / "private" / "private-00000.tar"
    records = [record for _, record in read_shard(tar) if record is not None]
    write_shard(tar, [replace(record, image=records[0].image) for record in records])
    encode(run, "before")
    edit_manifest(run, "latents", lambda manifest: manifest["config"].update(data_from="filter"))
    assert "private/private-00000 was made from private-00000 with index blake3:" in refused(run)
    assert not of_latents(run, shards=False)[0], "no shard need be read for that"


def test_a_source_that_is_changed_afterwards_is_named(run: Path) -> None:
    tar = run / "filter" / "private" / "private-00001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"PNG") + 30] ^= 1
    tar.write_bytes(content)
    assert "record private3 that it was made from was changed since" in refused(run)


def test_units_are_the_sources_own(run: Path) -> None:
    """Which its index tells, and the digests of records do not."""
    index = run / "filter" / "private" / "private-00000.index.jsonl"
    index.write_bytes(index.read_bytes().replace(b'"unit":"u0"', b'"unit":"u9"'))
    assert "filter/private/private-00000.index.jsonl is not as its manifest names it" in refused(run)


@pytest.mark.parametrize("told", [{"root": digest(b"other")}, {"records": 4}])
def test_a_manifest_that_tells_of_other_records_than_its_shard_has_is_named(run: Path, told: dict[str, Any]) -> None:
    rewrite(run, lambda found: found, **told)
    assert "private-00000.tar: its records are not those that its manifest names" in refused(run)


@pytest.mark.parametrize("suffix", [".tar", ".index.jsonl", ".latents.json"])
def test_a_changed_and_a_lost_file_are_named(run: Path, suffix: str) -> None:
    path = run / "latents" / "private" / f"private-00001{suffix}"
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "private-00001" in refused(run)
    path.write_bytes(whole)
    assert of_latents(run)[0]
    path.unlink()
    assert ("the 2 shard manifests" if suffix == ".latents.json" else path.name) in refused(run)


def test_shards_and_splits_that_nothing_speaks_of_are_found(run: Path) -> None:
    folder = run / "latents" / "private"
    shutil.copy(folder / "private-00001.tar", folder / "private-00002.tar")
    assert "private-00002.tar has no .latents.json" in refused(run)
    (folder / "private-00002.tar").unlink()
    manifest = read_leaf(LatentManifest, folder / "private-00001.latents.json")
    put(run, manifest.model_copy(update={"shard": "private-00002"}))
    assert "private-00002 was made from private-00001" in refused(run) and "and there is none" in refused(run)
    (folder / "private-00002.latents.json").unlink()
    (folder / "private-00001.latents.json").unlink()
    put(run, read_leaf(LatentManifest, folder / "private-00000.latents.json"))
    assert "latents/private has no latents of shard private-00001" in refused(run)


@pytest.mark.parametrize(
    ("edit", "seen"),
    [
        (lambda metrics: metrics.update(vae=digest(b"other")), "names another VAE"),
        (lambda metrics: metrics["splits"].pop("public"), "names other splits"),
        (lambda metrics: metrics["splits"]["private"].update(root=digest(b"other")), "the records of split private"),
        (lambda metrics: metrics.update(shards_root=digest(b"other")), "and not blake3:"),
    ],
)
def test_a_stage_manifest_that_says_something_else_is_found_out(run: Path, edit: Any, seen: str) -> None:
    edit_manifest(run, "latents", lambda manifest: edit(manifest["metrics"]))
    assert seen in refused(run)


def test_what_lies_elsewhere_is_said_and_the_manifests_are_still_checked(run: Path) -> None:
    for path in (run / "filter").glob("*/*.tar"):
        path.unlink()
    holds, evidence = of_latents(run)
    assert holds and "those of filter are not here" in evidence
    for path in (run / "latents").glob("*/*.tar"):
        path.unlink()
    holds, evidence = of_latents(run)
    assert holds and "the latents were not read: they are not here" in evidence
    first = read_leaf(LatentManifest, run / "latents" / "private" / "private-00000.latents.json")
    (run / "latents" / "private" / "private-00000.latents.json").write_bytes(
        first.model_copy(update={"source": digest(b"other")}).leaf()
    )
    found = read_leaves(LatentManifest, run / "latents")
    root = merkle_root([one.leaf() for one in found])
    edit_manifest(run, "latents", lambda manifest: manifest["metrics"].update(shards_root=root))
    assert "was made from private-00000 with index" in refused(run)


def test_latents_of_a_stage_that_filters_nothing_are_said_to_be(run: Path) -> None:
    """The indexes tell what there was, and the stage's manifest their roots."""
    shutil.copytree(run / "filter", run / "ingest", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*manifest.json"))
    splits = json.loads((run / "filter" / "manifest.json").read_text())["metrics"]["splits"]
    edit_manifest(run, "ingest", lambda manifest: manifest["metrics"].update(splits=splits))
    encode(run, "ingest")
    claim = OF_FILTER.replace("filter", "ingest")
    holds, evidence = of_latents(run, claim=claim)
    assert holds and "ingest, which is no filter; every byte of 7 records" in evidence
    splits["private"]["root"] = digest(b"other")
    edit_manifest(run, "ingest", lambda manifest: manifest["metrics"].update(splits=splits))
    assert "split private have root" in of_latents(run, claim=claim)[1]
    for path in (run / "ingest").glob("*/*.tar"):
        path.unlink()
    holds, evidence = of_latents(run, claim=claim)
    assert holds and "those of ingest are not here" in evidence


def test_a_file_that_cannot_be_read_leaves_no_verdict(run: Path) -> None:
    tar = run / "latents" / "private" / "private-00001.tar"
    tar.unlink()
    tar.mkdir()
    command = [sys.executable, str(ROOT / "scripts" / "audit.py"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "private-00001.tar cannot be read (Is a directory)" in done.stderr


def test_a_stage_from_before_there_were_roots_has_nothing_to_claim(run: Path) -> None:
    edit_manifest(run, "latents", lambda manifest: manifest["metrics"].pop("shards_root"))
    found = claims(audit_run(run))
    assert OF_FILTER not in found
    assert not found[NAMES][0], "but the ledger planned one"
