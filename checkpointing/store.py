"""The commit protocol: folders of files that are whole or are not there.

    root/latest                                   name of the newest checkpoint: a hint for people, never trusted
    root/step-00000100.attempt-000007-3fa9c1d2/   one save; the name is never used twice
        rank-00000.safetensors ...                payload, each fsynced with its BLAKE3 digest
        MANIFEST.json                             written last, aside, then renamed: the commit mark

Guarantees, on a file system whose rename is atomic and whose fsync is honest:
- a process killed anywhere leaves every earlier checkpoint as it was, and never a bad one with a manifest;
- what is returned as whole has the bytes that were saved: every file and the manifest itself match their digests;
- a folder without a manifest is never read; the next save removes it.
One save at a time may run in a root: the run folder's lock and the caller see to that.
"""

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from checkpointing.failpoints import failpoint

FORMAT = 1
MANIFEST = "MANIFEST.json"
POINTER = "latest"

# What a save writes beside its tensors, generously: headers, manifest, pointer and the file system's own blocks.
_OVERHEAD_BYTES = 1 << 20

_FOLDER = re.compile(r"step-(?P<step>\d{8,})\.attempt-(?P<attempt>\d{6,})-[0-9a-f]{8}")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be trusted; the message says which and why."""


@dataclass(frozen=True)
class Manifest:
    """What a committed folder says of itself; `body` is the JSON object without its digest."""

    folder: Path
    body: dict[str, Any]

    @property
    def step(self) -> int:
        return self.body["step"]

    @property
    def size_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.body["files"].values())


def digest_of(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"


def sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new, renamed and removed names) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create the folder and its missing parents, each durable in its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_durably(path: Path, data: bytes, place: str = "file", **where: int) -> None:
    """Replace the file's content so that a reader, now or after a crash, sees all of the old or all of the new."""
    aside = path.with_name(path.name + ".aside")
    try:
        with aside.open("wb") as file:
            file.write(data)
            failpoint(f"{place}.half_written", **where)  # data may lie in this process's buffer yet: a torn file
            sync_file(file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    failpoint(f"{place}.synced", **where)
    aside.replace(path)
    failpoint(f"{place}.renamed", **where)
    sync_folder(path.parent)


# --- writing -------------------------------------------------------------------------------------------------------


def open_attempt(root: Path, step: int, payload_bytes: int) -> Path:
    """A new, empty folder for one save, with room for it on the disk.

    Removes what interrupted saves left behind, and raises CheckpointError, with nothing written,
    where fewer bytes are free than the save needs.
    """
    make_folder(root)
    last = max((_attempt_of(folder) for folder in _folders(root)), default=0)
    _remove_debris(root)
    needed, free = payload_bytes + _OVERHEAD_BYTES, shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"{root} has {free:,} bytes free and the checkpoint of step {step} needs {needed:,}: "
            "free some space; nothing was written, and earlier checkpoints are as they were"
        )
    # The number orders saves; the random part keeps a late writer of a removed attempt out of this one.
    folder = root / f"step-{step:08d}.attempt-{last + 1:06d}-{secrets.token_hex(4)}"
    folder.mkdir()
    sync_folder(root)
    failpoint("attempt.opened", step=step)
    return folder


def commit(folder: Path, body: dict[str, Any]) -> None:
    """Make the folder a checkpoint. Every file that `body["files"]` names must have been written and fsynced."""
    step = body["step"]
    sync_folder(folder)  # the files' names are durable before the manifest speaks of them
    write_durably(folder / MANIFEST, _seal(body), "manifest", rank=0, step=step)
    try:
        write_durably(folder.parent / POINTER, f"{folder.name}\n".encode(), "pointer", rank=0, step=step)
    except OSError as error:
        warnings.warn(f"{folder} is committed, but {POINTER} beside it was not updated: {error}", stacklevel=2)


def remove(folder: Path) -> None:
    """Remove a checkpoint or the remains of one. The manifest goes first: half a checkpoint never has one."""
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink()
        sync_folder(folder)
        failpoint("remove.manifest_gone")
    shutil.rmtree(folder, ignore_errors=True)  # what stays is debris, and the next save tries again


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` checkpoints; returns what was removed.

    Guarantee: the newest whole checkpoint stays, even where `keep` newer ones are broken.
    To know it, the newest is verified (its files are read) whenever there is something to remove.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the newest checkpoint must stay")
    committed = committed_folders(root)
    kept = keep
    while kept < len(committed) and all(reason_broken(folder) for folder in committed[:kept]):
        kept += 1
    for folder in committed[kept:]:
        remove(folder)
    return committed[kept:]


def _seal(body: dict[str, Any]) -> bytes:
    return canonical_json({**body, "digest": digest_of(canonical_json(body))})


def canonical_json(value: object) -> bytes:
    """One text for one value: sorted keys, no spaces, UTF-8, and no NaN, which JSON does not know."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


# --- reading -------------------------------------------------------------------------------------------------------


def committed_folders(root: Path) -> list[Path]:
    """Folders with a manifest, the newest save first; whether they are whole is not looked at."""
    committed = [folder for folder in _folders(root) if (folder / MANIFEST).is_file()]
    return sorted(committed, key=lambda folder: (_attempt_of(folder), folder.name), reverse=True)


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest, checked against its own digest and the folder's name, but not against the files."""
    path = folder / MANIFEST
    try:
        sealed = path.read_bytes()
        body = json.loads(sealed)
        del body["digest"]
        whole = _seal(body) == sealed
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was never committed") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if not whole:
        raise CheckpointError(f"{path} is damaged: its text does not match its digest")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {body['format']}, and this code reads format {FORMAT}")
    name = _FOLDER.fullmatch(folder.name)
    if name is None or int(name["step"]) != body["step"]:
        raise CheckpointError(f"{folder} holds the checkpoint of step {body['step']}: it was renamed or mixed up")
    return Manifest(folder, body)


def verify(folder: Path) -> Manifest:
    """The manifest of a whole checkpoint; raises CheckpointError naming the first file that is not as it was saved."""
    manifest = read_manifest(folder)
    for name, entry in manifest.body["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{path} has {size:,} bytes, and {entry['bytes']:,} were saved")
            digest = f"blake3:{blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()}"
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if digest != entry["digest"]:
            raise CheckpointError(f"{path} is damaged: digest {digest}, and {entry['digest']} was saved")
    return manifest


def reason_broken(folder: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None where it is whole."""
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
    return None


def newest_whole(root: Path) -> Manifest | None:
    """The newest checkpoint whose every byte is as saved; None where nothing was ever committed.

    Each newer one that is skipped is told of in a warning with the reason. Where checkpoints were committed and
    none is whole, raises: to begin again from nothing must be a person's decision.
    """
    committed = committed_folders(root)
    reasons: list[str] = []
    for folder in committed:
        try:
            manifest = verify(folder)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(f"skipped a broken checkpoint: {reason}", stacklevel=2)
        return manifest
    if reasons:
        raise CheckpointError(
            f"none of the {len(committed)} checkpoints in {root} is whole: {'; '.join(reasons)}. "
            "Restore one from a copy, or move the folder away to begin again"
        )
    return None


def uncommitted_folders(root: Path) -> list[Path]:
    """What interrupted saves left behind: never read, removed by the next save."""
    return [folder for folder in _folders(root) if not (folder / MANIFEST).exists()]


def _remove_debris(root: Path) -> None:
    for folder in uncommitted_folders(root):
        remove(folder)
    (root / f"{POINTER}.aside").unlink(missing_ok=True)


def _folders(root: Path) -> Iterator[Path]:
    """Every folder in the root that a save made; whatever else lies there is none of ours."""
    return (path for path in sorted(root.glob("step-*")) if _FOLDER.fullmatch(path.name) and path.is_dir())


def _attempt_of(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match["attempt"])
