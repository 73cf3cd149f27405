"""The shard format: WebDataset tars, an index beside each, and the root that binds a split's records.

A split is a folder of `<split>-00000.tar`, `<split>-00001.tar`, ... A record's members are KEY.png or KEY.jpg (KEY.npy
in a split of latents), KEY.cls (the class, if it has one), KEY.txt (the caption, if any), KEY.svg (the drawing that the
image was made from, if any) and, where the privacy unit is not the record itself, KEY.json with {"unit": ...}. Beside
each tar lies `<split>-00000.index.jsonl`, one line a record:
{"key", "unit", "digest", "label", "members": {extension: [offset, length]}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from blake3 import blake3

from checkpointing.store import sync_folder
from privacy.pii.manifests import SUFFIX
from train.images import stored_extension

KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
LATENTS = "npy"  # in place of an image: see train.latent_shards
NPY_SIGNATURE = b"\x93NUMPY"
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<extension>[^/]+)", re.DOTALL)
END_OF_TAR = bytes(1024)
_MAX_CLASS_DIGITS = 18


class ShardError(ValueError):
    """A shard or its index is missing, damaged or not ours; the message names the file, where in it, and the mend."""


class RecordError(ValueError):
    """A record is refused; `reason` is a code fit for a manifest and says nothing of the content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Record:
    """One image with what belongs to it. Its repr shows neither image, nor caption, nor drawing."""

    key: str
    unit: str
    image: bytes = field(repr=False)
    label: int | None
    caption: str | None = field(repr=False)
    svg: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ShardSet:
    """What writing a split made: `root` binds every record's key, unit, image, class, caption and drawing, in order."""

    records: int
    bytes: int
    shards: int
    root: str


class ShardWriter:
    """Writes one split; nothing stands under `folder` before `commit`, which replaces what an unfinished run left.

    The bytes are a function of the records and `shard_size` (records a shard) alone.
    """

    def __init__(self, folder: Path, split: str, shard_size: int) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}: a shard holds at least one record")
        self.folder, self.split, self.shard_size = folder, split, shard_size
        self.keys: set[str] = set()
        self._digests: list[str] = []
        self._partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._shards: list[Path] = []
        self._open: tuple[IO[bytes], Any] | None = None  # the shard being written, and its TarWriter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            file, tar = self._open
            with contextlib.suppress(OSError):  # a full disk, say: these bytes are thrown away
                tar.close()
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, record: Record) -> None:
        """Append a record; a key that is not plain, or was there before, is refused."""
        if not KEY.fullmatch(record.key):
            raise ValueError(f"record key {record.key!r}: use letters, digits, _ and -, with / between folders")
        if record.key in self.keys:
            raise ValueError(f"record key {record.key!r} occurs twice in split {self.split}: keys must be unique")
        members = _members(record)
        if self._open is None:
            self._open = self._begin_shard()
        self._open[1].write({"__key__": record.key, **members})
        self.keys.add(record.key)
        self._digests.append(record_digest(record.key, members))
        if len(self.keys) % self.shard_size == 0:
            self._end_shard()

    def commit(self) -> ShardSet:
        """Sync everything and put the split in its place. A split without records is an error."""
        self._end_shard()
        if not self.keys:
            raise ValueError(f"split {self.split} has no records: check the source and its split fractions")
        sync_folder(self._partial)
        size = sum(shard.stat().st_size for shard in self._shards)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._partial.rename(self.folder)
        sync_folder(self.folder.parent)
        return ShardSet(len(self.keys), size, len(self._shards), root_of(self._digests))

    def _begin_shard(self) -> tuple[IO[bytes], Any]:
        self._shards.append(self._partial / f"{self.split}-{len(self._shards):05d}.tar")
        file = self._shards[-1].open("wb")
        return file, _tar_writer(file)

    def _end_shard(self) -> None:
        if self._open is None:
            return
        file, tar = self._open
        tar.close()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._open = None
        index_shard(self._shards[-1])


def write_shard(tar: Path, records: Iterable[Record]) -> list[str]:
    """Write one shard and its index, durably, and give its records' digests in order; without records, no file.

    The bytes are a function of the records.
    """
    digests: list[str] = []
    with tar.open("wb") as file:
        writer = _tar_writer(file)
        try:
            for record in records:
                members = _members(record)
                writer.write({"__key__": record.key, **members})
                digests.append(record_digest(record.key, members))
        finally:
            writer.close()
        file.flush()
        os.fsync(file.fileno())
    if digests:
        index_shard(tar)
    else:
        tar.unlink()
    return digests


def read_shard(tar: Path) -> Iterator[tuple[str, Record | None]]:
    """Each key of a shard's index with its record, in order; None where the tar no longer holds what the index says.

    Raises ShardError where the index itself is damaged, or a file is missing.
    """
    index = Path(index_name(str(tar)))
    try:
        lines = index.read_bytes().splitlines()
        file = tar.open("rb")
    except FileNotFoundError as error:
        raise ShardError(f"{error.filename} is missing: restore it or ingest again") from None
    with file:
        for number, line in enumerate(lines, 1):
            entry = parse_entry(line, f"{index}, line {number}")
            start, end = extent(entry)
            file.seek(start)
            try:
                record = verified(entry, file.read(end - start), str(tar))
            except (ShardError, RecordError):
                record = None
            yield entry["key"], record


def write_shards(folder: Path, split: str, records: Iterable[Record], shard_size: int) -> ShardSet:
    """Write a split's records to `folder`, all or nothing; see ShardWriter."""
    with ShardWriter(folder, split, shard_size) as writer:
        for record in records:
            writer.add(record)
        return writer.commit()


def index_shard(tar: Path) -> Path:
    """Read a whole shard back, check it, and write its index beside it. Raises ShardError on anything foreign."""
    lines: list[str] = []
    with tar.open("rb") as file:
        for key, members in iter_tar(file, str(tar)):
            data = {extension: content for extension, (_, content) in members.items()}
            try:
                record = parse_record(key, data)
            except RecordError as error:
                raise ShardError(f"{tar}: record {key!r} is not ours ({error.reason}): ingest the shard") from None
            entry = {
                "key": key,
                "unit": record.unit,
                "digest": record_digest(key, data),
                "label": record.label,
                "members": {extension: [offset, len(content)] for extension, (offset, content) in members.items()},
            }
            lines.append(json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n")
    if not lines:
        raise ShardError(f"{tar} holds no records: write it again")
    index = Path(index_name(str(tar)))
    aside = index.with_name(index.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(index)
    return index


def iter_tar(file: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Each record's key and members {extension: (offset, content)} of an uncompressed tar, in order.

    Raises ShardError where the tar is cut, damaged, or holds what no record has: links, paths that leave the folder,
    names without an extension, a key in two places.
    """
    seen: set[str] = set()
    key, members = "", dict[str, tuple[int, bytes]]()
    for member_key, extension, offset, content in _tar_members(file, name):
        if member_key != key:
            if members:
                yield key, members
            if member_key in seen:
                raise ShardError(f"{name}, byte {offset}: key {member_key!r} occurs twice: keys must be unique")
            seen.add(member_key)
            key, members = member_key, {}
        if extension in members:
            raise ShardError(f"{name}, byte {offset}: {member_key}.{extension} occurs twice: keys must be unique")
        members[extension] = (offset, content)
    if members:
        yield key, members


def _tar_members(file: IO[bytes], name: str) -> Iterator[tuple[str, str, int, bytes]]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isdir():
                    continue
                path, where = member.name.removeprefix("./"), f"{name}, byte {member.offset}"
                if path.startswith("/") or ".." in path.split("/"):
                    raise ShardError(f"{where}: member {path!r} leaves the folder: refused")
                matched = MEMBER.fullmatch(path)
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None or matched is None:
                    raise ShardError(f"{where}: member {path!r} is no plain file named KEY.EXTENSION")
                data = content.read()
                if len(data) != member.size:
                    raise ShardError(f"{name} is truncated at byte {file.tell()}: {path!r} has {member.size} bytes")
                yield matched["key"], matched["extension"].lower(), member.offset_data, data
            end = tar.offset
    except tarfile.TarError as error:
        raise ShardError(f"{name} is no whole uncompressed tar, near byte {file.tell()} ({error})") from None
    file.seek(end)
    # tarfile takes a damaged header, or a file cut between two members, for the end of the archive
    if file.read(len(END_OF_TAR)) != END_OF_TAR:
        raise ShardError(f"{name} is truncated or damaged at byte {end}: the archive does not end there as it should")


def parse_record(key: str, members: Mapping[str, bytes]) -> Record:
    """A record from its members' contents {extension: content}; its unit is `unit` of KEY.json, or else the key.

    Raises RecordError: "no_image", "bad_class", "bad_caption" or "bad_unit".
    """
    image = next((members[extension] for extension in (*IMAGE_EXTENSIONS, LATENTS) if extension in members), None)
    if image is None:
        raise RecordError("no_image")
    label, caption, unit = None, None, key
    if "cls" in members:
        if not (digits := members["cls"].strip()).isdigit() or len(digits) > _MAX_CLASS_DIGITS:
            raise RecordError("bad_class")
        label = int(digits)
    if "txt" in members:
        try:
            caption = members["txt"].decode("utf-8")
        except UnicodeDecodeError:
            raise RecordError("bad_caption") from None
    if "json" in members:
        try:
            unit = json.loads(members["json"]).get("unit", key)
        except (ValueError, AttributeError, RecursionError):
            raise RecordError("bad_unit") from None
        if not isinstance(unit, str) or not unit:
            raise RecordError("bad_unit")
    return Record(key, unit, image, label, caption, members.get("svg"))


def find_shards(files: Any, folder: str, split: str) -> list[tuple[str, int]]:
    """A split's tars in order, with their sizes in bytes; `files` is the fsspec file system that `folder` is on.

    Raises ShardError where one is missing: numbers leave no gap, but for filtered shards of which nothing was kept.
    """
    try:
        listing = files.ls(folder, detail=True)
    except FileNotFoundError:
        listing = []
    sizes: dict[str, int] = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listing}
    tars = {name for name in sizes if name.startswith(f"{split}-") and name.endswith(".tar")}
    indexed = {name.removesuffix(".index.jsonl") + ".tar" for name in sizes if name.endswith(".index.jsonl")}
    filtered = {name.removesuffix(SUFFIX) + ".tar" for name in sizes if name.endswith(SUFFIX)}
    if lost := sorted(indexed - tars):
        raise ShardError(f"{folder}/{lost[0]} is missing, its index is there: restore it or ingest again")
    for number, tar in enumerate(sorted(tars | filtered)):
        if tar != (expected := f"{split}-{number:05d}.tar"):
            raise ShardError(f"{folder}/{expected} is missing, {tar} is there: restore it or ingest again")
        if tar in tars - indexed:
            raise ShardError(
                f"{folder}/{tar} has no index {index_name(tar)}: run the ingest stage again, "
                "or train.shards.index_shard on it"
            )
        if tar not in tars and _keeps(files, f"{folder}/{tar.removesuffix('.tar')}{SUFFIX}"):
            raise ShardError(f"{folder}/{tar} is missing, its manifest is there: restore it or filter again")
    if not tars:
        raise ShardError(f"{folder} holds no shard {split}-00000.tar: run the ingest stage first")
    return [(f"{folder}/{tar}", sizes[tar]) for tar in sorted(tars)]


def _keeps(files: Any, manifest: str) -> bool:
    """Whether a filtered shard's manifest speaks of a tar."""
    try:
        return json.loads(files.cat_file(manifest))["tar"] is not None
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{manifest} is no shard manifest: run the filter stage again") from None


def parse_entry(line: bytes, where: str) -> dict[str, Any]:
    """One line of an index; anything else is a ShardError that begins with `where`."""
    try:
        entry = json.loads(line)
        whole = (
            isinstance(entry["key"], str)
            and isinstance(entry["unit"], str)
            and isinstance(entry["label"], int | None)
            and len(bytes.fromhex(entry["digest"].removeprefix("blake3:"))) == 32
            and 0 <= extent(entry)[0] <= extent(entry)[1]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, entry = False, {}
    if not whole:
        raise ShardError(f"{where}: not an index entry: run the ingest stage again, or train.shards.index_shard")
    return entry


def extent(entry: Mapping[str, Any]) -> tuple[int, int]:
    """First byte and end of an index entry's record in its tar; a record's members lie side by side."""
    spans: list[tuple[int, int]] = list(entry["members"].values())
    return min(offset for offset, _ in spans), max(offset + length for offset, length in spans)


def verified(entry: Mapping[str, Any], block: bytes, tar: str) -> Record:
    """The record of an index's entry, whose members are in `block`, the bytes of its `extent`.

    Raises ShardError where they are not what the index says, RecordError where they never were a record.
    """
    start = extent(entry)[0]
    members = {
        extension: block[offset - start : offset - start + length]
        for extension, (offset, length) in entry["members"].items()
    }
    where = f"{tar}, byte {start}: record {entry['key']}"
    if record_digest(entry["key"], members) != entry["digest"]:
        raise ShardError(f"{where} does not have the digest of its index: restore the shard or ingest again")
    record = parse_record(entry["key"], members)
    if (record.unit, record.label) != (entry["unit"], entry["label"]):
        raise ShardError(f"{where} has another unit or class than its index says: ingest again")
    return record


def index_name(tar: str) -> str:
    """The name of a tar's index."""
    return tar.removesuffix(".tar") + ".index.jsonl"


def record_digest(key: str, members: Mapping[str, bytes]) -> str:
    """BLAKE3 of the key and of each member's extension, length and content, in the order of the extensions."""
    digest = blake3(f"{len(key.encode())}:{key}".encode())
    for extension, content in sorted(members.items()):
        digest.update(f"{len(extension.encode())}:{extension}{len(content)}:".encode())
        digest.update(content)
    return f"blake3:{digest.hexdigest()}"


def root_of(digests: Iterable[str]) -> str:
    """BLAKE3 of the records' digests in order: the same however the records are cut into shards."""
    root = blake3()
    for digest in digests:
        root.update(bytes.fromhex(digest.removeprefix("blake3:")))
    return f"blake3:{root.hexdigest()}"


def _members(record: Record) -> dict[str, bytes]:
    extension = LATENTS if record.image.startswith(NPY_SIGNATURE) else stored_extension(record.image)
    if extension is None:
        raise ValueError(f"record {record.key}: a shard holds PNG and JPEG images, or latents: convert it first")
    members = {extension: record.image}
    if record.label is not None:
        members["cls"] = str(record.label).encode("ascii")
    if record.caption is not None:
        members["txt"] = record.caption.encode("utf-8")
    if record.svg is not None:
        members["svg"] = record.svg
    if record.unit != record.key:
        members["json"] = json.dumps({"unit": record.unit}).encode("ascii")
    return members


def _tar_writer(file: Any) -> Any:
    from webdataset.writer import TarWriter

    return TarWriter(file, user="", group="", mtime=0, encoder=False)
