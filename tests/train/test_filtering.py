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
from privacy.pii.filter import Policy, Tools
from privacy.pii.findings import Finding, MissingDetector
from privacy.pii.patterns import ENTITIES, PatternDetector, detect
from privacy.pii.pseudonyms import Pseudonyms, WrongKey
from privacy.secrets import SecretError, create_key_file, read_key_file
from train import ROOT
from train.data import ShardDataset
from train.filtering import filter_shards, open_tools
from train.heartbeat import Heartbeat
from train.planted import plant
from train.recipe import ConfigError, load_stage
from train.run_folder import RunFolder, now
from train.shards import Record, write_shards
from train.sources import DIGITS_SPLITS, DigitsSource, ingest
from train.stages import run_stage

NO_KEY = Path("no-such.key")
FILTER = ROOT / "configs" / "digits" / "20_filter.yaml"


@pytest.fixture(autouse=True)
def _no_secret_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFUMATO_SECRET", raising=False)


class DigitsStage:
    source = DigitsSource(kind="digits")
    shard_size = 512
    seed = 0


def png() -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), 100).save(out, "PNG")
    return out.getvalue()


def silent(done: int, total: int | None) -> None:
    assert total is not None and done <= total


def run(folder: Path, splits: Sequence[str] = ("private",), policy: Policy | None = None, **options: Any) -> Any:
    """Filter folder/in into folder/out."""
    policy = policy or Policy()
    tools = options.pop("tools", None) or open_tools(policy, NO_KEY)
    return filter_shards(folder / "in", folder / "out", list(splits), policy, tools, silent, **options)


def listed(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]


def kept(folder: Path, split: str = "private") -> list[Record]:
    dataset = ShardDataset(folder / "out" / split, split)
    return [dataset.read(index) for index in range(len(dataset))]


def left(folder: Path) -> dict[str, bytes]:
    """Every file under folder/out."""
    files = (path for path in (folder / "out").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def captioned(captions: Sequence[str | None]) -> list[Record]:
    return [Record(f"r{n:03d}", f"r{n:03d}", png(), 0, caption) for n, caption in enumerate(captions)]


def write(folder: Path, records: Sequence[Record], split: str = "private", shard_size: int = 16) -> None:
    write_shards(folder / "in" / split, split, records, shard_size)


def test_the_digits_come_out_with_nothing_planted_left(tmp_path: Path) -> None:
    ingested = ingest(DigitsStage(), tmp_path / "ingest", silent)
    tools = open_tools(Policy(), NO_KEY)
    metrics = filter_shards(tmp_path / "ingest", tmp_path / "filter", list(DIGITS_SPLITS), Policy(), tools, silent)
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


def test_a_split_with_nothing_left_is_an_error_and_no_split_stands(tmp_path: Path) -> None:
    write(tmp_path, captioned(["a cat"]), "public")
    write(tmp_path, captioned(["a@example.org"]))
    with pytest.raises(ValueError, match=r"split private has no records left of 1 \(holds_email 1\)"):
        run(tmp_path, ["public", "private"], Policy(captions={"email": "drop"}))
    assert set(left(tmp_path)) == {"out/quarantine.jsonl"}
    with pytest.raises(ValueError, match="split private has no records left"):
        run(tmp_path, policy=Policy(captions={"email": "drop"}), duplicates=DuplicatesConfig())
    assert set(left(tmp_path)) == {"out/quarantine.jsonl"}


# --- detectors ---


@pytest.mark.parametrize("name", ["names", "presidio", "gliner"])
def test_a_detector_that_is_not_here_is_refused_before_a_record_is_read(name: str) -> None:
    with pytest.raises(MissingDetector, match=f"'{name}'.*leave it out of policy.detectors; those that open are patt"):
        open_tools(Policy(detectors=("patterns", name)), NO_KEY)


def test_a_policy_that_the_tools_cannot_carry_out_is_refused_before_a_record_is_read(tmp_path: Path) -> None:
    with pytest.raises(MissingDetector, match="'patterns', which is not open"):
        run(tmp_path, tools=Tools(()))  # there is no folder to read, and this is said first
    assert not (tmp_path / "out").exists()


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


def test_records_go_through_the_detectors_in_batches_and_each_detector_is_told(tmp_path: Path) -> None:
    write(tmp_path, captioned(["Tom", *(f"cat {n}" for n in range(149))]))
    cats = Cats()
    metrics = run(tmp_path, policy=Policy(detectors=("names",)), tools=Tools((cats,)))
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
    metrics = run(tmp_path, ["public", "private"], NAMED, tools=open_tools(NAMED, tmp_path / "key"))
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
        run(tmp_path, policy=other, tools=open_tools(other, tmp_path / "key"))
    assert not (tmp_path / "out").exists()


# --- damage ---


def damaged(count: int) -> list[Record]:
    """100 records, the first `count` of them cut short."""
    return [Record(f"r{n:03d}", f"r{n:03d}", png()[: -1 if n < count else None], 0, None) for n in range(100)]


def test_too_much_damage_stops_the_stage_and_says_why(tmp_path: Path) -> None:
    write(tmp_path, captioned(["a cat"]), "public")
    write(tmp_path, damaged(6))
    told = r"6 of the first 65 records \(of 101\) are damaged.*max_quarantine_fraction 0.05.*malformed_png 6"
    with pytest.raises(ValueError, match=told):
        run(tmp_path, ["public", "private"])
    assert set(left(tmp_path)) == {"out/quarantine.jsonl"} and len(listed(tmp_path)) == 6


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
def test_what_the_policy_quarantines_is_no_damage(tmp_path: Path, policy: Policy, detector: Any, reason: str) -> None:
    write(tmp_path, captioned(["Tom tom@example.org"] * 50 + ["a cat"]))
    metrics = run(tmp_path, policy=policy, tools=Tools((detector,)), max_quarantine_fraction=0.0)
    assert metrics["reasons"] == {reason: 50}
    assert metrics["splits"]["private"]["quarantined"] == 50


# --- duplicates ---


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


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
    assert [line["key"] for line in listed(tmp_path)] == ["cut", "a-3", records[199].key]
    gone = {line["key"] for line in listed(tmp_path)}
    assert [record.key for record in kept(tmp_path)] == [record.key for record in records if record.key not in gone]
    assert not (tmp_path / "out" / ".staged").exists()
    assert run(tmp_path)["splits"]["private"]["kept"] == 199


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


# --- the same bytes again ---


class Killed(BaseException):
    pass


@pytest.mark.parametrize("duplicates", [None, DuplicatesConfig()], ids=["all", "unique"])
def test_run_again_after_whatever_end_the_shards_have_the_same_bytes(
    tmp_path: Path, duplicates: DuplicatesConfig | None
) -> None:
    write(tmp_path, with_copies(), shard_size=64)
    told = run(tmp_path, duplicates=duplicates, shard_size=50)
    once = left(tmp_path)
    assert run(tmp_path, duplicates=duplicates, shard_size=50) == told and left(tmp_path) == once
    for last in (1, 130, 199, 200, 201, 390):

        def killed(done: int, total: int | None, last: int = last) -> None:
            if done == last:
                raise Killed

        try:
            filter_shards(
                tmp_path / "in", tmp_path / "out", ["private"], Policy(), open_tools(Policy(), NO_KEY), killed,
                duplicates=duplicates, shard_size=50,
            )  # fmt: skip
        except Killed:
            (tmp_path / "out" / ".staged" / "private").mkdir(parents=True)  # as SIGKILL leaves it
        assert run(tmp_path, duplicates=duplicates, shard_size=50) == told and left(tmp_path) == once


# --- the stage ---


def test_the_stage_ends_with_its_manifest_or_without_one_where_too_much_is_damaged(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", "digits")
    written = write_shards(folder.stage_folder("ingest") / "private", "private", damaged(6), 50)
    source = load_stage(FILTER.with_name("10_ingest.yaml"))
    metrics = {"splits": {"private": {"root": written.root}}}
    folder.write_manifest(source, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})
    with pytest.raises(ValueError, match="6 of the first 64 records"):
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
    assert set(manifest["outputs"]) == {"filter/quarantine.jsonl"}


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
        ("executor={kind: local}", "executor"),
    ],
)
def test_no_key_of_the_stage_does_nothing(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_stage(FILTER, [override])
