"""What the filter stage does, as tasks: a shard in, a shard out, by any number of workers, each shard exactly once.

    <split>/<split>-00003.tar, .index.jsonl, .manifest.json     what was kept of shard 3: see privacy.pii.manifests
    quarantine.jsonl                                            what was not, by key and reason
    <split>.duplicates.json                                     of copies: dropped key -> the key that is kept

Without `duplicates` a shard is filtered in one pass. With them there are three rounds: map (each shard filtered into
`.staged`, the signatures of its records beside it), reduce (which records of a split are copies), and a second pass
over the staged shards, which leaves the copies out. Nothing here imports torch: a worker is up within a second.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, PrivateAttr

from privacy.pii.duplicates import DuplicatesConfig, Signatures, find_duplicates, from_bytes, signatures, to_bytes
from privacy.pii.filter import FilterResult
from privacy.pii.manifests import OUTCOMES, SUFFIX, ManifestError, ShardManifest, read_manifest
from privacy.pii.policy import Policy
from train.filter_tools import Filter, Filtered
from train.sandbox import Died, Sandbox
from train.shards import Record, ShardError, index_name, read_shard, root_of, write_shard
from train.sources import Quarantine
from train.tasks import LEASE, WORK, Task, aside, commit, digest_of, file_digest, leases, open_job, require_open

# Part of every task's id. Raise it where this code, or that of the filter, makes other shards of the same input, policy
# and detectors: what a run that is not finished has made is then made anew.
FORMAT = 1

# That a batch, and then a record by itself, may take. Long: what runs into it hangs on the machine's speed, too.
_TIMEOUT_S = 300.0
_STAGED = ".staged"
_REPORT = ".duplicates"
_NO_DAMAGE = re.compile(r"(image_)?(holds|uncertain)_.+")  # reasons of quarantine that are the policy's word
_TALLIES = {"entities": "findings", "boxes": "boxes", "found_by": "found_by", "acted": "acted", "metadata": "metadata"}


class InputShard(BaseModel):
    """A shard to be filtered. name: of the output, without .tar; digest: of its index, which holds each record's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    name: str
    tar: Path
    digest: str
    records: int


@dataclass(frozen=True)
class _ShardTask(Task):
    shard: InputShard


@dataclass(frozen=True)
class _SplitTask(Task):
    split: str


@dataclass(frozen=True)
class _Report:
    """The copies of a split, `dropped` -> kept; `digest` is of the file that says so."""

    dropped: Mapping[str, str]
    counts: Mapping[str, int]
    digest: str


class FilterJob(BaseModel):
    """All that a worker needs, in any process, as JSON; it holds no secret. `plan_filter` makes it.

    Guarantee: the shards are a function of the input, the policy, the detectors' versions, the key of pseudonyms and
    `duplicates`, whoever makes them and however often they were begun.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    kind: Literal["filter"] = "filter"
    folder: Path
    shards: tuple[InputShard, ...]
    policy: Policy
    detectors: dict[str, str]  # name -> version
    text_entities: tuple[str, ...]
    image_entities: tuple[str, ...]
    duplicates: DuplicatesConfig | None
    key_file: Path
    pseudonym_key_id: str | None
    max_quarantine_fraction: float

    _sandbox: Sandbox[Record, Filtered] | None = PrivateAttr(None)
    _reports: dict[str, _Report] = PrivateAttr(default_factory=lambda: {})
    _damaged: dict[str, int] = PrivateAttr(default_factory=lambda: {})  # of the shard tasks that are done, by name
    _outcomes: dict[InputShard, Mapping[str, int]] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the job's file lies while it may be worked on; its name binds all that decides the shards."""
        return self.folder / WORK / f"job-{self._decides.removeprefix('blake3:')[:16]}.json"

    @functools.cached_property
    def _decides(self) -> str:
        duplicates = None if self.duplicates is None else self.duplicates.model_dump()
        return digest_of([self._shard_id("job", shard) for shard in self.shards], duplicates)

    @property
    def splits(self) -> list[str]:
        """In the order in which they were named."""
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def begin(self) -> None:
        """Open the folder to workers of this job and of no other; a shard of which a byte has changed is undone."""
        open_job(self.path, self.model_dump_json().encode())
        for task in {*self._first_round(), *self._last_round()}:
            manifest = self._standing(task)
            if manifest is not None and not _whole(manifest, self._output(task)):
                self._output(task, SUFFIX).unlink()

    def finish(self) -> list[ShardManifest]:
        """The manifests of all shards, once every task is done, in the order of the splits; tidies the folder up."""
        self.look()
        manifests = [self._standing(task) for task in self._last_round()]
        for task, manifest in zip(self._last_round(), manifests, strict=True):
            if manifest is None:
                raise ValueError(f"{self._output(task)}: the shard was changed while the stage ran: run it again")
        files = (".tar", ".index.jsonl", SUFFIX)
        ours = {self._output(task, suffix) for task in self._last_round() for suffix in files}
        ours |= {self._report_path(split) for split in self.splits if self.duplicates is not None}
        for pattern in (*(f"[!.]*/*{suffix}" for suffix in (*files, LEASE)), f"*{_REPORT}.*"):  # of earlier jobs, too
            for path in set(self.folder.glob(pattern)) - ours:
                path.unlink(missing_ok=True)
        for folder in (_STAGED, WORK):
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        return [manifest for manifest in manifests if manifest is not None]

    def set_aside(self) -> Quarantine:
        """What was not kept in the shards that are done, by key and reason."""
        quarantine = Quarantine()
        for task, first in zip(self._last_round(), self._first_round(), strict=True):
            manifest = self._standing(task) or self._standing(first)
            for key, reason in manifest.set_aside if manifest is not None else ():
                quarantine.add(task.shard.split, key, reason)
        return quarantine

    def report(self, split: str) -> Mapping[str, int]:
        """What `find_duplicates` says of a split, once its task is done."""
        found = self._report(split)
        assert found is not None
        return found.counts

    # --- the tasks: train.tasks.Job ---

    def tasks(self) -> list[Task]:
        """By round; where all shards stand already, they alone: what they were made from may be gone."""
        return self._tasks

    @functools.cached_property
    def _tasks(self) -> list[Task]:
        last = self._last_round()
        if self.duplicates is None or all(map(self.done, last)):
            return list(last)
        return [*self._first_round(), *(_SplitTask(1, split + _REPORT, 0, split) for split in self.splits), *last]

    def _first_round(self) -> list[_ShardTask]:
        return self._last_round() if self.duplicates is None else [self._staged(task) for task in self._last_round()]

    def _last_round(self) -> list[_ShardTask]:
        last = 0 if self.duplicates is None else 2
        return [_ShardTask(last, f"{shard.split}/{shard.name}", shard.records, shard) for shard in self.shards]

    def _staged(self, task: _ShardTask) -> _ShardTask:
        return replace(task, round=0, name=f"{_STAGED}/{task.name}")

    def done(self, task: Task) -> bool:
        """Whether the task's output stands, by its manifest and its size: `begin` looks at every byte."""
        if isinstance(task, _SplitTask):
            return self._report(task.split) is not None
        assert isinstance(task, _ShardTask)
        return self._standing(task) is not None

    def run(self, task: Task, beat: Callable[[int], None]) -> None:
        """Do a task to its commit. ValueError where the folder was given to another job meanwhile."""
        require_open(self.path)
        with aside(self.folder) as files:
            if isinstance(task, _SplitTask):
                self._find_duplicates(task, files, beat)
            else:
                assert isinstance(task, _ShardTask)
                (self._leave_out if task.round else self._filter)(task, files, beat)
            beat(task.records)
            require_open(self.path)
            commit(files, self._output(task), ".json" if isinstance(task, _SplitTask) else SUFFIX)

    def look(self) -> tuple[int, int]:
        """Records that are through the policy, of how many: to leave copies out then takes seconds.

        ValueError once it is sure that too many are damaged.
        """
        first = [task for task in self._tasks if task.round == self._tasks[0].round]
        held: list[str] = []
        there = {folder: set(folder.glob("*")) for folder in {self._output(task).parent for task in self._tasks}}
        for task in self._tasks:
            if task.name in self._damaged or not isinstance(task, _ShardTask):
                continue
            if self._output(task, SUFFIX) in there[self._output(task).parent] and (made := self._standing(task)):
                self._damaged[task.name] = made.damaged
                self._outcomes[task.shard] = {name: made.counts[name] for name in OUTCOMES}  # of its last pass
            elif task.round == first[0].round and self._output(task, LEASE) in there[self._output(task).parent]:
                held.append(task.name)
        self._stop_if_damaged(first)
        done = sum(task.records for task in first if task.name in self._damaged)
        return done + leases(self.folder, held), sum(task.records for task in first)

    def counts(self) -> dict[str, int]:
        """Records by outcome in the shards that are done, as of the last `look`."""
        return {name: sum(shard[name] for shard in self._outcomes.values()) for name in OUTCOMES}

    def close(self) -> None:
        """End the child process that detectors run in."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def _stop_if_damaged(self, first: Sequence[Task]) -> None:
        """Each worker asks this of what all have committed, so whose shard it was that passed the limit hears of it."""
        seen = [task for task in first if task.name in self._damaged]
        damaged, total = sum(self._damaged[task.name] for task in seen), sum(shard.records for shard in self.shards)
        if damaged > self.max_quarantine_fraction * total:
            raise ValueError(
                f"{damaged:,} of the first {sum(task.records for task in seen):,} records (of {total:,}) are damaged, "
                f"more than max_quarantine_fraction {self.max_quarantine_fraction:g} of all "
                f"({told(self.set_aside())}): see quarantine.jsonl in the stage's folder, mend them or raise it"
            )

    # --- a shard through the policy, and without its copies ---

    def _filter(self, task: _ShardTask, files: Path, beat: Callable[[int], None]) -> None:
        tally, prints = _Tally(), list[Signatures]()

        def kept() -> Iterator[Record]:
            for batch in batches(task.shard.tar, 8 if self.policy.image_detectors else 64):
                for key, record, (result, print_) in self._results(batch):
                    tally.add(key, result)
                    if result.reason is None and record is not None:
                        prints.extend([] if print_ is None else [print_])
                        yield replace(record, image=result.image, caption=result.caption, svg=result.svg)
                beat(tally.counts["in"])

        tar = files / f"{task.shard.name}.tar"
        digests = write_shard(tar, kept())
        if self.duplicates is not None:
            content = to_bytes(_joined(prints))
            tar.with_suffix(".signatures").write_bytes(blake3(content).digest() + content)
        self._write_manifest(task, tar, digests, tally.fields())

    def _results(self, batch: Sequence[tuple[str, Record | None]]) -> Iterator[tuple[str, Record | None, Filtered]]:
        if self._sandbox is None:
            make = functools.partial(
                Filter, self.policy, self.key_file, self.pseudonym_key_id, self.detectors, self.duplicates is not None
            )
            self._sandbox = Sandbox(make, _TIMEOUT_S)
        answers = iter(self._sandbox.run([record for _, record in batch if record is not None]))
        for key, record in batch:
            answer = Died("digest_mismatch") if record is None else next(answers)
            died = isinstance(answer, Died)
            yield key, record, (FilterResult("quarantined", answer.reason), None) if died else answer

    def _find_duplicates(self, task: _SplitTask, files: Path, beat: Callable[[int], None]) -> None:
        assert self.duplicates is not None
        staged = [first for first in self._first_round() if first.shard.split == task.split]
        prints = [_read_signatures(self._output(first, ".signatures")) for first in staged]
        found = find_duplicates(prints, self.duplicates, lambda done, of: beat(0))
        body = {"task": self._report_id(task.split), "dropped": dict(found.dropped), "report": dict(found.report)}
        report = files / self._report_path(task.split).name
        report.write_text(json.dumps({**body, "digest": digest_of(body)}) + "\n", encoding="ascii")

    def _leave_out(self, task: _ShardTask, files: Path, beat: Callable[[int], None]) -> None:
        found = self._report(task.shard.split)
        first = self._staged(task)
        staged = self._standing(first)
        assert found is not None
        assert staged is not None  # the rounds before are done
        dropped: list[tuple[str, str]] = []

        def kept() -> Iterator[Record]:
            records = read_shard(self._output(first, ".tar")) if staged.tar is not None else iter(())
            for number, (key, record) in enumerate(records, 1):
                if record is None:
                    raise ShardError(f"{self._output(first, '.tar')}: record {key} was changed: run the stage again")
                if key in found.dropped:
                    dropped.append((key, "duplicate"))
                else:
                    yield record
                if number % 64 == 0:
                    beat(number)

        tar = files / f"{task.shard.name}.tar"
        digests = write_shard(tar, kept())
        counts = {**staged.counts, "kept": len(digests), "dropped": staged.counts["dropped"] + len(dropped)}
        fields = {name: getattr(staged, name) for name in ("damaged", *_TALLIES)}
        fields |= {"counts": counts, "set_aside": (*staged.set_aside, *dropped)}
        self._write_manifest(task, tar, digests, fields)

    def _write_manifest(self, task: _ShardTask, tar: Path, digests: list[str], fields: Mapping[str, Any]) -> None:
        index = Path(index_name(str(tar)))
        manifest = ShardManifest(
            task=self._task_id(task) or "",
            split=task.shard.split,
            shard=task.shard.name,
            input=task.shard.digest,
            bytes=tar.stat().st_size if digests else 0,
            root=root_of(digests),
            tar=file_digest(tar) if digests else None,
            index=file_digest(index) if digests else None,
            detectors=self.detectors,
            policy_sha256=self.policy.digest(),
            pseudonym_key_id=self.pseudonym_key_id,
            **fields,
        )
        tar.with_name(task.shard.name + SUFFIX).write_bytes(manifest.leaf())

    # --- what stands ---

    def _standing(self, task: _ShardTask) -> ShardManifest | None:
        """The manifest of the task's output, where it is of this very task and its files are there."""
        try:
            manifest = read_manifest(self._output(task, SUFFIX))
        except ManifestError:
            return None
        tar, index = (self._output(task, suffix) for suffix in (".tar", ".index.jsonl"))
        size = tar.stat().st_size if tar.exists() else 0
        there = size == manifest.bytes and index.exists() == (manifest.index is not None)
        return manifest if there and manifest.task == self._task_id(task) else None

    def _report(self, split: str) -> _Report | None:
        """The copies of a split, where they are what its task found."""
        if split not in self._reports:
            try:
                content = json.loads(self._report_path(split).read_bytes())
                digest = content.pop("digest")
                if digest != digest_of(content) or content["task"] != self._report_id(split):
                    return None
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return None
            self._reports[split] = _Report(content["dropped"], content["report"], digest)
        return self._reports[split]

    def _task_id(self, task: _ShardTask) -> str | None:
        """BLAKE3 of all that decides the task's output; None as long as it is not known which records are copies."""
        if task.round == 0:
            return self._shard_id("filter" if self.duplicates is None else "map", task.shard)
        found = self._report(task.shard.split)
        return None if found is None else digest_of(self._shard_id("unique", task.shard), found.digest)

    def _shard_id(self, step: str, shard: InputShard) -> str:
        return digest_of(step, shard.split, shard.name, shard.digest, self._settings)

    def _report_id(self, split: str) -> str:
        assert self.duplicates is not None
        ids = [self._shard_id("map", shard) for shard in self.shards if shard.split == split]
        return digest_of("duplicates", ids, self.duplicates.model_dump())

    @functools.cached_property
    def _settings(self) -> tuple[Any, ...]:
        return FORMAT, self.policy.digest(), sorted(self.detectors.items()), self.pseudonym_key_id

    def _output(self, task: Task, suffix: str = "") -> Path:
        return self.folder / f"{task.name}{suffix}"

    def _report_path(self, split: str) -> Path:
        return self.folder / f"{split}{_REPORT}.json"


class _Tally:
    """What became of a shard's records."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("in", "kept", "dropped", "quarantined"), 0)
        self.damaged, self.set_aside = 0, list[tuple[str, str]]()
        self.tallies = {name: Counter[str]() for name in _TALLIES}

    def add(self, key: str, result: FilterResult) -> None:
        self.counts["in"] += 1
        self.counts[result.outcome] += 1
        for name, field in _TALLIES.items():
            self.tallies[name].update(getattr(result, field))
        if result.reason is not None:
            self.set_aside.append((key, result.reason))
            self.damaged += result.outcome == "quarantined" and not _NO_DAMAGE.fullmatch(result.reason)

    def fields(self) -> dict[str, Any]:
        """Those of the shard's manifest."""
        return {"counts": self.counts, "damaged": self.damaged, "set_aside": tuple(self.set_aside), **self.tallies}


def told(quarantine: Quarantine) -> str:
    """Why records were not kept, and how many."""
    return ", ".join(f"{reason} {count:,}" for reason, count in quarantine.reasons().items())


def batches(tar: Path, size: int) -> Iterator[list[tuple[str, Record | None]]]:
    """What `read_shard` gives, `size` at a time."""
    records = read_shard(tar)
    while batch := list(itertools.islice(records, size)):
        yield batch


def _joined(prints: Sequence[Signatures]) -> Signatures:
    return np.concatenate(prints) if prints else signatures([], [], [], decode=lambda image: np.empty(0, np.uint8))


def _read_signatures(path: Path) -> Signatures:
    content = path.read_bytes()
    if blake3(content[32:]).digest() != content[:32]:
        raise ShardError(f"{path} was changed: remove it, and run the stage again")
    return from_bytes(content[32:], str(path))


def _whole(manifest: ShardManifest, place: Path) -> bool:
    """Whether the files beside a manifest are, to the byte, those that it names."""
    files = {".tar": manifest.tar, ".index.jsonl": manifest.index}
    try:
        named = all(file_digest(Path(f"{place}{suffix}")) == digest for suffix, digest in files.items() if digest)
        if (prints := Path(f"{place}.signatures")).exists():
            _read_signatures(prints)
    except (OSError, ValueError):
        return False
    return named
