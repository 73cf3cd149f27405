"""What a latent shard says of itself, and that its records are those of the shard of images that it was made from.

    out/<split>/<split>-00003.latents.json      written last: without it the shard is unfinished

The files are leaves of a Merkle tree as a filter stage's are (`privacy.pii.manifests`). Each names the index of the
shard that it was made from by its digest, and that index holds the digest of every record: so the root binds what was
encoded, record by record. A record keeps its key, unit, class and caption to the byte; in place of its image are its
latents, and its drawing is left out. What the VAE makes of an image is not looked at here.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from blake3 import blake3
from pydantic import Field

from privacy.pii.manifests import (
    Digest,
    Leaf,
    ManifestError,
    Name,
    index_of,
    named,
    opened,
    read_manifests,
    record_digest,
)

SUFFIX = ".latents.json"
KEPT = ("cls", "txt", "json")  # members that a record keeps: its class, its caption, its unit
LATENTS = "npy"

Positive = Annotated[int, Field(gt=0)]
Sums = tuple[float, ...]

_MEND = "run the latents stage again, and what was trained on its shards"
_RESTORE = "restore it from a copy, or run all again from there"


class LatentManifest(Leaf):
    """What became of one shard of images. sums, square_sums: of latents by channel, of the public split alone."""

    KIND = "latents"
    FILE = SUFFIX

    made_from: Name  # the shard of the same split in the stage that was encoded, without .tar
    source: Digest  # of that shard's index
    vae: Digest
    records: Positive
    bytes: Positive  # of the tar
    root: Digest  # of the records' digests in order
    tar: Digest
    index: Digest
    sums: Sums | None
    square_sums: Sums | None


def sources(folder: Path, *, filtered: bool) -> dict[str, list[tuple[str, str]]]:
    """The shards of a stage that may be encoded, by split: the name of each and the digest of its index, in order.

    filtered: as the stage's shard manifests say, which need no shard to be there; otherwise as the indexes are.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    if filtered:
        for manifest in read_manifests(folder):
            shards = found.setdefault(manifest.split, [])
            shards += [] if manifest.index is None else [(manifest.shard, manifest.index)]
        return found
    for tar in sorted(folder.glob("[!.]*/*.tar")):
        try:
            index = named(blake3(index_of(tar).read_bytes()).digest())
        except OSError as error:
            raise ManifestError(f"{error.filename} cannot be read ({error.strerror}): {_RESTORE}") from error
        found.setdefault(tar.parent.name, []).append((tar.stem, index))
    return found


def verify_sources(
    folder: Path, manifests: Sequence[LatentManifest], made_of: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """Hold what the manifests were made from against all that there was; ManifestError names a shard that differs."""
    for split in dict.fromkeys([*made_of, *(manifest.split for manifest in manifests)]):
        ours = [manifest for manifest in manifests if manifest.split == split]
        for manifest, there in zip_longest(ours, made_of.get(split, ())):
            if manifest is None:
                raise ManifestError(f"{folder / split} has no latents of shard {there[0]}: {_MEND}")
            if (manifest.made_from, manifest.source) != there:
                instead = "there is none" if there is None else f"there is {there[0]} with index {there[1][:19]}.."
                raise ManifestError(
                    f"{folder / split / manifest.shard} was made from {manifest.made_from} with index "
                    f"{manifest.source[:19]}.., and {instead}: {_MEND}"
                )


def verify_latents(
    folder: Path, manifests: Sequence[LatentManifest], source: Path | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Hold every shard against its manifest, and every record against the one it was made from, byte by byte.

    source: the folder of the stage that was encoded; None where its shards are not to be read. Gives each split's root
    over its records' digests, recomputed from the bytes in the tars, and the same of `source`. ManifestError names the
    shard, and the record, that is missing, changed, or of another record than its source.
    """
    ours, theirs = ({manifest.split: blake3() for manifest in manifests} for _ in range(2))
    known: set[Path] = set()
    for manifest in manifests:
        tar = folder / manifest.split / f"{manifest.shard}.tar"
        known.add(tar)
        with opened(tar, manifest.tar, manifest.index, _MEND) as (entries, content):
            digests = b"".join(record_digest(entry, content) for entry in entries)
            if named(blake3(digests).digest()) != manifest.root or len(entries) != manifest.records:
                raise ManifestError(f"{tar}: its records are not those that its manifest names: {_MEND}")
            ours[manifest.split].update(digests)
            if source is None:
                continue
            made_from = source / manifest.split / f"{manifest.made_from}.tar"
            with opened(made_from, None, manifest.source, _RESTORE) as (before, images):
                for digest in _compared(tar, entries, content, before, images):
                    theirs[manifest.split].update(digest)
    for tar in sorted(folder.glob("[!.]*/*.tar")):
        if tar not in known:
            raise ManifestError(f"{tar} has no {SUFFIX}, so nothing says what it was made from: remove it")
    ours_named, theirs_named = ({split: named(root.digest()) for split, root in of.items()} for of in (ours, theirs))
    return ours_named, theirs_named


def _compared(
    tar: Path,
    entries: Sequence[Mapping[str, Any]],
    content: mmap.mmap,
    before: Sequence[Mapping[str, Any]],
    images: mmap.mmap,
) -> Iterator[bytes]:
    """The digest of each record that was encoded; ManifestError where a record of `tar` is not that very one."""
    for latent, image in zip_longest(entries, before):
        if image is None:
            raise ManifestError(f"{tar}: record {latent['key']} is none of those that it was made from: {_MEND}")
        if latent is None:
            raise ManifestError(f"{tar}: record {image['key']} of those that it was made from is not in it: {_MEND}")
        if latent["key"] != image["key"]:
            raise ManifestError(f"{tar}: record {latent['key']} stands in the place of {image['key']}: {_MEND}")
        digest = record_digest(image, images)
        if named(digest) != image["digest"]:
            raise ManifestError(f"{tar}: record {image['key']} that it was made from was changed since: {_RESTORE}")
        for what in ("unit", "label"):
            if latent[what] != image[what]:
                raise ManifestError(f"{tar}: record {latent['key']} has another {what} than it was made from: {_MEND}")
        members = {name: _member(latent, name, content) for name in latent["members"]}
        if members.pop(LATENTS, None) is None or members != {
            name: _member(image, name, images) for name in KEPT if name in image["members"]
        }:
            raise ManifestError(
                f"{tar}: record {latent['key']} has another class, caption or unit than the one it was made from, or "
                f"something else beside its latents: {_MEND}"
            )
        yield digest


def _member(entry: Mapping[str, Any], name: str, content: mmap.mmap) -> bytes:
    offset, length = entry["members"][name]
    return content[offset : offset + length]
