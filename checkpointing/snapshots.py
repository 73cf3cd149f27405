"""Two slots in memory for a rank's shard, and two for each shard that it keeps a copy of: how state gets into them."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpointing.failpoints import failpoint
from checkpointing.layout import CheckpointError, Index, SaveId, ShardLayout, checksum_of
from checkpointing.memory import Memory, Slot
from checkpointing.peers import PeerLink
from checkpointing.places import index_file

# Elementwise minimum over ranks, at every rank: a collective, of the training process's main thread.
Agree = Callable[[list[float]], list[float]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceCopy:
    """A copy that a GPU has been told to make."""

    device: torch.device
    done: torch.Event


class Buffers:
    """The slots of one rank, mapped and touched for the length of a stage.

    Slot 0 of every rank holds nothing at first. Slot 1 holds `kept`, the save that the run goes on from, where that
    lies in memory whole and as this run would lay it out, on all ranks; otherwise it is kept aside.
    """

    def __init__(
        self,
        memory: Memory | None,
        layout: ShardLayout,
        *,
        rank: int,
        world_size: int,
        agree: Agree,
        peer: PeerLink | None,
    ) -> None:
        """Collective. Where a rank's memory folder has no room, all go on with anonymous slots, and say so."""
        self.layout, self.rank, self.world_size, self.agree = layout, rank, world_size, agree
        self.memory, self.peer, self.kept = memory, peer, None
        self.slots: dict[int, tuple[Slot, Slot]] = {}  # by the rank whose shards they hold
        if memory is not None and not self._open(memory):
            self.memory = None
        if self.memory is None:
            size_bytes = layout.size_bytes
            self.peer, self.kept = None, None
            self.slots = {rank: (Slot.anonymous(rank, size_bytes), Slot.anonymous(rank, size_bytes))}
        self._pinned: list[int] = []
        self._parts = [self._lay_out(slot) for slot in self.slots[rank]]
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def own(self) -> tuple[Slot, Slot]:
        return self.slots[self.rank]

    def close(self) -> None:
        self._parts = []
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)  # pyright: ignore
        for slot in [slot for pair in self.slots.values() for slot in pair]:
            slot.close()
        self.slots, self._pinned = {}, []

    # --- the copy --------------------------------------------------------------------------------------------------

    def ready(self, tensors: Sequence[Tensor]) -> list[torch.Event]:
        """For each GPU an event after which its tensors have the values that they have for the caller now."""
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        for device in devices:
            self._streams.setdefault(device, torch.cuda.Stream(device))
        return [torch.cuda.current_stream(device).record_event() for device in devices]

    def copy(
        self, number: int, save: SaveId, tensors: Sequence[Tensor], ready: Sequence[torch.Event]
    ) -> list[DeviceCopy]:
        """Copy the state into a slot: done on return, but for what GPUs have yet to do."""
        self.own[number].begin(save)
        for stream in self._streams.values():
            for event in ready:
                stream.wait_event(event)
        parts = self._parts[number]
        for n, (part, tensor) in enumerate(zip(parts, tensors, strict=True)):
            if n == len(parts) // 2:
                failpoint("snapshot.copying", rank=self.rank, step=save.step)
            _require_like(part, tensor)
            if tensor.is_cuda:
                with torch.cuda.stream(self._streams[tensor.device]):
                    part.copy_(tensor, non_blocking=True)
            else:
                # torch would copy with a team of threads, which the step's own team needs. ctypes lets go of the GIL.
                ctypes.memmove(part.data_ptr(), tensor.data_ptr(), part.nbytes)
        return [DeviceCopy(device, stream.record_event()) for device, stream in self._streams.items()]

    def exchange(self, number: int, save: SaveId, *, sealed: bool) -> bool:
        """Bring the sealed shard to the partner, and take the copies that are kept here; whether they are all whole.

        To be called for every save on every rank, sealed or not: the others count on it.
        """
        if self.peer is None or self.memory is None:
            return sealed
        kept = {rank: pair[number] for rank, pair in self.slots.items() if rank != self.rank}
        for slot in kept.values():
            slot.begin(save)
        failpoint("peer.sending", rank=self.rank, step=save.step)
        shard, index = None, b""
        if sealed:
            shard = memoryview(self.own[number].map)
            index = self.memory.path(save, self.rank).with_name(index_file(self.rank)).read_bytes()
        received = self.peer.exchange(shard, index, {rank: memoryview(slot.map) for rank, slot in kept.items()})
        for rank, text in received.items():
            self.memory.seal(save, rank, text)
        return sealed and len(received) == len(kept)

    # --- making them -----------------------------------------------------------------------------------------------

    def _open(self, memory: Memory) -> bool:
        """Make or take over the slots in the memory folder; False, on all ranks, where one has no room for them."""
        sizes = self.peer.gather_sizes(self.layout.size_bytes) if self.peer is not None else []
        error: OSError | None = None
        held: dict[SaveId, dict[int, tuple[Index, bytes]]] = {}
        try:
            memory.create()
            held = memory.held()
        except OSError as caught:
            error = caught
        # `recover` left at most one save here: the one that the run goes on from.
        mine = next((save for save, shards in held.items() if self._fits(shards.get(self.rank))), None)
        values = [-1.0, -1.0] if mine is None else [float(mine.epoch), float(mine.sequence)]
        least = self.agree([*values, *(-value for value in values)])
        everywhere = least[0] >= 0 and least[:2] == [-value for value in least[2:]]
        self.kept = mine if everywhere else None
        try:
            if error is None:
                self.slots[self.rank] = memory.slots(self.rank, self.layout.size_bytes, self.kept)
                for rank in self.peer.sources if self.peer is not None else ():
                    copied = self.kept is not None and rank in held[self.kept]
                    self.slots[rank] = memory.slots(rank, sizes[rank], self.kept if copied else None)
        except OSError as caught:
            error = caught
        if self.agree([float(error is None)])[0]:
            return True
        log.warning(
            "no room in %s for two snapshots of %s bytes a rank (%s): going on without snapshots in memory; give the "
            "machine or container more shared memory (--shm-size), or set checkpoint.memory_every to 0",
            memory.folder,
            f"{self.layout.size_bytes:,}",
            "on another rank" if error is None else error.strerror,
        )
        for slot in [slot for pair in self.slots.values() for slot in pair]:
            slot.close()
            if slot.path is not None and slot.save is None:
                slot.path.unlink(missing_ok=True)
        return False

    def _fits(self, shard: tuple[Index, bytes] | None) -> bool:
        """Whether a shard in memory is as this run would lay it out."""
        if shard is None:
            return False
        index, _ = shard
        theirs = index.world_size, index.size_bytes, index.header_digest
        return theirs == (self.world_size, self.layout.size_bytes, checksum_of(self.layout.header))

    def _lay_out(self, slot: Slot) -> list[Tensor]:
        """Each piece's place in the slot. The header is the same for every save, so it is written once."""
        view, layout = memoryview(slot.map), self.layout
        if slot.save is None:
            view[: len(layout.header)] = layout.header
        if torch.cuda.is_available():
            self._pin(slot)
        return [
            torch.frombuffer(view, dtype=torch.float32, count=piece.length, offset=begin)
            if piece.length
            else torch.empty(0)
            for piece, begin in zip(layout.pieces, layout.begins, strict=True)
        ]

    def _pin(self, slot: Slot) -> None:
        """Let a GPU copy straight into the slot, while this process goes on."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(slot.map))
        status = int(torch.cuda.cudart().cudaHostRegister(address, slot.size_bytes, 0))  # pyright: ignore
        if status == 0:
            self._pinned.append(address)
        else:
            log.warning("snapshot memory could not be pinned (CUDA error %d): copies from the GPU are slower", status)


def _require_like(part: Tensor, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise CheckpointError(f"a snapshot is of flat fp32 tensors, not {tensor.dtype} with strides {tensor.stride()}")
    if tensor.numel() != part.numel():
        raise CheckpointError(f"a piece has {part.numel():,} elements, and the tensor for it {tensor.numel():,}")
