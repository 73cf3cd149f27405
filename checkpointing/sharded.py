"""Training state in one canonical layout, whatever sharding wrote it and whatever sharding reads it.

Each tensor is a flat range of fp32 elements under its kind and fully-qualified name. A rank saves the pieces it owns;
a reader asks for any range of any tensor, and never needs to know how many ranks there were. What is read was verified
on the way: no byte reaches the caller that is not as it was saved.

    save_now(place, SaveId(epoch, sequence, step), chunks, state, rank=rank, world_size=world_size)
    checkpoint = latest(root)
    shard = checkpoint.read("param", "blocks.0.qkv.weight", offset=4096, length=1024)

Torch is imported where a tensor is made, so that a writer process need not wait for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpointing import store
from checkpointing.layout import (
    ELEMENT_BYTES,
    CheckpointError,
    Extent,
    Index,
    Key,
    Kind,
    Piece,
    SaveId,
    Shape,
    ShardLayout,
    StoredTensor,
    checksum_of,
    cover,
    cut,
    require_plain,
    require_whole,
    seal_digests,
    seal_index,
)
from checkpointing.places import (
    LocalPlace,
    Place,
    Source,
    index_file,
    open_place,
    read_verified,
    shard_file,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Checkpoint",
    "Chunk",
    "Index",
    "Kind",
    "Piece",
    "Shape",
    "ShardLayout",
    "Source",
    "latest",
    "reshard",
    "save_now",
    "seal_index",
    "write_shard",
]

Tier = Literal["memory", "peer", "disk", "remote"]
_TIMEOUT_S = 600.0

assert sys.byteorder == "little", "fp32 payloads are written as they lie in memory, and safetensors is little-endian"


@dataclass(frozen=True, eq=False)
class Chunk:
    """Elements `offset` to `offset + len(data)` of a tensor of `shape`, flattened in C order: fp32 on the CPU."""

    kind: Kind
    name: str
    offset: int
    shape: Shape
    data: Tensor

    def __post_init__(self) -> None:
        import torch

        data = self.data
        if data.dtype != torch.float32 or data.device.type != "cpu" or data.dim() != 1 or not data.is_contiguous():
            raise ValueError(
                f"{self.kind} {self.name}: a chunk is flat, contiguous fp32 on the CPU, not "
                f"{data.dtype} of shape {tuple(data.shape)} on {data.device}"
            )
        assert self.piece.length == data.numel()

    @property
    def piece(self) -> Piece:
        """The same without its data; ValueError where it lies outside its tensor."""
        return Piece(self.kind, self.name, self.offset, self.data.numel(), tuple(self.shape))


# --- saving --------------------------------------------------------------------------------------------------------


def write_shard(
    place: Place,
    save: SaveId,
    rank: int,
    world_size: int,
    layout: ShardLayout,
    payload: memoryview,
    index: bytes | None = None,
) -> None:
    """Write a shard that lies in memory (`payload`: its whole file, header included), then its sealed index.

    Both are durable on return, in this order. Without `index` the payload is digested while it is written.
    On failure rank 0 is told through the place, so that `commit` need not wait for its time-out.
    """
    require_whole(layout, payload)
    blocks = (payload[chunk.begin : chunk.begin + chunk.size_bytes] for chunk in layout.chunks())
    try:
        _write(place, save, rank, world_size, layout, blocks, index)
    except CheckpointError as error:
        store.report_failure(place, save, rank, str(error))
        raise


def _write(
    place: Place,
    save: SaveId,
    rank: int,
    world_size: int,
    layout: ShardLayout,
    blocks: Iterable[memoryview],
    index: bytes | None = None,
) -> None:
    """Write a shard from one block a chunk, then its index; a block may be overwritten once the next is asked for."""
    digests: list[str] = []

    def digested(pool: ThreadPoolExecutor) -> Iterator[bytes | memoryview]:
        yield layout.header
        for block in blocks:
            digest: Future[str] | None = None if index else pool.submit(checksum_of, block)
            yield block  # the place writes it meanwhile
            if digest is not None:
                digests.append(digest.result())

    with ThreadPoolExecutor(1) as pool:
        place.write(save, shard_file(rank), digested(pool))
    index = index or seal_digests(layout, save, rank, world_size, digests)
    place.put(save, index_file(rank), index)


def save_now(
    place: Place,
    save: SaveId,
    chunks: Sequence[Chunk],
    state: dict[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    timeout_s: float = _TIMEOUT_S,
    still_mine: Callable[[], bool] = lambda: True,
) -> None:
    """Write this rank's shard and see the save committed: the plain synchronous save, called by every rank.

    `state` is JSON, and rank 0's is kept. Every element of every tensor that any rank names must be in exactly one
    chunk. Ranks speak through the place alone.

    Guarantee: on return the checkpoint is durable. On CheckpointError, raised on every rank where any rank failed,
    nothing was committed; on death anywhere, what was written is never read.
    """
    try:
        require_plain(state)
        layout = ShardLayout.of([chunk.piece for chunk in chunks])
        place.open(save, world_size * layout.size_bytes)
        _write(place, save, rank, world_size, layout, _blocks(chunks))
        if rank == 0:
            store.commit(place, save, world_size, state, timeout_s=timeout_s, still_mine=still_mine)
        else:
            store.wait_for_commit(place, save, timeout_s)
    except Exception as error:
        cleared_away = rank != 0 and not place.has(save, shard_file(rank))
        store.give_up(place, save, rank, world_size, str(error))
        if cleared_away:
            store.wait_for_commit(place, save, timeout_s)  # rank 0 did so, and says why
        raise


def _blocks(chunks: Sequence[Chunk]) -> Iterator[memoryview]:
    """The chunks' memory, one block for each chunk of their layout."""
    for chunk in chunks:
        view = _bytes_of(chunk.data)
        for start, length in cut(chunk.data.numel()):
            yield view[ELEMENT_BYTES * start : ELEMENT_BYTES * (start + length)]


def _bytes_of(data: Tensor) -> memoryview:
    """The tensor's own memory as bytes."""
    if data.numel() == 0:  # an empty view has no cast
        return memoryview(b"")
    return data.detach().numpy().data.cast("B")


# --- loading -------------------------------------------------------------------------------------------------------


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `root`, every byte verified; None where none was ever committed.

    Warns of each newer one it skipped, with the reason; raises where checkpoints exist and none is whole.
    Reads every file once: in a large world let one rank call it and the others `Checkpoint.open` what it found.
    """
    manifest = store.newest_whole(LocalPlace(root))
    return None if manifest is None else Checkpoint.open(manifest.place, manifest.save)


class Checkpoint:
    """A save, read by ranges: each chunk is verified as it is read, and one chunk at most is held. Not thread-safe."""

    def __init__(
        self,
        indexes: Sequence[Index],
        state: dict[str, Any],
        sources: Callable[[int], Source],
        where: Tier,
        name: str,
    ) -> None:
        """For `open` and `of_shards`; `name` is what errors call the save."""
        self.save, self.state, self.where, self.name = indexes[0].save, state, where, name
        self._tensors = cover(indexes)
        self._source = sources
        self._sources: dict[int, Source] = {}
        self._buffer = bytearray()
        self._held: tuple[int, Extent] | None = None  # whose verified bytes the buffer holds

    @classmethod
    def open(cls, place: Place | Path, save: SaveId | None = None) -> Checkpoint:
        """A committed save, or one's folder: manifest and indexes are verified now, the payload as it is read."""
        if save is None:
            folder = Path(str(place))
            place, save = LocalPlace(folder.parent), SaveId.parse(folder.name)
            if save is None:
                raise CheckpointError(f"{folder} is no save's folder: its name is not one")
        place = open_place(place)
        manifest = store.read_manifest(place, save)
        found, tier = save, "disk" if isinstance(place, LocalPlace) else "remote"
        return cls(
            store.read_indexes(manifest),
            manifest.state,
            lambda rank: place.source(found, shard_file(rank)),
            tier,
            place.path(save),
        )

    @classmethod
    def of_shards(
        cls, indexes: Sequence[Index], sources: Callable[[int], Source] | Mapping[int, Source], where: Tier = "memory"
    ) -> Checkpoint:
        """A save without a manifest: all of its ranks' indexes, which carry the state, and where the shards lie.

        Sources are asked for as ranks are read: those that `needed` does not name may be absent.
        """
        ordered = sorted(indexes, key=lambda index: index.rank)
        state = ordered[0].state
        if state is None or any(index.state != state for index in ordered):
            raise CheckpointError(f"{ordered[0].save}: the ranks' indexes do not carry one and the same state")
        of_rank = sources if callable(sources) else sources.__getitem__
        return cls(ordered, state, of_rank, where, f"{ordered[0].save} in {where}")

    @property
    def step(self) -> int:
        return self.save.step

    @property
    def folder(self) -> Path:
        """The save's folder, where it lies on a disk."""
        return Path(self.name)

    def tensors(self) -> dict[Key, Shape]:
        """Shape by kind and name."""
        return {key: tensor.shape for key, tensor in self._tensors.items()}

    def require(self, shapes: Mapping[Key, Shape]) -> None:
        """Raise CheckpointError unless the save has exactly these tensors; the first that differs is named."""
        saved = self.tensors()
        for kind, name in [*shapes, *saved]:
            ours, theirs = shapes.get((kind, name)), saved.get((kind, name))
            if ours is not None and theirs is not None and tuple(ours) == theirs:
                continue
            has, wanted = ("has none" if s is None else f"has shape {list(s)}" for s in (theirs, ours))
            raise CheckpointError(
                f"{self.name} is a checkpoint of another model: {kind} {name} {has} there, and the model {wanted}. "
                "Set the model back to what was saved, or start in a new folder"
            )

    def needed(self, pieces: Iterable[Piece]) -> list[int]:
        """The ranks whose shards hold any element of these pieces."""
        ranks: set[int] = set()
        for piece in pieces:
            ranks.update(rank for rank, *_ in self._parts(piece.kind, piece.name, piece.offset, piece.length))
        return sorted(ranks)

    def read(self, kind: Kind, name: str, offset: int = 0, length: int | None = None) -> Tensor:
        """Elements `offset .. offset + length` (to the end, by default) of the flattened tensor, as fp32 on the CPU."""
        import torch

        if length is None:
            length = max(math.prod(self._tensor(kind, name).shape) - offset, 0)
        out = torch.empty(length, dtype=torch.float32, device="cpu")
        self.read_into(kind, name, offset, out)
        return out

    def read_into(self, kind: Kind, name: str, offset: int, out: Tensor) -> None:
        """Fill the flat fp32 tensor `out`, on any device, with the elements from `offset` on.

        Beside `out` at most one chunk (64 MiB) is held. On CheckpointError `out` may hold anything.
        """
        import torch

        if out.dim() != 1 or out.dtype != torch.float32:
            raise ValueError(f"{kind} {name}: reads fill flat fp32, not {out.dtype} of shape {tuple(out.shape)}")
        if out.device.type == "cpu" and out.is_contiguous():
            self.read_bytes(kind, name, offset, _bytes_of(out))
            return
        for rank, chunk, begin, end in self._parts(kind, name, offset, len(out)):
            part = torch.frombuffer(self._verified(rank, chunk), dtype=torch.float32)
            start = chunk.offset + begin - offset
            out[start : start + end - begin].copy_(part[begin:end])

    def read_bytes(self, kind: Kind, name: str, offset: int, out: memoryview) -> None:
        """As `read_into`, for memory of 4 bytes an element, without torch."""
        for rank, chunk, begin, end in self._parts(kind, name, offset, len(out) // ELEMENT_BYTES):
            start = ELEMENT_BYTES * (chunk.offset + begin - offset)
            part = out[start : start + ELEMENT_BYTES * (end - begin)]
            if end - begin == chunk.length and self._held != (rank, chunk):
                read_verified(self._source_of(rank), chunk.begin, part, chunk.digest)
            else:
                part[:] = self._verified(rank, chunk)[ELEMENT_BYTES * begin : ELEMENT_BYTES * end]

    def close(self) -> None:
        """Keep none of the save's files open; reading on opens them again."""
        for source in self._sources.values():
            source.close()

    def _tensor(self, kind: Kind, name: str) -> StoredTensor:
        tensor = self._tensors.get((kind, name))
        if tensor is None:
            raise CheckpointError(f"{self.name} has no {kind} {name}: it was saved from another model or optimiser")
        return tensor

    def _parts(self, kind: Kind, name: str, offset: int, length: int) -> Iterator[tuple[int, Extent, int, int]]:
        """What the range is made of: rank, chunk, and the elements [begin, end) of that chunk."""
        tensor = self._tensor(kind, name)
        numel = math.prod(tensor.shape)
        if offset < 0 or offset + length > numel:
            raise ValueError(f"{kind} {name} has {numel} elements: {offset} to {offset + length} cannot be read")
        for rank, chunk in tensor.parts:
            begin, end = max(offset, chunk.offset), min(offset + length, chunk.offset + chunk.length)
            if begin < end:
                yield rank, chunk, begin - chunk.offset, end - chunk.offset

    def _verified(self, rank: int, chunk: Extent) -> memoryview:
        """The chunk's bytes, in the one buffer: good until the next call."""
        if self._held != (rank, chunk):
            self._held = None
            if len(self._buffer) < chunk.size_bytes:
                self._buffer = bytearray(chunk.size_bytes)
            read_verified(
                self._source_of(rank), chunk.begin, memoryview(self._buffer)[: chunk.size_bytes], chunk.digest
            )
            self._held = rank, chunk
        return memoryview(self._buffer)[: chunk.size_bytes]

    def _source_of(self, rank: int) -> Source:
        if rank not in self._sources:
            self._sources[rank] = self._source(rank)
        return self._sources[rank]


# --- another world size --------------------------------------------------------------------------------------------


def reshard(
    checkpoint: Checkpoint, place: Place, world_size: int, progress: Callable[[int], object] = lambda size_bytes: None
) -> None:
    """Write the save again, under the same id in another place, as `world_size` ranks of equal share would have.

    Streams: two chunks at most are held. What is read is verified; on CheckpointError nothing is committed.
    """
    if world_size < 1:
        raise ValueError(f"{checkpoint.name} cannot be written for {world_size} ranks: give 1 or more")
    save, shapes = checkpoint.save, checkpoint.tensors()
    layouts: list[ShardLayout] = []
    for rank in range(world_size):
        pieces: list[Piece] = []
        for (kind, name), shape in shapes.items():
            begin, end = (math.prod(shape) * cut // world_size for cut in (rank, rank + 1))
            pieces.append(Piece(kind, name, begin, end - begin, shape))
        layouts.append(ShardLayout.of(pieces))
    place.open(save, sum(layout.size_bytes for layout in layouts))
    buffer = bytearray(max(chunk.size_bytes for layout in layouts for chunk in layout.chunks()) if shapes else 0)

    def blocks(layout: ShardLayout) -> Iterator[memoryview]:
        for chunk in layout.chunks():
            block = memoryview(buffer)[: chunk.size_bytes]
            checkpoint.read_bytes(chunk.kind, chunk.name, chunk.offset, block)
            yield block
            progress(len(block))

    try:
        for rank, layout in enumerate(layouts):
            _write(place, save, rank, world_size, layout, blocks(layout))
        store.commit(place, save, world_size, checkpoint.state, timeout_s=0)
    except CheckpointError as error:
        store.give_up(place, save, 0, 1, str(error))
        raise
