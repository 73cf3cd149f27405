"""The audit of a run folder: what it recomputes, which lies it finds, and what it tells a person."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy.accounting import epsilon
from privacy.audit import AuditReport, UnreadableRunError, audit_run
from privacy.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "audit.py"
EVENT = {"mechanism": "poisson_sampled_gaussian", "sampling_rate": 0.1, "noise_multiplier": 2.0}
STEPS = 4
CONFIG = "c" * 64
PRIVATE_ROOT = "blake3:" + "d" * 64


def write_manifest(run: Path, stage: str, kind: str, inputs: tuple[str, ...] = (), **content: Any) -> None:
    folder = run / stage
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {name: hashlib.sha256((run / name / "manifest.json").read_bytes()).hexdigest() for name in inputs}
    manifest = {"format": 1, "stage": stage, "kind": kind, "inputs": hashes, "metrics": {}, "ledger": None, **content}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(run: Path, stage: str, edit: Callable[[dict[str, Any]], object]) -> None:
    path = run / stage / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def open_ledger(run: Path, **settings: Any) -> Ledger:
    settings = {"delta": 1e-5, "unit": "record", "dataset_root": PRIVATE_ROOT, "fencing_epoch": 1} | settings
    return Ledger.open(run / "ledger.jsonl", **settings)


def train_privately(run: Path, replay: int | None = None, die_at: int | None = None, **plan: Any) -> None:
    """Charge STEPS steps and write the stage's manifest, as train does; `die_at` ends before that step is done."""
    with open_ledger(run) as ledger:
        ledger.plan("finetune_dp", steps=STEPS, event=EVENT, config_sha256=CONFIG, **plan)
        for step in [*range(STEPS), *([] if replay is None else [replay])]:
            charge = ledger.charge("finetune_dp", step, EVENT, "git:abc")
            if step == die_at:
                return
            ledger.done(charge, "keyed")
        statement: dict[str, Any] = {"path": str(ledger.path), "head": ledger.head, "charges": ledger.num_charges}
        statement["stage"] = "finetune_dp"
        spent = epsilon(ledger.counts(), 1e-5)
    write_manifest(
        run,
        "finetune_dp",
        "finetune_dp",
        ("filter",),
        config={"data_from": "filter"},
        config_sha256=CONFIG,
        metrics={"steps": STEPS, "target_epsilon": 2.0, "delta": 1e-5, "epsilon": spent, "noise_multiplier": 2.0},
        ledger=statement,
    )


@pytest.fixture
def public_run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    write_manifest(run, "ingest", "ingest")
    write_manifest(
        run, "filter", "filter", ("ingest",), metrics={"splits": {"private": {"root": PRIVATE_ROOT, "public": "p"}}}
    )
    return run


@pytest.fixture
def run(public_run: Path) -> Path:
    train_privately(public_run)
    return public_run


def false_claims(report: AuditReport) -> dict[str, str]:
    return {claim.claim: claim.evidence for claim in report.claims if not claim.holds}


def test_an_honest_run_holds_and_its_epsilon_comes_from_the_ledger(run: Path) -> None:
    report = audit_run(run)
    assert false_claims(report) == {}
    assert report.exit_code == 0
    assert len(report.claims) == 7
    assert report.spending is not None
    assert report.spending.epsilon == epsilon([(EVENT, STEPS)], 1e-5)
    assert report.spending.epsilon_by_rdp > report.spending.epsilon
    assert (report.spending.charges, report.spending.wasted, report.spending.replayed) == (STEPS, 0, 0)
    assert "every claim holds: epsilon" in report.verdict


def test_the_standing_caveats_are_always_said(run: Path) -> None:
    caveats = " ".join(audit_run(run).caveats)
    assert "number of records is treated as public" in caveats
    assert "Hyper-parameters chosen by the user are assumed to come from public data" in caveats


def test_a_replay_and_a_wasted_charge_are_said_and_counted(public_run: Path) -> None:
    train_privately(public_run, die_at=2)
    train_privately(public_run, replay=3)
    report = audit_run(public_run)
    assert report.exit_code == 0
    assert report.spending is not None
    # Three charges before the death, of which the last was wasted; then all four, and one of them again.
    assert (report.spending.charges, report.spending.wasted, report.spending.replayed) == (8, 1, 4)
    assert report.spending.epsilon == epsilon([(EVENT, 8)], 1e-5)
    caveats = " ".join(report.caveats)
    assert "never followed by a finished step: 1" in caveats
    assert "Charges for replays: 4" in caveats


def test_philox_and_operator_metrics_are_said(public_run: Path) -> None:
    train_privately(public_run, secure_noise=False, operator_metrics=True)
    caveats = " ".join(audit_run(public_run).caveats)
    assert "finetune_dp drew its noise from Philox" in caveats
    assert "finetune_dp showed operator-only metrics" in caveats


def test_a_run_without_a_private_stage_says_so(public_run: Path) -> None:
    report = audit_run(public_run)
    assert report.exit_code == 0
    assert report.spending is None
    assert "no private stage and no ledger" in report.verdict


def test_an_unfinished_private_stage_is_audited_by_its_ledger(public_run: Path) -> None:
    train_privately(public_run, die_at=1)
    report = audit_run(public_run)
    assert report.exit_code == 0
    assert report.spending is not None
    assert report.spending.epsilon == epsilon([(EVENT, 2)], 1e-5)


def test_a_moved_run_is_still_audited(run: Path) -> None:
    moved = run.rename(run.with_name("moved"))
    assert audit_run(moved).exit_code == 0


@pytest.mark.parametrize(
    ("tamper", "claim"),
    [
        (lambda run: (run / "ledger.jsonl").unlink(), "the ledger is there"),
        (lambda run: os.truncate(run / "ledger.jsonl", 2000), "the ledger head that finetune_dp recorded"),
        (lambda run: edit_manifest(run, "filter", lambda m: m.update(note="edited")), "every stage was made from"),
        (lambda run: (run / "ingest" / "manifest.json").unlink(), "every stage was made from"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m.update(config_sha256="e" * 64)), "configuration"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["ledger"].update(head="f" * 64)), "ledger head"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["ledger"].update(charges=3)), "ledger head"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["metrics"].update(epsilon=0.5)), "no less epsilon"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["metrics"].update(target_epsilon=0.5)), "target"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["metrics"].update(delta=1e-3)), "no less epsilon"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["metrics"].pop("epsilon")), "no less epsilon"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["metrics"].update(steps=5)), "every step"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["metrics"].update(steps=3)), "every step"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["metrics"].pop("steps")), "every step"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m.update(ledger=None)), "every private stage names"),
        (lambda run: edit_manifest(run, "finetune_dp", lambda m: m["config"].update(data_from="ingest")), "the data"),
    ],
)
def test_a_false_claim_is_found(run: Path, tamper: Callable[[Path], object], claim: str) -> None:
    tamper(run)
    report = audit_run(run)
    assert report.exit_code == 1
    assert any(claim in found for found in false_claims(report)), false_claims(report)
    assert "false" in report.verdict


def test_a_flipped_byte_of_the_ledger_gives_no_epsilon_at_all(run: Path) -> None:
    ledger = run / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"step":2', '"step":7'))
    report = audit_run(run)
    assert report.exit_code == 1
    assert report.spending is None
    assert "line 7: the record does not match its hash" in " ".join(false_claims(report).values())


def test_two_ledgers_in_one_run_are_not_one_budget(run: Path) -> None:
    (run / "ledger.jsonl").rename(run / "other.jsonl")
    edit_manifest(run, "finetune_dp", lambda m: m["ledger"].update(path="other.jsonl"))
    assert audit_run(run).exit_code == 0
    open_ledger(run).close()
    report = audit_run(run)
    assert list(false_claims(report)) == ["one ledger holds all that the run spent"]
    assert report.spending is None


def test_a_cap_that_was_passed_is_found(public_run: Path) -> None:
    with open_ledger(public_run, dataset_cap=0.1) as ledger:
        for step in range(3):
            ledger.charge("finetune_dp", step, EVENT, "git:abc")
    assert list(false_claims(audit_run(public_run))) == ["the data set's cap is kept"]


def test_charges_that_no_accountant_can_bound_are_a_false_claim(public_run: Path) -> None:
    with open_ledger(public_run, delta=1e-16) as ledger:
        ledger.charge("finetune_dp", 0, EVENT, "git:abc")
    report = audit_run(public_run)
    assert "delta is 1e-16, too small" in false_claims(report)["what was charged can be bounded"]
    assert report.spending is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 2}'])
def test_a_manifest_that_is_none_makes_the_run_unreadable(run: Path, content: str) -> None:
    (run / "ingest" / "manifest.json").write_text(content)
    with pytest.raises(UnreadableRunError, match="manifest"):
        audit_run(run)


def test_a_folder_that_is_no_run_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableRunError, match="holds neither"):
        audit_run(tmp_path)
    with pytest.raises(UnreadableRunError, match="cannot be read"):
        audit_run(tmp_path / "missing")


# --- the script ---


def audit(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_script_tells_a_person_from_any_folder(run: Path, tmp_path: Path) -> None:
    done = audit(run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("every claim holds", "at delta 1e-05", "one record", "adding or removing", "PLD", "RDP", "wasted"):
        assert said in done.stdout
    edit_manifest(run, "finetune_dp", lambda m: m["metrics"].update(epsilon=0.5))
    done = audit(run, cwd=tmp_path)
    assert done.returncode == 1
    assert "FALSE" in done.stdout
    done = audit(tmp_path / "missing", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("audit: ")


def test_the_script_prints_json_that_holds_the_whole_report(run: Path, tmp_path: Path) -> None:
    done = audit(run, "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == json.loads(json.dumps(audit_run(run).as_dict()))


def test_the_audit_loads_neither_torch_nor_our_other_floors(run: Path, tmp_path: Path) -> None:
    check = (
        "import runpy, sys\n"
        f"sys.argv = ['audit.py', {str(run)!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print([name for name in ('torch', 'kernels', 'models', 'train', 'opacus') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_says_what_the_exit_status_means(tmp_path: Path) -> None:
    done = audit("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "exit status" in done.stdout
    assert "--json" in done.stdout
