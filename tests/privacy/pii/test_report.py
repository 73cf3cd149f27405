"""The filter's page: self-contained, whole, without a value, and in the words of the metrics it was made from."""

import html
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from privacy.pii.filter import Tools
from privacy.pii.findings import Box, Pixels
from privacy.pii.patterns import PatternDetector
from privacy.pii.pixels import apply_boxes, decode
from privacy.pii.policy import Policy
from privacy.pii.pseudonyms import Pseudonyms
from privacy.pii.report import render, write_filter_report
from privacy.pii.report_samples import Sample, make_samples
from tests.page import Page

POLICY = Policy(captions={"email": "pseudonymise", "card": "drop"})
PATTERNS = PatternDetector()


class DarkIsAFace:
    """A detector of images that takes every dark pixel for a face."""

    name, version, entities = "faces", "1", ("face",)

    def detect(self, images: list[Pixels]) -> list[list[Box]]:
        return [self._dark(image) for image in images]

    def _dark(self, image: Pixels) -> list[Box]:
        rows, columns = np.nonzero(image.max(axis=2) < 40)
        if not len(rows):
            return []
        edges = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        return [Box("face", *edges, self.name, self.version)]


def split(kept: int, dropped: int, quarantined: int) -> dict[str, Any]:
    counts = {"in": kept + dropped + quarantined, "kept": kept, "dropped": dropped, "quarantined": quarantined}
    return {"records": kept, "bytes": 1, "shards": 1, "root": "blake3:" + "ab" * 32, **counts}


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "splits": {"public": split(5120, 1310, 20), "private": split(1204, 402, 6)},
        "shards_root": "blake3:" + "ef" * 32,
        "reasons": {"duplicate": 1502, "holds_card": 184, "too_many_pixels": 26, "image_still_shows_face": 26},
        "entities": {"email": 255, "card": 184, "iban": 0},
        "boxes": {"face": 120},
        "found_by": {
            "captions.email.patterns": 257,
            "captions.card.patterns": 190,
            "images.face.faces": 131,
            "svg.url.patterns": 9,
        },
        "acted": {"captions.email.pseudonymise": 240, "images.face.fill": 80},
        "metadata": {"png:tEXt": 2211, "svg:rdf": 8060, "svg:left_out:still_shows_phone": 5},
        "detectors": {"patterns": "email-2 card-2"},
        "policy_sha256": POLICY.digest(),
        "pseudonym_key_id": "0123456789abcdef",
        "duplicates": {"public": {"records": 6300, "dropped": 1200}, "private": {"records": 1600, "dropped": 302}},
    } | changes


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(POLICY, Tools((PATTERNS,), pseudonyms=Pseudonyms(b"k" * 32)))


def test_the_page_states_the_balance_and_every_count(samples: list[Sample]) -> None:
    text = Page(render("filter", metrics(), POLICY, samples)).text
    assert "✓ Every record is accounted for: 8,062 in; 6,324 kept; 1,712 dropped; 26 quarantined" in text
    for row in (
        "public 6,450 5,120 1,310 20 79.4%",
        "private 1,612 1,204 402 6 74.7%",
        "email 255 0 0 31.63 captions: pseudonymise",
        "face 0 120 0 14.88 images: fill",
        "url 0 0 9 1.12",
        "caption email patterns 257",
        "drawing (SVG) url patterns 9",
        "image face faces 131",
        "caption email pseudonymise 240",
        "svg:rdf 8,060",
        "png:tEXt 2,211",
        "a drawing that drawings how often after acting a detector still found: phone 5",
        "duplicate near another record of its split that was kept, by image and caption together 1,502 18.63%",
        "holds_card holds: card, for which the policy ends a record 184",
        "image_still_shows_face in its image after acting a detector still found: face 26",
        "too_many_pixels is damaged or not allowed: too many pixels 26",
        "left out 1,200 302",
        "Looked for and not found: iban.",
        "patterns email-2 card-2",
        "captions email: pseudonymise, card: drop",
    ):
        assert row in text, row
    for bound in ("blake3:" + "ef" * 32, "blake3:" + "ab" * 32, POLICY.digest(), "0123456789abcdef"):
        assert bound in text
    for said in ("does not prove", "That nothing personal is left", "differential privacy", "scripts/audit.py RUN"):
        assert said in text


def test_the_page_asks_for_nothing_from_outside_and_reads_without_seeing(samples: list[Sample]) -> None:
    source = render("filter", metrics(), POLICY, samples)
    page = Page(source)
    assert page.asked and all(asked.startswith("src=data:image/png;base64,") for asked in page.asked)
    assert not re.findall(r"https?://", source)
    for foreign in ("<script", "@import", "url(", "<link", "<iframe"):
        assert foreign not in source
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["aria-hidden"] == "true"  # its number is in the table
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert [tag for tag, _ in page.tags].count("main") == 1
    assert "prefers-color-scheme: dark" in source and "@media print" in source and "max-width: 640px" in source


def test_outcomes_that_do_not_add_up_are_called_false(samples: list[Sample]) -> None:
    wrong = {"private": split(3, 2, 1) | {"in": 7}}
    text = Page(render("filter", metrics(splits=wrong), POLICY, samples)).text
    assert "✗ FALSE: the outcomes do not add up to the records: 7 in" in text
    assert "accounted for" not in text


def test_a_run_in_which_nothing_was_found_has_a_page() -> None:
    names = ("reasons", "entities", "boxes", "found_by", "acted", "metadata", "detectors", "duplicates")
    nothing: dict[str, Any] = {name: {} for name in names}
    changes = nothing | {"splits": {"public": split(5, 0, 0)}, "pseudonym_key_id": None, "shards_root": None}
    text = Page(render("filter", metrics(**changes), Policy(detectors=()), [])).text
    assert "5 in; 5 kept; 0 dropped; 0 quarantined" in text
    assert "none were made" in text and "the stage has no section duplicates" in text


def test_names_in_the_metrics_cannot_write_into_the_page(samples: list[Sample]) -> None:
    evil = "<script>alert(1)</script>"
    changes: dict[str, Any] = {name: {evil: 3} for name in ("reasons", "entities", "boxes", "metadata")}
    changes |= {name: {f"captions.{evil}.{evil}": 3} for name in ("found_by", "acted")}
    changes |= {"splits": {evil: split(1, 0, 0)}, "detectors": {evil: evil}, "duplicates": {evil: {"records": 1}}}
    page = render(evil, metrics(**changes), POLICY, samples)
    assert evil not in page
    assert page.count(html.escape(evil)) >= 10


def test_the_samples_show_what_the_policy_does_to_invented_records(samples: list[Sample]) -> None:
    named, _, told, clean = samples
    assert named.before.caption is not None and "jordan.ashgrove@mail.example" in named.before.caption
    assert named.after.caption is not None and "@" not in named.after.caption
    assert "[EMAIL:" in named.after.caption and "[PHONE]" in named.after.caption
    assert b"Jordan Ashgrove" in told.before.image and b"Jordan" not in told.after.image
    assert told.after.metadata["png:tEXt"] == 2 and told.after.metadata["svg:rdf"] == 1
    assert b"jordan" not in (told.after.svg or b"jordan")
    assert (clean.after.outcome, dict(clean.after.found_by), clean.after.caption) == ("kept", {}, clean.before.caption)


def test_the_samples_pseudonyms_are_of_another_key_than_the_runs(samples: list[Sample]) -> None:
    ours = Pseudonyms(b"k" * 32).name("email", "jordan.ashgrove@mail.example")
    assert ours not in (samples[0].after.caption or "")
    again = make_samples(POLICY, Tools((PATTERNS,), pseudonyms=Pseudonyms(b"l" * 32)))
    assert again == samples


def test_a_sample_that_is_dropped_shows_no_after() -> None:
    policy = Policy(captions={"email": "drop"})
    samples = make_samples(policy, Tools((PATTERNS,)))
    page = Page(render("filter", metrics(), policy, samples))
    assert "A caption that names somebody: dropped" in page.text
    assert "not in the output: holds: email, for which the policy ends a record" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2 * len(samples) - 1


@pytest.mark.parametrize("installed", [True, False])
def test_a_face_is_shown_only_where_the_policy_looks_for_one_and_a_free_photograph_is_at_hand(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    if not installed:
        monkeypatch.setitem(sys.modules, "skimage.data", None)
    policy = Policy(detectors=("faces",))
    tools = Tools((), (DarkIsAFace(),), decode, apply_boxes)
    samples = make_samples(policy, tools)
    assert [sample.title for sample in samples if sample.title == "A face"] == ["A face"] * installed
    if installed:
        before, after = (
            np.asarray(Image.open(io.BytesIO(one.image))) for one in (samples[-1].before, samples[-1].after)
        )
        assert before.shape == after.shape and (before != after).any()


def test_the_file_is_written_whole_and_the_same_each_time(tmp_path: Path) -> None:
    tools = Tools((PATTERNS,), pseudonyms=Pseudonyms(b"k" * 32))
    path = write_filter_report(tmp_path, "filter", metrics(), POLICY, tools)
    first = path.read_bytes()
    assert path == tmp_path / "report.html" and [child.name for child in tmp_path.iterdir()] == ["report.html"]
    assert write_filter_report(tmp_path, "filter", metrics(), POLICY, tools).read_bytes() == first
