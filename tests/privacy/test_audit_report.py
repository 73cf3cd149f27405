"""The audit's page: self-contained, whole, and in the words of the report it was made from."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from privacy.audit import AuditReport, audit_run
from privacy.audit.page import detection_bound, render, write_report
from tests.page import Page
from tests.privacy.audited_run import (
    EVENT,
    LABEL,
    PRIVATE_ROOT,
    RUN_ID,
    STAGE,
    edit_manifest,
    open_ledger,
    public_stages,
    train_privately,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> AuditReport:
    run = public_stages(tmp_path_factory.mktemp("report") / "run")
    train_privately(run, replay=2, plan={"operator_metrics": True}, dataset_cap=3.0)
    return audit_run(run)


def test_both_files_are_written_and_the_json_is_the_report(report: AuditReport, tmp_path: Path) -> None:
    paths = write_report(report, tmp_path / "audit")
    assert [path.name for path in paths] == ["audit.json", "audit.html"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(report.as_dict()))
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == ["audit.html", "audit.json"]


def test_the_page_asks_for_nothing_from_outside(report: AuditReport) -> None:
    page = render(report)
    assert all(asked.partition("=")[2].startswith("#") for asked in Page(page).asked)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
    for foreign in ("<script", "@import", "url(http", "<link", "<iframe", "<?xml", "<!DOCTYPE svg"):
        assert foreign not in page


def test_the_page_states_verdict_promise_evidence_and_every_caveat(report: AuditReport) -> None:
    text, spent = Page(render(report)).text, report.spending
    assert spent is not None
    assert "Every claim holds: epsilon" in text
    assert f"{spent.epsilon:.5g} at δ = 1e-05" in text
    for words in ("one record", "adding or removing it", "PLD", "RDP", "PRV", RUN_ID, STAGE, "replays", PRIVATE_ROOT):
        assert words in text
    for said in (spent.head, spent.public_key, spent.ledger_id):
        assert said in text
    for claim in report.claims:
        assert claim.claim[1:] in text
        assert " ".join(claim.evidence.split()) in text
    for caveat in report.caveats:
        assert caveat in text
    assert f"{LABEL} showed operator-only metrics" in text


def test_a_false_claim_comes_first_and_is_not_told_by_colour(report: AuditReport, tmp_path: Path) -> None:
    run = public_stages(tmp_path / "run")
    train_privately(run)
    edit_manifest(run, STAGE, lambda m: m["metrics"].update(epsilon=0.1))
    text = Page(render(audit_run(run))).text
    assert "✗ 1 of 13 claims is false" in text
    assert "Rely on no figure of this page" in text
    assert text.index("✗ FALSE") < text.index("✓ holds")
    assert "Rely on no figure" not in Page(render(report)).text


def test_a_run_without_a_ledger_or_with_a_broken_one_has_a_page_without_figures(tmp_path: Path) -> None:
    run = public_stages(tmp_path / "run")
    assert "no privacy is promised" in Page(render(audit_run(run))).text
    (run / "ledger.jsonl").write_text("{}\n")
    page = render(audit_run(run))
    assert "✗ FALSE" in Page(page).text
    assert "<svg" not in page


def test_an_unfinished_run_and_one_with_many_stages_have_pages(tmp_path: Path) -> None:
    run = public_stages(tmp_path / "run")
    with open_ledger(run) as ledger:
        pages = [render(audit_run(run))]
        for number in range(12):
            ledger.charge(f"run{number}/tune", 0, EVENT, "git:abc")
    pages.append(render(audit_run(run)))
    assert "0 at δ" in Page(pages[0]).text
    assert all(f"run{number}" in Page(pages[1]).text for number in range(12))


def test_names_in_a_run_cannot_write_into_the_page(report: AuditReport) -> None:
    evil = "<script>alert(1)</script>"
    stages = [replace(report.stages[0], run=evil, stage=evil, code_versions=[evil])]
    filtered = {evil: {"splits": {}, "entities": {evil: 3}, "metadata": {}, "reasons": {}}}
    page = render(replace(report, run=f"runs/{evil}", stages=stages, filtered=filtered, caveats=[evil]))
    assert evil not in page
    assert html.escape(evil) in page


def test_what_a_membership_test_can_reach_is_what_the_promise_allows() -> None:
    assert detection_bound(0.0, 0.0, 0.01) == pytest.approx(0.01)  # no better than guessing
    assert detection_bound(1.0, 1e-5, 0.01) == pytest.approx(math.e * 0.01 + 1e-5)
    assert detection_bound(math.log(99), 0.0, 0.01) == pytest.approx(0.99)  # where the two bounds meet
    assert detection_bound(20.0, 1e-5, 0.01) == pytest.approx(1.0)
    assert detection_bound(1e6, 0.0, 0.01) == 1.0
