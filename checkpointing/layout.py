"""What a shard's bytes mean, without torch: saves, pieces, chunks, and the sealed index that says where each lies.

A shard is one safetensors file: its header, then this rank's pieces one after another. A piece is a flat range of one
fp32 tensor; it is cut into chunks of at most 64 MiB. The index keeps a checksum of each and of the header, so that
no byte of the file is without one and any part can be read and trusted without the rest.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blake3 import blake3
from xxhash import xxh3_128_hexdigest

FORMAT = 3
ELEMENT_BYTES = 4
CHUNK_ELEMENTS = 1 << 24  # 64 MiB: the most that a reader must hold to trust one element

Kind = Literal["param", "exp_avg", "exp_avg_sq", "ema"]
Shape = tuple[int, ...]
Key = tuple[Kind, str]  # of a tensor: its kind and fully-qualified name

_HEADER_ALIGNMENT = 64  # tensors begin on a cache line
_SAVE_NAME = re.compile(r"step-(\d{8,})\.attempt-(\d{6,})-(\d{6,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be trusted; the message says which and why."""


@dataclass(frozen=True, order=True)
class SaveId:
    """One save of a stage: the `sequence`-th of the run with this fencing epoch. Order is time; never used twice."""

    epoch: int
    sequence: int
    step: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"step-{self.step:08d}.attempt-{self.epoch:06d}-{self.sequence:06d}"

    @classmethod
    def parse(cls, name: str) -> "SaveId | None":
        """The save that has this name; None for a name that no save has."""
        match = _SAVE_NAME.fullmatch(name)
        if match is None:
            return None
        step, epoch, sequence = map(int, match.groups())
        save = cls(epoch, sequence, step)
        return save if save.name == name else None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Piece:
    """Elements `offset` to `offset + length` of a tensor of `shape`, flattened in C order."""

    kind: Kind
    name: str
    offset: int
    length: int
    shape: Shape

    def __post_init__(self) -> None:
        end = self.offset + self.length
        if self.offset < 0 or self.length < 0 or end > math.prod(self.shape):
            raise ValueError(
                f"{self.kind} {self.name}: elements {self.offset} to {end} lie outside its shape {tuple(self.shape)}"
            )


@dataclass(frozen=True)
class Extent:
    """A chunk where it lies: at most CHUNK_ELEMENTS of a tensor, from byte `begin` of its file on."""

    kind: Kind
    name: str
    shape: Shape
    offset: int
    length: int
    begin: int
    digest: str = ""

    @property
    def size_bytes(self) -> int:
        return ELEMENT_BYTES * self.length


@dataclass(frozen=True)
class ShardLayout:
    """Where each of a rank's pieces lies in its file: a function of the pieces alone."""

    pieces: tuple[Piece, ...]
    header: bytes  # the file's first bytes: the header's length, and the header with its padding
    begins: tuple[int, ...]  # the byte at which each piece begins
    size_bytes: int  # of the whole file

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "ShardLayout":
        """Raises CheckpointError where two pieces begin at one element.

        Source: the safetensors format, https://github.com/huggingface/safetensors#format.
        """
        entries: dict[str, dict[str, Any]] = {}
        offsets: list[int] = []
        end = 0
        for piece in pieces:
            offsets.append(end)
            if piece.length == 0:
                continue
            key = f"{piece.kind}/{piece.name}@{piece.offset}"
            if key in entries:
                raise CheckpointError(f"{piece.kind} {piece.name}: two pieces begin at its element {piece.offset}")
            end += ELEMENT_BYTES * piece.length
            entries[key] = {"dtype": "F32", "shape": [piece.length], "data_offsets": [offsets[-1], end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        begins = tuple(len(header) + offset for offset in offsets)
        return cls(tuple(pieces), header, begins, len(header) + end)

    def chunks(self) -> Iterator[Extent]:
        """The file after its header, in order."""
        for piece, begin in zip(self.pieces, self.begins, strict=True):
            for start, length in cut(piece.length):
                place = begin + ELEMENT_BYTES * start
                yield Extent(piece.kind, piece.name, piece.shape, piece.offset + start, length, place)


def cut(length: int) -> Iterator[tuple[int, int]]:
    """Start and length of each chunk of a piece; no elements are one chunk of none."""
    for start in range(0, max(length, 1), CHUNK_ELEMENTS):
        yield start, min(CHUNK_ELEMENTS, length - start)


# --- sealed JSON ---------------------------------------------------------------------------------------------------


def canonical_json(value: object) -> bytes:
    """One text for one value: sorted keys, no spaces, UTF-8, and no NaN, which JSON does not know."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(text: bytes) -> str:
    return f"blake3:{blake3(text).hexdigest()}"


def checksum_of(payload: bytes | bytearray | memoryview) -> str:
    """Of a shard's bytes: it finds damage, not intent, and at ten times the speed of a disk."""
    return f"xxh3-128:{xxh3_128_hexdigest(payload)}"


def seal(body: Mapping[str, Any]) -> bytes:
    """The JSON object with its own digest within: no bit of the text can change unseen."""
    return canonical_json({**body, "digest": digest_of(canonical_json(body))})


def unseal(sealed: bytes, where: str) -> dict[str, Any]:
    """What was sealed; raises CheckpointError, naming `where` it was read, if it is damaged or of another format."""
    try:
        body = json.loads(sealed)
        del body["digest"]
        whole = seal(body) == sealed
        format_ = body["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {error!r}") from error
    if not whole:
        raise CheckpointError(f"{where} is damaged: its {len(sealed):,} bytes do not match their digest")
    if format_ != FORMAT:
        raise CheckpointError(f"{where} has format {format_!r}, and this code reads format {FORMAT}")
    return body


def require_plain(state: object) -> None:
    """Raise CheckpointError for a state that JSON would not give back as it is."""
    try:
        plain = json.loads(canonical_json(state)) == state
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state is no JSON: {error}") from error
    if not plain:
        raise CheckpointError("the state would not come back from JSON as it is: no tuples, and only strings as keys")


# --- a shard's index -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """What a rank says of its shard. `digest` is of the sealed text: the manifest names the shard by it."""

    save: SaveId
    rank: int
    world_size: int
    size_bytes: int
    header_bytes: int
    header_digest: str
    chunks: tuple[Extent, ...]
    state: dict[str, Any] | None
    digest: str

    @classmethod
    def parse(cls, sealed: bytes, where: str) -> "Index":
        """Raises CheckpointError, naming `where`, unless every byte of the file that it tells of is in one chunk."""
        body = unseal(sealed, where)
        try:
            save = SaveId.parse(body["save"])
            if save is None:
                raise ValueError(f"{body['save']!r} is no save's name")
            chunks = tuple(_extent(chunk) for chunk in body["chunks"])
            end: int = body["header_bytes"]
            for chunk in chunks:
                if chunk.begin != end or chunk.length > CHUNK_ELEMENTS:
                    raise ValueError(f"{chunk.kind} {chunk.name} at byte {chunk.begin}, and byte {end} is the next")
                end += chunk.size_bytes
            if end != body["bytes"]:
                raise ValueError(f"its chunks end at byte {end} of {body['bytes']}")
            return cls(
                save,
                body["rank"],
                body["world_size"],
                body["bytes"],
                body["header_bytes"],
                body["header_digest"],
                chunks,
                body["state"],
                digest_of(sealed),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where} is no index of a shard: {error!r}") from error


def _extent(chunk: dict[str, Any]) -> Extent:
    piece = Piece(chunk["kind"], chunk["name"], chunk["offset"], chunk["length"], tuple(chunk["shape"]))
    return Extent(piece.kind, piece.name, piece.shape, piece.offset, piece.length, chunk["begin"], chunk["digest"])


def seal_digests(
    layout: ShardLayout,
    save: SaveId,
    rank: int,
    world_size: int,
    digests: Sequence[str],
    state: dict[str, Any] | None = None,
) -> bytes:
    """The sealed index of a shard whose chunks, in order, have these digests."""
    chunks = [
        {
            "kind": chunk.kind,
            "name": chunk.name,
            "shape": list(chunk.shape),
            "offset": chunk.offset,
            "length": chunk.length,
            "begin": chunk.begin,
            "digest": digest,
        }
        for chunk, digest in zip(layout.chunks(), digests, strict=True)
    ]
    return seal(
        {
            "format": FORMAT,
            "save": save.name,
            "rank": rank,
            "world_size": world_size,
            "bytes": layout.size_bytes,
            "header_bytes": len(layout.header),
            "header_digest": checksum_of(layout.header),
            "chunks": chunks,
            "state": state,
        }
    )


def seal_index(
    layout: ShardLayout,
    save: SaveId,
    rank: int,
    world_size: int,
    payload: memoryview,
    state: dict[str, Any] | None = None,
) -> bytes:
    """The sealed index of a shard that lies in memory: `payload` is its whole file, the header included."""
    require_whole(layout, payload)
    digests = [checksum_of(payload[chunk.begin : chunk.begin + chunk.size_bytes]) for chunk in layout.chunks()]
    return seal_digests(layout, save, rank, world_size, digests, state)


def require_whole(layout: ShardLayout, payload: memoryview) -> None:
    """Raise ValueError unless `payload` has the layout's length and header."""
    if len(payload) != layout.size_bytes or bytes(payload[: len(layout.header)]) != layout.header:
        raise ValueError(
            f"{len(payload):,} bytes are not a shard of this layout, which has {layout.size_bytes:,}, header first"
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a save: where its elements lie, as (rank, chunk) in the order of their offsets, without a hole."""

    shape: Shape
    parts: tuple[tuple[int, Extent], ...]


def cover(indexes: Sequence[Index]) -> dict[Key, StoredTensor]:
    """Where every element of every tensor lies, by kind and name.

    Raises CheckpointError on a hole, an overlap, or two shapes of one tensor, and where the indexes are not those of
    every rank of one save.
    """
    if not indexes:
        raise CheckpointError("a save of no rank holds nothing")
    first = indexes[0]
    for rank, index in enumerate(indexes):
        if (index.save, index.world_size, index.rank) != (first.save, len(indexes), rank):
            raise CheckpointError(
                f"shards of two saves are mixed: rank {index.rank} of {index.world_size} of {index.save} "
                f"stands where rank {rank} of {len(indexes)} of {first.save} should"
            )
    shapes: dict[Key, Shape] = {}
    parts: dict[Key, list[tuple[int, Extent]]] = {}
    for index in indexes:
        for chunk in index.chunks:
            key = chunk.kind, chunk.name
            if shapes.setdefault(key, chunk.shape) != chunk.shape:
                raise CheckpointError(
                    f"{chunk.kind} {chunk.name} has shape {list(shapes[key])}, "
                    f"but rank {index.rank} says {list(chunk.shape)}"
                )
            held = parts.setdefault(key, [])
            if chunk.length:
                held.append((index.rank, chunk))
    tensors: dict[Key, StoredTensor] = {}
    for (kind, name), shape in sorted(shapes.items()):
        held = sorted(parts[kind, name], key=lambda part: (part[1].offset, part[1].length, part[0]))
        end, owner = 0, -1
        for rank, offset, length in [*((r, c.offset, c.length) for r, c in held), (-1, math.prod(shape), 0)]:
            if offset > end:
                raise CheckpointError(f"{kind} {name}: no rank has its elements {end} to {offset}")
            if offset < end:
                shared = f"elements {offset} to {min(end, offset + length)}"
                raise CheckpointError(f"{kind} {name}: ranks {owner} and {rank} both have its {shared}")
            end, owner = offset + length, rank
        tensors[kind, name] = StoredTensor(shape, tuple(held))
    return tensors
