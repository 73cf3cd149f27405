"""Training state in one canonical layout, whatever sharding wrote it and whatever sharding reads it.

Each tensor is a flat range of fp32 elements under its kind and fully-qualified name. A rank saves the chunks it owns
(offset and data); a reader asks for any range of any tensor, and never needs to know how many ranks there were.
Payloads are safetensors files, one a rank, written and read here as streams: the digest is taken on the way to the
disk, and a range is read into its place without the rest of the file.

    folder = save(root, step, chunks, state, rank=rank, world_size=world_size, gather=gather)
    checkpoint = latest(root)
    shard = checkpoint.read("param", "blocks.0.qkv.weight", offset=4096, length=1024)
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from torch import Tensor

from checkpointing import store
from checkpointing.failpoints import failpoint
from checkpointing.store import CheckpointError

Kind = Literal["param", "exp_avg", "exp_avg_sq", "ema"]
Shape = tuple[int, ...]
# All-gather of one small JSON value a rank: rank r's at index r, on every rank. It is the save's only barrier too,
# so a rank that never answers must end in an exception (a collective's time-out), not in silence.
Gather = Callable[[object], list[Any]]

_ELEMENT_BYTES = 4
_WRITE_BYTES = 1 << 26  # 64 MiB at a time: the digest finds each block still in cache


@dataclass(frozen=True, eq=False)
class Chunk:
    """Elements `offset` to `offset + len(data)` of a tensor of `shape`, flattened in C order: fp32 on the CPU."""

    kind: Kind
    name: str
    offset: int
    shape: Shape
    data: Tensor

    def __post_init__(self) -> None:
        data, end = self.data, self.offset + self.data.numel()
        if data.dtype != torch.float32 or data.device.type != "cpu" or data.dim() != 1 or not data.is_contiguous():
            raise ValueError(
                f"{self.kind} {self.name}: a chunk is flat, contiguous fp32 on the CPU, not "
                f"{data.dtype} of shape {tuple(data.shape)} on {data.device}"
            )
        if self.offset < 0 or end > math.prod(self.shape):
            raise ValueError(
                f"{self.kind} {self.name}: elements {self.offset} to {end} lie outside its shape {tuple(self.shape)}"
            )


# --- saving --------------------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    chunks: Sequence[Chunk],
    state: dict[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = lambda mine: [mine],
) -> Path:
    """Write one checkpoint from all ranks together and commit it; returns its folder on every rank.

    `state` is JSON, and rank 0's is kept. Every element of every tensor that any rank names must be in exactly one
    chunk: holes and overlaps are refused before anything is written.

    Guarantee: on return the checkpoint is durable. On CheckpointError, raised on every rank where any rank failed,
    nothing was committed and the attempt's folder is gone; on death anywhere, it is never read.
    """
    peers = _Peers(gather, rank, world_size)
    layouts = peers.together(lambda: _layout(chunks, state))
    tensors = _check_coverage(layouts)  # the same verdict on every rank
    payload_bytes = _ELEMENT_BYTES * sum(math.prod(tensor["shape"]) for tensor in tensors)
    name = peers.first(lambda: store.open_attempt(root, step, payload_bytes).name)
    folder = root / name
    try:
        files = peers.together(lambda: _write_rank_file(folder, step, rank, chunks))
        body = {
            "format": store.FORMAT,
            "step": step,
            "state": state,
            "files": {_rank_file(rank): entry for rank, entry in enumerate(files)},
            "tensors": tensors,
        }
        peers.first(lambda: store.commit(folder, body))
    except CheckpointError:
        if rank == 0:
            store.remove(folder)
        raise
    return folder


class _Peers:
    """The ranks of one save: they act in phases, and what goes wrong on one is raised on all."""

    def __init__(self, gather: Gather, rank: int, world_size: int) -> None:
        self.gather, self.rank, self.world_size = gather, rank, world_size

    def together(self, act: Callable[[], Any]) -> list[Any]:
        """Every rank acts; returns each rank's result, in order."""
        cause: Exception | None = None
        try:
            report = {"result": act()}
        except Exception as error:
            cause, report = error, {"error": str(error)}
        reports = self.gather(report)
        if len(reports) != self.world_size:
            raise CheckpointError(f"{len(reports)} of {self.world_size} ranks answered: nothing is committed")
        errors = [f"rank {rank}: {report['error']}" for rank, report in enumerate(reports) if "error" in report]
        if errors:
            raise CheckpointError("; ".join(errors)) from cause
        return [report["result"] for report in reports]

    def first(self, act: Callable[[], Any]) -> Any:
        """Rank 0 acts, the others wait for it; returns rank 0's result on all."""
        return self.together(act if self.rank == 0 else lambda: None)[0]


def _layout(chunks: Iterable[Chunk], state: dict[str, Any]) -> list[list[Any]]:
    """What a rank tells the others of its chunks, as JSON."""
    if json.loads(store.canonical_json(state)) != state:
        raise ValueError("the state would not come back from JSON as it is: no tuples, and only strings as keys")
    return [[chunk.kind, chunk.name, list(chunk.shape), chunk.offset, chunk.data.numel()] for chunk in chunks]


def _check_coverage(layouts: Sequence[Sequence[Sequence[Any]]]) -> list[dict[str, Any]]:
    """The manifest's list of tensors and of where their elements lie; raises on a hole, an overlap or two shapes."""
    shapes: dict[tuple[str, str], list[int]] = {}
    pieces: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    for rank, layout in enumerate(layouts):
        for kind, name, shape, offset, length in layout:
            if shapes.setdefault((kind, name), shape) != shape:
                raise CheckpointError(f"{kind} {name} has shape {shapes[kind, name]}, but rank {rank} says {shape}")
            if length:
                pieces[kind, name].append((offset, length, rank))
    tensors: list[dict[str, Any]] = []
    for (kind, name), shape in sorted(shapes.items()):
        end, owner = 0, -1
        chunks = sorted(pieces[kind, name])
        for offset, length, rank in [*chunks, (math.prod(shape), 0, -1)]:
            if offset > end:
                raise CheckpointError(f"{kind} {name}: no rank has its elements {end} to {offset}")
            if offset < end:
                shared = f"elements {offset} to {min(end, offset + length)}"
                raise CheckpointError(f"{kind} {name}: ranks {owner} and {rank} both have its {shared}")
            end, owner = offset + length, rank
        tensors.append(
            {
                "kind": kind,
                "name": name,
                "shape": shape,
                "dtype": "float32",
                "chunks": [
                    {"file": _rank_file(rank), "key": _key(kind, name, offset), "offset": offset, "length": length}
                    for offset, length, rank in chunks
                ],
            }
        )
    return tensors


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _key(kind: str, name: str, offset: int) -> str:
    return f"{kind}/{name}@{offset}"


def _write_rank_file(folder: Path, step: int, rank: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Stream the rank's chunks into its safetensors file, fsynced; returns its size and digest for the manifest."""
    path = folder / _rank_file(rank)
    chunks = [chunk for chunk in chunks if chunk.data.numel()]
    hasher, size = blake3(), 0
    try:
        with path.open("xb") as file:
            for block in _safetensors_blocks(chunks):
                file.write(block)
                hasher.update(block)
                size += len(block)
                failpoint("shard.half_written", rank=rank, step=step)
            store.sync_file(file)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written past byte {size:,}: {error.strerror}") from error
    failpoint("shard.synced", rank=rank, step=step)
    return {"bytes": size, "digest": f"blake3:{hasher.hexdigest()}"}


def _safetensors_blocks(chunks: Sequence[Chunk]) -> Iterable[bytes | memoryview]:
    """The file's bytes in order: header length, header as JSON, then the tensors one after another.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {}
    end = 0
    for chunk in chunks:
        begin, end = end, end + _ELEMENT_BYTES * chunk.data.numel()
        key = _key(chunk.kind, chunk.name, chunk.offset)
        header[key] = {"dtype": "F32", "shape": [chunk.data.numel()], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for chunk in chunks:
        view = _bytes_of(chunk.data)
        for start in range(0, len(view), _WRITE_BYTES):
            yield view[start : start + _WRITE_BYTES]


def _bytes_of(data: Tensor) -> memoryview:
    """The tensor's own memory as bytes; fp32 in the machine's order, which is little-endian wherever torch runs."""
    return data.detach().numpy().data.cast("B")


# --- loading -------------------------------------------------------------------------------------------------------


def latest(root: Path) -> "Checkpoint | None":
    """The newest whole checkpoint in `root`, every digest verified; None where none was ever committed.

    Warns of each newer one it skipped, with the reason; raises where checkpoints exist and none is whole.
    Reads every file once: in a large world let one rank call it and the others `Checkpoint.open` its folder.
    """
    manifest = store.newest_whole(root)
    return None if manifest is None else Checkpoint(manifest)


class Checkpoint:
    """A committed checkpoint, read by ranges."""

    def __init__(self, manifest: store.Manifest) -> None:
        self.manifest = manifest
        self._tensors = {(tensor["kind"], tensor["name"]): tensor for tensor in manifest.body["tensors"]}
        self._begins: dict[Path, dict[str, int]] = {}

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder`, its manifest checked but not its payload: for what `latest` has verified."""
        return cls(store.read_manifest(folder))

    @property
    def folder(self) -> Path:
        return self.manifest.folder

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        return self.manifest.body["state"]

    def tensors(self) -> dict[tuple[Kind, str], Shape]:
        """Shape by kind and name."""
        return {key: tuple(tensor["shape"]) for key, tensor in self._tensors.items()}

    def read(self, kind: Kind, name: str, offset: int = 0, length: int | None = None) -> Tensor:
        """Elements `offset .. offset + length` (to the end, by default) of the flattened tensor, as fp32 on the CPU."""
        tensor = self._tensors.get((kind, name))
        if tensor is None:
            raise CheckpointError(f"{self.folder} has no {kind} {name}: it was saved from another model or optimiser")
        numel = math.prod(tensor["shape"])
        length = numel - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > numel:
            raise ValueError(f"{kind} {name} has {numel} elements: {offset} to {offset + length} cannot be read")
        out = torch.empty(length, dtype=torch.float32, device="cpu")
        for chunk in tensor["chunks"]:
            begin = max(offset, chunk["offset"])
            end = min(offset + length, chunk["offset"] + chunk["length"])
            if begin < end:
                self._read_into(out[begin - offset : end - offset], chunk, begin - chunk["offset"])
        return out

    def _read_into(self, out: Tensor, chunk: dict[str, Any], skip: int) -> None:
        """Fill `out` with the chunk's elements from `skip` on.

        By read, not by memory map: a file cut short under a map kills the process, and here it is an error.
        """
        path = self.folder / chunk["file"]
        begin = self._begin_of(path, chunk["key"]) + _ELEMENT_BYTES * skip
        view = _bytes_of(out)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(begin)
                filled = 0
                while filled < len(view) and (got := file.readinto(view[filled:])):
                    filled += got
        except OSError as error:
            raise CheckpointError(f"{path}, bytes {begin} to {begin + len(view)}: {error.strerror}") from error
        if filled < len(view):
            raise CheckpointError(f"{path}, bytes {begin} to {begin + len(view)}: the file ends after {filled} of them")

    def _begin_of(self, path: Path, key: str) -> int:
        """The byte at which the tensor `key` begins in its file."""
        if path not in self._begins:
            self._begins[path] = _read_header(path)
        return self._begins[path][key]


def _read_header(path: Path) -> dict[str, int]:
    """First byte of each tensor in a safetensors file, by key."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"it claims {size:,} bytes")
            header = json.loads(file.read(size))
        return {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the safetensors header cannot be read: {error}") from error
