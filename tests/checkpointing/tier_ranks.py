"""Ranks for the tests of tiers: forked processes joined by gloo, each with its writer process, that can be killed."""

import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpointing.layout import Piece
from checkpointing.peers import PeerLink
from checkpointing.recovery import recover
from checkpointing.sharded import Checkpoint
from checkpointing.tiers import Checkpointer, Tiers

SHAPES = {"scale": (), "prime": (101,), "matrix": (70, 90), "blocks.0.qkv.weight": (60, 400)}
KINDS = ("param", "exp_avg", "exp_avg_sq", "ema")
LIMIT_S = 60.0


@dataclass(frozen=True)
class Run:
    """What every rank of one run of the toy training is told."""

    folder: Path
    memory: Path  # each node's is a folder within
    epoch: int
    nodes: Sequence[int] = (0,)  # each rank's
    steps: int = 0
    every: int = 4
    remote: str | None = None
    keep: int = 3
    pause_s: float = 0.05  # of a step: without it most snapshots are left out
    finish: bool = False
    on_step: Callable[[int, int, Checkpointer], None] = lambda rank, step, checkpointer: None

    def tiers(self, rank: int) -> Tiers:
        return Tiers(self.folder, self.memory / f"node-{self.nodes[rank]}", self.remote, self.keep)


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: 0, 1 where it raised (`error`), -9 where it was killed; and what it said on the way."""

    code: int | None
    resumed: str | None  # the step and tier it went on from, as "12 memory"
    done: list[int]  # the steps of snapshots that were begun
    report: dict[str, Any]
    error: str
    said: str


def value(kind: str, name: str, step: int) -> Tensor:
    """What a tensor is after a step: exact in fp32, and different for every kind, name and step."""
    shape = SHAPES[name]
    first = 1000 * step + 100 * KINDS.index(kind) + list(SHAPES).index(name)
    return torch.arange(first, first + math.prod(shape), dtype=torch.float32)


def pieces(rank: int, world_size: int) -> list[Piece]:
    """The rank's part of every tensor, cut into near-equal ranges; some are empty."""
    found: list[Piece] = []
    for kind in KINDS:
        for name, shape in SHAPES.items():
            begin, end = (math.prod(shape) * cut // world_size for cut in (rank, rank + 1))
            found.append(Piece(kind, name, begin, end - begin, shape))  # pyright: ignore[reportArgumentType]
    return found


def assert_is(checkpoint: Checkpoint, step: int, mine: Sequence[Piece]) -> None:
    assert checkpoint.step == step
    assert checkpoint.state == {"step": step}
    for piece in mine:
        read = checkpoint.read(piece.kind, piece.name, piece.offset, piece.length)
        expected = value(piece.kind, piece.name, step)[piece.offset : piece.offset + piece.length]
        assert torch.equal(read, expected), (piece, step)


def train(rank: int, run: Run, world_size: int, note: Callable[..., None]) -> None:
    """Resume, check every element, take a snapshot after each step and a durable one every few, change in place."""
    mine = pieces(rank, world_size)

    def agree(values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor.tolist()

    def gather(item: object) -> list[Any]:
        items: list[Any] = [None] * world_size
        dist.all_gather_object(items, item)
        return items

    node, tiers = run.nodes[rank], run.tiers(rank)
    peer = PeerLink.join(rank, world_size, node, timeout_s=20)
    place = {"rank": rank, "world_size": world_size, "node": node}
    found = recover(tiers, mine, gather=gather, peer=peer, **place)
    first = 0
    tensors = [value(p.kind, p.name, 0)[p.offset : p.offset + p.length].clone() for p in mine]
    if found is not None:
        note(resumed=f"{found.step} {found.where}")
        assert_is(found, found.step, mine)
        for piece, tensor in zip(mine, tensors, strict=True):
            found.read_into(piece.kind, piece.name, piece.offset, tensor)
        first = found.step
    if not run.steps:
        return
    nodes = len(set(run.nodes))
    with Checkpointer(
        tiers, mine, epoch=run.epoch, num_nodes=nodes, agree=agree, peer=peer, timeout_s=20, **place
    ) as checkpointer:
        for step in range(first + 1, first + run.steps + 1):
            checkpointer.settle()
            for piece, tensor in zip(mine, tensors, strict=True):
                tensor.copy_(value(piece.kind, piece.name, step)[piece.offset : piece.offset + piece.length])
            if checkpointer.snapshot(step, tensors, {"step": step}, durable=step % run.every == 0):
                note(done=step)
            run.on_step(rank, step, checkpointer)
            time.sleep(run.pause_s)
        if run.finish:
            checkpointer.finish()
        else:
            checkpointer.drain()
        newest = checkpointer.newest_durable()
        note(report={**checkpointer.report(), "newest": None if newest is None else newest.step})


def launch(run: Run, environment: Mapping[str, str] | None = None) -> list[Outcome]:
    """Every rank's outcome. When one is killed, the others are given a moment, as a launcher would."""
    world_size, context = len(run.nodes), multiprocessing.get_context("fork")
    folder = run.folder.parent / f"ranks-{time.monotonic_ns()}"
    folder.mkdir()

    def work(rank: int) -> None:
        os.setpgid(0, 0)
        os.environ.update({**(environment or {}), "RANK": str(rank)})
        torch.set_num_threads(1)
        said = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        logging.basicConfig(force=True, stream=sys.stderr)
        notes = (folder / f"{rank}.jsonl").open("a", buffering=1)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size
            )
            train(rank, run, world_size, lambda **note: print(json.dumps(note), file=notes))
        except BaseException as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=notes)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)

    processes = [context.Process(target=work, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT_S
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 3)
    codes = [process.exitcode for process in processes]
    for process in processes:  # and their writers
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            process.join()
    return [_outcome(folder, rank, code) for rank, code in enumerate(codes)]


def _outcome(folder: Path, rank: int, code: int | None) -> Outcome:
    path = folder / f"{rank}.jsonl"
    notes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last: dict[str, Any] = {key: item for note in notes for key, item in note.items()}
    done = [note["done"] for note in notes if "done" in note]
    said = (folder / f"{rank}.err").read_text() if (folder / f"{rank}.err").exists() else ""
    return Outcome(code, last.get("resumed"), done, last.get("report", {}), last.get("error", ""), said)
