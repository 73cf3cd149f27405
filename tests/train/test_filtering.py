import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from privacy.pii.duplicates import DuplicatesConfig
from privacy.pii.filter import Policy
from privacy.pii.findings import Finding
from privacy.pii.manifests import verify_manifests, verify_shards
from privacy.pii.patterns import ENTITIES, PatternDetector, detect
from privacy.pii.pseudonyms import Pseudonyms, WrongKey
from privacy.secrets import SecretError, create_key_file, read_key_file
from tests.train.small_filter import NO_KEY, Inline, captioned, do, left, listed, picture, plan, png, run, write
from train import ROOT
from train.data import ShardDataset
from train.filtering import filter_shards, open_tools, plan_filter
from train.heartbeat import Heartbeat
from train.planted import plant
from train.recipe import ConfigError, load_stage
from train.run_folder import RunFolder, now
from train.sandbox import Sandbox
from train.shards import Record, write_shards
from train.source_config import DigitsSource
from train.sources import DIGITS_SPLITS, ingest
from train.stages import run_stage

FILTER = ROOT / "configs" / "digits" / "20_filter.yaml"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.filter_job.Sandbox", Inline)
    monkeypatch.delenv("SFUMATO_SECRET", raising=False)


class DigitsStage:
    source = DigitsSource(kind="digits")
    shard_size = 512
    seed = 0


def kept(folder: Path, split: str = "private") -> list[Record]:
    dataset = ShardDataset(folder / "out" / split, split)
    return [dataset.read(index) for index in range(len(dataset))]


def test_the_digits_come_out_with_nothing_planted_left(tmp_path: Path) -> None:
    ingested = ingest(DigitsStage(), tmp_path / "ingest", lambda done, total: None)
    metrics = filter_shards(
        plan_filter(tmp_path / "ingest", tmp_path / "filter", list(DIGITS_SPLITS), Policy(), NO_KEY), do
    )
    gold = dict.fromkeys(ENTITIES, 0)
    private = ShardDataset(tmp_path / "ingest" / "private", "private")
    for record in map(private.read, range(len(private))):
        for g in plant(f"a handwritten {record.label}", 0, record.key).gold:
            gold[g.entity] += 1
    assert metrics["entities"] == gold  # every planted entity, and nothing else, in all three splits
    for split, size in DIGITS_SPLITS.items():
        dataset, told = ShardDataset(tmp_path / "filter" / split, split), metrics["splits"][split]
        assert (told["in"], told["kept"], told["dropped"], told["quarantined"]) == (size, size, 0, 0)
        assert told["root"] == dataset.root
        assert (dataset.root == ingested["splits"][split]["root"]) == (split != "private")
        for record in map(dataset.read, range(len(dataset))):
            assert not detect(record.caption or "")
            assert Image.open(io.BytesIO(record.image)).info == {}
    assert metrics["metadata"]["png:tEXt"] == metrics["metadata"]["png:eXIf"] > 100
    manifests = verify_manifests(tmp_path / "filter", metrics["shards_root"])
    assert verify_shards(tmp_path / "filter", manifests) == {
        split: told["root"] for split, told in metrics["splits"].items()
    }


def test_what_goes_in_is_kept_or_dropped_or_quarantined_and_listed(tmp_path: Path) -> None:
    records = [
        Record("a", "a", png(), 0, "a cat"),
        Record("b", "b", png(), 1, "card 4111 1111 1111 1111"),
        Record("c", "user", png()[:-1], 0, "jane@example.org"),
        Record("d", "user", png(), None, None),
        Record("e", "e", png(), None, "by joe@example.org"),
    ]
    write(tmp_path, records, shard_size=2)
    policy = Policy(captions={"card": "drop"})
    metrics = run(tmp_path, policy=policy, max_quarantine_fraction=0.2)
    told = metrics["splits"]["private"]
    assert (told["in"], told["kept"], told["dropped"], told["quarantined"], told["records"]) == (5, 3, 1, 1, 3)
    assert metrics["reasons"] == {"holds_card": 1, "malformed_png": 1}
    assert metrics["entities"] == dict.fromkeys(ENTITIES, 0) | {"email": 2, "card": 1}
    assert metrics["found_by"] == {"captions.card.patterns": 1, "captions.email.patterns": 2}
    assert metrics["acted"] == {"captions.email.fill": 1}  # of what is kept
    assert metrics["detectors"] == {"patterns": PatternDetector().version}
    assert metrics["policy_sha256"] == policy.digest()
    assert (metrics["pseudonym_key_id"], metrics["duplicates"], metrics["boxes"]) == (None, {}, {})
    assert kept(tmp_path) == [records[0], records[3], Record("e", "e", png(), None, "by [EMAIL]")]
    assert listed(tmp_path) == [
        {"split": "private", "key": "b", "reason": "holds_card"},
        {"split": "private", "key": "c", "reason": "malformed_png"},
    ]
    said = json.dumps(metrics) + json.dumps(listed(tmp_path))
    assert not any(value in said for value in ("jane", "joe", "4111"))


def test_a_drawing_is_stripped_or_left_out_on_its_way_through_the_stage(tmp_path: Path) -> None:
    drawn = b'<svg xmlns="http://www.w3.org/2000/svg"><!-- by Jane --><title>of a@example.org</title><path/></svg>'
    records = [Record(key, key, png(), 0, "a cat", svg) for key, svg in (("a", drawn), ("b", drawn[:-1]), ("c", None))]
    write(tmp_path, records)
    metrics = run(tmp_path)
    first, second, third = (record.svg for record in kept(tmp_path))
    assert first is not None and first.endswith(b"><title>of [EMAIL]</title><path/></svg>")
    assert second is third is None
    assert metrics["metadata"] == {"svg:comment": 1, "svg:left_out:malformed": 1}
    assert metrics["acted"] == {"svg.email.fill": 1}


def test_a_split_with_nothing_left_is_an_error_however_often_it_is_run(tmp_path: Path) -> None:
    write(tmp_path, captioned(["a cat"]), "public")
    write(tmp_path, captioned(["a@example.org"]))
    policy = Policy(captions={"email": "drop"})
    for options in ({}, {}, {"duplicates": DuplicatesConfig()}):
        with pytest.raises(ValueError, match=r"split private has no records left of 1 \(holds_email 1\)"):
            run(tmp_path, ["public", "private"], policy, **options)
        assert listed(tmp_path) == [{"split": "private", "key": "r000", "reason": "holds_email"}]


def test_shards_of_which_much_or_all_is_dropped_are_read_as_one_split(tmp_path: Path) -> None:
    captions = ["a cat", *["a@example.org"] * 15, *["a@example.org"] * 16, *["a dog"] * 16, *["a@example.org"] * 3]
    write(tmp_path, captioned(captions))
    metrics = run(tmp_path, policy=Policy(captions={"email": "drop"}))
    assert sorted(name for name in left(tmp_path) if name.endswith("tar")) == [
        "private/private-00000.tar", "private/private-00002.tar"
    ]  # fmt: skip
    assert len([name for name in left(tmp_path) if name.endswith("manifest.json")]) == 4
    told = metrics["splits"]["private"]
    assert (told["in"], told["kept"], told["dropped"], told["shards"]) == (51, 17, 34, 2)
    dataset = ShardDataset(tmp_path / "out" / "private", "private")
    assert [record.key for record in kept(tmp_path)] == ["r000", *(f"r{n:03d}" for n in range(32, 48))]
    assert dataset.root == told["root"]
    verify_shards(tmp_path / "out", verify_manifests(tmp_path / "out", metrics["shards_root"]))
    for gone in (".tar", ".index.jsonl"):
        (tmp_path / "out" / "private" / f"private-00002{gone}").unlink()
    with pytest.raises(ValueError, match=r"private-00002\.tar is missing, its manifest is there: .* filter again"):
        ShardDataset(tmp_path / "out" / "private", "private")


def test_a_shard_with_nothing_left_goes_through_a_filter_again(tmp_path: Path) -> None:
    write(tmp_path, captioned([*["a@example.org"] * 16, *["a dog"] * 16]))
    run(tmp_path, policy=Policy(captions={"email": "drop"}))
    (tmp_path / "again").mkdir()
    (tmp_path / "out").rename(tmp_path / "again" / "in")
    assert run(tmp_path / "again")["splits"]["private"]["kept"] == 16


def test_in_a_child_process_the_same_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, with_copies())
    metrics = run(tmp_path, duplicates=DuplicatesConfig())
    inline = left(tmp_path)
    (tmp_path / "out").rename(tmp_path / "inline")
    monkeypatch.setattr("train.filter_job.Sandbox", Sandbox)
    assert run(tmp_path, duplicates=DuplicatesConfig()) == metrics
    assert left(tmp_path) == inline


# --- detectors ---


class Cats:
    name, version, entities = "names", "7", ("person", "address")

    def __init__(self) -> None:
        self.batches: list[int] = []

    def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
        self.batches.append(len(texts))
        return [
            [Finding("person", m.start(), m.end(), self.name, self.version, 0.2) for m in re.finditer("Tom", text)]
            for text in texts
        ]


def test_records_go_through_the_detectors_in_batches_and_each_detector_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, captioned(["Tom", *(f"cat {n}" for n in range(149))]), shard_size=100)
    cats = Cats()
    monkeypatch.setattr("train.filter_tools.open_detectors", lambda policy: ((cats,), ()))
    metrics = run(tmp_path, policy=Policy(detectors=("names",)))
    assert max(cats.batches) > 10
    assert metrics["reasons"] == {"uncertain_person": 1}
    assert metrics["entities"] == {"person": 1, "address": 0}
    assert metrics["detectors"] == {"names": "7"}
    assert [record.key for record in kept(tmp_path)] == [f"r{n:03d}" for n in range(1, 150)]


# --- pseudonyms ---

NAMED = Policy(captions={"email": "pseudonymise"})


def test_a_value_has_one_pseudonym_in_all_shards_and_splits_and_the_keys_id_is_told(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    captions = ["by jane@example.org", *("a cat" for _ in range(100)), "by Jane@Example.org"]
    write(tmp_path, captioned(captions))
    write(tmp_path, captioned(captions), "public")
    metrics = run(tmp_path, ["public", "private"], NAMED, key_file=tmp_path / "key")
    pseudonyms = Pseudonyms(read_key_file(tmp_path / "key"))
    assert metrics["pseudonym_key_id"] == pseudonyms.key_id
    assert metrics["acted"] == {"captions.email.pseudonymise": 4}
    named = [r.caption for split in ("public", "private") for r in kept(tmp_path, split) if r.caption != "a cat"]
    assert named == [f"by {pseudonyms.name('email', 'jane@example.org')}"] * 4


def test_pseudonyms_need_a_key_and_the_policys_own_if_it_names_one(tmp_path: Path) -> None:
    write(tmp_path, captioned(["by jane@example.org"]))
    with pytest.raises(SecretError, match=r"no-such\.key is missing: create it, or set .* SFUMATO_SECRET"):
        open_tools(NAMED, NO_KEY)
    create_key_file(tmp_path / "key")
    other = Policy.model_validate({**NAMED.model_dump(), "pseudonyms": {"key_id": "0123456789abcdef"}})
    with pytest.raises(WrongKey, match="key 0123456789abcdef, and the key at hand is"):
        run(tmp_path, policy=other, key_file=tmp_path / "key")
    assert not (tmp_path / "out").exists()


def test_another_key_than_that_of_the_first_run_is_refused_wherever_it_turns_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, captioned(["by jane@example.org"]))
    for name in ("key", "other"):
        create_key_file(tmp_path / name)
    first = plan(tmp_path, policy=NAMED, key_file=tmp_path / "key")
    (tmp_path / "other").rename(tmp_path / "key")
    with pytest.raises(WrongKey, match=rf"has pseudonyms of key {first.pseudonym_key_id}, and the key at hand is"):
        filter_shards(first, do)  # a worker that reads another key than the stage was planned with
    again = run(tmp_path, policy=NAMED, key_file=tmp_path / "key")
    create_key_file(tmp_path / "other")
    with pytest.raises(WrongKey, match=rf"private-00000\.manifest\.json has .* key {again['pseudonym_key_id']}"):
        plan(tmp_path, policy=NAMED, key_file=tmp_path / "other")


def test_a_worker_with_another_version_of_a_detector_is_refused(tmp_path: Path) -> None:
    write(tmp_path, captioned(["a cat"]))
    job = plan(tmp_path)
    older = job.model_copy(update={"detectors": {"patterns": "old"}})
    with pytest.raises(
        ValueError, match=r"detector patterns is version .* here, and the stage began with old: install"
    ):
        filter_shards(older, do)


# --- damage ---


def damaged(count: int) -> list[Record]:
    """100 records, the first `count` of them cut short."""
    return [Record(f"r{n:03d}", f"r{n:03d}", png()[: -1 if n < count else None], 0, None) for n in range(100)]


def test_too_much_damage_stops_the_stage_and_says_why(tmp_path: Path) -> None:
    write(tmp_path, captioned(["a cat"]), "public")
    write(tmp_path, damaged(6))
    told = r"6 of the first 17 records \(of 101\) are damaged.*max_quarantine_fraction 0.05.*malformed_png 6"
    for _ in range(2):
        with pytest.raises(ValueError, match=told):
            run(tmp_path, ["public", "private"])
        assert len(listed(tmp_path)) == 6
    before = left(tmp_path)
    metrics = run(tmp_path, ["public", "private"], max_quarantine_fraction=0.06)
    assert metrics["splits"]["private"]["kept"] == 94
    assert {name: left(tmp_path)[name] for name in before if name.startswith("p")}.items() <= before.items()


def test_as_much_damage_as_is_allowed_is_none_too_much(tmp_path: Path) -> None:
    write(tmp_path, damaged(5))
    assert run(tmp_path)["reasons"] == {"malformed_png": 5}


@pytest.mark.parametrize(
    ("policy", "detector", "reason"),
    [
        (Policy(captions={"email": "quarantine"}), PatternDetector(), "holds_email"),
        (Policy(detectors=("names",), uncertain="quarantine"), Cats(), "uncertain_person"),
    ],
    ids=["holds", "uncertain"],
)
def test_what_the_policy_quarantines_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy, detector: Any, reason: str
) -> None:
    write(tmp_path, captioned(["Tom tom@example.org"] * 50 + ["a cat"]))
    monkeypatch.setattr("train.filter_tools.open_detectors", lambda policy: ((detector,), ()))
    metrics = run(tmp_path, policy=policy, max_quarantine_fraction=0.0)
    assert metrics["reasons"] == {reason: 50}
    assert metrics["splits"]["private"]["quarantined"] == 50


def test_input_that_is_no_longer_what_its_index_says_is_quarantined_and_the_rest_is_not(tmp_path: Path) -> None:
    write(tmp_path, captioned([f"cat {n}" for n in range(40)]))
    tars = sorted((tmp_path / "in" / "private").glob("*.tar"))
    content = bytearray(tars[0].read_bytes())
    content[content.index(b"cat 3") + 4] ^= 1
    tars[0].write_bytes(content)
    tars[2].write_bytes(tars[2].read_bytes()[: tars[2].read_bytes().index(b"cat 38")])
    metrics = run(tmp_path, max_quarantine_fraction=0.1)
    assert metrics["reasons"] == {"digest_mismatch": 3}
    assert [line["key"] for line in listed(tmp_path)] == ["r003", "r038", "r039"]
    assert len(kept(tmp_path)) == 37


def test_a_record_that_kills_the_process_that_decodes_it_is_quarantined(tmp_path: Path) -> None:
    write(tmp_path, [*captioned(["a cat", "a dog"]), Record("killer", "u", png(), 0, "a bomb")])
    metrics = run(tmp_path, max_quarantine_fraction=0.5)
    assert metrics["reasons"] == {"crashed": 1} and metrics["splits"]["private"]["kept"] == 2


# --- duplicates ---


def with_copies() -> list[Record]:
    """200 pictures in which 150 and 199 are 3 and 7 again, but for what the policy takes out; 100 is damaged."""
    source = {150: 3, 199: 7}
    records = [
        Record(f"{'k' * (n % 5)}-{n:03d}", "u", picture(source.get(n, n)), 0, f"of {source.get(n, n)}")
        for n in range(200)
    ]
    for n, who in ((3, "jane@example.org"), (150, "joe@example.com")):
        records[n] = Record(f"a-{n}", "u", records[n].image, 0, f"a blue picture by {who}")
    records[100] = Record("cut", "u", records[100].image[:-9], 0, None)
    return records


def test_copies_within_a_split_are_left_out_and_counted(tmp_path: Path) -> None:
    records = with_copies()
    write(tmp_path, records)
    write(tmp_path, records[:20], "public")
    metrics = run(tmp_path, ["public", "private"], duplicates=DuplicatesConfig())
    told = metrics["splits"]["private"]
    assert (told["in"], told["kept"], told["dropped"], told["quarantined"], told["records"]) == (200, 197, 2, 1, 197)
    assert metrics["splits"]["public"]["kept"] == 20  # what is public does not hang on what is private
    assert metrics["reasons"] == {"duplicate": 2, "malformed_png": 1}
    assert metrics["duplicates"]["private"]["dropped"] == 2 and metrics["duplicates"]["private"]["records"] == 199
    assert [line["key"] for line in listed(tmp_path)] == ["a-3", "cut", records[199].key]
    told = json.loads((tmp_path / "out" / "private.duplicates.json").read_text())
    assert told["dropped"] == {"a-3": "a-150", records[199].key: records[7].key}
    gone = {line["key"] for line in listed(tmp_path)}
    assert [record.key for record in kept(tmp_path)] == [record.key for record in records if record.key not in gone]
    assert {name.split("/")[0] for name in left(tmp_path)} == {
        "private", "public", "private.duplicates.json", "public.duplicates.json", "quarantine.jsonl"
    }  # fmt: skip
    assert run(tmp_path)["splits"]["private"]["kept"] == 199
    assert {name.split("/")[0] for name in left(tmp_path)} == {"private", "quarantine.jsonl"}


def test_transparent_and_deep_pictures_are_told_apart_by_what_they_show(tmp_path: Path) -> None:
    """Black all over, but for what is transparent; and more than 8 bits a pixel, which clipping would make white."""

    def stored(pixels: Any) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()

    shapes = [np.asarray(Image.open(io.BytesIO(picture(n))).convert("L")) for n in range(4)]
    black = np.zeros((48, 48, 3), np.uint8)
    images = [stored(np.dstack([black, shape])) for shape in shapes[:2]]
    images += [stored(shape.astype(np.uint16) + 1000) for shape in shapes[2:]]
    write(tmp_path, [Record(f"r{n}", "u", image, 0, "a shape") for n, image in enumerate(images)])
    assert run(tmp_path, duplicates=DuplicatesConfig())["splits"]["private"]["kept"] == 4


# --- the stage ---


def test_the_stage_ends_with_its_manifest_or_without_one_where_too_much_is_damaged(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", "digits")
    written = write_shards(folder.stage_folder("ingest") / "private", "private", damaged(6), 50)
    source = load_stage(FILTER.with_name("10_ingest.yaml"))
    metrics = {"splits": {"private": {"root": written.root}}}
    folder.write_manifest(source, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})
    with pytest.raises(ValueError, match="6 of the first 50 records"):
        run_stage(load_stage(FILTER), folder, None, Heartbeat(0))
    assert folder.read_manifest("filter") is None

    overrides = ["max_quarantine_fraction=0.1", "duplicates={smallest_side: 32}", "policy.captions={ip: pseudonymise}"]
    stage = load_stage(FILTER, overrides)
    with pytest.raises(SecretError, match=r"secret\.key is missing"):
        run_stage(stage, folder, None, Heartbeat(0))
    create_key_file(folder.path / "secret.key")
    run_stage(stage, folder, None, Heartbeat(0))
    manifest = folder.read_manifest("filter")
    assert manifest is not None
    told = manifest["metrics"]
    assert told["splits"]["private"] | {"root": "", "bytes": 0} == {
        "records": 1, "bytes": 0, "shards": 1, "root": "", "in": 100, "kept": 1, "dropped": 93, "quarantined": 6,
    }  # fmt: skip
    key_id = Pseudonyms(read_key_file(folder.path / "secret.key")).key_id
    assert told["pseudonym_key_id"] == key_id and told["headline"]["pseudonyms"] == f"key {key_id}"
    assert told["headline"]["dropped or quarantined"] == "duplicate 93, malformed_png 6"
    assert set(manifest["outputs"]) == {"filter/quarantine.jsonl", "filter/report.html"}


def test_where_the_key_lies_is_no_part_of_a_stages_identity_and_what_is_left_out_is() -> None:
    plain, named = load_stage(FILTER), load_stage(FILTER, ["policy.captions={email: pseudonymise}"])
    moved = load_stage(FILTER, ["policy.captions={email: pseudonymise}", "key_file=/elsewhere.key"])
    assert named.sha256() == moved.sha256() != plain.sha256()
    assert load_stage(FILTER, ["duplicates={image_bits: 4}"]).sha256() != plain.sha256()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("key_file=my.key", "key_file names a key, and policy.captions pseudonymises nothing: leave key_file out"),
        ("policy.pseudonyms={key_id: 0123456789abcdef}", "policy.pseudonyms names a key, and policy.captions pseudo"),
    ],
)
def test_no_key_of_the_stage_does_nothing(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_stage(FILTER, [override])
