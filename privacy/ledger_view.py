"""The ledger's format and its reader: what each line must be, what all of them sum to, and who signed them.

One JSON object a line, canonical (sorted keys, no spaces). Every record has `seq`, `prev` (the `hash` of the line
before), `hash` (SHA-256 of the record without `hash` and signatures) and `signature`. Five types of record:

    open    whose budget this is: ledger id, format, unit, relation, delta, data set (root and epsilon cap), public key
    plan    what a stage means to run, once a stage
    charge  one release, written and synced before its noise is drawn; it counts whether or not the step was finished
    done    the step of one charge was finished, with a keyed digest of what went in
    rotate  the public key that signs from the next record on; signed by the old key, and by the new in `new_signature`

`signature` is Ed25519 (RFC 8032) by the current key over 64 bytes: the record's hash, then a digest of all signatures
before it, S, with S = 32 zero bytes at first and SHA-256(S, signature's hex) after each record. So the last signature
answers for every byte of the file, and a reader that checks it and the chain need not check a million others.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privacy.events import canonical_json, check_event, event_key

FORMAT = 2
RELATION = "add_or_remove_one"
GENESIS = "0" * 64
MAX_MARKS = 256
UNHASHED = frozenset(("hash", "signature"))
ROTATE_UNHASHED = UNHASHED | {"new_signature"}
CHAIN_KEYS = frozenset(("seq", "prev", "hash", "signature", "type"))
FIELDS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "open": {
        "ledger_id": str,
        "format": int,
        "unit": str,
        "relation": str,
        "delta": float,
        "dataset_root": str,
        "dataset_cap": (float, int, type(None)),
        "public_key": str,
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
    "rotate": {"public_key": str, "new_signature": str},
}
KEYS = {kind: CHAIN_KEYS | fields.keys() for kind, fields in FIELDS.items()}


class LedgerError(ValueError):
    """The ledger is damaged, foreign, held by another, or cannot be written; nothing may be released on its word."""


@dataclass
class StageTally:
    """What one stage was charged: steps -> number of attempts, the steps that have a finished attempt."""

    attempts: dict[int, int] = field(default_factory=dict[int, int])
    finished: set[int] = field(default_factory=set[int])


class Mark(NamedTuple):
    """What had been charged by one point of the ledger."""

    num_charges: int
    stages: Counter[str]  # stage -> charges
    counts: Counter[str]  # event's canonical JSON -> charges


class _Stretch(NamedTuple):
    """What was charged between two marks: far less to keep than the sums, where every event is another."""

    stages: Counter[str]
    counts: Counter[str]


@dataclass
class LedgerView:
    """A ledger as read: its opening, its sums and its head. Counts, not records: a million charges fit in memory."""

    path: Path
    opening: dict[str, Any] = field(default_factory=dict[str, Any])
    public_keys: list[str] = field(default_factory=list[str])  # all that ever signed, in order
    head: str = GENESIS
    num_records: int = 0
    num_charges: int = 0  # finished or not; all of them count
    fencing_epoch: int = 0  # the highest that was charged under
    counts: Counter[str] = field(default_factory=Counter[str])  # event's canonical JSON -> charges
    plans: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    planned_under: dict[str, str] = field(default_factory=dict[str, str])  # stage -> public key when it was planned
    stages: dict[str, StageTally] = field(default_factory=dict[str, StageTally])
    unfinished: dict[int, tuple[str, int, int]] = field(default_factory=dict[int, tuple[str, int, int]])
    heads: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])  # asked for, found -> counts then
    torn_bytes: int = 0  # after the last whole line: written by a process that died, never acknowledged
    _stretches: list[_Stretch] = field(default_factory=list[_Stretch])
    _stretch_charges: int = 1  # that a full stretch has
    _last: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _signatures_before: bytes = bytes(32)  # the digest S under the last record's signature

    @property
    def public_key(self) -> str:
        """The key that signs the next record, as hex."""
        return self.public_keys[-1]

    @property
    def history(self) -> Iterator[Mark]:
        """What had been charged at up to 256 points, evenly spread, the last of them now; made while you iterate."""
        num_charges, stages, counts = 0, Counter[str](), Counter[str]()
        for stretch in self._stretches:
            num_charges += stretch.stages.total()
            stages.update(stretch.stages)
            counts.update(stretch.counts)
            yield Mark(num_charges, stages.copy(), counts.copy())

    def follow(self, line: bytes, verify: bool) -> None:
        """Check the next line in full and add it; a LedgerError names the line.

        verify: its signature too. A change of key is always verified, for what follows rests on it.
        """
        number = self.num_records + 1
        try:
            record = self._parse(line)
            self.tally(record)
            self.advance(record)
            if verify or record["type"] == "rotate":
                self.verify_head()
        except LedgerError:
            raise
        except ValueError as error:
            raise LedgerError(
                f"{self.path}, line {number}: {error}. The ledger cannot be trusted from here on: "
                "restore it whole from a copy or treat the budget as spent; never edit it"
            ) from None

    def tally(self, record: dict[str, Any]) -> None:
        """Add a record's content to the sums; ValueError, and no sum changed, where it breaks the ledger's rules."""
        kind = record.get("type")
        if not isinstance(kind, str) or kind not in FIELDS:
            raise ValueError(f"record type is {kind!r}, and this version knows {', '.join(FIELDS)}")
        if (kind == "open") != (self.num_records == 0):
            raise ValueError("a ledger begins with its one open record")
        if kind == "open" and record.get("format") != FORMAT:
            raise LedgerError(
                f"{self.path} has ledger format {record.get('format')!r}, and this version reads {FORMAT}: go on with "
                "the version that wrote it; what was spent in it stays spent"
            )
        _check_fields(record, kind)
        getattr(self, f"_tally_{kind}")(record)

    def advance(self, record: Mapping[str, Any]) -> None:
        """Move the head to a record that was tallied."""
        self._signatures_before = self._signatures()
        self._last = record
        self.head = record["hash"]
        self.num_records += 1

    def to_sign(self, record_hash: str) -> bytes:
        """What the signature of the next record, of that hash, is over."""
        return bytes.fromhex(record_hash) + self._signatures()

    def verify_head(self) -> None:
        """ValueError unless the last record is signed as it must be."""
        signed, last = bytes.fromhex(self.head) + self._signatures_before, self._last
        signers = [("signature", self.public_key)]
        if last["type"] == "rotate":
            signers = [("signature", self.public_keys[-2]), ("new_signature", self.public_key)]
        for name, key in signers:
            try:
                Ed25519PublicKey.from_public_bytes(unhex(key, 32)).verify(unhex(last[name], 64), signed)
            except (InvalidSignature, ValueError):
                raise ValueError(
                    f"its {name} is not one by key {key[:12]}.. of this record and the lines before it: "
                    "somebody without the key wrote or changed it"
                ) from None

    def _signatures(self) -> bytes:
        """The digest S of all signatures so far."""
        if self.num_records == 0:
            return self._signatures_before
        return hashlib.sha256(self._signatures_before + self._last["signature"].encode()).digest()

    def _parse(self, line: bytes) -> dict[str, Any]:
        """The line as a record: canonical, rightly hashed, and the one that follows the head."""
        try:
            text = line.decode("ascii")
            record = json.loads(text)
            claimed = record["hash"]
            canonical = canonical_json(record) + "\n" == text
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError("this is no ledger record") from None
        if not canonical:
            raise ValueError("the record is not in canonical form")
        if hash_of(record) != claimed:
            raise ValueError("the record does not match its hash")
        if record.get("prev") != self.head or record.get("seq") != self.num_records:
            raise ValueError(f"the record (seq {record.get('seq')!r}) does not follow the line before it")
        return record

    def _tally_open(self, record: dict[str, Any]) -> None:
        if record["relation"] != RELATION:
            raise ValueError(f"relation is {record['relation']!r}: this version accounts for {RELATION}")
        if not 0 < record["delta"] < 1:
            raise ValueError(f"delta is {record['delta']}")
        unhex(record["public_key"], 32)
        self.opening = _content(record)
        self.public_keys.append(record["public_key"])

    def _tally_rotate(self, record: dict[str, Any]) -> None:
        new = record["public_key"]
        unhex(new, 32)
        if new in self.public_keys:
            raise ValueError(f"key {new[:12]}.. signs or signed this ledger: it is never taken again")
        self.public_keys.append(new)

    def _tally_plan(self, record: dict[str, Any]) -> None:
        if record["stage"] in self.plans:
            raise ValueError(f"stage {record['stage']} is planned twice")
        check_event(record["event"])
        self.plans[record["stage"]] = _content(record)
        self.planned_under[record["stage"]] = self.public_key

    def _tally_charge(self, record: dict[str, Any]) -> None:
        stage, step, attempt = sys.intern(record["stage"]), record["step"], record["attempt"]
        key = canonical_json(record["event"])
        if key not in self.counts and event_key(record["event"]) != key:  # a million charges have few events
            raise ValueError(f"the event {key} is not in the form it is counted under")
        tally = self.stages.get(stage) or StageTally()
        due = tally.attempts.get(step, 0)
        if step < 0 or attempt != due:
            twice = ": twice charged would be twice the same noise" if 0 <= attempt < due else ""
            raise ValueError(f"stage {stage} step {step} is charged as attempt {attempt}, and {due} is due{twice}")
        if record["dataset_root"] != self.opening["dataset_root"]:
            raise ValueError(f"the charge is for data set {record['dataset_root']}, not the one this ledger opened for")
        if record["fencing_epoch"] < self.fencing_epoch:
            raise ValueError(f"fencing epoch {record['fencing_epoch']} charges after epoch {self.fencing_epoch}")
        self.stages[stage] = tally
        tally.attempts[step] = attempt + 1
        self.fencing_epoch = record["fencing_epoch"]
        self.unfinished[record["seq"]] = (stage, step, attempt)
        self._mark(stage, key)

    def _mark(self, stage: str, key: str) -> None:
        """Count a charge, in the sums and in the history."""
        if self.num_charges % self._stretch_charges == 0:
            if len(self._stretches) == MAX_MARKS:
                pairs = zip(self._stretches[::2], self._stretches[1::2], strict=True)
                self._stretches = [_Stretch(a.stages + b.stages, a.counts + b.counts) for a, b in pairs]
                self._stretch_charges *= 2
            self._stretches.append(_Stretch(Counter(), Counter()))
        stretch = self._stretches[-1]
        stretch.stages[stage] += 1
        stretch.counts[key] += 1
        self.counts[key] += 1
        self.num_charges += 1

    def _tally_done(self, record: dict[str, Any]) -> None:
        charge = record["charge"]
        if charge not in self.unfinished:
            raise ValueError(self._not_unfinished(charge, record["digest"]))
        stage, step, _ = self.unfinished.pop(charge)
        self.stages[stage].finished.add(step)

    def _not_unfinished(self, charge: int, digest: str) -> str:
        """Why a charge cannot be done now. Read off the file again: a million digests are not kept for this."""
        which, first = "", None
        with self.path.open("rb") as file:
            for line, _ in zip(file, range(self.num_records), strict=False):
                record = json.loads(line)
                if record["type"] == "charge" and record["seq"] == charge:
                    which = f"stage {record['stage']}, step {record['step']}, attempt {record['attempt']}"
                elif record["type"] == "done" and record["charge"] == charge:
                    first = record["digest"]
        if first is None:
            return f"done names charge {charge}, which is no charge before it"
        if first == digest:
            return f"charge {charge} ({which}) is done twice, with one digest"
        return (
            f"charge {charge} ({which}) is done twice, with digests {first} and {digest}: "
            "the same noise met two inputs, and the difference of what was released shows the data"
        )


def read_ledger(
    path: Path, heads: Collection[str] = (), public_key: str | None = None, *, every_signature: bool = False
) -> LedgerView:
    """Read and verify a whole ledger, without a lock and without changing it.

    heads: hashes kept by manifests or checkpoints; the view's `heads` holds those found, and the counts up to there.
    public_key: one that the ledger must have been signed by, at its opening or after a rotation. Give the newest you
    have kept: who holds none of the keys can make no ledger that passes, nor who holds only those before it.
    every_signature: verify each of them, not only the last and those of rotations. No other file passes thereby, as
    the last signature covers all before it; a minute a million.

    A torn last line is no error, for nobody acted on it; the view says how long it is. Anything else is a LedgerError.
    """
    try:
        with path.open("rb") as file:
            view = replay(path, file, frozenset(heads), every_signature)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}") from error
    if view.num_records == 0:
        raise LedgerError(f"{path} holds no record: it is not the ledger of any run that was charged")
    if public_key is not None and public_key not in view.public_keys:
        raise LedgerError(
            f"{path} was signed by {', '.join(key[:12] + '..' for key in view.public_keys)}, never by the expected key "
            f"{public_key[:12]}..: it is another ledger, or one written anew or cut before that key was taken"
        )
    return view


def replay(path: Path, file: BinaryIO, heads: frozenset[str], every_signature: bool = False) -> LedgerView:
    """The view of the whole lines of a file: chain, content and signatures checked (LedgerError)."""
    view = LedgerView(path)
    for line in file:
        if not line.endswith(b"\n"):
            view.torn_bytes = len(line)
            break
        view.follow(line, every_signature)
        if view.head in heads:
            view.heads[view.head] = view.counts.copy()
    if view.num_records and not every_signature:
        try:
            view.verify_head()
        except ValueError:  # here or before: let the first bad line be named
            file.seek(0)
            return replay(path, file, heads, every_signature=True)
    return view


def hash_of(record: Mapping[str, Any]) -> str:
    """The record's hash: SHA-256 of its canonical JSON without the hash itself and the signatures."""
    apart = ROTATE_UNHASHED if record.get("type") == "rotate" else UNHASHED
    hashed = {name: value for name, value in record.items() if name not in apart}
    return hashlib.sha256(canonical_json(hashed).encode()).hexdigest()


def unhex(text: str, size: int) -> bytes:
    """That many bytes from their one spelling in hex (ValueError for any other)."""
    value = bytes.fromhex(text)
    if len(value) != size or value.hex() != text:
        raise ValueError(f"{text[:12]!r}.. is not {size} bytes in lower-case hex")
    return value


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CHAIN_KEYS}


def _check_fields(record: Mapping[str, Any], kind: str) -> None:
    fields, beyond = KEYS[kind], len(record) - len(KEYS[kind])
    if not record.keys() >= fields or (kind != "plan" and beyond):
        raise ValueError(f"a {kind} record has {', '.join(sorted(record))}: it takes {', '.join(sorted(fields))}")
    if not isinstance(record["signature"], str):
        raise ValueError(f"signature of a {kind} record is {record['signature']!r}")
    for name, of_type in FIELDS[kind].items():
        value = record[name]
        if not isinstance(value, of_type) or isinstance(value, bool):
            raise ValueError(f"{name} of a {kind} record is {value!r}")
