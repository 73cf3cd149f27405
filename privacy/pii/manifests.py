"""What a filtered shard says of itself, and the Merkle root that binds all shards of a filter stage.

    out/<split>/<split>-00003.tar, .index.jsonl         what was kept; neither is there where nothing was
    out/<split>/<split>-00003.manifest.json             written last: without it the shard is unfinished

A manifest's file is its leaf, byte for byte: canonical JSON (sorted keys, no spaces) and a newline. The leaves in the
order of (split, shard) make a tree as RFC 6962 has it, with BLAKE3: a leaf's hash is of 0x00 and the leaf, a node's of
0x01 and its two children. No time and no host is in a leaf, so the root is a function of input, policy, detectors and
key. Anybody who holds the root can be shown that one shard is in it, by one manifest and a few hashes.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

from blake3 import blake3
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

FORMAT = 1
SUFFIX = ".manifest.json"
OUTCOMES = ("kept", "dropped", "quarantined")

Digest = Annotated[str, Field(pattern=r"^blake3:[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Count = Annotated[int, Field(ge=0)]
_CODE = re.compile(r"[A-Za-z0-9_.:+-]{1,200}")  # a name of ours, never words of a record


def _named_by_codes(value: object) -> object:
    """Refuse other keys before pydantic names one of them in an error."""
    if isinstance(value, dict) and not all(_CODE.fullmatch(str(key)) for key in cast(dict[object, object], value)):
        raise ValueError("a key is no name of an entity, a detector or an action")
    return cast(object, value)


Code = Annotated[str, Field(pattern=f"^{_CODE.pattern}$")]
Tally = Annotated[dict[str, Annotated[int, Field(gt=0)]], BeforeValidator(_named_by_codes)]


class ManifestError(ValueError):
    """A shard is not what its manifest says, or the manifests not what their root says; the message names the shard.

    Its cause is an OSError where a file could not be read.
    """


class Leaf(BaseModel):
    """What a shard's own file says of it: a leaf of the tree of its stage.

    KIND: of the stage; FILE: what the file's name ends in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    KIND: ClassVar[str]
    FILE: ClassVar[str]

    format: Literal[1] = FORMAT
    task: Digest  # of all that decides the shard's bytes
    split: Name
    shard: Name  # the name of the tar, without .tar

    def leaf(self) -> bytes:
        """The bytes of the file, and the tree's leaf; their own digest is in them, so that a bit that turns on a disk
        makes no other manifest of it.
        """
        body = self.model_dump(mode="json")
        return _canonical({**body, "digest": named(blake3(_canonical(body)).digest())})


LeafType = TypeVar("LeafType", bound=Leaf)


class ShardManifest(Leaf):
    """What became of one input shard. It holds counts, codes, keys and digests, and no value of a record."""

    KIND = "filter"
    FILE = SUFFIX

    input: Digest  # of the shard it was made from
    bytes: Count  # of the tar
    root: Digest  # of the kept records' digests in order
    tar: Digest | None  # None where nothing was kept
    index: Digest | None
    counts: dict[Literal["in", "kept", "dropped", "quarantined"], Count]
    damaged: Count = 0  # of those quarantined, where the record's state was the reason and not the policy's word
    set_aside: tuple[tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_/-]+$")], Code], ...] = ()  # key, reason
    entities: Tally = {}  # findings in captions
    boxes: Tally = {}  # findings in images
    found_by: Tally = {}  # by place, entity and detector
    acted: Tally = {}  # by place, entity and action
    metadata: Tally = {}  # pieces stripped
    detectors: Annotated[dict[str, str], BeforeValidator(_named_by_codes)] = {}  # name -> version
    policy_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    pseudonym_key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        counts, kept = self.counts, self.counts.get("kept")
        if set(counts) != {"in", *OUTCOMES}:
            raise ValueError(f"counts has {', '.join(counts)}: it takes in, {', '.join(OUTCOMES)}")
        left = {outcome: counts[outcome] for outcome in OUTCOMES}
        if counts["in"] != sum(left.values()):
            told = " + ".join(f"{number} {outcome}" for outcome, number in left.items())
            raise ValueError(f"{counts['in']} records went in, and {told} came out")
        if len(self.set_aside) != counts["dropped"] + counts["quarantined"]:
            raise ValueError(f"set_aside names {len(self.set_aside)} records, and counts another number")
        if self.damaged > counts["quarantined"]:
            raise ValueError(f"{self.damaged} records are damaged, of {counts['quarantined']} quarantined")
        if any((part is None) != (not kept) for part in (self.tar, self.index)) or bool(self.bytes) != bool(kept):
            raise ValueError(f"{kept} records are kept, which the tar's size, its digest or its index's does not fit")
        return self


def manifest_path(folder: Path, split: str, shard: str) -> Path:
    """Where a shard's manifest lies in a filter stage's folder."""
    return folder / split / (shard + SUFFIX)


def read_manifest(path: Path) -> ShardManifest:
    """The manifest in a file; ManifestError where it is not, to the byte, one that was written here."""
    return read_leaf(ShardManifest, path)


def read_leaf(of: type[LeafType], path: Path) -> LeafType:
    """As `read_manifest`, of the shards of any kind of stage."""
    mend = f"run the {of.KIND} stage again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror}): {mend}") from error
    try:
        manifest = of.model_validate_json(_without_digest(content))
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "the whole"
        told = f"no shard manifest of format {FORMAT} ({where}: {first['msg']})"
        raise ManifestError(f"{path} is {told}: {mend}") from None
    if manifest.leaf() != content or path.parts[-2:] != (manifest.split, manifest.shard + of.FILE):
        raise ManifestError(f"{path} is not as it was written, or not where: {mend}")
    return manifest


def _without_digest(content: bytes) -> bytes:
    """What `leaf` made a digest of; content that it did not make as it is."""
    try:
        body = json.loads(content)
        del body["digest"]
    except (ValueError, KeyError, TypeError):
        return content
    return json.dumps(body).encode()


def _canonical(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")


def read_manifests(folder: Path) -> list[ShardManifest]:
    """The manifests of all shards of a filter stage, by split and shard: the order of the tree's leaves."""
    return read_leaves(ShardManifest, folder)


def read_leaves(of: type[LeafType], folder: Path) -> list[LeafType]:
    """As `read_manifests`, of any kind of stage."""
    manifests = [read_leaf(of, path) for path in folder.glob(f"[!.]*/*{of.FILE}")]
    return sorted(manifests, key=lambda manifest: (manifest.split, manifest.shard))


# --- the tree ---


def merkle_root(leaves: Sequence[bytes]) -> str:
    """The root over leaves in order. Source: RFC 6962, 2.1, with BLAKE3 for SHA-256."""
    return named(_root([_hash(b"\0", leaf) for leaf in leaves]))


def inclusion_proof(leaves: Sequence[bytes], at: int) -> list[str]:
    """The hashes that show leaf `at` to be under the root, from the leaf upwards. Source: RFC 6962, 2.1.1."""
    if not 0 <= at < len(leaves):
        raise ValueError(f"there is no leaf {at} among {len(leaves)}: count from 0")
    hashes, path = [_hash(b"\0", leaf) for leaf in leaves], list[bytes]()
    while len(hashes) > 1:
        left = _left(len(hashes))
        beside, hashes = (hashes[left:], hashes[:left]) if at < left else (hashes[:left], hashes[left:])
        at -= left if at >= left else 0
        path.append(_root(beside))
    return [named(digest) for digest in reversed(path)]


def verify_inclusion(leaf: bytes, at: int, num_leaves: int, proof: Sequence[str], root: str) -> bool:
    """Whether `leaf` is number `at` of `num_leaves` under `root`. Source: RFC 9162, 2.1.3.2."""
    if not 0 <= at < num_leaves:
        return False
    node, last, digest = at, num_leaves - 1, _hash(b"\0", leaf)
    for name in proof:
        beside = _unnamed(name)
        if beside is None or last == 0:
            return False
        if node % 2 or node == last:
            digest = _hash(b"\1", beside, digest)
            while node % 2 == 0 and node:
                node, last = node // 2, last // 2
        else:
            digest = _hash(b"\1", digest, beside)
        node, last = node // 2, last // 2
    return last == 0 and named(digest) == root


def _root(hashes: Sequence[bytes]) -> bytes:
    if not hashes:
        return blake3().digest()
    if len(hashes) == 1:
        return hashes[0]
    left = _left(len(hashes))
    return _hash(b"\1", _root(hashes[:left]), _root(hashes[left:]))


def _left(leaves: int) -> int:
    """How many of so many leaves are left of a node: the largest power of two that is less."""
    return 1 << ((leaves - 1).bit_length() - 1)


def _hash(*parts: bytes) -> bytes:
    return blake3(b"".join(parts)).digest()


def named(digest: bytes) -> str:
    """A digest as every manifest writes it."""
    return f"blake3:{digest.hex()}"


def _unnamed(name: str) -> bytes | None:
    try:
        digest = bytes.fromhex(name.removeprefix("blake3:"))
    except ValueError:
        return None
    return digest if named(digest) == name and len(digest) == 32 else None


# --- the shards themselves ---


def verify_manifests(folder: Path, root: str) -> list[ShardManifest]:
    """The manifests of all shards of a filter stage, held against `root`; ManifestError where they have another."""
    return verify_leaves(ShardManifest, folder, root)


def verify_leaves(of: type[LeafType], folder: Path, root: str) -> list[LeafType]:
    """As `verify_manifests`, of any kind of stage."""
    manifests = read_leaves(of, folder)
    found = merkle_root([manifest.leaf() for manifest in manifests])
    if not manifests or found != root:
        raise ManifestError(
            f"the {len(manifests)} shard manifests in {folder} have root {found}, and not {root}: one was changed, "
            f"added or removed; run the {of.KIND} stage again, and what was trained on its shards"
        )
    return manifests


def verify_shards(folder: Path, manifests: Sequence[ShardManifest]) -> dict[str, str]:
    """Hold every shard of a filter stage against its manifest, byte by byte.

    Gives each split's root over its records' digests, recomputed from the bytes in the tars: what a ledger names as
    the root of a data set. Raises ManifestError, which names the shard, where one is missing, changed or has no
    manifest.
    """
    records = {manifest.split: blake3() for manifest in manifests}
    known: set[Path] = set()
    for manifest in manifests:
        tar = folder / manifest.split / f"{manifest.shard}.tar"
        known.add(tar)
        digests = _record_digests(tar, manifest)
        records[manifest.split].update(digests)
        if named(blake3(digests).digest()) != manifest.root:
            raise ManifestError(f"{tar}: its records are not those that its manifest names: {_MEND}")
    for tar in sorted(folder.glob("[!.]*/*.tar")):
        if tar not in known:
            raise ManifestError(f"{tar} has no manifest, so nothing says that it was filtered: remove it")
    return {split: named(digest.digest()) for split, digest in records.items()}


_MEND = "run the filter stage again"


def _record_digests(tar: Path, manifest: ShardManifest) -> bytes:
    """The digests of a shard's records, computed from their bytes, in the order of the index."""
    if manifest.tar is None:
        for path in (tar, index_of(tar)):
            if path.exists():
                raise ManifestError(f"{path} exists, and its manifest says that nothing was kept: {_MEND}")
        return b""
    with opened(tar, manifest.tar, manifest.index, _MEND) as (entries, content):
        return b"".join(record_digest(entry, content) for entry in entries)


def index_of(tar: Path) -> Path:
    """Where the index of a shard lies."""
    return tar.with_suffix(".index.jsonl")


@contextmanager
def opened(
    tar: Path, digest: str | None, index: str | None, mend: str
) -> Generator[tuple[list[dict[str, Any]], mmap.mmap]]:
    """The entries of a shard's index, and the tar's bytes, if both have the digests given; None: whatever it has.

    ManifestError, which ends in `mend`, where they have not, and where an entry that is read is none.
    """
    try:
        lines = index_of(tar).read_bytes()
        with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for path, data, expected in ((tar, content, digest), (index_of(tar), lines, index)):
                if expected is not None and named(blake3(data).digest()) != expected:
                    raise ManifestError(f"{path} is not as its manifest names it: {mend}")
            yield [json.loads(line) for line in lines.splitlines()], content
    except OSError as error:
        raise ManifestError(f"{error.filename or tar} cannot be read ({error.strerror}): {mend}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{tar} cannot be read by its index: {mend}") from None


def record_digest(entry: Mapping[str, Any], content: mmap.mmap) -> bytes:
    """BLAKE3 of a record's key and members, as the shard format has it (train/shards.py, record_digest)."""
    key = cast(str, entry["key"]).encode()
    digest = blake3(b"%d:%b" % (len(key), key))
    for extension, (offset, length) in sorted(cast(dict[str, tuple[int, int]], entry["members"]).items()):
        digest.update(f"{len(extension.encode())}:{extension}{length}:".encode())
        digest.update(content[offset : offset + length])
    return digest.digest()
