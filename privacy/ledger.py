"""The write-ahead ledger: what was spent on a data set, durable before anything is released, and never taken back.

One JSON object a line, canonical (sorted keys, no spaces), chained: `hash` is the SHA-256 of the record without it and
`prev` the hash of the line before. Four types of record:

    open    whose budget this is: ledger id, format, unit, relation, delta, data set (root and epsilon cap)
    plan    what a stage means to run, once a stage
    charge  one release, written and synced before its noise is drawn; it counts whether or not the step was finished
    done    the step of one charge was finished, with a keyed digest of what went in

The chain shows damage and any edit that leaves the rest in place. Somebody who writes the whole file anew is shown only
by the heads that manifests and checkpoints have kept: `read_ledger` says which of these lie in the chain.
"""

# One file, somewhat long: the writer checks each record by the reader's own rules before it writes it.

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from privacy.events import Event, canonical_json, check_event

FORMAT = 1
RELATION = "add_or_remove_one"
GENESIS = "0" * 64
CHAIN_KEYS = frozenset(("seq", "prev", "hash", "type"))
FIELDS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "open": {
        "ledger_id": str,
        "format": int,
        "unit": str,
        "relation": str,
        "delta": float,
        "dataset_root": str,
        "dataset_cap": (float, int, type(None)),
    },
    "plan": {"stage": str, "steps": int, "event": dict, "config_sha256": str},  # and whatever else the stage says
    "charge": {
        "stage": str,
        "step": int,
        "attempt": int,
        "event": dict,
        "dataset_root": str,
        "code_version": str,
        "fencing_epoch": int,
    },
    "done": {"charge": int, "digest": str},
}


class LedgerError(ValueError):
    """The ledger is damaged, foreign, held by another, or cannot be written; nothing may be released on its word."""


class LedgerWarning(UserWarning):
    """Something happened to the ledger that costs no privacy and that a person should know."""


@dataclass(frozen=True)
class Charge:
    """A durable permission to release once: (stage, step, attempt) never come twice in one ledger."""

    seq: int
    stage: str
    step: int
    attempt: int
    event: Mapping[str, Any]
    hash: str


@dataclass
class StageTally:
    """What one stage was charged: steps -> number of attempts, the steps that have a finished attempt."""

    attempts: dict[int, int] = field(default_factory=dict[int, int])
    finished: set[int] = field(default_factory=set[int])


@dataclass
class LedgerView:
    """A ledger as read: its opening, its sums and its head. Counts, not records: a million charges fit in memory."""

    path: Path
    opening: dict[str, Any] = field(default_factory=dict[str, Any])
    head: str = GENESIS
    num_records: int = 0
    fencing_epoch: int = 0  # the highest that was charged under
    counts: Counter[str] = field(default_factory=Counter[str])  # event's canonical JSON -> charges
    plans: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    stages: dict[str, StageTally] = field(default_factory=dict[str, StageTally])
    unfinished: dict[int, tuple[str, int, int]] = field(default_factory=dict[int, tuple[str, int, int]])
    heads: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])  # asked for, found -> counts then
    torn_bytes: int = 0  # after the last whole line: written by a process that died, never acknowledged

    @property
    def num_charges(self) -> int:
        """How many charges there are, finished or not; all of them count."""
        return self.counts.total()

    def follow(self, line: bytes) -> None:
        """Check the next line in full and add it; a LedgerError names the line."""
        try:
            record = self._parse(line)
            self.tally(record)
        except ValueError as error:
            raise LedgerError(
                f"{self.path}, line {self.num_records + 1}: {error}. The ledger cannot be trusted from here on: "
                "restore it whole from a copy or treat the budget as spent; never edit it"
            ) from None
        self.advance(record)

    def tally(self, record: dict[str, Any]) -> None:
        """Add a record's content to the sums; ValueError where it breaks the ledger's rules."""
        kind = record.get("type")
        if not isinstance(kind, str) or kind not in FIELDS:
            raise ValueError(f"record type is {kind!r}, and this version knows {', '.join(FIELDS)}")
        if (kind == "open") != (self.num_records == 0):
            raise ValueError("a ledger begins with its one open record")
        _check_fields(record, kind)
        getattr(self, f"_tally_{kind}")(record)

    def advance(self, record: Mapping[str, Any]) -> None:
        """Move the head to a record that was tallied."""
        self.head = record["hash"]
        self.num_records += 1

    def _parse(self, line: bytes) -> dict[str, Any]:
        """The line as a record: canonical, rightly hashed, and the one that follows the head."""
        try:
            record = json.loads(line)
            claimed = record["hash"]
            canonical = canonical_json(record).encode() + b"\n" == line
        except (ValueError, KeyError, TypeError):
            raise ValueError("this is no ledger record") from None
        if not canonical:
            raise ValueError("the record is not in canonical form")
        if _hash(record) != claimed:
            raise ValueError("the record does not match its hash")
        if record.get("prev") != self.head or record.get("seq") != self.num_records:
            raise ValueError(f"the record (seq {record.get('seq')!r}) does not follow the line before it")
        return record

    def _tally_open(self, record: dict[str, Any]) -> None:
        if record["format"] != FORMAT:
            raise ValueError(f"ledger format is {record['format']}: this version reads {FORMAT}")
        if record["relation"] != RELATION:
            raise ValueError(f"relation is {record['relation']!r}: this version accounts for {RELATION}")
        if not 0 < record["delta"] < 1:
            raise ValueError(f"delta is {record['delta']}")
        self.opening = _content(record)

    def _tally_plan(self, record: dict[str, Any]) -> None:
        if record["stage"] in self.plans:
            raise ValueError(f"stage {record['stage']} is planned twice")
        check_event(record["event"])
        self.plans[record["stage"]] = _content(record)

    def _tally_charge(self, record: dict[str, Any]) -> None:
        stage, step, attempt = record["stage"], record["step"], record["attempt"]
        key = canonical_json(check_event(record["event"]))
        tally = self.stages.setdefault(stage, StageTally())
        if step < 0 or attempt != tally.attempts.get(step, 0):
            raise ValueError(f"stage {stage} step {step} is charged as attempt {attempt}")
        if record["dataset_root"] != self.opening["dataset_root"]:
            raise ValueError(f"the charge is for data set {record['dataset_root']}, not the one this ledger opened for")
        if record["fencing_epoch"] < self.fencing_epoch:
            raise ValueError(f"fencing epoch {record['fencing_epoch']} charges after epoch {self.fencing_epoch}")
        tally.attempts[step] = attempt + 1
        self.fencing_epoch = record["fencing_epoch"]
        self.unfinished[record["seq"]] = (stage, step, attempt)
        self.counts[key] += 1

    def _tally_done(self, record: dict[str, Any]) -> None:
        if record["charge"] not in self.unfinished:
            raise ValueError(f"done names charge {record['charge']}, which is no charge or was done before")
        stage, step, _ = self.unfinished.pop(record["charge"])
        self.stages[stage].finished.add(step)


def _hash(record: Mapping[str, Any]) -> str:
    unhashed = {name: value for name, value in record.items() if name != "hash"}
    return hashlib.sha256(canonical_json(unhashed).encode()).hexdigest()


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CHAIN_KEYS}


def _check_fields(record: Mapping[str, Any], kind: str) -> None:
    fields, given = FIELDS[kind], set(record) - CHAIN_KEYS
    if not given.issuperset(fields) or (kind != "plan" and len(given) > len(fields)):
        raise ValueError(f"a {kind} record has {', '.join(sorted(given))}: it takes {', '.join(fields)}")
    for name, of_type in fields.items():
        if not isinstance(record[name], of_type) or isinstance(record[name], bool):
            raise ValueError(f"{name} of a {kind} record is {record[name]!r}")


def read_ledger(path: Path, heads: Collection[str] = ()) -> LedgerView:
    """Read and verify a whole ledger, without a lock and without changing it.

    heads: hashes kept by manifests or checkpoints; the view's `heads` holds those found, and the counts up to there.
    A torn last line is no error, for nobody acted on it; the view says how long it is. Anything else is a LedgerError.
    """
    try:
        with path.open("rb") as file:
            view = _replay(path, file, frozenset(heads))
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}") from error
    if view.num_records == 0:
        raise LedgerError(f"{path} holds no record: it is not the ledger of any run that was charged")
    return view


class Ledger:
    """The one writer of a ledger file, holding its lock from `open` to `close`.

    Guarantee: when `charge` returns, the charge is on the disk and will be counted by every later reader. When anything
    about the file is in doubt (a failed write or sync, a file changed by another), this object refuses every further
    charge.
    """

    def __init__(self, descriptor: int, view: LedgerView, fencing_epoch: int, recovered: int) -> None:
        self._descriptor = descriptor
        self._view = view
        self._fencing_epoch = fencing_epoch
        self._size = os.fstat(descriptor).st_size
        self._failure: str | None = None
        self.recovered = recovered  # bytes of a torn last line that were dropped on opening; 0 for none

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        delta: float,
        unit: str,
        dataset_root: str,
        dataset_cap: float | None = None,
        fencing_epoch: int,
    ) -> Self:
        """Open for charging, creating the ledger where there is none.

        A torn last line is dropped, with a LedgerWarning and in `recovered`: no charge in it was ever acknowledged.
        Refused (LedgerError): a second writer, a file that cannot be written, a broken chain, a ledger of another data
        set, unit, delta or cap, a fencing epoch below the highest charged under. A `dataset_cap` of None takes the
        ledger's.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta is {delta}: give a probability between 0 and 1")
        descriptor = _open_locked(path)
        try:
            view, torn = _recover(path, descriptor)
            ledger = cls(descriptor, view, fencing_epoch, torn)
            if view.num_records == 0:
                ledger._append(
                    "open",
                    {
                        "ledger_id": uuid.uuid4().hex,
                        "format": FORMAT,
                        "unit": unit,
                        "relation": RELATION,
                        "delta": float(delta),
                        "dataset_root": dataset_root,
                        "dataset_cap": dataset_cap,
                    },
                )
            _sync_folder(path.parent)
            asked = {"delta": delta, "unit": unit, "dataset_root": dataset_root}
            if dataset_cap is not None:
                asked["dataset_cap"] = dataset_cap
            ledger._check_opening(asked)
        except BaseException:
            os.close(descriptor)
            raise
        return ledger

    @property
    def ledger_id(self) -> str:
        """This ledger's own id; keys are derived under it, for it is what makes (stage, step, attempt) unique."""
        return self._view.opening["ledger_id"]

    @property
    def path(self) -> Path:
        """Where the ledger is."""
        return self._view.path

    @property
    def dataset_cap(self) -> float | None:
        """The epsilon that all stages and runs on this data set together may spend; None for no cap."""
        return self._view.opening["dataset_cap"]

    @property
    def head(self) -> str:
        """The hash of the last record, already durable."""
        return self._view.head

    @property
    def num_charges(self) -> int:
        """How many charges the ledger holds."""
        return self._view.num_charges

    def num_charges_of(self, stage: str) -> int:
        """How many charges one stage holds, replays among them."""
        return sum(self._view.stages.get(stage, StageTally()).attempts.values())

    def counts(self) -> dict[str, int]:
        """Every charge ever made, as event's canonical JSON -> number."""
        return dict(self._view.counts)

    def planned(self, stage: str) -> dict[str, Any] | None:
        """What the stage recorded when it began; None where it never did."""
        return self._view.plans.get(stage)

    def plan(self, stage: str, *, steps: int, event: Event, config_sha256: str, **fields: Any) -> dict[str, Any]:
        """Record what the stage means to run, or return what it recorded when it began: then the ledger's word holds.

        fields: whatever else is part of the plan, all JSON. Another config_sha256 is refused: a stage that changes
        half-way is another stage.
        """
        if self.planned(stage) is None:
            content = {**fields, "stage": stage, "steps": steps, "config_sha256": config_sha256}
            self._append("plan", {**content, "event": check_event(event)})
        plan = self._view.plans[stage]
        if plan["config_sha256"] != config_sha256:
            raise LedgerError(
                f"stage {stage} was planned in {self._view.path} with config {plan['config_sha256'][:12]}, and is now "
                f"{config_sha256[:12]}: put the configuration back, or give the stage another name"
            )
        return plan

    def charge(self, stage: str, step: int, event: Event, code_version: str) -> Charge:
        """Charge one release, durably; only then may its noise be drawn.

        The attempt is the number of earlier charges for (stage, step), in this process or any before it.
        """
        tally = self._view.stages.get(stage, StageTally())
        seq, attempt = self._view.num_records, tally.attempts.get(step, 0)
        checked = check_event(event)
        self._append(
            "charge",
            {
                "stage": stage,
                "step": step,
                "attempt": attempt,
                "event": checked,
                "dataset_root": self._view.opening["dataset_root"],
                "code_version": code_version,
                "fencing_epoch": self._fencing_epoch,
            },
        )
        return Charge(seq, stage, step, attempt, checked, self._view.head)

    def done(self, charge: Charge, digest: str) -> None:
        """Record that the charge's step was finished. digest: keyed, never a plain hash of private data."""
        self._append("done", {"charge": charge.seq, "digest": digest})

    def close(self) -> None:
        """Give up the lock. Charging afterwards is refused."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._failure = "it is closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write one record and sync it, or leave this object refusing all further ones."""
        path = self._view.path
        if self._failure is not None:
            raise LedgerError(f"{path} takes no more records from this process: {self._failure}")
        record = {**content, "type": kind, "seq": self._view.num_records, "prev": self._view.head}
        record["hash"] = _hash(record)
        try:
            self._view.tally(record)  # by the reader's own rules: what no reader would accept is never written
        except ValueError as error:
            raise LedgerError(f"{path} refuses the record: {error}") from None
        self._write(canonical_json(record).encode() + b"\n")
        self._view.advance(record)

    def _write(self, line: bytes) -> None:
        path = self._view.path
        try:
            self._failure = self._foreign_hand()
            if self._failure is not None:
                raise LedgerError(f"{path} {self._failure}: the step must not run; find who else uses the file")
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            # Part of the line may stay: it has no end, so the next opening drops it. A whole line that was not synced
            # may stay too: nobody acted on it, and it counts. Either way nothing is under-counted.
            self._failure = f"a write failed ({error.strerror})"
            raise LedgerError(
                f"{path}: the record could not be made durable ({error.strerror}), so the step must not run: "
                "make room or mend the disk, then start again"
            ) from error
        self._size += len(line)

    def _foreign_hand(self) -> str | None:
        """What somebody else did to the file since the last record, where the lock did not keep them off."""
        ours = os.fstat(self._descriptor)
        try:
            there = self._view.path.stat()
        except FileNotFoundError:
            return "was removed while it was in use"
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            return "was replaced while it was in use"
        if there.st_size != self._size:
            return f"has {there.st_size} bytes where this process left {self._size}"
        return None

    def _check_opening(self, asked: Mapping[str, Any]) -> None:
        path, opening = self._view.path, self._view.opening
        for name, value in asked.items():
            if opening[name] != value:
                raise LedgerError(
                    f"{path} is the ledger of {name} {opening[name]!r}, and this run has {value!r}: "
                    "a budget belongs to one data set and one promise, so put the value back or use another ledger"
                )
        if self._fencing_epoch < self._view.fencing_epoch:
            raise LedgerError(
                f"{path} was charged under fencing epoch {self._view.fencing_epoch}, and this process has "
                f"{self._fencing_epoch}: it has been replaced by a later one and must end"
            )


def _replay(path: Path, file: BinaryIO, heads: frozenset[str]) -> LedgerView:
    view = LedgerView(path)
    for line in file:
        if not line.endswith(b"\n"):
            view.torn_bytes = len(line)
            break
        view.follow(line)
        if view.head in heads:
            view.heads[view.head] = view.counts.copy()
    return view


def _open_locked(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be written ({error.strerror}): a private stage must charge it, so mend the path or its mode"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EWOULDBLOCK:
            raise LedgerError(f"{path} is in use by another process: a ledger has one writer, so wait for it") from None
        raise LedgerError(f"{path} cannot be locked ({error.strerror}): keep it on a file system with flock") from error
    return descriptor


def _recover(path: Path, descriptor: int) -> tuple[LedgerView, int]:
    """The ledger behind the descriptor, and how many bytes of a torn last line were dropped from it."""
    with open(descriptor, "rb", closefd=False) as file:
        view = _replay(path, file, frozenset())
    torn, view.torn_bytes = view.torn_bytes, 0
    if torn:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - torn)
    os.fsync(descriptor)  # what was just read may be in memory only, if its writer died before its own sync
    if torn:
        message = (
            f"{path}: dropped a torn last line of {torn} bytes, written by a process that died; nobody acted on it"
        )
        warnings.warn(message, LedgerWarning, stacklevel=3)
    return view, torn


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
