"""Two runs side by side: one budget or two, and in what they differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from privacy.audit import AuditReport, audit_run
from privacy.audit.compare import Comparison, compare
from tests.privacy.audited_run import (
    EVENT,
    PRIVATE_ROOT,
    STAGE,
    STEPS,
    edit_manifest,
    open_ledger,
    public_stages,
    train_privately,
)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> AuditReport:
    run = public_stages(tmp_path_factory.mktemp("first") / "run")
    train_privately(run)
    return audit_run(run)


def differing(compared: Comparison) -> dict[str, tuple[str, str]]:
    return {row.what: (row.first, row.second) for row in compared.rows if row.differs}


def test_a_run_is_like_itself_and_draws_on_one_budget(first: AuditReport) -> None:
    compared = compare(first, first)
    assert differing(compared) == {}
    assert compared.exit_code == 0
    assert compared.ledgers.startswith("One ledger")


def test_epsilon_sampling_noise_and_steps_are_set_side_by_side(first: AuditReport, tmp_path: Path) -> None:
    run = public_stages(tmp_path / "other")
    event = {**EVENT, "sampling_rate": 0.2, "noise_multiplier": 4.0}
    train_privately(run, events=[event] * STEPS, replay=1, dataset_root="blake3:" + "e" * 64, dataset_cap=3.0)
    compared = compare(first, audit_run(run))
    assert "of different data sets" in compared.ledgers
    found = differing(compared)
    assert found[f"{STAGE}: sampling and noise"] == (
        "Poisson-sampled Gaussian, sampling rate 0.1, noise multiplier 2",
        "Poisson-sampled Gaussian, sampling rate 0.2, noise multiplier 4",
    )
    assert found[f"{STAGE}: charges"] == ("4", "5")
    assert found["replays"] == ("0", "1")
    assert found["data set"] == (PRIVATE_ROOT, "blake3:" + "e" * 64)
    assert found["data set's cap"] == ("none", "3.0")
    assert "epsilon" in found
    assert f"{STAGE}: steps" not in found


def test_keys_in_which_configurations_differ_are_named(first: AuditReport, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(first.run, run)
    edit_manifest(run, STAGE, lambda m: m["config"]["train"].update(batch_size=20))
    edit_manifest(run, STAGE, lambda m: m["config"]["parallel"].pop("nproc"))
    found = differing(compare(first, audit_run(run)))
    assert found[f"{STAGE}: train.batch_size"] == ("10", "20")
    assert found[f"{STAGE}: parallel.nproc"] == ("2", "absent")
    assert "verdict" in found  # one of the two was edited


def test_a_stage_that_one_run_lacks_is_said(first: AuditReport, tmp_path: Path) -> None:
    run = public_stages(tmp_path / "public")
    compared = compare(first, audit_run(run))
    assert "no two budgets" in compared.ledgers
    assert differing(compared)[f"{STAGE}: finished"] == ("True", "False")
    assert compared.exit_code == 0


def test_two_ledgers_of_one_data_set_hide_what_it_pays(first: AuditReport, tmp_path: Path) -> None:
    run = public_stages(tmp_path / "other")
    train_privately(run)
    compared = compare(first, audit_run(run))
    assert "ONE data set" in compared.ledgers
    assert compared.exit_code == 1
    assert [claim.holds for claim in compared.claims] == [False]


def test_a_copy_of_a_ledger_and_one_that_goes_on_from_it_share_no_noise(first: AuditReport, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(first.run, run)
    assert compare(first, audit_run(run)).ledgers == "Two copies of one ledger, alike."
    with open_ledger(run) as ledger:
        ledger.charge("tune", 0, EVENT, "git:abc")
    compared = compare(first, audit_run(run))
    assert "one goes on where the other ends" in compared.ledgers
    assert compared.exit_code == 0


def test_copies_that_went_apart_without_a_common_noise_key_are_told_so(first: AuditReport, tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "other"]
    for stage, run in zip(("tune", "probe"), runs, strict=True):
        shutil.copytree(first.run, run)
        with open_ledger(run) as ledger:
            ledger.charge(stage, 0, EVENT, "git:abc")
    compared = compare(*map(audit_run, runs))
    assert "went apart after line 10" in compared.ledgers
    assert compared.exit_code == 0
    assert compared.as_dict()["claims"][0]["evidence"].startswith("both used 0 noise keys")
