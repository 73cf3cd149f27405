"""The filter stage: every record of an ingested split through the policy, copies left out, into new shards."""

from __future__ import annotations

import itertools
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from privacy.pii.detectors import open_detectors
from privacy.pii.duplicates import DuplicatesConfig, Signatures, find_duplicates, signatures
from privacy.pii.filter import FilterResult, Tools, check_tools, filter_records
from privacy.pii.findings import Pixels
from privacy.pii.pixels import apply_boxes, decode
from privacy.pii.policy import Policy
from privacy.pii.pseudonyms import Pseudonyms
from privacy.secrets import load_master_secret
from train.data import ShardDataset
from train.images import ImageError, open_image
from train.shards import Record, ShardWriter
from train.sources import Quarantine

_BATCH = 64  # records filtered at once, and held in memory
_BY_POLICY = re.compile(r"(image_)?(holds|uncertain)_.+")  # reasons that say nothing of damage


def open_tools(policy: Policy, key_file: Path) -> Tools:
    """Open all that `policy` needs; the key of pseudonyms comes from `key_file` or SFUMATO_SECRET.

    Raises MissingDetector where a detector cannot be opened, SecretError where a key is needed and there is none.
    """
    texts, images = open_detectors(policy)
    pseudonyms = Pseudonyms(load_master_secret(key_file)) if policy.pseudonymises else None
    return Tools(texts, images, decode, apply_boxes, pseudonyms)


def filter_shards(
    in_dir: Path,
    out_dir: Path,
    splits: Sequence[str],
    policy: Policy,
    tools: Tools,
    progress: Callable[[int, int | None], None],
    *,
    duplicates: DuplicatesConfig | None = None,
    max_quarantine_fraction: float = 0.05,
    shard_size: int = 512,
) -> dict[str, Any]:
    """Filter `in_dir/<split>` into `out_dir/<split>` for each split, and return the stage's metrics.

    Guarantee: the shards are a function of the input, the policy, the detectors, the key of pseudonyms and
    `duplicates`: run again, after whatever end, it writes the same bytes. No split stands before all are filtered.

    With `duplicates`, of records of one split that are near each other one is kept. Which those are hangs on several
    records at once, so a private stage's guarantee is for the split as it is after this.

    Records that are not kept are listed in `quarantine.jsonl` by key and reason, also where it ends in an error.
    Raises, before the first record, what `check_tools` raises; ValueError where a split has nothing left, and as soon
    as it is sure that more than `max_quarantine_fraction` of all records are damaged (what the policy quarantines is
    not).

    metrics, none of which holds a value: splits -> {records, bytes, shards, root, in, kept, dropped, quarantined},
    where in = kept + dropped + quarantined; reasons -> records; entities -> findings in captions; boxes -> findings in
    images; found_by -> findings by place, entity and detector; acted -> findings by place, entity and action, copies
    not yet left out; metadata -> pieces stripped; detectors -> version; policy_sha256; pseudonym_key_id; duplicates:
    split -> the report of `find_duplicates`.
    """
    check_tools(policy, tools)
    datasets = {split: ShardDataset(in_dir / split, split) for split in splits}
    walk = _Walk(policy, tools, duplicates, sum(map(len, datasets.values())), max_quarantine_fraction, progress)
    with ExitStack() as stack:
        stack.callback(walk.quarantine.write, out_dir)
        staged = out_dir / ".staged"
        stack.callback(shutil.rmtree, staged, ignore_errors=True)
        writers: dict[str, ShardWriter] = {}
        for split, dataset in datasets.items():
            writers[split] = stack.enter_context(ShardWriter(out_dir / split, split, shard_size))
            for record in walk.kept(split, dataset, staged / split):
                writers[split].add(record)
            if not writers[split].keys:
                raise ValueError(
                    f"split {split} has no records left of {len(dataset)} ({walk.told()}): let the policy drop less"
                )
        written = {split: asdict(writer.commit()) for split, writer in writers.items()}
    metrics: dict[str, Any] = {}
    for split, dataset in datasets.items():
        counts = {outcome: walk.outcomes[split][outcome] for outcome in ("kept", "dropped", "quarantined")}
        assert len(dataset) == sum(counts.values()) and counts["kept"] == written[split]["records"]
        metrics[split] = {**written[split], "in": len(dataset), **counts}
    return {"splits": metrics, **walk.metrics()}


class _Walk:
    """The records of all splits on their way through the policy, and what is counted meanwhile."""

    def __init__(
        self,
        policy: Policy,
        tools: Tools,
        duplicates: DuplicatesConfig | None,
        num_records: int,
        max_quarantine_fraction: float,
        progress: Callable[[int, int | None], None],
    ) -> None:
        self.policy, self.tools, self.duplicates = policy, tools, duplicates
        self.num_records, self.max_quarantine_fraction = num_records, max_quarantine_fraction
        self.quarantine = Quarantine()
        self.outcomes: dict[str, Counter[str]] = {}
        self._entities, self._boxes, self._metadata = Counter[str](), Counter[str](), Counter[str]()
        self._found_by, self._acted = Counter[str](), Counter[str]()
        self._reports: dict[str, Mapping[str, int]] = {}
        self._num_seen = self._num_damaged = self._step = 0
        self._progress = progress

    def kept(self, split: str, dataset: ShardDataset, staged: Path) -> Iterator[Record]:
        """The split's records that are kept, in order, as they will be stored."""
        self.outcomes[split] = Counter()
        batches = self._filtered(split, dataset)
        if self.duplicates is None:
            return itertools.chain.from_iterable(batches)
        return self._unique(split, batches, len(dataset), staged, self.duplicates)

    def told(self) -> str:
        """Why records were not kept so far, and how many."""
        return ", ".join(f"{reason} {count:,}" for reason, count in self.quarantine.reasons().items())

    def metrics(self) -> dict[str, Any]:
        """All that is counted over the splits together."""
        looking = (*self.tools.texts, *self.tools.images)
        in_captions = [entity for detector in self.tools.texts for entity in detector.entities]
        in_images = [entity for detector in self.tools.images for entity in detector.entities]
        return {
            "reasons": self.quarantine.reasons(),
            "entities": dict.fromkeys(in_captions, 0) | self._entities,
            "boxes": dict.fromkeys(in_images, 0) | self._boxes,
            "found_by": dict(sorted(self._found_by.items())),
            "acted": dict(sorted(self._acted.items())),
            "metadata": dict(sorted(self._metadata.items())),
            "detectors": {detector.name: detector.version for detector in looking},
            "policy_sha256": self.policy.digest(),
            "pseudonym_key_id": self.tools.pseudonyms.key_id if self.tools.pseudonyms else None,
            "duplicates": self._reports,
        }

    def _filtered(self, split: str, dataset: ShardDataset) -> Iterator[list[Record]]:
        """What the policy keeps, batch by batch."""
        for start in range(0, len(dataset), _BATCH):
            records = [dataset.read(index) for index in range(start, min(start + _BATCH, len(dataset)))]
            results = filter_records([(record.image, record.caption) for record in records], self.policy, self.tools)
            for record, result in zip(records, results, strict=True):
                self._count(split, record.key, result)
            self._stop_if_damaged()
            yield [
                replace(record, image=result.image, caption=result.caption)
                for record, result in zip(records, results, strict=True)
                if result.reason is None
            ]

    def _count(self, split: str, key: str, result: FilterResult) -> None:
        self.outcomes[split][result.outcome] += 1
        self._entities.update(result.findings)
        self._boxes.update(result.boxes)
        self._found_by.update(result.found_by)
        self._acted.update(result.acted)
        self._metadata.update(result.metadata)
        if result.reason is not None:
            self.quarantine.add(split, key, result.reason)
            self._num_damaged += result.outcome == "quarantined" and not _BY_POLICY.fullmatch(result.reason)
        self._num_seen += 1
        self._advance(1)

    def _stop_if_damaged(self) -> None:
        if self._num_damaged > self.max_quarantine_fraction * self.num_records:
            raise ValueError(
                f"{self._num_damaged:,} of the first {self._num_seen:,} records (of {self.num_records:,}) are damaged, "
                f"more than max_quarantine_fraction {self.max_quarantine_fraction:g} of all ({self.told()}): see "
                "quarantine.jsonl in the stage's folder, mend them or raise it"
            )

    def _unique(
        self, split: str, batches: Iterator[list[Record]], num_records: int, staged: Path, config: DuplicatesConfig
    ) -> Iterator[Record]:
        """What of the batches is left without copies: all of them lie in `staged` until it is known which are."""
        parts: list[Signatures] = []
        with ShardWriter(staged, split, shard_size=4096) as writer:
            for batch in batches:
                keys, images = [record.key for record in batch], [record.image for record in batch]
                captions = [record.caption for record in batch]
                parts.append(signatures(keys, images, captions, _decode))
                for record in batch:
                    writer.add(record)
            if not writer.keys:
                return
            writer.commit()
        found = find_duplicates(parts, config)
        self._reports[split] = found.report
        dataset = ShardDataset(staged, split)
        self._advance(num_records - len(dataset))
        for record in map(dataset.read, range(len(dataset))):
            if record.key in found.dropped:
                self.outcomes[split].update(kept=-1, dropped=1)
                self.quarantine.add(split, record.key, "duplicate")
            else:
                yield record
            self._advance(1)
        shutil.rmtree(staged)

    def _advance(self, records: int) -> None:
        """Each record counts once when it is filtered and, where copies are left out, once more after that."""
        self._step += records
        self._progress(self._step, self.num_records * (1 if self.duplicates is None else 2))


def _decode(image: bytes) -> Pixels:
    """The upright image in RGB, transparency over white."""
    picture = open_image(image)
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255: told by its bytes
        raise ImageError("undecodable")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(picture.convert("RGB"))
