"""A ledger of a few charges, and the hands that forge one: a second writing of the format, by its description alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.events import canonical_json
from privacy.ledger import Charge, Ledger

EVENT = {"mechanism": "poisson_sampled_gaussian", "sampling_rate": 0.1, "noise_multiplier": 1.5}
OTHER = {"mechanism": "gaussian", "noise_multiplier": 4.0}
CONFIG = "c" * 64
DATASET = "blake3:" + "d" * 64
SEED, OTHER_SEED = b"s" * 32, b"o" * 32
STAGE = "finetune_dp"

Record = dict[str, Any]


def open_ledger(path: Path, **changes: Any) -> Ledger:
    settings: Record = {"delta": 1e-5, "unit": "record", "dataset_root": DATASET, "fencing_epoch": 1}
    return Ledger.open(path, **({"signing_seed": SEED} | settings | changes))


def charge(ledger: Ledger, step: int, stage: str = STAGE) -> Charge:
    return ledger.charge(stage, step, EVENT, "git:abc")


def write_charged(path: Path) -> Path:
    """Three charges, two of them done. Its lines: open, plan, charge, done, charge, done, charge."""
    with open_ledger(path) as ledger:
        ledger.plan(STAGE, steps=3, event=EVENT, config_sha256=CONFIG)
        for step in range(2):
            ledger.done(charge(ledger, step), "keyed")
        charge(ledger, 2)
    return path


def read_records(path: Path) -> list[Record]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def write_records(path: Path, records: Sequence[Record], seed: bytes | None) -> None:
    """Chain the records anew, as somebody who knows the format would, and sign them where the seed is known."""
    prev, signatures = "0" * 64, bytes(32)
    for seq, record in enumerate(records):
        record.update(seq=seq, prev=prev)
        apart = {"hash", "signature"} | ({"new_signature"} if record["type"] == "rotate" else set())
        hashed = {name: value for name, value in record.items() if name not in apart}
        prev = record["hash"] = hashlib.sha256(canonical_json(hashed).encode()).hexdigest()
        if seed is not None:
            key = Ed25519PrivateKey.from_private_bytes(seed)
            record["signature"] = key.sign(bytes.fromhex(prev) + signatures).hex()
        signatures = hashlib.sha256(signatures + record["signature"].encode()).digest()
    path.write_text("".join(canonical_json(record) + "\n" for record in records))


def forge(path: Path, line: int, edit: Callable[[Record], object], seed: bytes | None = SEED) -> None:
    """Edit one record and write everything anew around it."""
    records = read_records(path)
    edit(records[line])
    write_records(path, records, seed)
