"""A job that computes nothing and checkpoints for real: every state is a known function of its step.

What a rank sees it tells its account, a line at once: which save it loaded and whether every bit of it was right, and
each save that the checkpointer told it is durable.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpointing.failpoints import failpoint
from checkpointing.layout import Piece
from checkpointing.peers import PeerLink
from checkpointing.recovery import recover
from checkpointing.sharded import Checkpoint, Chunk, latest, save_now
from checkpointing.store import CheckpointError, LocalPlace, SaveId, fence, holds_fence, prune
from checkpointing.tiers import Checkpointer, Tiers
from tests.chaos import faulty_disk

STEPS, MEMORY_EVERY, DURABLE_EVERY, KEEP = 12, 2, 4, 2
DRAINED = 11  # from here on the save of step 8 is durable, or is known not to be
STEP_S, TIMEOUT_S = 0.02, 6.0
EXIT_WRONG, EXIT_REFUSED = 99, 2  # the state that was loaded is not what was saved; a CheckpointError said so
SHAPES: dict[tuple[str, str], tuple[int, ...]] = {
    (kind, name): shape
    for kind in ("param", "exp_avg", "exp_avg_sq", "ema")
    for name, shape in {"scale": (), "prime": (1009,), "blocks.0.qkv.weight": (60, 41)}.items()
}


def numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def pieces_of(rank: int, world_size: int) -> list[Piece]:
    pieces = []
    for (kind, name), shape in SHAPES.items():
        begin, end = (round(numel(shape) * part / world_size) for part in (rank, rank + 1))
        pieces.append(Piece(kind, name, begin, end - begin, shape))  # pyright: ignore[reportArgumentType]
    return pieces


def expected(piece: Piece, step: int) -> Tensor:
    """The piece once `step` steps are done: whole numbers below 2^23, which fp32 has exactly."""
    seed = zlib.crc32(f"{piece.kind}/{piece.name}".encode())
    numbers = torch.arange(piece.offset, piece.offset + piece.length, dtype=torch.int64)
    return ((numbers * 2654435761 + seed * 31 + step * 40503) % 2**23).to(torch.float32)


def state_at(step: int) -> dict[str, Any]:
    return {"stage": "chaos", "done": step}


def wrong_pieces(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> list[str]:
    """What is not, bit for bit, as the checkpoint's own step has it."""
    wrong = [] if checkpoint.state == state_at(checkpoint.step) else ["state"]
    if checkpoint.tensors() != SHAPES:
        return [*wrong, "list of tensors"]
    for piece in pieces:
        read = checkpoint.read(piece.kind, piece.name, piece.offset, piece.length)
        if not torch.equal(read, expected(piece, checkpoint.step)):
            wrong.append(f"{piece.kind} {piece.name}")
    return wrong


def tiers_of(folder: Path, node: int) -> Tiers:
    return Tiers(disk=folder / "checkpoints", memory=folder / "memory" / f"node-{node}", keep=KEEP)


def run(folder: Path, epoch: int, environment: dict[str, str], plain: bool = False) -> None:
    """Be one rank of the job in `folder`, from what the last attempt left to the last step.

    Its saves go through all tiers and a writer process, or are `plain` ones, which the step waits for.
    """
    os.environ.update(environment)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    log = os.open(folder / f"log-{epoch}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    faulty_disk.install()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{epoch}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    account = Account(folder / f"account-{epoch}-{rank}.jsonl")
    warnings.showwarning = lambda message, *_, **__: account.tell(warned=str(message))
    try:
        _train(folder, epoch, rank, world_size, plain, account)
    except CheckpointError as error:
        account.tell(refused=str(error))
        sys.exit(EXIT_REFUSED)
    dist.destroy_process_group()


class Account:
    """What this process saw, a line each, written as it happens."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._durable: SaveId | None = None
        self.tell(pid=os.getpid())

    def tell(self, **line: Any) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def durable(self, save: SaveId | None) -> None:
        if save is not None and save != self._durable:
            self._durable = save
            faulty_disk.mark(f"durable {save.name}")
            self.tell(durable=save.name)


def _gather(mine: object) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _agree(values: list[float]) -> list[float]:
    least = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least.tolist()


def _train(folder: Path, epoch: int, rank: int, world_size: int, plain: bool, account: Account) -> None:
    num_nodes = int(os.environ.get("NNODES", "1"))
    node = rank * num_nodes // world_size
    known: dict[str, Any] = {"rank": rank, "world_size": world_size}
    pieces, tiers = pieces_of(rank, world_size), tiers_of(folder, node)
    if plain:
        found = _recover_plain(tiers.disk, rank)
    else:
        known["node"] = node
        known["peer"] = PeerLink.join(**known, timeout_s=TIMEOUT_S)
        found = recover(tiers, pieces, **known, gather=_gather)
        known["num_nodes"] = num_nodes
    first = 0
    if found is not None:
        first = found.step
        wrong = wrong_pieces(found, pieces)
        account.tell(loaded=found.save.name, where=found.where, wrong=wrong)
        if wrong:
            sys.exit(EXIT_WRONG)
    known |= {"epoch": epoch, "timeout_s": TIMEOUT_S}
    with _Plain(tiers, pieces, **known) if plain else Checkpointer(tiers, pieces, agree=_agree, **known) as saver:
        for step in range(first, STEPS):
            time.sleep(STEP_S)
            _agree([1.0])  # as the gradients' all-reduce
            saver.settle()
            done = step + 1
            tensors = [expected(piece, done) for piece in pieces]
            failpoint("step.computed", step=step)
            if done % MEMORY_EVERY == 0:
                saver.snapshot(done, tensors, state_at(done), durable=done % DURABLE_EVERY == 0)
            if done == DRAINED:
                try:
                    saver.drain()
                except CheckpointError as error:
                    account.tell(failed=str(error))
            account.durable(saver.newest_durable())
            account.tell(step=done)
        if found is not None and first == STEPS and found.where != "disk":
            # all is done, but for a save that outlives this machine
            tensors = [expected(piece, STEPS) for piece in pieces]
            saver.snapshot(STEPS, tensors, state_at(STEPS), durable=True)
        saver.drain()
        account.durable(saver.newest_durable())
        saver.finish()
    account.tell(finished=STEPS)


class _Plain:
    """`save_now` as a checkpointer: no memory, no writer, the step waits."""

    def __init__(self, tiers: Tiers, pieces: Sequence[Piece], *, epoch: int, rank: int, **known: Any) -> None:
        self.place, self.keep, self.pieces, self.rank, self.known = (
            LocalPlace(tiers.disk),
            tiers.keep,
            pieces,
            rank,
            known,
        )
        self.newest: SaveId | None = None
        self.next = functools.partial(SaveId, epoch)
        self.number = 0
        if rank == 0:
            fence(self.place, epoch)
        self.still_mine = lambda: holds_fence(self.place, epoch)
        _agree([1.0])

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None: ...

    def settle(self) -> None: ...

    drain = finish = settle

    def snapshot(self, step: int, tensors: Sequence[Tensor], state: dict[str, Any], *, durable: bool) -> None:
        if durable:
            self.number += 1
            save = self.next(self.number, step)
            chunks = [
                Chunk(piece.kind, piece.name, piece.offset, piece.shape, data)
                for piece, data in zip(self.pieces, tensors, strict=True)
            ]
            save_now(self.place, save, chunks, state, rank=self.rank, still_mine=self.still_mine, **self.known)
            self.newest = save
            if self.rank == 0:
                prune(self.place, self.keep)

    def newest_durable(self) -> SaveId | None:
        return self.newest


def _recover_plain(root: Path, rank: int) -> Checkpoint | None:
    """Rank 0 verifies every byte, the others open what it found."""
    found = latest(root) if rank == 0 else None
    name = _gather(None if found is None else found.save.name)[0]
    return None if name is None else found or Checkpoint.open(root / name)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), dict(os.environ))
