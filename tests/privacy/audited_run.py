"""A small run folder as train leaves it: a real ledger, manifests and checkpoints, and no weights or data."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpointing.sharded import save_now
from checkpointing.store import LocalPlace, SaveId
from privacy.accounting import epsilon
from privacy.events import canonical_json
from privacy.ledger import Ledger
from privacy.ledger_view import hash_of

RUN_ID = "0a1b2c3d4e5f"
STAGE = "finetune_dp"
LABEL = f"{RUN_ID}/{STAGE}"
STEPS = 4
EVENT = {"mechanism": "poisson_sampled_gaussian", "sampling_rate": 0.1, "noise_multiplier": 2.0}
PRIVATE_ROOT = "blake3:" + "d" * 64
CODE = "git:" + "a" * 40
SEED, OTHER_SEED = b"s" * 32, b"o" * 32
OPERATIONAL = ["parallel", "log", "train.microbatch_size", "privacy.key_file"]
CONFIG: dict[str, Any] = {
    "name": STAGE,
    "stage": STAGE,
    "data_from": "filter",
    "split": "private",
    "train": {"steps": STEPS, "batch_size": 10, "microbatch_size": 5},
    "parallel": {"backend": "fsdp2", "nproc": 2},
    "privacy": {"target_epsilon": 2.0, "delta": 1e-5, "max_grad_norm": 1.0, "unit": "record", "dataset_cap": None},
}


def config_sha256(config: Mapping[str, Any] = CONFIG) -> str:
    """As train hashes a stage's configuration: without what is operational."""
    identity = copy.deepcopy(dict(config))
    del identity["parallel"], identity["train"]["microbatch_size"]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(run: Path, stage: str, kind: str, inputs: tuple[str, ...] = (), **content: Any) -> None:
    folder = run / stage
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {name: hashlib.sha256((run / name / "manifest.json").read_bytes()).hexdigest() for name in inputs}
    manifest = {"format": 1, "stage": stage, "kind": kind, "inputs": hashes, "metrics": {}, "ledger": None, **content}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(run: Path, stage: str, edit: Callable[[dict[str, Any]], object]) -> None:
    path = run / stage / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def public_stages(run: Path) -> Path:
    """The stages before the private one, finished."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"format": 1, "id": RUN_ID, "recipe": "small"}))
    write_manifest(run, "ingest", "ingest")
    split = {"records": 95, "root": PRIVATE_ROOT, "in": 100, "kept": 95, "dropped": 3, "quarantined": 2}
    metrics = {"splits": {"private": split}, "entities": {"email": 12, "iban": 0}, "metadata": {"png:eXIf": 7}}
    metrics["reasons"] = {"too many findings": 5, "duplicate": 2}
    write_manifest(run, "filter", "filter", ("ingest",), metrics=metrics)
    return run


def open_ledger(run: Path, **settings: Any) -> Ledger:
    settings = {"delta": 1e-5, "unit": "record", "dataset_root": PRIVATE_ROOT, "fencing_epoch": 1} | settings
    return Ledger.open(run / "ledger.jsonl", **{"signing_seed": SEED, **settings})


def save_checkpoint(run: Path, step: int, head: str | None, stage: str = STAGE, **said: Any) -> Path:
    """A committed checkpoint, as far as its manifest goes. said: what else its state holds."""
    place = LocalPlace(run / stage / "checkpoints")
    save = SaveId(1, len(place.saves()) + 1, step)
    state = {"stage": stage, "config_sha256": config_sha256(), "ledger_head": head, **said}
    save_now(place, save, [], state)
    return place.folder(save)


def train_privately(
    run: Path,
    *,
    replay: int | None = None,
    die_at: int | None = None,
    skip: Collection[int] = (),
    events: Sequence[Mapping[str, Any]] = (),
    code: str = CODE,
    plan: Mapping[str, Any] | None = None,
    saved: Mapping[str, Any] | None = None,
    digest: str = "keyed",
    **settings: Any,
) -> None:
    """Charge the steps, save a checkpoint at the second and the last, and write the stage's manifest, as train does.

    replay: a step run again; die_at: end before that step is done; skip: steps never charged; events: a step's own;
    saved: what else the checkpoints hold.
    """
    with open_ledger(run, **settings) as ledger:
        fields = {"target_epsilon": 2.0, "max_grad_norm": 1.0, "operational": OPERATIONAL, **(plan or {})}
        ledger.plan(LABEL, steps=STEPS, event=EVENT, config_sha256=config_sha256(), **fields)
        for step in [*range(STEPS), *([] if replay is None else [replay])]:
            if step in skip:
                continue
            charge = ledger.charge(LABEL, step, events[step] if events else EVENT, code)
            if step == die_at:
                return
            ledger.done(charge, f"{digest} {step}")
            if step == 1:
                save_checkpoint(run, 2, ledger.head, **(saved or {}))
        save_checkpoint(run, STEPS, ledger.head, **(saved or {}))
        statement = {"path": "ledger.jsonl", "head": ledger.head, "charges": ledger.num_charges, "stage": LABEL}
        statement["public_key"] = ledger.public_key
        spent = epsilon(ledger.counts(), 1e-5)
    write_manifest(
        run,
        STAGE,
        "finetune_dp",
        ("filter",),
        config=CONFIG,
        config_sha256=config_sha256(),
        code_version=code,
        metrics={"steps": STEPS, "target_epsilon": 2.0, "delta": 1e-5, "epsilon": spent, "noise_multiplier": 2.0},
        ledger=statement,
    )


def read_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def write_lines(run: Path, lines: Sequence[str]) -> None:
    (run / "ledger.jsonl").write_text("".join(line + "\n" for line in lines))


def rewrite(run: Path, records: Sequence[dict[str, Any]], seed: bytes = SEED) -> None:
    """Write a ledger anew from these records, rightly chained and signed by whoever has the seed."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(seed)
    prev, signatures, lines = "0" * 64, bytes(32), list[str]()
    for seq, record in enumerate(records):
        content = {name: value for name, value in record.items() if name not in ("hash", "signature")}
        if content["type"] == "open":
            content["public_key"] = key.public_key().public_bytes_raw().hex()
        content |= {"seq": seq, "prev": prev}
        prev = content["hash"] = hash_of(content)
        content["signature"] = key.sign(bytes.fromhex(prev) + signatures).hex()
        signatures = hashlib.sha256(signatures + content["signature"].encode()).digest()
        lines.append(canonical_json(content))
    write_lines(run, lines)
