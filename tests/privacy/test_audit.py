"""The audit of a run folder: what it recomputes, which lies it finds, and what it tells a person."""

# One file, somewhat long: each claim of the audit beside the run that breaks it.

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import scripts.audit
from privacy.accounting import epsilon
from privacy.audit import AuditReport, UnreadableRunError, audit_run
from tests.privacy.audited_run import (
    CODE,
    EVENT,
    LABEL,
    OPERATIONAL,
    OTHER_SEED,
    PRIVATE_ROOT,
    RUN_ID,
    STAGE,
    STEPS,
    config_sha256,
    edit_manifest,
    open_ledger,
    public_stages,
    save_checkpoint,
    train_privately,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "audit.py"


@pytest.fixture
def public_run(tmp_path: Path) -> Path:
    return public_stages(tmp_path / "run")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = public_stages(tmp_path_factory.mktemp("honest") / "run")
    train_privately(run)
    return run


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "run"))


def false_claims(report: AuditReport) -> dict[str, str]:
    return {claim.claim: claim.evidence for claim in report.claims if not claim.holds}


def caveats(run: Path, **options: Any) -> str:
    return " ".join(audit_run(run, **options).caveats)


# --- what it recomputes ---


def test_an_honest_run_holds_and_its_epsilon_comes_from_the_ledger(run: Path) -> None:
    report = audit_run(run)
    assert false_claims(report) == {}
    assert report.exit_code == 0
    assert len(report.claims) == 13
    spent = report.spending
    assert spent is not None
    assert spent.epsilon == epsilon([(EVENT, STEPS)], 1e-5)
    assert (spent.charges, spent.wasted, spent.replayed) == (STEPS, 0, 0)
    assert (spent.unit, spent.relation, spent.dataset_root) == ("record", "add_or_remove_one", PRIVATE_ROOT)
    assert "every claim holds: epsilon" in report.verdict


def test_two_other_accountants_look_at_the_same_charges(run: Path) -> None:
    spent = audit_run(run).spending
    assert spent is not None
    by_rdp, by_prv = spent.cross_checks
    assert by_rdp.accountant.startswith("RDP")
    assert by_rdp.epsilon is not None and by_rdp.epsilon > spent.epsilon
    assert by_prv.accountant.startswith("PRV")
    assert by_prv.epsilon == pytest.approx(spent.epsilon, rel=0.02, abs=0.02)


def test_the_curve_ends_at_the_epsilon_stated_and_never_falls(run: Path) -> None:
    report = audit_run(run)
    assert report.spending is not None
    charges, epsilons = zip(*report.curve, strict=True)
    assert charges == (1, 2, 3, 4)
    assert list(epsilons) == sorted(epsilons)
    assert epsilons[-1] == report.spending.epsilon


def test_each_stage_of_each_run_on_the_ledger_is_told_apart(run: Path) -> None:
    with open_ledger(run) as ledger:
        for _ in range(2):
            ledger.charge("another/tune", 0, {"mechanism": "gaussian", "noise_multiplier": 5.0}, "git:b")
    report = audit_run(run)
    assert report.exit_code == 0
    ours, another = report.stages
    assert (ours.run, ours.stage, ours.own, ours.charges, ours.wasted) == (RUN_ID, STAGE, True, STEPS, 0)
    assert ours.mechanisms == ["Poisson-sampled Gaussian, sampling rate 0.1, noise multiplier 2"]
    assert ours.code_versions == [CODE]
    assert (another.run, another.stage, another.own) == ("another", "tune", False)
    assert (another.steps, another.charges, another.replayed, another.wasted) == (1, 2, 1, 2)
    assert report.spending is not None
    assert ours.epsilon_alone < report.spending.epsilon < ours.epsilon_alone + another.epsilon_alone


def test_a_replay_and_a_wasted_charge_are_said_and_counted(public_run: Path) -> None:
    train_privately(public_run, die_at=2)
    train_privately(public_run, replay=3)
    report = audit_run(public_run)
    assert report.exit_code == 0
    assert report.spending is not None
    # Three charges before the death, of which the last was wasted; then all four, and one of them again.
    assert (report.spending.charges, report.spending.wasted, report.spending.replayed) == (8, 1, 4)
    assert report.spending.epsilon == epsilon([(EVENT, 8)], 1e-5)
    said = " ".join(report.caveats)
    assert "never followed by a finished step: 1" in said
    assert "Charges for replays: 4" in said


def test_a_run_without_a_private_stage_says_so(public_run: Path) -> None:
    report = audit_run(public_run)
    assert report.exit_code == 0
    assert report.spending is None
    assert "no private stage and no ledger" in report.verdict


def test_an_unfinished_private_stage_is_audited_by_its_ledger_and_its_checkpoints(public_run: Path) -> None:
    train_privately(public_run, die_at=2)
    report = audit_run(public_run)
    assert report.exit_code == 0
    assert report.spending is not None
    assert report.spending.epsilon == epsilon([(EVENT, 3)], 1e-5)
    assert any(
        claim.claim == f"every checkpoint of {STAGE} was paid for before it was saved" for claim in report.claims
    )


def test_a_ledger_that_was_opened_and_never_charged_has_spent_nothing(public_run: Path) -> None:
    open_ledger(public_run).close()
    report = audit_run(public_run)
    assert report.exit_code == 0
    assert report.spending is not None
    assert (report.spending.epsilon, report.spending.charges, report.curve) == (0.0, 0, [])


def test_a_moved_run_is_still_audited(run: Path) -> None:
    moved = run.rename(run.with_name("moved"))
    assert audit_run(moved).exit_code == 0


def test_a_checkpoint_of_a_public_stage_needs_no_ledger(public_run: Path) -> None:
    save_checkpoint(public_run, 2, None, stage="pretrain")
    assert audit_run(public_run).exit_code == 0


# --- what it says beside the figures ---


def test_the_standing_caveats_are_always_said(run: Path) -> None:
    said = caveats(run)
    assert "number of records is treated as public" in said
    assert "Hyper-parameters chosen by the user are assumed to come from public data" in said
    assert "The filter's counts were taken from the data without noise" in said
    assert "Near-duplicates were left out by comparing records" in said


@pytest.mark.parametrize(
    ("plan", "caveat"),
    [
        ({"secure_noise": False}, f"{LABEL} drew its noise from Philox"),
        ({"operator_metrics": True}, f"{LABEL} showed operator-only metrics"),
        ({"bands": 4, "cycle": 8}, f"{LABEL} used noise correlated over 4 steps (DP-BandMF)"),
        ({"max_records": 3}, f"{LABEL} read at most 3 records of one unit in a step"),
        ({"num_units": 100_000}, f"{LABEL}: delta is 1e-05, not below 1/100000"),
    ],
)
def test_what_a_stage_planned_outside_the_guarantee_is_said(
    public_run: Path, plan: dict[str, Any], caveat: str
) -> None:
    train_privately(public_run, plan=plan)
    assert caveat in caveats(public_run)


def test_nothing_is_said_of_a_delta_well_below_one_over_the_units(public_run: Path) -> None:
    plan = {"num_units": 1000, "secure_noise": True, "operator_metrics": False, "bands": 1, "max_records": 1}
    train_privately(public_run, plan=plan)
    said = caveats(public_run)
    for word in ("delta", "Philox", "operator-only", "shuffled", "Batches", "+dirty", "correlated", "of one unit"):
        assert word not in said


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"mechanism": "gaussian", "noise_multiplier": 3.0}, ["were shuffled", "fixed places"]),
        (EVENT, ["fixed places"]),
        (
            {**EVENT, "mechanism": "truncated_poisson_sampled_gaussian", "num_units": 95, "max_batch_size": 20},
            ["fixed places", "larger draws were cut"],
        ),
    ],
)
def test_what_a_mechanism_means_for_the_promise_is_said(
    public_run: Path, event: dict[str, Any], said: list[str]
) -> None:
    events = [{**event, "partition": "epoch 0", "part": step} for step in range(STEPS)]
    train_privately(public_run, events=events)
    report = audit_run(public_run)
    assert report.exit_code == 0
    assert report.spending is not None
    assert report.spending.epsilon == epsilon([(event, 1)], 1e-5)  # no unit is in two parts
    assert len(report.stages[0].mechanisms) == 1
    for words in ("were shuffled", "fixed places", "larger draws were cut"):
        assert (words in said) == (words in " ".join(report.caveats))


def test_another_unit_than_the_record_is_said(public_run: Path) -> None:
    train_privately(public_run, unit="user")
    edit_manifest(public_run, STAGE, lambda m: m["config"]["privacy"].update(unit="user"))
    assert "protects one user, that is all of its records together" in caveats(public_run)


def test_code_that_changed_or_has_no_name_is_said(public_run: Path) -> None:
    train_privately(public_run, die_at=2)
    train_privately(public_run, code="git:abc+dirty")
    said = caveats(public_run)
    assert f"{LABEL} was charged by 2 versions of the code" in said
    assert "(+dirty)" in said


def test_a_key_that_the_auditor_gives_takes_the_place_of_the_runs_word(run: Path) -> None:
    with open_ledger(run) as ledger:
        key = ledger.public_key
    assert "No public key was given" in caveats(run)
    assert "No public key was given" not in caveats(run, public_key=key)


# --- which lies it finds (test_tampering.py has those told with care) ---


@pytest.mark.parametrize(
    ("tamper", "claim"),
    [
        (lambda run: edit_manifest(run, "filter", lambda m: m.update(note="edited")), "every stage was made from"),
        (lambda run: (run / "ingest" / "manifest.json").unlink(), "every stage was made from"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m.update(config_sha256="e" * 64)), "configuration"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["ledger"].update(head="f" * 64)), "ledger head"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["ledger"].update(charges=3)), "ledger head"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["ledger"].update(stage="x")), "it planned in the ledger"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["ledger"].update(public_key="f" * 64)), "signed by the key"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["metrics"].update(target_epsilon=0.5)), "target"),
        (
            lambda run: edit_manifest(run, STAGE, lambda m: m["metrics"].update(delta=1e-3)),
            "no less than its charges cost",
        ),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["metrics"].pop("epsilon")), "no less than its charges cost"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["metrics"].update(steps=5)), "every step"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["metrics"].update(steps=3)), "every step"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["metrics"].pop("steps")), "every step"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m.update(ledger=None)), "every private stage names"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m["config"].update(data_from="ingest")), "the data"),
        (lambda run: edit_manifest(run, STAGE, lambda m: m.update(config={})), "the promise in the configuration"),
    ],
)
def test_a_false_claim_is_found(run: Path, tamper: Callable[[Path], object], claim: str) -> None:
    tamper(run)
    report = audit_run(run)
    assert report.exit_code == 1
    assert any(claim in found for found in false_claims(report)), false_claims(report)
    assert "false" in report.verdict


def test_a_plan_that_names_no_operational_keys_cannot_be_held_against_the_configuration(public_run: Path) -> None:
    train_privately(public_run, plan={"operational": None})
    assert "no list of its operational keys" in " ".join(false_claims(audit_run(public_run)).values())


def test_two_ledgers_in_one_run_are_not_one_budget(run: Path) -> None:
    (run / "ledger.jsonl").rename(run / "other.jsonl")
    edit_manifest(run, STAGE, lambda m: m["ledger"].update(path="other.jsonl"))
    assert audit_run(run).exit_code == 0
    open_ledger(run).close()
    report = audit_run(run)
    assert list(false_claims(report)) == ["one ledger holds all that the run spent"]
    assert report.spending is None


def test_a_cap_that_was_passed_is_found(public_run: Path) -> None:
    with open_ledger(public_run, dataset_cap=0.1) as ledger:
        for step in range(3):
            ledger.charge(LABEL, step, EVENT, CODE)
    assert list(false_claims(audit_run(public_run))) == ["the data set's cap is kept"]


def test_charges_that_no_accountant_can_bound_are_a_false_claim(public_run: Path) -> None:
    with open_ledger(public_run, delta=1e-16) as ledger:
        ledger.charge(LABEL, 0, EVENT, CODE)
    report = audit_run(public_run)
    assert "delta is 1e-16, too small" in false_claims(report)["what was charged can be bounded"]
    assert report.spending is None


def test_charges_that_promise_nothing_are_a_false_claim(public_run: Path) -> None:
    with open_ledger(public_run) as ledger:
        ledger.charge(LABEL, 0, {"mechanism": "gaussian", "noise_multiplier": 1e-200}, CODE)
    report = audit_run(public_run)
    assert "epsilon is infinite" in false_claims(report)["what was charged can be bounded"]
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


# --- how long it takes ---


# Processor time, for other tests may share the core: the audit is one thread and waits for nothing. And the most memory
# it held, not ru_maxrss, which begins with what the process was forked from.
MEASURED = """
import runpy, sys, time
from pathlib import Path
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    peak = next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM:"))
    print(time.process_time(), 1024 * int(peak.split()[1]), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_charges_are_audited_within_a_minute_and_a_gibibyte(public_run: Path) -> None:
    """Limits of issue 3. The steps are charged a thousand at a time and all done; the audit runs in its own process."""
    million, event = 1_000_000, {**EVENT, "sampling_rate": 0.001}
    with open_ledger(public_run) as ledger:
        ledger.plan(LABEL, steps=million, event=event, config_sha256=config_sha256(), operational=OPERATIONAL)
        for first in range(0, million, 1000):
            steps = [(step, event) for step in range(first, first + 1000)]
            for charge in ledger.charge_ahead(LABEL, steps, CODE):
                ledger.done(charge, "hmac-sha256:" + "e" * 64)
        save_checkpoint(public_run, million, ledger.head)
    command = [sys.executable, "-c", MEASURED, str(SCRIPT), str(public_run), "--json"]
    done = subprocess.run(command, cwd=public_run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spending"]["charges"] == million
    seconds, peak = map(float, done.stderr.split()[-2:])
    print(f"audit of {million} charges: {seconds:.1f} s, {peak / 2**20:.0f} MiB")
    assert seconds < 60
    assert peak < 2**30


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
    edit_manifest(run, STAGE, lambda m: m["metrics"].update(epsilon=0.1))
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
    assert "--compare" in done.stdout


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The script in this process: exit status, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["audit.py", *map(str, arguments)])
        status = scripts.audit.main()
        return status, *capsys.readouterr()

    return call


Script = Callable[..., tuple[int, str, str]]


def test_the_script_takes_the_public_key_from_a_file_or_from_the_line(
    run: Path, tmp_path: Path, script: Script
) -> None:
    with open_ledger(run) as ledger:
        key = ledger.public_key
    file = tmp_path / "ledger.pub"
    file.write_text(key + "\n")
    for given in (key, file):
        assert script(run, "--public-key", given, "--every-signature")[0] == 0
    assert script(run, "--public-key", "f" * 64)[0] == 1
    status, _, said = script(run, "--public-key", "abc")
    assert status == 2
    assert "--public-key is abc: give 64 hex digits" in said


def test_the_script_writes_pages_only_when_asked_and_where_asked(run: Path, tmp_path: Path, script: Script) -> None:
    before = sorted(run.rglob("*"))
    assert script(run)[0] == 0
    assert script(run, "--html", tmp_path / "page.html")[0] == 0
    assert "<html" in (tmp_path / "page.html").read_text()
    assert sorted(run.rglob("*")) == before
    assert script(run, "--html")[0] == 0
    assert {path.name for path in (run / "audit").iterdir()} == {"audit.html", "audit.json"}
    assert json.loads((run / "audit" / "audit.json").read_text())["exit_code"] == 0


def test_the_script_sets_two_runs_side_by_side(run: Path, tmp_path: Path, script: Script) -> None:
    other = public_stages(tmp_path / "other")
    train_privately(other, signing_seed=OTHER_SEED)
    status, said, _ = script(run, "--compare", other)
    assert status == 1
    assert "Different ledgers of ONE data set" in said
    assert "differs" in said
    status, said, _ = script(run, "--compare", run, "--json")
    assert status == 0
    assert not any(row["differs"] for row in json.loads(said)["rows"])
