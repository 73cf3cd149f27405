"""The run folder: which stages are finished, from what, and who may write.

    runs/x/run.json, launch.lock, <stage>/manifest.json, <stage>/stage.lock

A manifest is written last and atomically: a stage folder without one is unfinished, and what it holds is the stage's
own to resume from. Manifests name each other by hash, so a stage whose input changed is seen.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blake3 import blake3

from checkpointing.store import sync_folder
from privacy.pages import write_whole
from train.config import FinetuneStage, StageConfig, identity_of
from train.measurements import code_version
from train.recipe import differing_key

FORMAT = 1


class RunFolderError(ValueError):
    """The run folder belongs to another recipe, is in use, or a stage in it is of another config or stale."""


class RunFolder:
    """One run's folder, opened for the recipe it belongs to."""

    def __init__(self, path: Path, recipe: str) -> None:
        self.path = path
        self.recipe = recipe

    @classmethod
    def open(cls, path: Path, recipe: str) -> RunFolder:
        """Open `path` for `recipe`, creating it where it is missing or empty.

        A folder of another recipe, and one that holds something else than a run, is refused untouched.
        """
        marker = path / "run.json"
        if marker.exists():
            found = cls.existing(path)
            if found.recipe != recipe:
                raise RunFolderError(
                    f"{path} is a run of recipe {found.recipe}, not of {recipe}: give another --run-dir, or run recipe "
                    f"{found.recipe}"
                )
            return found
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(f"{path} holds something that is not a run (no run.json): give another --run-dir")
        path.mkdir(parents=True, exist_ok=True)
        identity = {"id": secrets.token_hex(6), "recipe": recipe}
        write_json(marker, {"format": FORMAT, **identity, "created": now(), "code_version": code_version()})
        return cls(path, recipe)

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Open the run that is in `path`, whatever its recipe."""
        marker = path / "run.json"
        recipe = _read_json(marker).get("recipe")
        if not isinstance(recipe, str):
            raise RunFolderError(f"{marker} names no recipe: restore it from a copy")
        return cls(path, recipe)

    @property
    def run_id(self) -> str:
        """What tells this run from every other that charges the same ledger."""
        return _read_json(self.path / "run.json")["id"]

    def stage_folder(self, stage: str) -> Path:
        """The folder of `stage`, created if missing."""
        folder = self.path / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def manifest_path(self, stage: str) -> Path:
        """Where the manifest of `stage` is, or will be."""
        return self.path / stage / "manifest.json"

    def read_manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of `stage`; None where the stage is unfinished."""
        path = self.manifest_path(stage)
        if not path.exists():
            return None
        manifest = _read_json(path)
        if manifest.get("stage") != stage:
            raise RunFolderError(f"{path} is not the manifest of stage {stage}: restore it, or run the stage again")
        return manifest

    def shards_root(self, stage: str) -> str | None:
        """The Merkle root over the shard manifests of a finished stage that filters or encodes; None for another."""
        manifest = self.read_manifest(stage)
        return None if manifest is None else manifest["metrics"].get("shards_root")

    def manifest_sha256(self, stage: str) -> str:
        """Hex SHA-256 of the manifest file of a finished stage; an unfinished one is refused."""
        path = self.manifest_path(stage)
        if not path.exists():
            raise RunFolderError(f"stage {stage} is not finished: {path} is missing; run it first (--from {stage})")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def input_hashes(self, config: StageConfig) -> dict[str, str]:
        """Stage name -> hash of its manifest, for every stage `config` reads; take it before the stage starts."""
        return {name: self.manifest_sha256(name) for name in config.inputs()}

    def finished(self, config: StageConfig) -> bool:
        """Whether the stage's manifest is there, of this very config, made from the inputs as they are now.

        A manifest of another config or of other inputs is an error, never a silent second run: what was made from it,
        and what was spent for it, would no longer fit.
        """
        manifest = self.read_manifest(config.name)
        if manifest is None:
            return False
        mend = "give another --run-dir"
        difference = differing_key(identity_of(manifest["config"]), config.identity())
        if difference is not None:
            key, before, after = difference
            raise RunFolderError(
                f"{self.path}: stage {config.name} is finished with {key} = {json.dumps(before)}, "
                f"but the recipe now says {json.dumps(after)}: set it back, or {mend}"
            )
        for name, recorded in manifest["inputs"].items():
            if self.manifest_sha256(name) != recorded:
                raise RunFolderError(
                    f"{self.path}: stage {config.name} is stale: it was made from {name}/manifest.json with hash "
                    f"{recorded[:12]}.., which is now {self.manifest_sha256(name)[:12]}..: {mend}"
                )
        return True

    def write_manifest(
        self,
        config: StageConfig,
        *,
        inputs: Mapping[str, str],
        started: str,
        seconds: float,
        metrics: Mapping[str, Any],
        outputs: Mapping[str, str],
        seeds: Mapping[str, int] | None = None,
        ledger: Mapping[str, Any] | None = None,
    ) -> Path:
        """Finish a stage: write its manifest aside, sync, rename. `outputs` maps relative paths to "algorithm:hex".

        `started` is `now()` of the stage's first start, `inputs` what `input_hashes` said then.
        """
        path = self.stage_folder(config.name) / "manifest.json"
        manifest = {
            "format": FORMAT,
            "stage": config.name,
            "kind": config.kind,
            "inputs": dict(inputs),
            "config": config.model_dump(mode="json"),
            "config_sha256": config.sha256(),
            "code_version": code_version(),
            "seeds": dict(seeds or {}),
            "metrics": dict(metrics),
            "outputs": dict(outputs),
            "ledger": dict(ledger) if ledger is not None else None,
            "started": started,
            "finished": now(),
            "seconds": seconds,
        }
        write_json(path, manifest)
        return path

    @contextmanager
    def launch_lock(self) -> Iterator[None]:
        """Hold the run folder for one launch; a second is refused with the holder's process id."""
        with _lock(self.path / "launch.lock", f"{self.path} is in use by another launch", wait_s=0):
            yield

    @contextmanager
    def stage_lock(self, stage: str, wait_s: float = 60) -> Iterator[None]:
        """Hold one stage for one process group (rank 0 takes it), waiting for a dying predecessor at most `wait_s`."""
        path = self.stage_folder(stage) / "stage.lock"
        with _lock(path, f"stage {stage} of {self.path} is being run by another process", wait_s):
            yield

    def ledger_path(self, config: StageConfig) -> Path | None:
        """Where a private stage's ledger lies; None for a stage that has none."""
        if not isinstance(config, FinetuneStage):
            return None
        return Path(config.privacy.ledger) if config.privacy.ledger else self.path / "ledger.jsonl"

    def next_fencing_epoch(self, ledger: Path | None = None) -> int:
        """A number larger than any given before, durable before it is returned.

        Counted beside `ledger` where one is given: runs that share a ledger must share the count, for the ledger
        refuses an epoch lower than the highest it has seen.
        """
        counter = self.path / "fencing_epoch" if ledger is None else ledger.with_name(ledger.name + ".epoch")
        with _lock(counter.with_name(counter.name + ".lock"), f"{counter} is being counted", wait_s=60):
            epoch = 1 + (_read_json(counter)["epoch"] if counter.exists() else 0)
            write_json(counter, {"epoch": epoch})
        return epoch


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
    sync_folder(path.parent)


def digests(files: Iterable[Path]) -> dict[Path, str]:
    """The string "blake3:" and the hex digest of each file, as a manifest's `outputs` names it."""
    return {file: "blake3:" + blake3(max_threads=1).update_mmap(file).hexdigest() for file in files}


def now() -> str:
    """The time in UTC, as manifests write it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is not JSON ({error}): it was changed by hand or the disk lost it") from error
    if not isinstance(value, dict) or value.get("format", FORMAT) != FORMAT:
        raise RunFolderError(f"{path}: expected a JSON object of format {FORMAT}")
    return value


@contextmanager
def _lock(path: Path, refusal: str, wait_s: float) -> Iterator[None]:
    """Hold an exclusive flock on `path`, which then holds who has it; the kernel frees it however the holder dies."""
    deadline = time.monotonic() + wait_s
    with path.open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise RunFolderError(f"{refusal} ({holder}): wait for it or stop it") from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
