"""The write-ahead ledger: what was spent on a data set, durable before anything is released, and never taken back.

Here is its one writer; its format and its rules are in `ledger_view`, whose reader every record passes before it is
written. Nothing is ever removed or rewritten. The chain and the signatures show any edit by somebody without the key;
a ledger cut at its end, or written anew by somebody with it, is shown only by the heads that manifests and checkpoints
have kept: `read_ledger` says which of these lie in the chain.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.events import Event, canonical_json, check_event
from privacy.ledger_view import (
    FORMAT,
    RELATION,
    LedgerError,
    LedgerView,
    Mark,
    StageTally,
    hash_of,
    read_ledger,
    replay,
)

__all__ = [
    "Charge",
    "Ledger",
    "LedgerError",
    "LedgerView",
    "LedgerWarning",
    "Mark",
    "StageTally",
    "public_key_of",
    "read_ledger",
]


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


class Ledger:
    """The one writer of a ledger file, holding its lock from `open` to `close`.

    Guarantee: when `charge` returns, the charge is on the disk and will be counted by every later reader. When anything
    about the file is in doubt (a failed write or sync, a file changed by another), this object refuses every further
    charge.
    """

    def __init__(
        self, descriptor: int, view: LedgerView, key: Ed25519PrivateKey, fencing_epoch: int, recovered: int
    ) -> None:
        self._descriptor = descriptor
        self._view = view
        self._key = key
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
        signing_seed: bytes,
        dataset_cap: float | None = None,
        fencing_epoch: int,
    ) -> Self:
        """Open for charging, creating the ledger where there is none.

        signing_seed: 32 secret bytes, the Ed25519 private key (`privacy.secrets.signing_seed`).
        A torn last line is dropped, with a LedgerWarning and in `recovered`: no charge in it was ever acknowledged.
        Refused (LedgerError): a second writer, a file that cannot be written, a broken chain, a ledger of another key,
        data set, unit, delta or cap, a fencing epoch below the highest charged under. A `dataset_cap` of None takes
        the ledger's.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta is {delta}: give a probability between 0 and 1")
        key = Ed25519PrivateKey.from_private_bytes(signing_seed)
        descriptor = _open_locked(path)
        try:
            view, torn = _recover(path, descriptor)
            ledger = cls(descriptor, view, key, fencing_epoch, torn)
            if view.num_records == 0:
                opening = {
                    "ledger_id": uuid.uuid4().hex,
                    "format": FORMAT,
                    "unit": unit,
                    "relation": RELATION,
                    "delta": float(delta),
                    "dataset_root": dataset_root,
                    "dataset_cap": dataset_cap,
                    "public_key": _public(key),
                }
                ledger._append("open", [opening])
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
    def public_key(self) -> str:
        """The Ed25519 key that signs it now, as hex: keep it where no writer of the ledger can change it."""
        return self._view.public_key

    @property
    def dataset_cap(self) -> float | None:
        """The epsilon that all stages and runs on this data set together may spend; None for no cap."""
        return self._view.opening["dataset_cap"]

    @property
    def head(self) -> str:
        """The hash of the last record: durable after a charge, and after `sync` whatever came last."""
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

    def rotated_since_plan(self, stage: str) -> bool:
        """Whether the key changed since the stage was planned.

        Then its sampling and noise keys changed too. That is harmless where every step draws for itself (Poisson draws,
        independent noise); a stage that shuffles epochs or correlates noise over steps must not go on.
        """
        return self._view.planned_under.get(stage, self.public_key) != self.public_key

    def plan(self, stage: str, *, steps: int, event: Event, config_sha256: str, **fields: Any) -> dict[str, Any]:
        """Record what the stage means to run, or return what it recorded when it began: then the ledger's word holds.

        fields: whatever else is part of the plan, all JSON. Another config_sha256 is refused: a stage that changes
        half-way is another stage.
        """
        if self.planned(stage) is None:
            content = {**fields, "stage": stage, "steps": steps, "config_sha256": config_sha256}
            self._append("plan", [{**content, "event": check_event(event)}])
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
        return self.charge_ahead(stage, [(step, event)], code_version)[0]

    def charge_ahead(self, stage: str, steps: Sequence[tuple[int, Event]], code_version: str) -> list[Charge]:
        """Charge several releases with one write and one sync; all are durable on return, or the ledger takes no more.

        A crash before their steps ran leaves them charged, and so does one in the midst of the write for those whose
        line is whole: they count, and running them again costs another attempt. So K charges ahead waste at most K.
        """
        before, contents = Counter[int](), list[dict[str, Any]]()
        attempts = self._view.stages.get(stage, StageTally()).attempts
        for step, event in steps:
            contents.append(
                {
                    "stage": stage,
                    "step": step,
                    "attempt": attempts.get(step, 0) + before[step],
                    "event": check_event(event),
                    "dataset_root": self._view.opening["dataset_root"],
                    "code_version": code_version,
                    "fencing_epoch": self._fencing_epoch,
                }
            )
            before[step] += 1
        return [
            Charge(record["seq"], stage, record["step"], record["attempt"], record["event"], record["hash"])
            for record in self._append("charge", contents)
        ]

    def done(self, charge: Charge, digest: str) -> None:
        """Record that the charge's step was finished. digest: keyed, never a plain hash of private data.

        Written, not synced: it outlives this process, and a machine that fails may lose it, which costs no privacy. The
        next charge or `sync` makes it durable.
        """
        self._append("done", [{"charge": charge.seq, "digest": digest}], durable=False)

    def rotate(self, signing_seed: bytes) -> None:
        """Hand the ledger to a new key, durably: the old one signs the change and nothing after it."""
        key = Ed25519PrivateKey.from_private_bytes(signing_seed)
        self._append("rotate", [{"public_key": _public(key)}], new_key=key)
        self._key = key

    def sync(self) -> None:
        """Make the head durable, with all before it: call it before anything durable names the head."""
        self._require_sound()
        self._write(b"", durable=True)

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

    def _append(
        self,
        kind: str,
        contents: Iterable[Mapping[str, Any]],
        *,
        durable: bool = True,
        new_key: Ed25519PrivateKey | None = None,
    ) -> list[dict[str, Any]]:
        """Write records of one kind at once, or leave this object refusing all further ones."""
        self._require_sound()
        records: list[dict[str, Any]] = []
        try:
            for content in contents:
                records.append(self._next(kind, content, new_key))
        except LedgerError:
            if records:  # the view holds what the file does not
                self._failure = "it refused one of several records"
            raise
        self._write(b"".join(canonical_json(record).encode() + b"\n" for record in records), durable)
        return records

    def _next(self, kind: str, content: Mapping[str, Any], new_key: Ed25519PrivateKey | None) -> dict[str, Any]:
        """The next record, chained, signed and counted."""
        view = self._view
        record: dict[str, Any] = {**content, "type": kind, "seq": view.num_records, "prev": view.head}
        try:
            record["hash"] = hash_of(record)
            signed = view.to_sign(record["hash"])
            record["signature"] = self._key.sign(signed).hex()
            if new_key is not None:
                record["new_signature"] = new_key.sign(signed).hex()
            view.tally(record)  # by the reader's own rules: what no reader would accept is never written
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{view.path} refuses the record: {error}") from None
        view.advance(record)
        return record

    def _require_sound(self) -> None:
        if self._failure is not None:
            raise LedgerError(f"{self._view.path} takes no more records from this process: {self._failure}")

    def _write(self, lines: bytes, durable: bool) -> None:
        path = self._view.path
        try:
            self._failure = self._foreign_hand()
            if self._failure is not None:
                raise LedgerError(f"{path} {self._failure}: the step must not run; find who else uses the file")
            written = 0
            while written < len(lines):
                written += os.write(self._descriptor, lines[written:])
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            # Part of a line may stay: it has no end, so the next opening drops it. Whole lines that were not synced
            # may stay too: nobody acted on them, and they count. Either way nothing is under-counted.
            self._failure = f"a write failed ({error.strerror})"
            raise LedgerError(
                f"{path}: the record could not be made durable ({error.strerror}), so the step must not run: "
                "make room or mend the disk, then start again"
            ) from error
        self._size += len(lines)

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
        path, opening, public = self._view.path, self._view.opening, _public(self._key)
        for name, value in asked.items():
            if opening[name] != value:
                raise LedgerError(
                    f"{path} is the ledger of {name} {opening[name]!r}, and this run has {value!r}: "
                    "a budget belongs to one data set and one promise, so put the value back or use another ledger"
                )
        if public != self._view.public_key:
            given_up = ", which it gave up" if public in self._view.public_keys else ""
            raise LedgerError(
                f"{path} is signed by key {self._view.public_key[:12]}.., and this run's secret makes key "
                f"{public[:12]}..{given_up}: give the secret that signs it now (privacy.key_file or the environment)"
            )
        if self._fencing_epoch < self._view.fencing_epoch:
            raise LedgerError(
                f"{path} was charged under fencing epoch {self._view.fencing_epoch}, and this process has "
                f"{self._fencing_epoch}: it has been replaced by a later one and must end"
            )


def public_key_of(signing_seed: bytes) -> str:
    """The public key, as hex, of a private one."""
    return _public(Ed25519PrivateKey.from_private_bytes(signing_seed))


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


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
        view = replay(path, file, frozenset())
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
