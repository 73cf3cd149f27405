"""The filter stage's walk: every record of an ingested split through the policy, into new shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from privacy.pii.filter import Policy, filter_record
from privacy.pii.patterns import DETECTORS, ENTITIES
from train.data import ShardDataset
from train.shards import Record, ShardWriter
from train.sources import Quarantine


def filter_shards(
    in_dir: Path,
    out_dir: Path,
    splits: Sequence[str],
    policy: Policy,
    progress: Callable[[int, int | None], None],
    *,
    shard_size: int = 512,
) -> dict[str, Any]:
    """Filter `in_dir/<split>` into `out_dir/<split>` for each split, and return the stage's metrics.

    metrics: splits -> {records, bytes, shards, root, in, kept, dropped, quarantined}, where in = kept + dropped +
    quarantined; reasons -> records; entities -> findings; metadata -> pieces stripped; detectors -> version. None holds
    a value. Records that are not kept are listed in `quarantine.jsonl` by key and reason.
    """
    datasets = {split: ShardDataset(in_dir / split, split) for split in splits}
    total, done = sum(map(len, datasets.values())), 0
    entities, metadata = Counter[str](), Counter[str]()
    quarantine = Quarantine()
    metrics: dict[str, Any] = {}
    for split, dataset in datasets.items():
        outcomes = Counter[str]()
        with ShardWriter(out_dir / split, split, shard_size) as writer:
            for index in range(len(dataset)):
                record = dataset.read(index)
                result = filter_record(record.image, record.caption, policy)
                outcomes[result.outcome] += 1
                entities.update(result.findings)
                metadata.update(result.metadata)
                if result.reason is None:
                    writer.add(Record(record.key, record.unit, result.image, record.label, result.caption))
                else:
                    quarantine.add(split, record.key, result.reason)
                done += 1
                progress(done, total)
            quarantine.write(out_dir)
            written = asdict(writer.commit())
        counts = {outcome: outcomes[outcome] for outcome in ("kept", "dropped", "quarantined")}
        assert len(dataset) == sum(counts.values()) and counts["kept"] == written["records"]
        metrics[split] = {**written, "in": len(dataset), **counts}
    return {
        "splits": metrics,
        "reasons": quarantine.reasons(),
        "entities": {entity: entities[entity] for entity in ENTITIES},
        "metadata": dict(sorted(metadata.items())),
        "detectors": {name: detector.version for name, detector in DETECTORS.items()},
    }
