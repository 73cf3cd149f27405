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
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import fsspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from checkpointing.store import write_durably
from privacy.pii.patterns import detect
from train.images import MAX_PIXELS, ImageError, encode_png, open_image, stored_extension
from train.planted import author_metadata, plant
from train.shards import IMAGE_EXTENSIONS, KEY, Record, RecordError, ShardWriter, iter_tar, parse_record

Split = Literal["public", "private", "test"]
REASONS = (
    "undecodable", "too_many_pixels", "class_out_of_range", "no_image", "bad_class", "bad_caption", "bad_unit",
)  # fmt: skip
DIGITS_SPLITS: dict[Split, int] = {"test": 297, "public": 750, "private": 750}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Part(_Section):
    """A piece of a source and the shares of its privacy units that go to each split."""

    splits: dict[Split, Annotated[float, Field(gt=0, le=1)]]

    @field_validator("splits")
    @classmethod
    def _shares_are_the_whole(cls, splits: dict[Split, float]) -> dict[Split, float]:
        if abs(sum(splits.values()) - 1) > 1e-9:
            raise ValueError(f"the shares of splits add up to {sum(splits.values()):g}: make them 1")
        return splits

    def split_of(self, unit: str, seed: int) -> Split:
        """A unit's split, a function of (seed, unit): whatever else the source holds, and all its records together."""
        at = int.from_bytes(blake3(f"{seed}:{unit}".encode()).digest(8)) / 2**64
        chosen: Split = next(iter(self.splits))
        for split, share in self.splits.items():
            chosen, at = split, at - share
            if at < 0:
                break
        return chosen


class _Source(_Section):
    max_pixels: Annotated[int, Field(gt=0)] = MAX_PIXELS  # width * height of an image; more are quarantined
    max_quarantine_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05  # more of all records fail the stage


class DigitsSource(_Source):
    """The 1,797 handwritten digits inside scikit-learn (8x8, grey), with personal data planted in the private split."""

    kind: Literal["digits"]


class IdxPart(_Part):
    """A pair of MNIST-format files, plain or gzipped."""

    images: str
    labels: str


class IdxSource(_Source):
    """MNIST-format files of grey images; a class's name is its images' caption."""

    kind: Literal["idx"]
    parts: Annotated[tuple[IdxPart, ...], Field(min_length=1)]
    class_names: Annotated[tuple[str, ...], Field(min_length=1)] = tuple("0123456789")


class _Shaped(_Source):
    """Without these, PNG and JPEG bytes are kept as they are and other formats become PNG."""

    image_size: Annotated[int, Field(gt=0)] | None = None  # centre crop and resize to a square
    channels: Literal[1, 3] | None = None  # convert to grey or RGB


class FolderPart(_Part):
    """A folder with one sub-folder a class, whose images may each have a NAME.txt (caption) beside NAME.png."""

    folder: str


class ImageFolderSource(_Shaped):
    """Folders of images; the classes are the sub-folders' names, sorted, and the captions where no file has one."""

    kind: Literal["image_folder"]
    parts: Annotated[tuple[FolderPart, ...], Field(min_length=1)]


class ShardPart(_Part):
    """Existing WebDataset tars: a path or fsspec URL, with * for several."""

    shards: str


class WebDatasetSource(_Shaped):
    """Existing WebDataset tars (KEY.png|jpg|..., KEY.cls, KEY.txt; `unit` of KEY.json names the privacy unit)."""

    kind: Literal["webdataset"]
    parts: Annotated[tuple[ShardPart, ...], Field(min_length=1)]
    num_classes: Annotated[int, Field(gt=0)]


SourceConfig = Annotated[
    DigitsSource | IdxSource | ImageFolderSource | WebDatasetSource, Field(discriminator="kind")
]  # fmt: skip


class IngestConfig(Protocol):
    """What `ingest` reads of the stage's configuration."""

    @property
    def source(self) -> DigitsSource | IdxSource | ImageFolderSource | WebDatasetSource: ...
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

    metrics: splits -> {records, bytes, shards, root}, quarantined -> {reason: records}, num_classes, class_names.
    Raises ValueError where a split is empty, a key comes twice, or more than `max_quarantine_fraction` of the records
    were quarantined; then no split is written.
    """
    source = config.source
    stream = SOURCES[source.kind](source, config.seed)
    quarantine, seen = Quarantine(), 0
    with ExitStack() as stack:
        writers = {split: ShardWriter(out_dir / split, split, config.shard_size) for split in stream.splits}
        for writer in writers.values():
            stack.enter_context(writer)
        for split, item in stream.items:
            seen += 1
            if any(item.key in writer.keys for writer in writers.values()):
                raise ValueError(f"record key {item.key!r} occurs twice in the source: keys must be unique")
            passed = item if isinstance(item, Rejected) else _checked(item, source, stream.num_classes)
            if isinstance(passed, Rejected):
                quarantine.add(split, passed.key, passed.reason)
            else:
                writers[split].add(passed)
            progress(seen, stream.total)
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
    }


def _checked(record: Record, source: _Source, num_classes: int) -> Record | Rejected:
    """The record as it will be stored, if its image decodes within the limits and its class exists."""
    if record.label is not None and not 0 <= record.label < num_classes:
        return Rejected(record.key, "class_out_of_range")
    try:
        image = open_image(record.image, source.max_pixels)
    except ImageError as error:
        return Rejected(record.key, error.reason)
    shaped = isinstance(source, _Shaped) and (source.channels is not None or source.image_size is not None)
    if not shaped and stored_extension(record.image):
        return record
    channels, size = (source.channels, source.image_size) if isinstance(source, _Shaped) else (None, None)
    return Record(record.key, record.unit, encode_png(image, channels, size), record.label, record.caption)


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


def image_folder(config: ImageFolderSource, seed: int) -> Stream:
    """Keys are PART/CLASS/NAME, or a digest of CLASS/NAME where that is not plain."""
    found: list[tuple[int, FolderPart, Path, Path]] = []
    for number, part in enumerate(config.parts):
        folder = Path(part.folder).expanduser()
        if not folder.is_dir():
            raise ValueError(f"image_folder part {number}: {folder} is not a folder: check its path")
        images = sorted(path for path in folder.rglob("*") if path.suffix.lower()[1:] in IMAGE_EXTENSIONS)
        if loose := next((path for path in images if path.parent == folder), None):
            raise ValueError(f"{folder} holds {loose.name} outside a class: put images in one sub-folder a class")
        found += [(number, part, path, path.relative_to(folder)) for path in images]
    names = tuple(sorted({relative.parts[0] for _, _, _, relative in found}))
    classes = {name: label for label, name in enumerate(names)}

    def items() -> Iterator[tuple[Split, Record | Rejected]]:
        for number, part, path, relative in found:
            key = f"{number}/{plain_name(relative.with_suffix('').as_posix())}"
            split, caption_file = part.split_of(key, seed), path.with_suffix(".txt")
            name = relative.parts[0]
            try:
                caption = caption_file.read_text("utf-8").strip() if caption_file.exists() else name.replace("_", " ")
            except UnicodeDecodeError:
                yield split, Rejected(key, "bad_caption")
                continue
            yield split, Record(key, key, path.read_bytes(), classes[name], caption)

    return Stream(items(), _splits(config.parts), len(found), len(names), names)


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
                for name, members in iter_tar(file, tar):
                    key = plain_name(name)
                    try:
                        record = parse_record(name, {extension: data for extension, (_, data) in members.items()})
                    except RecordError as error:
                        yield part.split_of(key, seed), Rejected(key, error.reason)
                        continue
                    unit = plain_name(record.unit)
                    yield part.split_of(unit, seed), Record(key, unit, record.image, record.label, record.caption)

    return Stream(items(), _splits(config.parts), None, config.num_classes, None)


SOURCES: Mapping[str, Callable[[Any, int], Stream]] = {
    "digits": digits,
    "idx": idx,
    "image_folder": image_folder,
    "webdataset": webdataset,
}


def _splits(parts: tuple[_Part, ...]) -> tuple[Split, ...]:
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


def _png(shades: NDArray[np.uint8], author: str | None = None) -> bytes:
    out = io.BytesIO()
    text, exif = author_metadata(author) if author else (None, None)
    Image.fromarray(shades).save(out, "PNG", pnginfo=text, exif=exif)
    return out.getvalue()
