import gzip
import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, TiffImagePlugin, TiffTags
from pydantic import TypeAdapter, ValidationError

from privacy.pii.metadata import strip_metadata
from privacy.pii.patterns import detect
from train.data import ShardDataset
from train.planted import plant
from train.shapes import recognise, scene_of
from train.shards import Record, ShardError, write_shards
from train.source_config import DigitsSource, FolderPart, SourceConfig
from train.sources import DIGITS_SPLITS, ingest, plain_name

HALVES = {"public": 0.5, "private": 0.5}


@dataclass(frozen=True)
class Config:
    source: SourceConfig
    shard_size: int = 100
    seed: int = 0


def config(seed: int = 0, **source: object) -> Config:
    return Config(TypeAdapter(SourceConfig).validate_python(source), seed=seed)


def run(out: Path, settings: Config) -> dict:
    told: list[tuple[int, int | None]] = []
    metrics = ingest(settings, out, lambda done, total: told.append((done, total)))
    kept = sum(split["records"] for split in metrics["splits"].values())
    assert [done for done, _ in told] == list(range(1, kept + sum(metrics["quarantined"].values()) + 1))
    return metrics


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def grey(shade: int, size: int = 8) -> bytes:
    return encoded(Image.new("L", (size, size), shade))


def claiming(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header speaks of more."""
    small = encoded(Image.new("1", (1, 1)))
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def all_records(out: Path, metrics: dict) -> dict[str, tuple[str, Record]]:
    datasets = {split: ShardDataset(out / split, split) for split in metrics["splits"]}
    return {(r := d.read(n)).key: (split, r) for split, d in datasets.items() for n in range(len(d))}


def idx_files(folder: Path, count: int, zipped: bool = False, **header: bytes) -> dict[str, str]:
    images = np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 4)
    files = {
        "images": header.get("images", struct.pack(">4B3I", 0, 0, 8, 3, count, 3, 4)) + images.tobytes(),
        "labels": header.get("labels", struct.pack(">4BI", 0, 0, 8, 1, count)) + bytes(n % 10 for n in range(count)),
    }
    folder.mkdir(exist_ok=True)
    paths = {name: folder / (name + (".gz" if zipped else "")) for name in files}
    for name, path in paths.items():
        path.write_bytes(gzip.compress(files[name]) if zipped else files[name])
    return {name: str(path) for name, path in paths.items()}


def image_folder(folder: Path, count: int = 40) -> Path:
    for n in range(count):
        place = folder / ("cats" if n % 2 else "big_dogs") / f"{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(grey(n))
    return folder


# digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("digits")
    return out, run(out, config(kind="digits"))


def test_digits_are_all_there_once_in_splits_of_the_promised_sizes(digits: tuple[Path, dict]) -> None:
    from sklearn.datasets import load_digits

    out, metrics = digits
    assert {split: told["records"] for split, told in metrics["splits"].items()} == dict(DIGITS_SPLITS)
    found, truth = all_records(out, metrics), load_digits()
    assert sorted(found) == [f"digit-{n:04d}" for n in range(1797)]
    for n in range(0, 1797, 50):
        _, record = found[f"digit-{n:04d}"]
        shades = np.asarray(Image.open(io.BytesIO(record.image)))
        np.testing.assert_array_equal(shades, np.rint(truth.images[n] * 255 / 16))
        assert record.label == truth.target[n] and record.unit == record.key


def test_digits_splits_hold_every_class_in_its_share(digits: tuple[Path, dict]) -> None:
    out, metrics = digits
    of_all = Counter(record.label for _, record in all_records(out, metrics).values())
    for split, size in DIGITS_SPLITS.items():
        labels = Counter(ShardDataset(out / split, split).labels.tolist())
        assert all(abs(labels[label] - of_all[label] * size / 1797) < 1.5 for label in range(10)), split


def test_only_private_digits_carry_planted_data_and_all_of_it_is_known(digits: tuple[Path, dict]) -> None:
    out, metrics = digits
    authors = 0
    for key, (split, record) in all_records(out, metrics).items():
        plain = f"a handwritten {record.label}"
        image = Image.open(io.BytesIO(record.image))
        if split == "private":
            planted = plant(plain, 0, key)
            assert record.caption == planted.caption
            assert image.info.get("Author") == planted.author
            authors += bool(image.getexif())
        else:
            assert record.caption == plain and detect(plain) == [] and image.info == {}
    assert 0.15 < authors / DIGITS_SPLITS["private"] < 0.25


def test_digits_depend_on_the_seed_alone(digits: tuple[Path, dict], tmp_path: Path) -> None:
    _, metrics = digits
    assert run(tmp_path / "again", config(kind="digits")) == metrics
    other = run(tmp_path / "other", config(seed=1, kind="digits"))
    assert all(other["splits"][split]["root"] != metrics["splits"][split]["root"] for split in DIGITS_SPLITS)


# idx


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_plain_or_zipped(tmp_path: Path, zipped: bool) -> None:
    train, test = idx_files(tmp_path / "a", 20, zipped), idx_files(tmp_path / "b", 6, zipped)
    names = tuple(f"thing {n}" for n in range(10))
    parts = [{**train, "splits": HALVES}, {**test, "splits": {"test": 1}}]
    metrics = run(tmp_path / "out", config(kind="idx", parts=parts, class_names=names))
    found = all_records(tmp_path / "out", metrics)
    assert sorted(found) == [f"0-{n:07d}" for n in range(20)] + [f"1-{n:07d}" for n in range(6)]
    assert {split for key, (split, _) in found.items() if key.startswith("1-")} == {"test"}
    _, record = found["0-0000013"]
    assert (record.label, record.caption) == (3, "thing 3")
    shades = np.asarray(Image.open(io.BytesIO(record.image)))
    np.testing.assert_array_equal(shades, np.arange(13 * 12, 14 * 12, dtype=np.uint8).reshape(3, 4))


def test_a_class_out_of_range_is_quarantined(tmp_path: Path) -> None:
    part = {**idx_files(tmp_path / "a", 20), "splits": {"public": 1}}
    settings = config(kind="idx", parts=[part], class_names=list("012345678"), max_quarantine_fraction=0.1)
    metrics = run(tmp_path / "out", settings)
    assert metrics["quarantined"] == {"class_out_of_range": 2}
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"split": "public", "key": f"0-{n:07d}", "reason": "class_out_of_range"} for n in (9, 19)
    ]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"images": struct.pack(">4B3I", 0, 0, 9, 3, 20, 3, 4)}, "no IDX file of unsigned bytes in 3 dimensions"),
        ({"images": struct.pack(">4B3I", 0, 0, 8, 3, 21, 3, 4)}, r"its header says \(21, 3, 4\)"),
        ({"labels": struct.pack(">4BI", 0, 0, 8, 1, 2**32 - 1)}, "its header says"),
        ({"labels": b"\0\0"}, "no IDX file"),
    ],
)
def test_a_wrong_idx_header_is_named(tmp_path: Path, header: dict[str, bytes], message: str) -> None:
    part = {**idx_files(tmp_path / "a", 20, **header), "splits": {"public": 1}}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", config(kind="idx", parts=[part]))


def test_idx_files_that_are_no_pair_or_missing_or_cut_are_named(tmp_path: Path) -> None:
    long, short = idx_files(tmp_path / "a", 20), idx_files(tmp_path / "b", 6, zipped=True)
    mixed = {"images": long["images"], "labels": short["labels"], "splits": {"public": 1}}
    with pytest.raises(ValueError, match=r"20 images, .* 6 labels: not a pair"):
        run(tmp_path / "out", config(kind="idx", parts=[mixed]))
    Path(short["labels"]).write_bytes(Path(short["labels"]).read_bytes()[:-9])
    with pytest.raises(ValueError, match="no whole gzip file"):
        run(tmp_path / "out", config(kind="idx", parts=[{**short, "splits": {"public": 1}}]))
    Path(long["images"]).unlink()
    with pytest.raises(ValueError, match=r"images is missing: fetch it \(scripts/fetch_data.py\)"):
        run(tmp_path / "out", config(kind="idx", parts=[{**long, "splits": {"public": 1}}]))


# image_folder


def test_an_image_folder_gives_classes_captions_and_untouched_bytes(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    photo = encoded(Image.new("RGB", (20, 10), "red"), "JPEG")
    (folder / "cats" / "photo.jpg").write_bytes(photo)
    (folder / "cats" / "photo.txt").write_text("a red cat\n")
    (folder / "cats" / "moving.gif").write_bytes(encoded(Image.new("P", (9, 9)), "GIF"))
    metrics = run(tmp_path / "out", config(kind="image_folder", parts=[{"folder": str(folder), "splits": HALVES}]))
    assert (metrics["num_classes"], metrics["class_names"]) == (2, ("big_dogs", "cats"))
    found = all_records(tmp_path / "out", metrics)
    assert found["0/cats/photo"][1] == Record("0/cats/photo", "0/cats/photo", photo, 1, "a red cat")
    assert found["0/big_dogs/4"][1].caption == "big dogs" and found["0/big_dogs/4"][1].image == grey(4)
    assert found["0/cats/moving"][1].image.startswith(b"\x89PNG")


def test_images_are_cropped_and_converted_when_a_shape_is_given(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    part = {"folder": str(folder), "splits": {"public": 1}}
    run(tmp_path / "out", config(kind="image_folder", parts=[part], image_size=4, channels=3))
    dataset = ShardDataset(tmp_path / "out" / "public", "public")
    image = Image.open(io.BytesIO(dataset.read(0).image))
    assert (image.size, image.mode, image.info) == ((4, 4), "RGB", {})


SECRET = b"Jane Roe"


def with_metadata(kind: str) -> bytes:
    exif, tags = Image.Exif(), TiffImagePlugin.ImageFileDirectory_v2()
    exif[ExifTags.Base.Artist] = tags[ExifTags.Base.Artist] = SECRET.decode()
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (1.0, 2.0, 3.0), 27: SECRET})
    tags[ExifTags.Base.ImageDescription] = SECRET.decode()
    tags.tagtype[700] = tags.tagtype[33723] = TiffTags.UNDEFINED
    tags[700], tags[33723] = b"<x>" + SECRET + b"</x>", b"\x1c\x02\x50\0\x08" + SECRET  # XMP; IPTC's by-line
    xmp = {"exif": exif.tobytes(), "xmp": SECRET, "icc_profile": SECRET}
    told: dict[str, dict[str, object]] = {
        "WEBP": {**xmp, "lossless": True},
        "GIF": {"comment": SECRET},
        "BMP": {},
        "TIFF": {"tiffinfo": tags, "icc_profile": SECRET},
    }
    out = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("P" if kind == "GIF" else "RGB").save(out, kind, **told[kind])
    return out.getvalue() + b"trailing " + SECRET


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_become_pngs_with_nothing_but_their_pixels(tmp_path: Path, kind: str) -> None:
    folder, source = image_folder(tmp_path / "images", 3), with_metadata(kind)
    assert source.count(SECRET) >= {"WEBP": 4, "GIF": 2, "BMP": 1, "TIFF": 5}[kind]
    (folder / "cats" / f"x.{kind.lower()}").write_bytes(source)
    part = {"folder": str(folder), "splits": {"public": 1}}
    metrics = run(tmp_path / "out", config(kind="image_folder", parts=[part]))
    stored = all_records(tmp_path / "out", metrics)["0/cats/x"][1].image
    assert SECRET not in stored and strip_metadata(stored).removed == {}
    shown, meant = (Image.open(io.BytesIO(data)) for data in (stored, source))
    assert shown.format == "PNG" and shown.info == {}
    np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), np.asarray(meant.convert("RGB")))


def test_bad_images_are_quarantined_by_reason_and_nothing_of_them_is_told(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    bad = {
        "cut": grey(0, 64)[:60],
        "empty": b"",
        "words": b"jane@example.org",
        "heif": b"\0\0\0\x18ftypheic",
        "large": encoded(Image.new("1", (300, 200))),
        "bomb": claiming(60_000, 60_000),
    }
    for name, content in bad.items():
        (folder / "cats" / f"{name}.png").write_bytes(content)
    (folder / "cats" / "1.txt").write_bytes(b"\xff\xfe")
    (folder / "cats" / "3.txt").write_bytes(b"a cat " * 1_700_000)
    (folder / "cats" / "lost.png").symlink_to("/home/jane/lost.png")
    part = {"folder": str(folder), "splits": {"public": 1}}
    settings = {"kind": "image_folder", "parts": [part], "max_pixels": 50_000}
    metrics = run(tmp_path / "out", config(**settings, max_quarantine_fraction=0.25))
    assert metrics["quarantined"] == {
        "bad_caption": 1, "caption_too_long": 1, "empty_image": 1, "too_many_pixels": 2, "undecodable": 1,
        "unknown_image_type": 2, "unreadable_file": 1,
    }  # fmt: skip
    assert metrics["splits"]["public"]["records"] == 38
    told = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert {json.loads(line)["key"] for line in told.splitlines()} == {
        f"0/cats/{name}" for name in (*bad, "1", "3", "lost")
    }
    assert "jane" not in told


def test_too_many_bad_images_fail_the_stage_and_write_no_split(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 18)
    for n in range(2):
        (folder / "cats" / f"bad{n}.png").write_bytes(b"x")
    settings = config(kind="image_folder", parts=[{"folder": str(folder), "splits": HALVES}])
    with pytest.raises(
        ValueError, match=r"2 of 20 records were quarantined \(unknown_image_type 2\), more than .* 0.05"
    ):
        run(tmp_path / "out", settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["quarantine.jsonl"]


def test_an_empty_or_flat_or_missing_folder_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    settings = config(kind="image_folder", parts=[{"folder": str(folder), "splits": {"public": 1}}])
    with pytest.raises(ValueError, match="is not a folder"):
        run(tmp_path / "out", settings)
    folder.mkdir()
    with pytest.raises(ValueError, match="the image_folder source holds no records"):
        run(tmp_path / "out", settings)
    (folder / "loose.png").write_bytes(grey(0))
    with pytest.raises(ValueError, match=r"holds loose.png outside a class"):
        run(tmp_path / "out", settings)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 2)
    part = {"folder": str(folder), "splits": {"public": 0.999, "test": 0.001}}
    with pytest.raises(ValueError, match="split test has none of 2 records"):
        run(tmp_path / "out", config(kind="image_folder", parts=[part]))
    assert not (tmp_path / "out" / "public").exists()


def test_of_images_with_one_name_none_is_taken_for_the_right_one(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    for name in ("1.jpg", "1.jpeg", "5.jpg"):
        (folder / "cats" / name).write_bytes(encoded(Image.new("L", (8, 8)), "JPEG"))
    part = {"folder": str(folder), "splits": {"public": 1}}
    settings = config(kind="image_folder", parts=[part], max_quarantine_fraction=0.2)
    metrics = ingest(settings, tmp_path / "out", lambda *_: None)
    assert metrics["quarantined"] == {"duplicate_key": 5} and metrics["splits"]["public"]["records"] == 38
    assert not {"0/cats/1", "0/cats/5"} & set(all_records(tmp_path / "out", metrics))
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_classes_go_to_the_splits_of_their_part_and_keep_one_numbering(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    parts = [
        {"folder": str(folder), "classes": ["cats"], "splits": {"public": 0.5, "test": 0.5}},
        {"folder": str(folder), "classes": ["big_dogs"], "splits": {"private": 0.5, "private_test": 0.5}},
    ]
    metrics = run(tmp_path / "out", config(kind="image_folder", parts=parts))
    assert metrics["class_names"] == ("big_dogs", "cats")
    found = all_records(tmp_path / "out", metrics).values()
    assert {(split, record.label) for split, record in found} == {
        ("public", 1), ("test", 1), ("private", 0), ("private_test", 0),
    }  # fmt: skip


def test_a_class_that_is_not_there_or_is_in_two_parts_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")

    def parts(*classes: list[str] | None) -> Config:
        given = [{"folder": str(folder), "classes": names, "splits": {"public": 1}} for names in classes]
        return config(kind="image_folder", parts=given)

    with pytest.raises(ValueError, match=r"part 1: .* has no images of class birds: choose from big_dogs, cats"):
        run(tmp_path / "out", parts(["cats"], ["big_dogs", "birds"]))
    with pytest.raises(
        ValidationError, match=r"parts 0 and 1 both take cats of .* give each part `classes` of its own"
    ):
        parts(["cats"], ["big_dogs", "cats"])
    with pytest.raises(ValidationError, match="parts 0 and 1 both take cats"):
        parts(None, ["cats"])
    with pytest.raises(ValidationError, match="parts 0 and 1 both take every class"):
        parts(None, None)


def captioned_folder(folder: Path, captions: int = 30, images: int = 4) -> Path:
    for n in range(captions * images):
        place = folder / ("people" if n % 3 else "hands") / f"{n:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(grey(n))
        place.with_suffix(".txt").write_text(f"number {n % captions}\n")
    return folder


def test_images_of_one_caption_are_one_unit_in_one_split_whatever_their_classes(tmp_path: Path) -> None:
    part = {"folder": str(captioned_folder(tmp_path / "images")), "splits": HALVES}
    metrics = run(tmp_path / "out", config(kind="image_folder", parts=[part], unit="caption"))
    found = all_records(tmp_path / "out", metrics)
    homes = {(record.caption, record.unit, split) for split, record in found.values()}
    assert len(homes) == 30 and {split for _, _, split in homes} == set(HALVES)
    for caption, unit, _ in homes:  # the unit is named by a record, for a caption's digest tells who guesses it
        assert unit == min(key for key, (_, record) in found.items() if record.caption == caption)
    (tmp_path / "images" / "hands" / "zzz.png").write_bytes(grey(0))
    again = run(tmp_path / "again", config(kind="image_folder", parts=[part], unit="caption"))
    later = all_records(tmp_path / "again", again)
    assert all(later[key] == where for key, where in found.items())


def test_a_caption_that_would_be_on_two_sides_is_refused_and_not_told(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "images")
    parts = [
        {"folder": str(folder), "classes": ["hands"], "splits": {"public": 1}},
        {"folder": str(folder), "classes": ["people"], "splits": {"private": 1}},
    ]
    settings = config(kind="image_folder", parts=parts, unit="caption")
    (folder / "people" / "001.txt").write_text("number 0")
    with pytest.raises(ValueError, match=r"0/hands/000 and 1/people/001 have one caption.* give hands and people"):
        run(tmp_path / "out", settings)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_drawing_beside_an_image_goes_with_it(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 6)
    (folder / "cats" / "1.svg").write_bytes(b"<svg/>")
    part = {"folder": str(folder), "splits": {"public": 1}}
    metrics = run(tmp_path / "out", config(kind="image_folder", parts=[part], image_size=4))
    drawings = {key: record.svg for key, (_, record) in all_records(tmp_path / "out", metrics).items()}
    assert drawings.pop("0/cats/1") == b"<svg/>" and set(drawings.values()) == {None}


def test_names_that_show_something_become_digests() -> None:
    assert plain_name("cats/img_0001") == "cats/img_0001"
    for name in ("jane.roe@example.org", "cats/212-555-0143", "Büro", "a b", "../up"):
        assert plain_name(name) == plain_name(name) != name
        assert len(plain_name(name)) == 20 and plain_name(name).isalnum()


# webdataset


def shards(folder: Path, count: int = 60) -> Path:
    records = [Record(f"r{n:03d}", f"user{n % 12}", grey(n), n % 3, f"caption {n}") for n in range(count)]
    write_shards(folder, "old", records, 20)
    for index in folder.glob("*.jsonl"):
        index.unlink()
    return folder


def test_existing_shards_are_rewritten_whole_and_a_users_records_stay_together(tmp_path: Path) -> None:
    folder = shards(tmp_path / "old")
    part = {"shards": f"{folder}/old-*.tar", "splits": {"public": 0.4, "private": 0.6}}
    metrics = run(tmp_path / "out", config(kind="webdataset", parts=[part], num_classes=3))
    found = all_records(tmp_path / "out", metrics)
    for n in range(60):
        assert found[f"r{n:03d}"][1] == Record(f"r{n:03d}", f"user{n % 12}", grey(n), n % 3, f"caption {n}")
    homes = {(record.unit, split) for split, record in found.values()}
    assert len(homes) == 12


def tar_source(folder: Path, **settings: float) -> Config:
    part = {"shards": f"{folder}/old-*.tar", "splits": {"public": 1}}
    return config(0, kind="webdataset", num_classes=3, parts=[part], **settings)


def test_a_file_that_is_no_tar_and_a_pattern_that_matches_nothing_are_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "old")
    for content in (gzip.compress((folder / "old-00001.tar").read_bytes()), b"", grey(0)):
        (folder / "old-00001.tar").write_bytes(content)
        with pytest.raises(ShardError, match=r"old-00001.tar is no uncompressed tar: unpack it"):
            run(tmp_path / "out", tar_source(folder))
        assert not list((tmp_path / "out").glob("*"))
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no shard matches"):
        run(tmp_path / "out", tar_source(folder))


def test_a_damaged_tar_loses_what_is_damaged_and_too_much_of_that_stops_the_stage(tmp_path: Path) -> None:
    folder = shards(tmp_path / "old")
    whole = (folder / "old-00001.tar").read_bytes()
    (folder / "old-00001.tar").write_bytes(b"PK" + whole[2:40_000])
    metrics = run(tmp_path / "out", tar_source(folder))
    assert metrics["quarantined"] == {"damaged_tar": 1, "truncated_tar": 1}
    found = all_records(tmp_path / "out", metrics)
    saved = {f"r{n:03d}" for n in (*range(20), *range(21, 29), *range(40, 60))}
    assert set(found) == saved and found["r021"][1].caption == "caption 21"
    told = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert '"key": "r020", "reason": "damaged_tar"' in told and '"key": "r029", "reason": "truncated_tar"' in told
    for name in ("old-00000.tar", "old-00002.tar"):
        (folder / name).write_bytes(whole[:512] * 2)
    with pytest.raises(ValueError, match=r"of .* were quarantined \(.*\), more than max_quarantine_fraction 0.05"):
        run(tmp_path / "out", tar_source(folder))


def test_records_a_tar_cannot_give_are_quarantined(tmp_path: Path) -> None:
    folder = shards(tmp_path / "old", 60)
    bad: dict[str, dict[str, bytes]] = {
        "no_image": {"a.cls": b"1"},
        "bad_class": {"b.png": grey(0), "b.cls": b"cat"},
        "class_out_of_range": {"c.png": grey(0), "c.cls": b"7"},
        "empty_image": {"d.png": b""},
        "bad_caption": {"e.png": grey(0), "e.txt": b"\xff\xfe"},
        "caption_too_long": {"f.png": grey(0), "f.txt": b"a cat " * 1_700_000},
        "too_many_pixels": {"g.png": claiming(21_000, 11_000)},
        "unsupported_depth": {"l.png": encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")},
        "unsupported_depth ": {"m.png": encoded(Image.fromarray(np.full((4, 4), 2**31 - 1, np.int32)), "TIFF")},
        "unknown_image_type": {"h.png": b"\0\0\0\x18ftypheic"},
        "undecodable": {"i.png": grey(0, 64)[:60]},
        "bad_unit": {"j.png": grey(0), "j.json": b"[" * 100_000},
        "unsafe_path": {"../up.png": grey(0), "/etc/passwd.png": grey(0)},
        "no_extension": {"READ ME": b"by jane@example.org"},
        "duplicate_key": {"r001.png": grey(0)},
        "bad_class ": {"k.png": grey(0), "k.cls": b"9" * 5000},
    }
    with tarfile.open(folder / "old-00003.tar", "w") as tar:
        for name, content in (member for members in bad.values() for member in members.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("JANE ROE.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/home/jane/roe.png"
        tar.addfile(link)
    metrics = ingest(tar_source(folder, max_quarantine_fraction=0.3), tmp_path / "out", lambda *_: None)
    assert metrics["quarantined"] == {
        **dict.fromkeys(map(str.strip, bad), 1), "unsafe_path": 2, "bad_class": 2,
        "unsupported_depth": 2, "duplicate_key": 2, "not_a_file": 1,
    }  # fmt: skip
    assert metrics["splits"]["public"]["records"] == 59
    told = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert not any(word in told for word in ("etc", "READ", "ROE", "roe", "example"))
    with pytest.raises(ValueError, match=r"19 of 78 records were quarantined \(bad_caption 1, bad_class 2"):
        ingest(tar_source(folder), tmp_path / "again", lambda *_: None)


def test_a_record_without_a_caption_is_a_record(tmp_path: Path) -> None:
    write_shards(tmp_path / "old", "old", [Record("a", "a", grey(0), 0, None), Record("b", "b", grey(1), 1, "")], 9)
    found = all_records(tmp_path / "out", run(tmp_path / "out", tar_source(tmp_path / "old")))
    assert [found[key][1].caption for key in "ab"] == [None, ""]


# shapes

SHAPES = {"kind": "shapes", "records": {"public": 60, "private": 30, "test": 30}, "image_size": 16, "max_count": 2}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("shapes")
    return out, run(out, config(**SHAPES))


def test_shapes_are_as_many_as_asked_for_and_look_as_their_captions_say(shapes: tuple[Path, dict]) -> None:
    out, metrics = shapes
    assert {split: told["records"] for split, told in metrics["splits"].items()} == SHAPES["records"]
    assert metrics["num_classes"] == len(metrics["class_names"]) == 36 and metrics["quarantined"] == {}
    for split, record in all_records(out, metrics).values():
        scene = scene_of(record.caption or "")
        seen = recognise(np.asarray(Image.open(io.BytesIO(record.image))))
        assert scene is not None and seen is not None and seen.scene == scene and scene.count <= 2
        assert record.label is not None and metrics["class_names"][record.label] == f"{scene.colour} {scene.form}"
        assert record.unit == record.key and record.key.startswith(split) and detect(record.caption or "") == []


def test_test_alone_shows_the_shapes_held_out(shapes: tuple[Path, dict]) -> None:
    out, metrics = shapes
    labels: dict[str, set[int]] = {}
    for split, record in all_records(out, metrics).values():
        labels.setdefault(split, set()).add(record.label)
    assert len(labels["test"]) > 3 and not labels["test"] & (labels["public"] | labels["private"])


def test_shapes_depend_on_seed_and_key_alone(shapes: tuple[Path, dict], tmp_path: Path) -> None:
    out, metrics = shapes
    more = run(tmp_path / "more", config(**{**SHAPES, "records": {"public": 70}}))
    first, again = all_records(out, metrics), all_records(tmp_path / "more", more)
    assert all(again[key] == first[key] for key in again if key in first) and len(again) == 70
    other = run(tmp_path / "other", config(seed=1, **SHAPES))
    assert other["splits"]["public"]["root"] != metrics["splits"]["public"]["root"]


def test_shapes_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"image_size is 16, too small to tell 3 forms apart: give at least 20"):
        config(**{**SHAPES, "max_count": 3})
    with pytest.raises(ValidationError, match=r"held_out is 6: give 0 to 5"):
        config(**SHAPES, held_out=6)
    for records in ({}, {"public": 0}, {"valid": 3}):
        with pytest.raises(ValidationError):
            config(**{**SHAPES, "records": records})


# configuration


def test_shares_that_are_not_the_whole_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"the shares of splits add up to 0\.9: make them 1"):
        FolderPart(folder="x", splits={"public": 0.5, "test": 0.4})
    with pytest.raises(ValidationError):
        TypeAdapter(SourceConfig).validate_python({"kind": "digits", "sed": 1})
    with pytest.raises(ValidationError, match="frozen"):
        DigitsSource(kind="digits").max_pixels = 1  # type: ignore[misc]


def test_a_units_split_is_its_own_affair_and_shares_come_out_right() -> None:
    part = FolderPart(folder="x", splits={"public": 0.3, "private": 0.6, "test": 0.1})
    drawn = Counter(part.split_of(f"unit-{n}", 0) for n in range(20_000))
    assert abs(drawn["public"] / 20_000 - 0.3) < 0.015 and abs(drawn["test"] / 20_000 - 0.1) < 0.01
    assert part.split_of("unit-7", 0) == part.split_of("unit-7", 0)
    assert any(part.split_of(f"unit-{n}", 0) != part.split_of(f"unit-{n}", 1) for n in range(20))
