"""Where images come from: each source reads its own layout, and `ingest` writes what passes as indexed shards.

A record that cannot be used (see REASONS) is set aside by key and reason, never by content, and the stage goes on until
too many are. Names of foreign files become keys only where they are plain and hold no personal data; others become
digests of themselves.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from PIL import Image

from checkpointing.store import write_durably
from privacy.pii.patterns import detect
from train.images import ImageError, encode_png, open_image, stored_extension
from train.planted import author_metadata, plant
from train.salvage import MAX_MEMBER_BYTES, salvage_tar
from train.salvage import REASONS as SALVAGE_REASONS
from train.shapes import COLOURS, FORMS, combinations, draw, random_scene
from train.shards import IMAGE_EXTENSIONS, KEY, Record, RecordError, ShardWriter, parse_record
from train.source_config import (
    DigitsSource,
    FolderPart,
    IdxSource,
    ImageFolderSource,
    Part,
    ShapedSource,
    ShapesSource,
    ShardPart,
    Source,
    Split,
    WebDatasetSource,
)

REASONS = (
    *SALVAGE_REASONS, "no_image", "empty_image", "unknown_image_type", "too_many_pixels", "unsupported_depth",
    "undecodable", "bad_class", "class_out_of_range", "bad_caption", "caption_too_long", "bad_unit", "unreadable_file",
)  # fmt: skip
MAX_CAPTION_BYTES = 1_000_000
DIGITS_SPLITS: dict[Split, int] = {"test": 297, "public": 750, "private": 750}


class IngestConfig(Protocol):
    """What `ingest` reads of the stage's configuration."""

    @property
    def source(self) -> DigitsSource | IdxSource | ImageFolderSource | WebDatasetSource | ShapesSource: ...
    @property
    def shard_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Rejected(NamedTuple):
    """A record that its source could not make."""

    key: str
    reason: str


@dataclass(frozen=True)
class Stream:
    """What a source yields: (split, record) in a fixed order; `total` and `class_names` where they are known."""

    items: Iterator[tuple[Split, Record | Rejected]]
    splits: tuple[Split, ...]
    total: int | None
    num_classes: int
    class_names: tuple[str, ...] | None


class Quarantine:
    """Records set aside: key and reason code, never content."""

    def __init__(self) -> None:
        self.lines: list[dict[str, str]] = []

    def add(self, split: str, key: str, reason: str) -> None:
        """Set a record aside."""
        self.lines.append({"split": split, "key": key, "reason": reason})

    def reasons(self) -> dict[str, int]:
        """Records by reason."""
        return dict(sorted(Counter(line["reason"] for line in self.lines).items()))

    def write(self, folder: Path) -> Path:
        """Write `quarantine.jsonl`, durably."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "quarantine.jsonl"
        write_durably(path, "".join(json.dumps(line, sort_keys=True) + "\n" for line in self.lines).encode())
        return path


def ingest(config: IngestConfig, out_dir: Path, progress: Callable[[int, int | None], None]) -> dict[str, Any]:
    """Write a source's records to `out_dir/<split>` and return the stage's metrics.

    Records with one key are all quarantined, for nothing says which of them is the right one: where there are any, the
    source is read twice.

    metrics: splits -> {records, bytes, shards, root}, quarantined -> {reason: records}, num_classes, class_names.
    Raises ValueError where a split is empty, or more than `max_quarantine_fraction` of the records were quarantined;
    then no split is written.
    """
    metrics, twice = _ingest(config, out_dir, progress, frozenset())
    if twice:
        metrics, _ = _ingest(config, out_dir, progress, twice)
    assert metrics is not None
    return metrics


def _ingest(
    config: IngestConfig, out_dir: Path, progress: Callable[[int, int | None], None], twice: frozenset[str]
) -> tuple[dict[str, Any] | None, frozenset[str]]:
    """The metrics, where no key but those of `twice` comes twice; else none, and the keys that do."""
    source = config.source
    stream = SOURCES[source.kind](source, config.seed)
    quarantine, keys, found, seen = Quarantine(), set[str](), set[str](), 0
    with ExitStack() as stack:
        writers = {split: ShardWriter(out_dir / split, split, config.shard_size) for split in stream.splits}
        for writer in writers.values():
            stack.enter_context(writer)
        for split, item in stream.items:
            seen += 1
            if item.key in twice:
                passed = Rejected(item.key, "duplicate_key")
            elif item.key in keys or found:  # then nothing of this reading stays
                found.update({item.key} & keys)
                keys.add(item.key)
                continue
            else:
                passed = item if isinstance(item, Rejected) else _checked(item, source, stream.num_classes)
            keys.add(item.key)
            if isinstance(passed, Rejected):
                quarantine.add(split, passed.key, passed.reason)
            else:
                writers[split].add(passed)
            progress(seen, stream.total)
        if found:
            return None, frozenset(found)
        listed = quarantine.write(out_dir)
        if not seen:
            raise ValueError(f"the {source.kind} source holds no records: check its paths")
        if len(quarantine.lines) > source.max_quarantine_fraction * seen:
            reasons = ", ".join(f"{reason} {count}" for reason, count in quarantine.reasons().items())
            raise ValueError(
                f"{len(quarantine.lines)} of {seen} records were quarantined ({reasons}), more than "
                f"max_quarantine_fraction {source.max_quarantine_fraction:g}: see {listed}, mend them or raise it"
            )
        if empty := [split for split, writer in writers.items() if not writer.keys]:
            raise ValueError(f"split {empty[0]} has none of {seen} records: give it a larger share of the source")
        splits = {split: asdict(writer.commit()) for split, writer in writers.items()}
    return {
        "splits": splits,
        "quarantined": quarantine.reasons(),
        "num_classes": stream.num_classes,
        "class_names": stream.class_names,
    }, twice


def _checked(record: Record, source: Source, num_classes: int) -> Record | Rejected:
    """The record as it will be stored, if its image decodes within the limits and its class exists."""
    if record.label is not None and not 0 <= record.label < num_classes:
        return Rejected(record.key, "class_out_of_range")
    if len((record.caption or "").encode()) > MAX_CAPTION_BYTES:
        return Rejected(record.key, "caption_too_long")
    if not record.image:
        return Rejected(record.key, "empty_image")
    try:
        image = open_image(record.image, source.max_pixels)
    except ImageError as error:
        return Rejected(record.key, error.reason)
    shaped = isinstance(source, ShapedSource) and (source.channels is not None or source.image_size is not None)
    if not shaped and stored_extension(record.image):
        return record
    channels, size = (source.channels, source.image_size) if isinstance(source, ShapedSource) else (None, None)
    return replace(record, image=encode_png(image, channels, size))


def plain_name(name: str) -> str:
    """A foreign name as a key: itself where it is plain and shows no personal data, or else a digest of it."""
    if KEY.fullmatch(name) and not detect(name):
        return name
    return blake3(name.encode("utf-8", "surrogateescape")).hexdigest(10)


def digits(config: DigitsSource, seed: int) -> Stream:
    """Stratified: each split holds every class in its share, to within one record."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    shades: NDArray[np.uint8] = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    classes: NDArray[np.int64] = bunch.target
    splits: list[Split] = [split for split, count in DIGITS_SPLITS.items() for _ in range(count)]

    def items() -> Iterator[tuple[Split, Record]]:
        for split, index in zip(splits, _stratified(classes, seed), strict=True):
            key, label = f"digit-{index:04d}", int(classes[index])
            caption = f"a handwritten {label}"
            if split == "private":
                planted = plant(caption, seed, key)
                image = _png(shades[index], planted.author)
                yield split, Record(key, key, image, label, planted.caption)
            else:
                yield split, Record(key, key, _png(shades[index]), label, caption)

    return Stream(items(), tuple(DIGITS_SPLITS), len(splits), 10, tuple("0123456789"))


def idx(config: IdxSource, seed: int) -> Stream:
    """Keys are PART-NUMBER, by the place in the files."""
    pairs = [(part, _read_idx(part.images, 3), _read_idx(part.labels, 1)) for part in config.parts]
    for part, images, labels in pairs:
        if len(images) != len(labels):
            raise ValueError(f"{part.images} has {len(images)} images, {part.labels} {len(labels)} labels: not a pair")

    def items() -> Iterator[tuple[Split, Record]]:
        for number, (part, images, labels) in enumerate(pairs):
            for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                key = f"{number}-{place:07d}"
                caption = config.class_names[label] if label < len(config.class_names) else None
                yield part.split_of(key, seed), Record(key, key, _png(image), label, caption)

    total = sum(len(images) for _, images, _ in pairs)
    return Stream(items(), _splits(config.parts), total, len(config.class_names), config.class_names)


class _FolderImage(NamedTuple):
    key: str
    part: FolderPart
    class_name: str
    path: Path

    def caption(self) -> str:
        """That of the file beside it, or else its class's name. Raises RecordError."""
        told = _read_file(self.path.with_suffix(".txt"))
        try:
            return self.class_name.replace("_", " ") if told is None else told.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise RecordError("bad_caption") from None


def image_folder(config: ImageFolderSource, seed: int) -> Stream:
    """Keys are PART/CLASS/NAME, or a digest of CLASS/NAME where that is not plain.

    Under `unit: caption` a unit has the key of its first record, and its caption decides its split. It is not named by
    a digest of the caption, which would outlive the filter and let whoever guesses what was redacted check the guess.
    """
    found = [image for number, part in enumerate(config.parts) for image in _folder_images(number, part)]
    names = tuple(sorted({image.class_name for image in found}))
    classes = {name: label for label, name in enumerate(names)}

    def items() -> Iterator[tuple[Split, Record | Rejected]]:
        firsts: dict[str, _FolderImage] = {}
        for image in found:
            split = image.part.split_of(image.key, seed)
            try:
                caption, unit = image.caption(), image.key
                if config.unit == "caption":
                    first = firsts.setdefault(caption, image)
                    if first.part.splits != image.part.splits:
                        raise ValueError(
                            f"{first.key} and {image.key} have one caption, and so are one privacy unit, in parts of "
                            f"other splits: give {first.class_name} and {image.class_name} the same, or set unit to "
                            "record"
                        )
                    split, unit = image.part.split_of(caption, seed), first.key
                if (content := _read_file(image.path)) is None:  # a link to nothing
                    raise RecordError("unreadable_file")
                svg = _read_file(image.path.with_suffix(".svg"))
            except RecordError as error:
                yield split, Rejected(image.key, error.reason)
            else:
                yield split, Record(image.key, unit, content, classes[image.class_name], caption, svg)

    return Stream(items(), _splits(config.parts), len(found), len(names), names)


def _folder_images(number: int, part: FolderPart) -> Iterator[_FolderImage]:
    folder = Path(part.folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"image_folder part {number}: {folder} is not a folder: check its path")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower()[1:] in IMAGE_EXTENSIONS)
    if loose := next((path for path in paths if path.parent == folder), None):
        raise ValueError(f"{folder} holds {loose.name} outside a class: put images in one sub-folder a class")
    there = {path.relative_to(folder).parts[0] for path in paths}
    wanted = there if part.classes is None else set(part.classes)
    if missing := sorted(wanted - there):
        raise ValueError(
            f"image_folder part {number}: {folder} has no images of class {missing[0]}: "
            f"choose from {', '.join(sorted(there)) or 'none'}"
        )
    for path in paths:
        relative = path.relative_to(folder)
        if relative.parts[0] in wanted:
            key = f"{number}/{plain_name(relative.with_suffix('').as_posix())}"
            yield _FolderImage(key, part, relative.parts[0], path)


def webdataset(config: WebDatasetSource, seed: int) -> Stream:
    """Keys and units are the shards' own, or digests of them where they are not plain."""
    tars: list[tuple[ShardPart, Any, str]] = []
    for part in config.parts:
        files, pattern = fsspec.core.url_to_fs(os.path.expanduser(part.shards))  # noqa: PTH111 - it may be a URL
        matches = sorted(files.glob(pattern))
        if not matches:
            raise ValueError(f"no shard matches {part.shards}: check the path")
        tars += [(part, files, tar) for tar in matches]

    def items() -> Iterator[tuple[Split, Record | Rejected]]:
        for part, files, tar in tars:
            with files.open(tar, "rb") as file:
                for name, members, reason in salvage_tar(file, tar):
                    key = plain_name(name)
                    try:
                        if reason is not None:
                            raise RecordError(reason)
                        record = parse_record(name, members)
                    except RecordError as error:
                        yield part.split_of(key, seed), Rejected(key, error.reason)
                    else:
                        unit = plain_name(record.unit)
                        yield part.split_of(unit, seed), replace(record, key=key, unit=unit)

    return Stream(items(), _splits(config.parts), None, config.num_classes, None)


def shapes(config: ShapesSource, seed: int) -> Stream:
    """Keys are SPLIT-NUMBER. A record is a function of (seed, key): more of them leave the first as they were."""
    learnt, held_out = combinations(config.held_out, seed)
    names = tuple(f"{colour} {form}" for colour in COLOURS for form in FORMS)

    def items() -> Iterator[tuple[Split, Record]]:
        for split, count in config.records.items():
            among = held_out if split == "test" and held_out else learnt
            for number in range(count):
                key = f"{split}-{number:07d}"
                chance = random.Random(f"{seed}:{key}")
                scene = random_scene(chance, among, config.max_count)
                image = _png(draw(scene, config.image_size, chance))
                yield split, Record(key, key, image, names.index(f"{scene.colour} {scene.form}"), scene.caption)

    return Stream(items(), tuple(config.records), sum(config.records.values()), len(names), names)


def _read_file(path: Path) -> bytes | None:
    """A file of a foreign folder, None where there is none. Raises RecordError."""
    try:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise RecordError("member_too_large")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        raise RecordError("unreadable_file") from None


SOURCES: Mapping[str, Callable[[Any, int], Stream]] = {
    "digits": digits,
    "idx": idx,
    "image_folder": image_folder,
    "webdataset": webdataset,
    "shapes": shapes,
}


def _splits(parts: tuple[Part, ...]) -> tuple[Split, ...]:
    return tuple(dict.fromkeys(split for part in parts for split in part.splits))


def _stratified(classes: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A seeded order in which every stretch holds the classes in their shares, to within one record each."""
    words = np.random.Philox(np.random.SeedSequence([seed])).random_raw(len(classes))
    place = np.empty(len(classes))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        place[members[np.argsort(words[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((words, place))


def _read_idx(name: str, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes. Source: the format's description on the MNIST page."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is missing: fetch it (scripts/fetch_data.py) or check its path")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}): fetch it again") from None
    head = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < head:
        raise ValueError(f"{path} is no IDX file of unsigned bytes in {dimensions} dimensions: check its path")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - head != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path} holds {len(content) - head} bytes of data, its header says {shape}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _png(image: NDArray[np.uint8], author: str | None = None) -> bytes:
    out = io.BytesIO()
    text, exif = author_metadata(author) if author else (None, None)
    Image.fromarray(image).save(out, "PNG", pnginfo=text, exif=exif)
    return out.getvalue()
