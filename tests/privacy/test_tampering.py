"""Every way to make a run look better than it was that we could think of: each is found, and named for what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy.audit import AuditReport, audit_run
from privacy.audit.compare import compare
from privacy.ledger_view import hash_of
from tests.privacy.audited_run import (
    OTHER_SEED,
    STAGE,
    STEPS,
    config_sha256,
    edit_manifest,
    open_ledger,
    public_stages,
    read_records,
    rewrite,
    save_checkpoint,
    train_privately,
    write_lines,
)

WHOLE = "the ledger is whole"
KEY = "the ledger was signed by the key that is expected"
PAID = f"every checkpoint of {STAGE} was paid for before it was saved"
HEAD = f"the ledger head that {STAGE} recorded lies in the chain"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest run. Its ledger: open, plan, then charge and done for each of four steps."""
    run = public_stages(tmp_path_factory.mktemp("honest") / "run")
    train_privately(run)
    assert audit_run(run).exit_code == 0
    return run


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "run"))


def lines_of(run: Path) -> list[str]:
    return (run / "ledger.jsonl").read_text().splitlines()


def named(report: AuditReport, claim: str, *said: str) -> None:
    """The claim is false, and its evidence says what was done."""
    assert report.exit_code == 1
    false = {found.claim: found.evidence for found in report.claims if not found.holds}
    evidence = [seen for found, seen in false.items() if claim in found]
    assert evidence, false
    for words in said:
        assert words in evidence[0]


def test_a_changed_line(run: Path) -> None:
    lines = lines_of(run)
    lines[4] = lines[4].replace('"noise_multiplier":2.0', '"noise_multiplier":9.0')
    write_lines(run, lines)
    report = audit_run(run)
    named(report, WHOLE, "line 5", "does not match its hash")
    assert report.spending is None  # a broken ledger gives no figure at all


def test_a_removed_line(run: Path) -> None:
    lines = lines_of(run)
    write_lines(run, lines[:4] + lines[5:])
    named(audit_run(run), WHOLE, "line 5", "does not follow the line before it")


def test_two_swapped_lines(run: Path) -> None:
    lines = lines_of(run)
    lines[4], lines[6] = lines[6], lines[4]
    write_lines(run, lines)
    named(audit_run(run), WHOLE, "line 5", "does not follow the line before it")


def test_a_line_appended_without_the_key(run: Path) -> None:
    records, lines = read_records(run), lines_of(run)
    rewrite(run, [*records, {**records[-2], "step": STEPS}], seed=OTHER_SEED)  # chained as it should be
    forged = json.loads(lines_of(run)[-1])
    forged |= {"prev": records[-1]["hash"]}
    forged["hash"] = hash_of(forged)
    write_lines(run, [*lines, json.dumps(forged, sort_keys=True, separators=(",", ":"))])
    named(audit_run(run), WHOLE, f"line {len(lines) + 1}", "signature", "without the key")


def test_a_signature_in_the_midst_is_changed(run: Path) -> None:
    records = read_records(run)
    records[3]["signature"] = records[5]["signature"]
    write_lines(run, [json.dumps(record, sort_keys=True, separators=(",", ":")) for record in records])
    for every in (False, True):
        named(audit_run(run, every_signature=every), WHOLE, "line 4", "signature")


def test_a_ledger_cut_at_its_end_while_a_checkpoint_names_a_later_head(run: Path) -> None:
    (run / STAGE / "manifest.json").unlink()  # only the checkpoints are left to tell
    write_lines(run, lines_of(run)[:6])
    named(audit_run(run), PAID, f"step-{STEPS:08d}", "knows 2 of the 4 steps", "end was cut off")


def test_a_ledger_cut_at_its_end_while_a_manifest_names_a_later_head(run: Path) -> None:
    shutil.rmtree(run / STAGE / "checkpoints")
    write_lines(run, lines_of(run)[:6])
    named(audit_run(run), HEAD, "knows 2 of the 4 steps", "end was cut off")


def test_a_lost_ledger(run: Path) -> None:
    (run / "ledger.jsonl").unlink()
    named(audit_run(run), WHOLE, "cannot be read")
    (run / STAGE / "manifest.json").unlink()  # nor do checkpoints alone pass without one
    named(audit_run(run), WHOLE, "cannot be read")


def test_a_checkpoint_from_another_ledger(run: Path, tmp_path: Path) -> None:
    other = public_stages(tmp_path / "other")
    train_privately(other)
    shutil.rmtree(run / STAGE / "checkpoints")
    shutil.copytree(other / STAGE / "checkpoints", run / STAGE / "checkpoints")
    named(audit_run(run), PAID, "knows all 4 steps", "of another ledger")


def test_a_checkpoint_of_steps_that_were_not_paid_for_yet(run: Path) -> None:
    early = read_records(run)[5]["hash"]  # after two steps
    save_checkpoint(run, STEPS, early)
    named(audit_run(run), PAID, "step 2 was not charged and done before it")


def test_the_same_noise_key_charged_twice_by_somebody_with_the_key(run: Path) -> None:
    records = read_records(run)
    rewrite(run, [*records[:6], *records[4:]])  # the second step once more, as the same attempt
    named(audit_run(run), WHOLE, "line 7", "attempt 0", "the same noise")


def test_the_same_noise_key_with_two_input_digests(run: Path) -> None:
    records = read_records(run)
    rewrite(run, [*records, {**records[3], "digest": "other input"}])
    named(audit_run(run), WHOLE, f"line {len(records) + 1}", "done twice", "the same noise met two inputs")


def test_the_same_noise_key_in_two_copies_of_a_run_that_went_on_apart(tmp_path: Path) -> None:
    """No folder can show this by itself; the comparison of the two does."""
    runs = [tmp_path / "one", tmp_path / "other"]
    train_privately(public_stages(runs[0]), die_at=2)
    shutil.copytree(*runs)
    for run, digest in zip(runs, ("these records", "other records"), strict=True):
        train_privately(run, digest=digest)
    reports = [audit_run(run) for run in runs]
    assert [report.exit_code for report in reports] == [0, 0]
    compared = compare(*reports)
    assert compared.exit_code == 1
    assert "went apart after line" in compared.ledgers
    (claim,) = compared.claims
    assert not claim.holds
    assert claim.evidence == "both used 4 noise keys, 4 of them with another input digest"


def test_a_configuration_edited_after_the_run(run: Path) -> None:
    edit_manifest(run, STAGE, lambda m: m["config"]["train"].update(batch_size=20))
    named(audit_run(run), "the configuration that finetune_dp ran", "edited after the run")


def test_a_configuration_edited_together_with_its_hash(run: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["config"]["privacy"]["max_grad_norm"] = 100.0
        manifest["config_sha256"] = config_sha256(manifest["config"])

    edit_manifest(run, STAGE, edit)
    report = audit_run(run)
    named(report, "the configuration that finetune_dp ran", "planned", "recomputed")
    named(report, "the promise in the configuration", "privacy.max_grad_norm is 100.0, in the ledger 1.0")


def test_a_promise_hidden_among_the_operational_keys(tmp_path: Path) -> None:
    """The hash leaves the key out, as the ledger's own plan says; the promise is compared key by key all the same."""
    run = public_stages(tmp_path / "run")
    hidden = ["parallel", "train.microbatch_size", "privacy.max_grad_norm"]
    train_privately(run, plan={"operational": hidden})
    edit_manifest(run, STAGE, lambda m: m["config"]["privacy"].update(max_grad_norm=100.0))
    named(audit_run(run), "the promise in the configuration", "max_grad_norm is 100.0")


def test_a_step_missing_from_the_ledger(tmp_path: Path) -> None:
    run = public_stages(tmp_path / "run")
    train_privately(run, skip={2})
    report = audit_run(run)
    named(report, f"every step of {STAGE} was charged and done", "1 not charged (first: 2)")
    named(report, PAID, "step 2 was not charged and done before it")


def test_a_step_taken_out_of_the_ledger_by_somebody_with_the_key(run: Path) -> None:
    records = read_records(run)
    done = [
        {**record, "charge": record["charge"] - 2} if record["type"] == "done" else record for record in records[6:]
    ]
    rewrite(run, records[:4] + done)
    report = audit_run(run)
    named(report, f"every step of {STAGE} was charged and done", "1 not charged (first: 1)")
    named(report, HEAD, "is not in the chain")


def test_a_whole_ledger_rewritten_with_another_key(run: Path) -> None:
    key = read_records(run)[0]["public_key"]
    assert audit_run(run, public_key=key).exit_code == 0
    rewrite(run, read_records(run), seed=OTHER_SEED)
    report = audit_run(run)
    named(report, KEY, f"{STAGE} names {key[:12]}", "written by another key")
    named(report, HEAD, "is not in the chain")
    named(report, PAID, "of another ledger")


def test_a_whole_run_rewritten_with_another_key_is_shown_by_the_auditors_own(run: Path, tmp_path: Path) -> None:
    key = read_records(run)[0]["public_key"]
    forged = public_stages(tmp_path / "forged")
    train_privately(forged, signing_seed=OTHER_SEED)
    assert audit_run(forged).exit_code == 0  # consistent in itself: only what is kept elsewhere can show it
    assert "No public key was given" in " ".join(audit_run(forged).caveats)
    named(audit_run(forged, public_key=key), KEY, "the auditor names", "written by another key")


def test_a_key_that_was_changed_by_its_owner_is_no_tampering(run: Path) -> None:
    key = read_records(run)[0]["public_key"]
    with open_ledger(run) as ledger:
        ledger.rotate(OTHER_SEED)
    for pinned in (key, ledger.public_key):
        report = audit_run(run, public_key=pinned)
        assert report.exit_code == 0
        assert "1 signed change of key" in " ".join(claim.evidence for claim in report.claims)


def test_an_epsilon_understated_in_the_manifest(run: Path) -> None:
    edit_manifest(run, STAGE, lambda m: m["metrics"].update(epsilon=0.1))
    named(audit_run(run), "is no less than its charges cost", "recomputed", "stated 0.1")


def test_a_target_overstated_in_the_manifest(run: Path) -> None:
    edit_manifest(run, STAGE, lambda m: m["metrics"].update(target_epsilon=100.0))
    named(audit_run(run), "within its target", "the target planned in the ledger is 2")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["metrics"]["splits"]["private"].update(root="blake3:" + "e" * 64),
        lambda m: m["metrics"]["splits"].pop("private"),
    ],
)
def test_a_data_set_that_was_changed(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(run, "filter", edit)
    report = audit_run(run)
    named(report, f"the ledger is for the data that {STAGE} trained on", "private split of filter")
    named(report, "every stage was made from the manifests that lie here", f"{STAGE} was made from another filter")


def test_a_code_version_changed_in_the_manifest(run: Path) -> None:
    edit_manifest(run, STAGE, lambda m: m.update(code_version="git:" + "b" * 40))
    named(audit_run(run), "the code that finished finetune_dp", "manifest git:bbbbbbbbbbbb")


def test_a_damaged_checkpoint_manifest(run: Path) -> None:
    min((run / STAGE / "checkpoints").glob("step-*/MANIFEST.json")).write_text("{")
    named(audit_run(run), "every checkpoint's manifest can be read", "step-00000002")
