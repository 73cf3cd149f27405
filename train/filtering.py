"""The filter stage: every record of an ingested split through the policy, copies left out, into new shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from blake3 import blake3

from privacy.pii.duplicates import DuplicatesConfig
from privacy.pii.filter import check_tools
from privacy.pii.manifests import SUFFIX, ManifestError, ShardManifest, merkle_root, read_manifest
from privacy.pii.policy import Policy
from train.filter_job import FilterJob, InputShard, told
from train.filter_tools import open_tools
from train.shards import ShardError, find_shards, index_name, parse_entry, root_of
from train.tasks import mendable

__all__ = ["FilterJob", "filter_shards", "open_tools", "plan_filter"]


def plan_filter(
    in_dir: Path,
    folder: Path,
    splits: Sequence[str],
    policy: Policy,
    key_file: Path,
    *,
    duplicates: DuplicatesConfig | None = None,
    max_quarantine_fraction: float = 0.05,
) -> FilterJob:
    """The job that filters `in_dir/<split>` into `folder/<split>`; reads the indexes, and no record.

    Raises what `open_tools` and `check_tools` raise; ShardError where the input is not whole; WrongKey where `folder`
    holds pseudonyms of another key than the one at hand.
    """
    tools = open_tools(policy, key_file)
    check_tools(policy, tools)
    shards = tuple(shard for split in splits for shard in input_shards(in_dir.absolute(), split))
    if tools.pseudonyms is not None:
        for path in sorted(folder.glob(f"[!.]*/*{SUFFIX}")) + sorted(folder.glob(f".staged/*/*{SUFFIX}")):
            if (key_id := _key_id(path)) is not None:
                tools.pseudonyms.check(key_id, str(path))
    return FilterJob(
        folder=folder.absolute(),
        shards=shards,
        policy=policy,
        detectors={detector.name: detector.version for detector in (*tools.texts, *tools.images)},
        text_entities=tuple(entity for detector in tools.texts for entity in detector.entities),
        image_entities=tuple(entity for detector in tools.images for entity in detector.entities),
        duplicates=duplicates,
        key_file=key_file.absolute(),
        pseudonym_key_id=tools.pseudonyms.key_id if tools.pseudonyms is not None else None,
        max_quarantine_fraction=max_quarantine_fraction,
    )


def filter_shards(job: FilterJob, run: Callable[[FilterJob], None]) -> dict[str, Any]:
    """Have `run` do every task of `job`, and return the stage's metrics; begun again, it goes on where it was.

    With `duplicates`, of records of one split that are near each other one is kept. Which those are hangs on several
    records at once, so a private stage's guarantee is for the split as it is after this.

    Records that are not kept are listed in `quarantine.jsonl` by key and reason, also where it ends in an error.
    Raises ValueError where a split has nothing left, and once it is sure that more than `max_quarantine_fraction` of
    all records are damaged (what the policy quarantines is not).

    metrics, none of which holds a value: splits -> {records, bytes, shards, root, in, kept, dropped, quarantined},
    where in = kept + dropped + quarantined; shards_root: the Merkle root over the shards' manifests; reasons ->
    records; entities -> findings in captions; boxes -> findings in images; found_by -> findings by place, entity and
    detector; acted -> findings by place, entity and action, copies not yet left out; metadata -> pieces stripped;
    detectors -> version; policy_sha256; pseudonym_key_id; duplicates: split -> the report of `find_duplicates`.
    """
    with mendable(job.folder):
        job.begin()
        try:
            run(job)
            manifests = job.finish()
        finally:
            quarantine = job.set_aside()
            quarantine.write(job.folder)
    splits = {split: _split(job, split, manifests) for split in job.splits}

    def total(name: str) -> dict[str, int]:
        counters = (Counter[str](getattr(manifest, name)) for manifest in manifests)
        return dict(sorted(sum(counters, Counter[str]()).items()))

    leaves = [manifest.leaf() for manifest in sorted(manifests, key=lambda made: (made.split, made.shard))]
    return {
        "splits": splits,
        "shards_root": merkle_root(leaves),
        "reasons": quarantine.reasons(),
        "entities": dict.fromkeys(job.text_entities, 0) | total("entities"),
        "boxes": dict.fromkeys(job.image_entities, 0) | total("boxes"),
        "found_by": total("found_by"),
        "acted": total("acted"),
        "metadata": total("metadata"),
        "detectors": job.detectors,
        "policy_sha256": job.policy.digest(),
        "pseudonym_key_id": job.pseudonym_key_id,
        "duplicates": {split: dict(job.report(split)) for split in job.splits if job.duplicates is not None},
    }


def _split(job: FilterJob, split: str, manifests: Sequence[ShardManifest]) -> dict[str, Any]:
    """The metrics of one split."""
    made = [manifest for manifest in manifests if manifest.split == split]
    counts = {name: sum(manifest.counts[name] for manifest in made) for name in made[0].counts}
    if not counts["kept"]:
        raise ValueError(
            f"split {split} has no records left of {counts['in']} ({told(job.set_aside())}): let the policy drop less"
        )
    tars = [job.folder / split / f"{manifest.shard}.tar" for manifest in made if manifest.tar is not None]
    digests = (entry["digest"] for tar in tars for entry in _entries(tar))
    size = sum(manifest.bytes for manifest in made)
    return {"records": counts["kept"], "bytes": size, "shards": len(tars), "root": root_of(digests), **counts}


def input_shards(in_dir: Path, split: str) -> list[InputShard]:
    """The shards of `in_dir/<split>`, numbered anew; reads the indexes, no record. ShardError where none has any."""
    found: list[InputShard] = []
    for number, (tar, _) in enumerate(find_shards(fsspec.filesystem("file"), str(in_dir / split), split)):
        path = Path(tar)
        index = Path(index_name(tar)).read_bytes()
        digest, records = f"blake3:{blake3(index).hexdigest()}", sum(1 for _ in _entries(path))
        found.append(InputShard(split=split, name=f"{split}-{number:05d}", tar=path, digest=digest, records=records))
    if not any(shard.records for shard in found):
        raise ShardError(f"{in_dir / split}: the indexes are empty: run the ingest stage again")
    return found


def _entries(tar: Path) -> Iterator[dict[str, Any]]:
    index = Path(index_name(str(tar)))
    with index.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield parse_entry(line, f"{index}, line {number}")


def _key_id(path: Path) -> str | None:
    try:
        return read_manifest(path).pseudonym_key_id
    except ManifestError:
        return None  # made anew, whatever it was
