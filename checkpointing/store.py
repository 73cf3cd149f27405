"""The commit protocol: saves that are whole or are not there, in any place (see `places`).

Each rank writes its shard, durable, and then the shard's sealed index. Rank 0 waits for every rank's index, checks that
together they hold every element once, asks whether the run still owns the place, and puts the manifest: that is the
commit. No collective takes part, so that a writer process can do all of it while training goes on.

Guarantees, where rename (or the store's PUT) is atomic and fsync is honest:
- a process killed anywhere leaves every earlier checkpoint as it was, and never a bad one with a manifest;
- every byte handed out is as it was saved: the manifest is sealed by its own digest, holds those of the indexes, and
  they hold those of the header and of each chunk of each shard;
- a save without a manifest is never read; `fence` and `prune` remove it once its epoch is over or a later one stands;
- a run that another has fenced out commits nothing more. One stopped between the question and the rename still can:
  its save is whole, and older than every save of the newer epoch.
"""

import re
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing.disk import make_folder, sync_folder, write_durably
from checkpointing.layout import (
    FORMAT,
    CheckpointError,
    Index,
    SaveId,
    canonical_json,
    cover,
    require_plain,
    seal,
    unseal,
)
from checkpointing.places import (
    MANIFEST,
    POINTER,
    LocalPlace,
    Place,
    RemotePlace,
    Unreachable,
    index_file,
    open_place,
    read_verified,
    shard_file,
)

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "LocalPlace",
    "Manifest",
    "Place",
    "RemotePlace",
    "SaveId",
    "Unreachable",
    "canonical_json",
    "commit",
    "committed",
    "fence",
    "give_up",
    "holds_fence",
    "make_folder",
    "newest_whole",
    "open_place",
    "prune",
    "read_indexes",
    "read_manifest",
    "reason_broken",
    "report_failure",
    "sync_folder",
    "uncommitted",
    "verify",
    "wait_for_commit",
    "write_durably",
]

_FENCE = re.compile(r"fence-(\d{6,})\.json")
_FORMAT_1 = re.compile(r"step-\d{8,}\.attempt-\d{6,}-[0-9a-f]{8}")
_LONGEST_PAUSE_S = 0.5


@dataclass(frozen=True)
class Manifest:
    """What a committed save says of itself; `body` is the sealed JSON object without its digest."""

    place: Place
    save: SaveId
    body: dict[str, Any]

    @property
    def step(self) -> int:
        return self.save.step

    @property
    def world_size(self) -> int:
        return self.body["world_size"]

    @property
    def state(self) -> dict[str, Any]:
        return self.body["state"]

    @property
    def size_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.body["shards"])


# --- committing ----------------------------------------------------------------------------------------------------


def commit(
    place: Place,
    save: SaveId,
    world_size: int,
    state: dict[str, Any],
    *,
    timeout_s: float,
    still_mine: Callable[[], bool] = lambda: True,
) -> None:
    """Make a save a checkpoint as soon as every rank's index is in the place; for rank 0 alone.

    `still_mine` is asked last, just before the manifest is put (`holds_fence`). On return the checkpoint is durable.
    On CheckpointError nothing is promised: a rank failed, or did not answer in time; the shards hold an element twice
    or not at all, or are of another save; a newer run owns the place; or the manifest could not be written. Where its
    very last sync failed it may be found, and is whole.
    """
    require_plain(state)
    indexes = _sealed_indexes(place, save, world_size, timeout_s)
    cover(indexes)
    for index in indexes:
        size = place.size(save, shard_file(index.rank))
        if size != index.size_bytes:
            path = place.path(save, shard_file(index.rank))
            raise CheckpointError(f"{path} has {size} bytes, and its index tells of {index.size_bytes}")
    body = {
        "format": FORMAT,
        "step": save.step,
        "epoch": save.epoch,
        "sequence": save.sequence,
        "world_size": world_size,
        "state": state,
        "shards": [
            {"file": shard_file(index.rank), "bytes": index.size_bytes, "index_digest": index.digest}
            for index in indexes
        ],
    }
    place.sync(save)  # the files' names are durable before the manifest speaks of them
    if not still_mine():
        raise CheckpointError(f"{place.path(save)} is not committed: a newer run has taken {place} over")
    place.put(save, MANIFEST, seal(body))
    try:
        place.put(None, POINTER, f"{save.name}\n".encode())
    except CheckpointError as error:
        warnings.warn(f"{place.path(save)} is committed, but {POINTER} beside it is not updated: {error}", stacklevel=2)


def _sealed_indexes(place: Place, save: SaveId, world_size: int, timeout_s: float) -> list[Index]:
    """Every rank's index, waited for."""
    found: dict[int, Index] = {}
    pause_s, deadline = 0.005, time.monotonic() + timeout_s
    while True:
        late = time.monotonic() > deadline
        present = set(place.files(save))
        for rank in set(range(world_size)) - set(found):
            if index_file(rank) in present:
                path = place.path(save, index_file(rank))
                index = Index.parse(place.read(save, index_file(rank)), path)
                if (index.save, index.rank, index.world_size) != (save, rank, world_size):
                    raise CheckpointError(
                        f"{path} is of rank {index.rank} of {index.world_size} of {index.save}: "
                        "shards of two saves are mixed"
                    )
                found[rank] = index
            elif _failure_file(rank) in present:
                raise CheckpointError(f"rank {rank}: {place.read(save, _failure_file(rank)).decode()}")
        if len(found) == world_size:
            return [found[rank] for rank in range(world_size)]
        if late:
            missing = ", ".join(str(rank) for rank in range(world_size) if rank not in found)
            raise CheckpointError(
                f"{place.path(save)} is not committed: no sealed shard of rank {missing} within {timeout_s:g} s"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def report_failure(place: Place, save: SaveId, rank: int, reason: str) -> None:
    """Tell rank 0 that this rank's shard will not come, or, from rank 0, the others that nothing will be committed.

    Where the place takes no file any more, they find out by their time-outs.
    """
    with _tidying(save):
        place.put(save, _failure_file(rank), reason.encode())


def give_up(place: Place, save: SaveId, rank: int, world_size: int, reason: str) -> None:
    """Say that the save failed, and remove it, on rank 0, if it was not committed; the notice stays until `prune`."""
    with _tidying(save):
        if place.has(save, MANIFEST):
            return
        if rank == 0:
            place.remove(save)
            if world_size > 1:
                place.open(save, 0)
        if world_size > 1:
            report_failure(place, save, rank, reason)


@contextmanager
def _tidying(save: SaveId) -> Generator[None]:
    """What goes wrong in here must not hide the failure that it was about to tell of."""
    try:
        yield
    except CheckpointError as error:
        warnings.warn(f"{save} failed, and the other ranks could not be told: {error}", stacklevel=4)


def _failure_file(rank: int) -> str:
    return f"rank-{rank:05d}.failed"


def wait_for_commit(place: Place, save: SaveId, timeout_s: float) -> None:
    """Return once the save is committed; CheckpointError where it was given up, or not committed in time."""
    pause_s, deadline = 0.005, time.monotonic() + timeout_s
    while not place.has(save, MANIFEST):
        if place.has(save, _failure_file(0)):
            raise CheckpointError(place.read(save, _failure_file(0)).decode())
        if time.monotonic() > deadline:
            raise CheckpointError(f"{place.path(save)} is not committed: rank 0 did not within {timeout_s:g} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    place.sync(save)  # what is seen may not be durable yet


def fence(place: Place, epoch: int) -> None:
    """Take the place over for the run with this epoch: from here on no older one commits, and its debris goes.

    Raises CheckpointError where a newer epoch was here: this run's saves would count as older than those.
    """
    # One file an epoch, never rewritten: two runs that start at once cannot lower the fence for each other.
    raised = _fences(place)
    newest = max([*raised, *(save.epoch for save in place.saves())], default=epoch)
    if newest > epoch:
        raise CheckpointError(
            f"{place} was taken over by the run with epoch {newest}, and this run's is {epoch}: "
            "stop one of the two; after a restore from a copy, restore the whole run folder"
        )
    if epoch not in raised:
        place.put(None, f"fence-{epoch:06d}.json", canonical_json({"epoch": epoch}))
    for older in sorted(_fences(place)):
        if older < epoch:
            place.delete(f"fence-{older:06d}.json")
    if not holds_fence(place, epoch):
        raise CheckpointError(f"{place} was taken over by a newer run than this one, whose epoch is {epoch}: stop one")
    for save in uncommitted(place):
        if save.epoch < epoch:
            place.remove(save)


def holds_fence(place: Place, epoch: int) -> bool:
    """Whether no run with a newer epoch has taken the place over."""
    return max(_fences(place), default=epoch) <= epoch


def _fences(place: Place) -> list[int]:
    return [int(match[1]) for name in place.files(None) if (match := _FENCE.fullmatch(name))]


# --- keeping -------------------------------------------------------------------------------------------------------


def committed(place: Place) -> list[SaveId]:
    """Saves with a manifest, the newest first; whether they are whole is not looked at."""
    return [save for save in place.saves() if place.has(save, MANIFEST)]


def uncommitted(place: Place) -> list[SaveId]:
    """Saves without a manifest: under way, or what interrupted ones left behind. Never read."""
    return [save for save in place.saves() if not place.has(save, MANIFEST)]


def prune(where: Place | Path, keep: int, keep_every: int | None = None, whole: SaveId | None = None) -> list[SaveId]:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every`-th step; returns what was removed.

    whole: a checkpoint that its writer has this moment committed, which need not be read to be believed.

    Guarantee: the newest whole checkpoint stays, even where `keep` newer ones are broken; where none is whole, all
    stay. To know it, the newest is verified (its files are read) where there is something to remove and no `whole`.
    Saves that were never committed go too, if a newer one was or their epoch is over.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the newest checkpoint must stay")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every is {keep_every}: give a number of steps, 1 or more, or leave it out")
    place = open_place(where)
    checkpoints = committed(place)
    newest = checkpoints[0] if checkpoints else None
    epoch = max(_fences(place), default=0)
    for save in uncommitted(place):
        if save.epoch < epoch or (newest is not None and save < newest):
            place.remove(save)
    steps: set[int] = set()
    spare: list[SaveId] = []
    for number, save in enumerate(checkpoints):
        for_ever = keep_every is not None and save.step % keep_every == 0 and save.step not in steps
        steps.add(save.step)
        if number >= keep and not for_ever:
            spare.append(save)
    if spare:
        if whole not in checkpoints:
            whole = next((save for save in checkpoints if reason_broken(place, save) is None), None)
        spare = [save for save in spare if whole is not None and save != whole]
    for save in spare:
        place.remove(save)
    return spare


# --- reading -------------------------------------------------------------------------------------------------------


def read_manifest(place: Place, save: SaveId) -> Manifest:
    """The save's manifest, checked against its own digest and the folder's name, but not against the files."""
    path = place.path(save, MANIFEST)
    if not place.has(save, MANIFEST):
        raise CheckpointError(f"{place.path(save)} has no {MANIFEST}: it was never committed")
    body = unseal(place.read(save, MANIFEST), path)
    try:
        saved = SaveId(body["epoch"], body["sequence"], body["step"]).name
        manifest = Manifest(place, save, body)
        _ = manifest.state
        shards = [(shard["file"], shard["bytes"], shard["index_digest"]) for shard in body["shards"]]
        well_formed = len(shards) == manifest.world_size
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint's manifest: {error!r}") from error
    if not well_formed:
        raise CheckpointError(f"{path} is no checkpoint's manifest: it has no shard for each rank")
    if saved != save.name:
        raise CheckpointError(f"{place.path(save)} holds the checkpoint {saved}: it was renamed or mixed up")
    return manifest


def read_indexes(manifest: Manifest) -> list[Index]:
    """Every rank's index, checked against the manifest."""
    place, save = manifest.place, manifest.save
    indexes: list[Index] = []
    for rank, shard in enumerate(manifest.body["shards"]):
        path = place.path(save, index_file(rank))
        index = Index.parse(place.read(save, index_file(rank)), path)
        if index.digest != shard["index_digest"]:
            raise CheckpointError(
                f"{path} is not the index that was committed: digest {index.digest}, "
                f"and {MANIFEST} has {shard['index_digest']}"
            )
        indexes.append(index)
    return indexes


def verify(place: Place, save: SaveId, progress: Callable[[int], object] = lambda size_bytes: None) -> Manifest:
    """The manifest of a whole checkpoint; CheckpointError names the first file and bytes that are not as saved.

    Every byte of every file is read, by chunks of at most 64 MiB; `progress` is told the size of each.
    """
    manifest = read_manifest(place, save)
    indexes = read_indexes(manifest)
    cover(indexes)
    for index in indexes:
        verify_shard(place, save, index, progress)
    return manifest


def verify_shard(
    place: Place, save: SaveId, index: Index, progress: Callable[[int], object] = lambda size_bytes: None
) -> None:
    """Raise CheckpointError, naming its first bytes that are not as saved, unless the shard is what its index says."""
    size = place.size(save, shard_file(index.rank))
    with closing(place.source(save, shard_file(index.rank))) as shard:
        if size is not None and size != index.size_bytes:
            raise CheckpointError(f"{shard} has {size:,} bytes, and {index.size_bytes:,} were saved")
        ranges = [(0, index.header_bytes, index.header_digest)]
        ranges += [(chunk.begin, chunk.size_bytes, chunk.digest) for chunk in index.chunks]
        buffer = bytearray(max(length for _, length, _ in ranges))
        for begin, length, digest in ranges:
            read_verified(shard, begin, memoryview(buffer)[:length], digest)
            progress(length)


def reason_broken(place: Place, save: SaveId) -> str | None:
    """Why the checkpoint cannot be trusted, or None where it is whole. Unreachable is raised: it says neither."""
    try:
        verify(place, save)
    except Unreachable:
        raise
    except CheckpointError as error:
        return str(error)
    return None


def _named_newest(place: Place) -> SaveId | None:
    """The save that the pointer names, which was committed before it was named."""
    try:
        return SaveId.parse(place.read(None, POINTER).decode().strip()) if place.has(None, POINTER) else None
    except UnicodeDecodeError:
        return None


def newest_whole(place: Place) -> Manifest | None:
    """The newest checkpoint whose every byte is as saved; None where nothing was ever committed.

    Each newer one that is skipped is told of in a warning with the reason. Where checkpoints were committed and
    none is whole, raises: to begin again from nothing must be a person's decision. A store that does not answer is
    Unreachable, and never a broken checkpoint.
    """
    reasons: list[str] = []
    checkpoints = committed(place)
    for save in checkpoints:
        try:
            manifest = verify(place, save)
        except Unreachable:
            raise
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(f"skipped a broken checkpoint: {reason}", stacklevel=2)
        return manifest
    old = [name for name in place.folders() if _FORMAT_1.fullmatch(name) and SaveId.parse(name) is None]
    reasons += [f"{place}/{name} has format 1, and this code reads format {FORMAT}" for name in old]
    named = _named_newest(place) if not checkpoints else None
    if named is not None and named in place.saves():
        reasons.append(f"{place.path(named, MANIFEST)} is missing, though {POINTER} names its save as committed")
    if reasons:
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {place} is whole: {'; '.join(reasons)}. "
            "Restore one from a copy, or move the folder away to begin again"
        )
    return None
