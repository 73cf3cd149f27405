import io
import json
from pathlib import Path

import pytest
from PIL import Image

from privacy.pii.filter import Policy
from privacy.pii.patterns import detect
from train.data import ShardDataset
from train.filtering import filter_shards
from train.planted import plant
from train.shards import Record, write_shards
from train.sources import DIGITS_SPLITS, DigitsSource, ingest


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


def test_the_digits_come_out_with_nothing_planted_left(tmp_path: Path) -> None:
    ingested = ingest(DigitsStage(), tmp_path / "ingest", silent)
    metrics = filter_shards(tmp_path / "ingest", tmp_path / "filter", list(DIGITS_SPLITS), Policy(), silent)
    gold: dict[str, int] = {}
    private = ShardDataset(tmp_path / "ingest" / "private", "private")
    for record in map(private.read, range(len(private))):
        for g in plant(f"a handwritten {record.label}", 0, record.key).gold:
            gold[g.entity] = gold.get(g.entity, 0) + 1
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
    ]
    write_shards(tmp_path / "in" / "private", "private", records, 2)
    metrics = filter_shards(tmp_path / "in", tmp_path / "out", ["private"], Policy(captions={"card": "drop"}), silent)
    told = metrics["splits"]["private"]
    assert (told["in"], told["kept"], told["dropped"], told["quarantined"], told["records"]) == (4, 2, 1, 1, 2)
    assert metrics["reasons"] == {"holds_card": 1, "malformed_png": 1}
    assert metrics["entities"] == {"email": 1, "iban": 0, "card": 1, "ssn": 0, "ip": 0, "phone": 0}
    dataset = ShardDataset(tmp_path / "out" / "private", "private")
    assert [dataset.read(n) for n in range(2)] == [records[0], records[3]]
    listed = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert [json.loads(line) for line in listed.splitlines()] == [
        {"split": "private", "key": "b", "reason": "holds_card"},
        {"split": "private", "key": "c", "reason": "malformed_png"},
    ]
    assert "jane" not in listed + json.dumps(metrics) and "4111" not in listed + json.dumps(metrics)


def test_a_split_with_nothing_left_is_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path / "in" / "private", "private", [Record("a", "a", png(), 0, "a@example.org")], 1)
    with pytest.raises(ValueError, match="split private has no records"):
        filter_shards(tmp_path / "in", tmp_path / "out", ["private"], Policy(captions={"email": "drop"}), silent)
    assert not (tmp_path / "out" / "private").exists()
