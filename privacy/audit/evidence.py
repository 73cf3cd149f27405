"""What a run folder says of itself: its manifests, its checkpoints' heads and where its ledger lies. Nothing is judged.

    RUN/run.json                                        the run's id
    RUN/<stage>/manifest.json                           of every finished stage
    RUN/<stage>/checkpoints/step-*/MANIFEST.json        of every committed checkpoint
    RUN/ledger.jsonl                                    or wherever the manifests say

Only these are read: no weights, no secret, and of the data only the shards of filter and latents stages and of what was
encoded, where they lie (`claims`, `latents`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from privacy.events import canonical_json

MANIFEST_FORMAT = 1
PRIVATE_KIND = "finetune_dp"


class UnreadableRunError(ValueError):
    """The folder is no run, or a file an audit needs cannot be read at all."""


@dataclass(frozen=True)
class Manifest:
    """A finished stage's manifest and where it lies."""

    path: Path
    stage: str
    content: dict[str, Any]

    def section(self, *keys: str) -> dict[str, Any]:
        """The mapping under these keys; empty where there is none."""
        value = self.content
        for key in keys:
            inner = value.get(key)
            value = cast(dict[str, Any], inner) if isinstance(inner, dict) else {}
        return value

    @property
    def is_private(self) -> bool:
        """Whether the stage charged a ledger, or is of the kind that must."""
        return bool(self.section("ledger")) or self.content.get("kind") == PRIVATE_KIND


@dataclass(frozen=True)
class PaidCheckpoint:
    """A checkpoint of a private stage: so many steps were done when the ledger's head was this one."""

    stage: str
    folder: str
    step: int
    head: str
    config_sha256: str
    shards_root: str | None  # of the filtered shards or latents it was trained on; None in a save that does not say


@dataclass(frozen=True)
class RunEvidence:
    """All that one run folder says; `damaged` names the checkpoints whose manifest cannot be read, and why."""

    path: Path
    run_id: str | None
    manifests: tuple[Manifest, ...]
    checkpoints: tuple[PaidCheckpoint, ...]
    damaged: tuple[str, ...]

    @property
    def private(self) -> list[Manifest]:
        """The manifests that name a ledger."""
        return [manifest for manifest in self.manifests if manifest.section("ledger")]

    def manifest(self, stage: object) -> Manifest | None:
        """A finished stage's manifest; None where it is unfinished or there is no such stage."""
        return next((manifest for manifest in self.manifests if manifest.stage == stage), None)

    def label(self, stage: str) -> str:
        """The stage's name in the ledger: what its manifest says, or else the run's id and the stage's name."""
        manifest = self.manifest(stage)
        if manifest is not None and manifest.section("ledger"):
            return str(manifest.section("ledger").get("stage"))
        return stage if self.run_id is None else f"{self.run_id}/{stage}"

    def ledgers(self) -> list[Path]:
        """Every ledger the run has or names, each once.

        Runs are moved, so a recorded path counts from the run folder, then by its name within it. Which file it is
        decides nothing by itself: the heads that manifests and checkpoints recorded must lie in its chain.
        """
        own = self.path / "ledger.jsonl"
        found = {self._resolve(str(manifest.section("ledger").get("path"))) for manifest in self.private}
        if own.exists() or (self.checkpoints and not found):
            found.add(own.resolve())
        return sorted(found)

    def heads(self) -> set[str]:
        """Every ledger head that a manifest or a checkpoint kept."""
        recorded = {str(manifest.section("ledger").get("head")) for manifest in self.private}
        return recorded | {checkpoint.head for checkpoint in self.checkpoints}

    def _resolve(self, recorded: str) -> Path:
        places = [self.path / recorded, Path(recorded), self.path / Path(recorded).name]
        return next((place for place in places if place.is_file()), places[0]).resolve()


def read_run(run_dir: Path) -> RunEvidence:
    """Read a run folder, finished or not; UnreadableRunError where there is nothing that can be audited."""
    try:
        run_dir = run_dir.resolve(strict=True)
        manifests = tuple(_read_manifest(path) for path in sorted(run_dir.glob("*/manifest.json")))
        checkpoints: list[PaidCheckpoint] = []
        damaged: list[str] = []
        for path in sorted(run_dir.glob("*/checkpoints/step-*/MANIFEST.json")):
            try:
                checkpoint = _read_checkpoint(path)
            except (ValueError, KeyError, TypeError) as error:
                damaged.append(f"{path.relative_to(run_dir)} ({error!r})")
                continue
            if checkpoint is not None:
                checkpoints.append(checkpoint)
        run_id = _read_run_id(run_dir / "run.json")
    except OSError as error:
        raise UnreadableRunError(f"{error.filename or run_dir} cannot be read: {error.strerror}") from error
    if not (manifests or checkpoints or damaged or (run_dir / "ledger.jsonl").exists()):
        raise UnreadableRunError(
            f"{run_dir} holds neither a stage's manifest.json nor a ledger.jsonl: name a run folder"
        )
    return RunEvidence(run_dir, run_id, manifests, tuple(checkpoints), tuple(damaged))


def identity_sha256(config: dict[str, Any], operational: Sequence[str]) -> str:
    """The hash a stage planned in the ledger, from its resolved configuration: SHA-256 of what decides its result.

    operational: dotted keys that say how and where a stage runs and not what it computes; they are left out.
    """
    identity = copy.deepcopy(config)
    for dotted in operational:
        *sections, key = dotted.split(".")
        holder: Any = identity
        for section in sections:
            holder = holder.get(section) or {}
        holder.pop(key, None)
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != MANIFEST_FORMAT:
            raise UnreadableRunError(f"{path} has format {content['format']!r}: this version reads {MANIFEST_FORMAT}")
        return Manifest(path, path.parent.name, content)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UnreadableRunError):
            raise
        raise UnreadableRunError(f"{path} is no manifest of format 1: restore it or run the stage again") from error


def _read_checkpoint(path: Path) -> PaidCheckpoint | None:
    """The checkpoint as far as the ledger is concerned; None for one of a stage that charges nothing."""
    body = json.loads(path.read_bytes())
    state = body["state"]
    head = state.get("ledger_head")
    if head is None:
        return None
    folder, stage = path.parent, path.parents[2].name
    root = state.get("shards_root")
    shards_root = None if root is None else str(root)
    return PaidCheckpoint(stage, folder.name, int(body["step"]), str(head), str(state["config_sha256"]), shards_root)


def _read_run_id(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_bytes())["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableRunError(f"{path} is no run.json: restore it from a copy") from error
