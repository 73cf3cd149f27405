"""A filter stage's shards as train writes them, with their manifests: small, and of invented records."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from blake3 import blake3
from PIL import Image

from privacy.pii.manifests import ShardManifest, manifest_path, merkle_root, read_manifests
from train.shards import Record, root_of, write_shards


def digest(content: bytes) -> str:
    return f"blake3:{blake3(content).hexdigest()}"


def fields(kept: int = 2, gone: int = 1, **changed: Any) -> dict[str, Any]:
    """What a manifest of so many records is made of."""
    some = digest(b"some") if kept else None
    return {
        "task": digest(b"task"),
        "split": "public",
        "shard": "public-00000",
        "input": digest(b"input"),
        "bytes": 10_240 if kept else 0,
        "root": digest(b"root"),
        "tar": some,
        "index": some,
        "counts": {"in": kept + gone, "kept": kept, "dropped": gone, "quarantined": 0},
        "set_aside": [(f"gone{i}", "holds_email") for i in range(gone)],
        "policy_sha256": "0" * 64,
    } | changed


def write_filtered(folder: Path) -> dict[str, Any]:
    """Two splits, of which the private one has two shards and a third that kept nothing; gives the stage's metrics."""
    for split, num_records in (("public", 2), ("private", 5)):
        records = []
        for i in range(num_records):
            image = io.BytesIO()
            Image.new("L", (4, 4), 20 * i).save(image, "PNG")
            records.append(Record(f"{split}{i}", f"u{i // 2}", image.getvalue(), i, "a caption", None))
        write_shards(folder / split, split, records, shard_size=3)
        entries: list[dict[str, Any]] = []
        for tar in sorted((folder / split).glob("*.tar")):
            index = tar.with_suffix(".index.jsonl")
            entries = [json.loads(line) for line in index.read_text().splitlines()]
            put(
                folder,
                **fields(len(entries), split=split, shard=tar.stem, bytes=tar.stat().st_size)
                | {"root": root_of(entry["digest"] for entry in entries)}
                | {"tar": digest(tar.read_bytes()), "index": digest(index.read_bytes())},
            )
    put(folder, **fields(0, split="private", shard="private-00002", root=root_of([])))
    return {
        "splits": {split: _metrics(folder, split) for split in ("public", "private")},
        "shards_root": root_now(folder),
    }


def _metrics(folder: Path, split: str) -> dict[str, Any]:
    lines = [line for index in sorted((folder / split).glob("*.jsonl")) for line in index.read_text().splitlines()]
    counts = Counter[str]()
    for manifest in read_manifests(folder):
        counts.update(manifest.counts if manifest.split == split else {})
    return {"records": len(lines), "root": root_of(json.loads(line)["digest"] for line in lines), **counts}


def put(folder: Path, **changed: Any) -> ShardManifest:
    manifest = ShardManifest(**changed)
    manifest_path(folder, manifest.split, manifest.shard).write_bytes(manifest.leaf())
    return manifest


def root_now(folder: Path) -> str:
    return merkle_root([manifest.leaf() for manifest in read_manifests(folder)])
