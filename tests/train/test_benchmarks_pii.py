"""The bench of personal data measures what it says, beside Presidio where that is installed."""

from pathlib import Path

import pytest

from privacy.pii.planting import ENTITIES
from privacy.pii.policy import Policy
from train import benchmarks_pii
from train.benchmarks_pii import fetched_captions, pii, presidio_sentences
from train.pii_evaluation import open_policy


def test_foreign_sentences_say_where_their_values_are() -> None:
    sentences = presidio_sentences(300, 0)
    assert sentences == presidio_sentences(400, 0)[:300]
    planted = [(gold.entity, one.text[gold.start : gold.end]) for one in sentences for gold in one.gold]
    assert {"person", "address", "card", "phone", "email"} <= {entity for entity, _ in planted} <= set(ENTITIES)
    assert all(value and "{" not in value for _, value in planted)


def test_captions_that_were_fetched_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks_pii, "CACHE", tmp_path)
    assert fetched_captions("emoji") == []
    for name, text in (("a", "red apple\n"), ("b", "red apple"), ("c", "pear"), ("d", "")):
        (tmp_path / "emoji" / name).mkdir(parents=True)
        (tmp_path / "emoji" / name / "1.txt").write_text(text, "utf-8")
    assert fetched_captions("emoji") == ["pear", "red apple"]


def test_speeds_are_told_with_their_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks_pii, "TIMED_CAPTIONS", 40)
    policy = Policy()
    rows = {row["name"]: row for row in benchmarks_pii._speeds(policy, open_policy(policy), None)}
    assert set(rows) == {"pii.patterns_mb_a_second", "pii.captions_a_second"}
    assert all(row.get("target") is not None and row.get("ok") is not None for row in rows.values())


@pytest.mark.slow
def test_all_of_it_is_measured_in_one_run() -> None:
    rows = {row["name"]: row for row in pii()}
    assert {"pii.recall.person", "pii.faces.recall", "pii.leak", "pii.images_a_second"} <= set(rows)
    assert rows["pii.metadata.survives"]["value"] == 0
