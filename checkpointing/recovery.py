"""What a run goes on from: the newest save that is whole in some tier, the nearest tier first, agreed by all ranks.

A tier is this node's memory, other nodes' memories (a lost node's shards come back from its partner), the disk, or the
remote store. Whole means that every byte was read and matches its digest, each rank reading its part; what is read from
the result is verified once more on its way.
"""

from __future__ import annotations

import base64
import logging
import mmap
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from checkpointing import store
from checkpointing.layout import CheckpointError, Index, Piece, SaveId
from checkpointing.memory import Memory
from checkpointing.peers import PeerLink
from checkpointing.places import LocalPlace, Place, Unreachable, open_place, shard_file
from checkpointing.sharded import Checkpoint
from checkpointing.tiers import Tiers

Gather = Callable[[Any], list[Any]]

log = logging.getLogger(__name__)


def recover(
    tiers: Tiers,
    pieces: Sequence[Piece] | None,
    *,
    rank: int,
    world_size: int,
    node: int = 0,
    gather: Gather,
    peer: PeerLink | None = None,
) -> Checkpoint | None:
    """The save to go on from; None where nothing was ever saved. For all ranks together, before `Checkpointer`.

    pieces: what this rank will read, by default everything; shards it needs from other nodes' memories are brought
    here. gather: all-gather of one JSON value a rank. At any world size, whatever the saves' was.
    What is in memory and is not the result is given up; the result is good until a new snapshot is whole.

    Rank 0 says which newer saves were skipped, and why. Raises CheckpointError, on all ranks, where checkpoints were
    committed and none is whole: to begin again from nothing must be a person's decision.
    """
    return _Recovery(tiers, pieces, rank, world_size, node, gather, peer).run()


@dataclass(frozen=True)
class _Copy:
    """One shard on its way from a node that has it to one that needs it."""

    shard: int
    sender: int
    receiver: int


class _Recovery:
    def __init__(
        self,
        tiers: Tiers,
        pieces: Sequence[Piece] | None,
        rank: int,
        world_size: int,
        node: int,
        gather: Gather,
        peer: PeerLink | None,
    ) -> None:
        self.pieces, self.rank, self.world_size, self.gather, self.peer = pieces, rank, world_size, gather, peer
        self.memory = None if tiers.memory is None else Memory(tiers.memory)
        self.held = {} if self.memory is None else self.memory.held()
        self.disk = LocalPlace(tiers.disk)
        self.remote_url = tiers.remote
        self.reasons: list[str] = []
        self.committed_anywhere = False
        told = gather([node, {save.name: sorted(shards) for save, shards in self.held.items()}])
        self.nodes: list[int] = [node for node, _ in told]
        self.mates = [r for r, n in enumerate(self.nodes) if n == node]  # this node's ranks
        self.in_memory = {_parse(name) for _, held in told for name in held}

    def run(self) -> Checkpoint | None:
        on_disk = set(self._committed(self.disk))
        found, disk_is_whole = None, bool(on_disk)
        for save in sorted(self.in_memory | on_disk, reverse=True):
            found = self._from_memory(save) if save in self.in_memory else None
            if found is None and save in on_disk:
                found = self._from_place(self.disk, save)
                disk_is_whole &= found is not None
            if found is not None:
                break
        if not disk_is_whole:  # the remote store may have what the disk has lost
            found = self._from_remote(found)
        self._give_up_all_but(found)
        if self.rank == 0:
            for reason in self.reasons:
                log.warning("skipped a save: %s", reason)
        if found is None and self.committed_anywhere:
            raise CheckpointError(
                f"no checkpoint in {self.disk} is whole: {'; '.join(self.reasons)}. "
                "Restore one from a copy, or move the folder away to begin again"
            )
        return found

    # --- memory ----------------------------------------------------------------------------------------------------

    def _from_memory(self, save: SaveId) -> Checkpoint | None:
        """The save from the nodes' memories, if together they have all of it; shards this node needs are brought."""
        mine = self.held.get(save, {})
        good: dict[int, str] = {}
        bad: list[str] = []
        for number, (shard, (index, sealed)) in enumerate(sorted(mine.items())):
            if self.mates[number % len(self.mates)] != self.rank:
                continue  # another rank of this node looks at it
            assert self.memory is not None
            reason = _reason_broken(LocalPlace(self.memory.folder), save, index)
            if reason is None:
                good[shard] = _packed(sealed)
            else:
                bad.append(reason)
        holders: dict[int, list[int]] = {}  # shard -> nodes that have it whole
        texts: dict[int, str] = {}
        for rank, (theirs, reasons) in enumerate(self.gather([sorted(good.items()), bad])):
            self.reasons += reasons
            for shard, text in theirs:
                holders.setdefault(shard, []).append(self.nodes[rank])
                texts[shard] = text
        try:
            indexes = [Index.parse(_unpacked(texts[shard]), f"{save} in memory") for shard in sorted(texts)]
            wanted = indexes[0].world_size if indexes else 0
            missing = sorted(set(range(wanted)) - set(texts))
            if missing or not indexes:
                raise CheckpointError(f"{save} in memory: no node has the shard of rank {_listed(missing)}")
            plan = self._plan(Checkpoint.of_shards(indexes, {}), holders)
            if plan and self.peer is None:
                raise CheckpointError(f"{save} in memory: its shards lie on several nodes, which have no peer link")
        except CheckpointError as error:  # the same on all ranks: all saw the same indexes
            self.reasons.append(str(error))
            return None
        failures = [reason for reason in self.gather(self._carry_out(plan, save, texts)) if reason]
        if failures:
            self.reasons += failures
            return None
        assert self.memory is not None
        place = LocalPlace(self.memory.folder)
        return Checkpoint.of_shards(
            indexes, lambda shard: place.source(save, shard_file(shard)), "peer" if plan else "memory"
        )

    def _plan(self, checkpoint: Checkpoint, holders: dict[int, list[int]]) -> list[_Copy]:
        """Which shards go where, the same list on all ranks."""
        own = range(len(holders)) if self.pieces is None else checkpoint.needed(self.pieces)
        plan: dict[tuple[int, int], _Copy] = {}
        wanted: list[list[int]] = self.gather(list(own))
        for receiver, needed in enumerate(wanted):
            for shard in needed:
                node = self.nodes[receiver]
                if node not in holders[shard]:
                    there = [r for r, n in enumerate(self.nodes) if n == holders[shard][0]]
                    sender = there[shard % len(there)]
                    plan.setdefault((shard, node), _Copy(shard, sender, receiver))
        return sorted(plan.values(), key=lambda copy: (copy.shard, copy.receiver))

    def _carry_out(self, plan: Iterable[_Copy], save: SaveId, texts: dict[int, str]) -> str | None:
        """This rank's part of the copies, in the plan's order; returns why one of them is no good."""
        failure: str | None = None
        for copy in plan:
            sealed = _unpacked(texts[copy.shard])
            index = Index.parse(sealed, f"{save} in memory")
            if self.rank == copy.sender:
                assert self.peer is not None and self.memory is not None
                with self.memory.path(save, copy.shard).open("rb") as file:
                    map_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch has no tensor that is read only
                self.peer.send(torch.frombuffer(map_, dtype=torch.uint8), copy.receiver)
            elif self.rank == copy.receiver:
                assert self.peer is not None and self.memory is not None
                try:
                    self.memory.create()
                    slot = self.memory.new_slot(copy.shard, index.size_bytes)
                except OSError as error:
                    # The sender knows nothing of it: what it sends must be taken.
                    self.peer.receive(memoryview(bytearray(index.size_bytes)), copy.sender)
                    failure = f"{save} in memory: no room for the shard of rank {copy.shard}: {error.strerror}"
                    continue
                slot.begin(save)
                self.peer.receive(memoryview(slot.map), copy.sender)
                slot.close()
                reason = _reason_broken(LocalPlace(self.memory.folder), save, index)
                failure = failure or reason
                if reason is None:
                    self.memory.seal(save, copy.shard, sealed)
        return failure

    def _give_up_all_but(self, found: Checkpoint | None) -> None:
        """What lies in memory and is not gone on from must not be found later; its pages serve again."""
        self.gather(None)  # every rank has read what it wanted to
        if self.memory is not None and self.rank == self.mates[0]:
            kept = found.save if found is not None and found.where in ("memory", "peer") else None
            for save, shards in self.memory.held().items():
                if save != kept:
                    for shard in shards:
                        self.memory.invalidate(save, shard)
        self.gather(None)

    # --- disk and remote -------------------------------------------------------------------------------------------

    def _committed(self, place: Place) -> list[SaveId]:
        """As rank 0 sees them, on all ranks."""
        answer: list[str] | str | None = None
        if self.rank == 0:
            try:
                answer = [save.name for save in store.committed(place)]
                if not answer:
                    store.newest_whole(place)  # raises where there are checkpoints of another format
            except CheckpointError as error:
                answer = str(error)
        answer = self.gather(answer)[0]
        if isinstance(answer, str):
            raise (Unreachable if place is not self.disk else CheckpointError)(answer)
        assert answer is not None
        self.committed_anywhere |= bool(answer)
        return [_parse(name) for name in answer]

    def _from_place(self, place: Place, save: SaveId) -> Checkpoint | None:
        """A committed save of which every rank has verified its share of the shards."""
        reason: str | None = None
        checkpoint: Checkpoint | None = None
        try:
            checkpoint = Checkpoint.open(place, save)
            indexes = store.read_indexes(store.read_manifest(place, save))
            for index in indexes[self.rank :: self.world_size]:
                reason = reason or _reason_broken(place, save, index)
        except CheckpointError as error:
            reason = str(error)
        reasons = [reason for reason in self.gather(reason) if reason]
        self.reasons += list(dict.fromkeys(reasons))
        return None if reasons else checkpoint

    def _from_remote(self, local: Checkpoint | None) -> Checkpoint | None:
        """The newest whole save of the remote store, if it is newer than what was found so far."""
        if self.remote_url is None:
            return local
        try:
            place = open_place(self.remote_url)
            saves = self._committed(place)
        except CheckpointError as error:
            if self.rank == 0:
                log.warning("remote store not asked for saves: %s", error)
            return local
        for save in saves:
            if local is not None and save <= local.save:
                return local
            found = self._from_place(place, save)
            if found is not None:
                return found
        return local


def _reason_broken(place: Place, save: SaveId, index: Index) -> str | None:
    """Why a shard does not have the bytes that its index tells of; None where it does."""
    try:
        store.verify_shard(place, save, index)
    except CheckpointError as error:
        return str(error)
    return None


def _packed(sealed: bytes) -> str:
    return base64.b85encode(zlib.compress(sealed, 1)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _parse(name: str) -> SaveId:
    save = SaveId.parse(name)
    assert save is not None, name
    return save
