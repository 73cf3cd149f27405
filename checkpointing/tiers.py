"""Saves that hardly stop the training loop, in tiers: this node's memory, a peer's memory, disk, a remote store.

    with Checkpointer(tiers, pieces, rank=rank, world_size=size, epoch=epoch, agree=agree) as checkpointer:
        for step in ...:
            compute gradients
            checkpointer.settle()                               # the last snapshot's copy is over
            change the weights
            if step % 10 == 0:
                checkpointer.snapshot(step, tensors, state, durable=step % 100 == 0)
        checkpointer.finish()

Weights do not change between one optimizer step and the next, so the copy runs beside the next forward and backward.
Behind it a process of its own digests the copy, writes it to the disk, and commits (see `writer`).

Guarantee: from the first whole snapshot on there is, at every moment, one that is whole on all ranks. There are two
slots a rank; one is overwritten only while the other holds a save that every rank (and its partner on another node) has
sealed, and never while it is being written to the disk.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpointing import disk, store
from checkpointing.failpoints import failpoint
from checkpointing.layout import CheckpointError, Piece, SaveId, ShardLayout, require_plain
from checkpointing.memory import Memory, memory_folder
from checkpointing.peers import PeerLink
from checkpointing.places import LocalPlace
from checkpointing.snapshots import Agree, Buffers, DeviceCopy
from checkpointing.writer import Orders, WriterProcess

__all__ = ["Agree", "Checkpointer", "Tiers", "memory_folder"]

_POLL_S = 0.01
_WORTH_SAYING_S = 1.0
_MOST_FAILURES = 2  # of durable saves in a row: the next one is an error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiers:
    """Where one stage's saves lie. `memory` is this node's folder on tmpfs (`memory_folder`); None: no such tier."""

    disk: Path
    memory: Path | None = None
    remote: str | None = None
    keep: int = 3
    keep_every: int | None = None


@dataclass(eq=False)
class _Snapshot:
    """One save's way through the tiers, as this rank knows it."""

    save: SaveId
    slot: int
    durable: bool
    state: dict[str, Any]
    copied: threading.Event = field(default_factory=threading.Event)
    on_devices: Sequence[DeviceCopy] = ()  # what GPUs may have to do yet of the copy
    digested: threading.Event = field(default_factory=threading.Event)  # the writer sealed it, or failed to
    ended: bool = False  # copied, sealed and at the partner, or failed
    sealed_here: bool = False
    sealed: bool = False  # here, and what this rank keeps for others is too
    flushed: bool = False
    failure: str | None = None

    @property
    def reading_slot(self) -> bool:
        """Whether the writer may be reading its slot for the disk yet."""
        return self.durable and not self.flushed and self.failure is None


class Checkpointer:
    """One rank's saves for the length of a stage. Not thread-safe: for the thread that steps.

    `snapshot` (but not `settle`), `drain` and `finish` are collectives by way of `agree`: all ranks call them alike.
    Leaving the context ends the background work where it is and keeps the memory folder, for `recover`.
    """

    def __init__(
        self,
        tiers: Tiers,
        pieces: Sequence[Piece],
        *,
        rank: int,
        world_size: int,
        epoch: int,
        node: int = 0,
        num_nodes: int = 1,
        agree: Agree,
        peer: PeerLink | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Takes the disk over for `epoch`, touches the buffers and starts the writer, so that the first save is as any.

        pieces: what `snapshot`'s tensors are, in this order. Raises CheckpointError, on all ranks, where a newer run
        has the disk or it cannot be written to.
        """
        self.tiers, self.rank, self.world_size, self.epoch, self.agree = tiers, rank, world_size, epoch, agree
        self.timeout_s = timeout_s
        self.layout = ShardLayout.of(pieces)
        self.place = LocalPlace(tiers.disk)
        self._together("could not take over", self._take_over)
        if num_nodes > 1 and tiers.memory is not None and peer is None:
            log.warning("node %d has no peer link: if it is lost, so are its snapshots in memory", node)
        memory = None if tiers.memory is None else Memory(tiers.memory)
        self._buffers = Buffers(memory, self.layout, rank=rank, world_size=world_size, agree=agree, peer=peer)
        self.memory, kept = self._buffers.memory, self._buffers.kept

        self._sequence = 0
        self._whole = [False, kept is not None]  # of each slot: whether it holds a save that is whole on all ranks
        self._newest_slot = 1
        self._leftovers = self.memory is not None  # of earlier runs, until a snapshot is whole
        self._current: _Snapshot | None = None
        self._durable: dict[SaveId, _Snapshot] = {}  # asked for and not committed, as far as this rank knows
        self._asked: SaveId | None = None
        self._committed: SaveId | None = None
        self._failed = -1  # sequence of the newest durable save that failed here
        self._failures = 0  # in a row
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

        self._heard = threading.Condition()
        self._finished: bool | None = None
        self._writer: WriterProcess | None = self._start_writer()
        self._jobs: queue.Queue[tuple[_Snapshot, list[Tensor], list[torch.Event]] | None] = queue.Queue()
        self._copying = threading.Thread(target=self._copy_all, name="snapshots", daemon=True)
        self._copying.start()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for the loop ----------------------------------------------------------------------------------------------

    def snapshot(self, step: int, tensors: Sequence[Tensor], state: dict[str, Any], *, durable: bool) -> bool:
        """Begin to save `tensors` (flat fp32, as `pieces`) and `state` (JSON, the same on every rank).

        The tensors must not change before `settle`; the state may.

        Returns whether it was begun, the same on all ranks. One that is not durable is left out where the last one is
        not whole yet or no slot is free; a durable one waits for that. Where two durable saves in a row came to
        nothing, the next raises CheckpointError, on all ranks.
        """
        if not durable and self.memory is None:
            return False
        self.settle()
        begin = time.perf_counter()
        require_plain(state)
        slot = self._admit(wait=durable)
        waited = time.perf_counter() - begin
        self._seconds["wait_s" if durable else "asking_s"] += waited
        if slot is None:
            self._counts["skipped"] += 1
            self._stalled(begin)
            return False
        if waited > _WORTH_SAYING_S:
            log.warning(
                "step %d: waited %.1f s for earlier saves: the disk is slower than the interval asks", step, waited
            )
        self._sequence += 1
        snapshot = _Snapshot(SaveId(self.epoch, self._sequence, step), slot, durable, deepcopy(state))
        self._whole[slot] = False
        if durable:
            self._asked = snapshot.save
            self._durable[snapshot.save] = snapshot
        self._current = snapshot
        self._jobs.put((snapshot, [tensor.detach() for tensor in tensors], self._buffers.ready(tensors)))
        self._counts["durable" if durable else "in_memory"] += 1
        self._stalled(begin)
        return True

    def settle(self) -> None:
        """On return the last snapshot's tensors may change. On a GPU, its stream waits and this thread does not."""
        snapshot = self._current
        if snapshot is None or (snapshot.copied.is_set() and not snapshot.on_devices):
            return
        begin = time.perf_counter()
        snapshot.copied.wait()
        for copy in snapshot.on_devices:
            torch.cuda.current_stream(copy.device).wait_event(copy.done)
        snapshot.on_devices = ()
        self._stalled(begin)

    def drain(self) -> None:
        """On return the last durable save is committed, on the disk; CheckpointError, on all ranks, says why it is not.

        What was whole in memory stays so.
        """
        self.settle()
        begin = time.perf_counter()
        while self._asked is not None:
            failed, committed, blamed = self._exchange_durable()
            if committed >= self._asked.sequence:
                break
            if failed >= self._asked.sequence:
                raise CheckpointError(self._blame(blamed))
            time.sleep(_POLL_S)
        self._seconds["drain_s"] += time.perf_counter() - begin

    def newest_durable(self) -> SaveId | None:
        """This run's newest save that is known to be committed; after `drain` the same on all ranks."""
        return self._committed

    def finish(self) -> None:
        """The stage is done, or its process told to end: `drain`, let the remote store catch up, give the memory back.

        A remote store that does not answer is waited for no longer; it is said, and the next run makes up for it.
        """
        self.drain()
        self._together("could not finish", self._finish_remote)
        self.close()
        if self.memory is not None:
            self.memory.remove()

    @property
    def writer_pid(self) -> int | None:
        """The background process, where it lives."""
        return None if self._writer is None else self._writer.pid

    def report(self) -> dict[str, Any]:
        """Seconds of the loop (stall_s, of which wait_s and asking_s; drain_s) and beside it; and counts."""
        return {**self._seconds, **self._counts, "shard_bytes": self.layout.size_bytes}

    def close(self) -> None:
        """End the background work where it is; what was copied is sealed yet."""
        if self._copying.is_alive():
            self._jobs.put(None)
            self._copying.join(timeout=10)
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._buffers.close()

    # --- admission -------------------------------------------------------------------------------------------------

    def _admit(self, *, wait: bool) -> int | None:
        """The slot that all ranks may overwrite now; None where there is none and we are not to wait."""
        while True:
            with self._heard:
                current = self._current
                ended = current is None or current.ended
                sealed = current is None or current.sealed
                reading = {snapshot.slot for snapshot in self._durable.values() if snapshot.reading_slot}
            mine = [ended, sealed, 0 not in reading, 1 not in reading, *self._durable_values()]
            theirs = self.agree([float(value) for value in mine])
            ended, sealed, *free = (bool(value) for value in theirs[:4])
            self._learn(theirs[4:])
            if self._failing is not None:
                raise CheckpointError(self._blame(self._failing))
            if ended and (slot := self._choose(sealed, free)) is not None:
                if self._writer is None:
                    log.warning("starting the writer process again")
                    self._writer = self._start_writer()
                return slot
            if not wait:
                return None
            time.sleep(_POLL_S)

    def _choose(self, sealed: bool, free: Sequence[bool]) -> int | None:
        current, self._current = self._current, None
        if current is not None:
            self._whole[current.slot] = sealed
            if sealed:
                self._newest_slot = current.slot
                self._remove_leftovers()
        older = 1 - self._newest_slot
        if free[older] and (self._whole[self._newest_slot] or not any(self._whole)):
            return older
        if free[self._newest_slot] and self._whole[older]:
            return self._newest_slot
        return None

    def _remove_leftovers(self) -> None:
        if self._leftovers and self.memory is not None:
            self._leftovers = False
            self.memory.remove_before(self.epoch, self._buffers.kept)

    # --- what ranks tell each other of durable saves ---------------------------------------------------------------

    def _durable_values(self) -> list[float]:
        with self._heard:
            failed, failures = self._failed, self._failures
            committed = -1 if self._committed is None else self._committed.sequence
        newest = -1 if self._asked is None else self._asked.sequence
        return [
            -failed,
            self.rank if 0 <= newest <= failed else math.inf,
            self.rank if failures >= _MOST_FAILURES else math.inf,
            committed if self.rank == 0 else math.inf,  # rank 0 commits
        ]

    def _learn(self, values: Sequence[float]) -> tuple[int, int, int]:
        """From the minima of `_durable_values`: newest failed sequence, newest committed one, a rank that failed."""
        failed, committed = -int(values[0]), int(values[3])
        self._failing = None if math.isinf(values[2]) else int(values[2])
        with self._heard:
            for save, snapshot in list(self._durable.items()):
                if save.sequence == committed and self.rank != 0:  # rank 0 may have heard of a newer one since
                    self._committed = save
                if save.sequence <= committed or (save.sequence == failed and not snapshot.reading_slot):
                    del self._durable[save]
        return failed, committed, -1 if math.isinf(values[1]) else int(values[1])

    def _exchange_durable(self) -> tuple[int, int, int]:
        return self._learn(self.agree(self._durable_values()))

    def _take_over(self) -> None:
        if self.rank == 0:
            disk.make_folder(self.tiers.disk)
            store.fence(self.place, self.epoch)

    def _blame(self, rank: int) -> str:
        if self._why is not None:
            return self._why
        return f"rank {rank} could not save to {self.place}: its log says why"

    def _together(self, what: str, act: Callable[[], object]) -> None:
        """Act on every rank; CheckpointError on all where one fails."""
        error: Exception | None = None
        try:
            act()
        except (CheckpointError, OSError) as caught:
            error = caught
        worst = self.agree([math.inf if error is None else float(self.rank)])[0]
        if error is not None:
            raise CheckpointError(f"rank {self.rank} {what} {self.place}: {error}") from error
        if not math.isinf(worst):
            raise CheckpointError(f"rank {int(worst)} {what} {self.place}: its log says why")

    # --- the background thread -------------------------------------------------------------------------------------

    def _copy_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            snapshot, tensors, ready = job
            try:
                self._copy(snapshot, tensors, ready)
                del tensors, job
                self._seal(snapshot)
            except Exception as error:
                self._fail(snapshot, f"snapshot of step {snapshot.save.step}: {error}")
            snapshot.copied.set()
            begin, sealed = time.perf_counter(), False
            try:
                sealed = self._buffers.exchange(snapshot.slot, snapshot.save, sealed=snapshot.sealed_here)
            except Exception as error:
                log.warning("snapshot of step %d did not reach the other nodes: %s", snapshot.save.step, error)
            self._seconds["peer_s"] += time.perf_counter() - begin
            with self._heard:
                snapshot.sealed, snapshot.ended = sealed, True

    def _copy(self, snapshot: _Snapshot, tensors: Sequence[Tensor], ready: Sequence[torch.Event]) -> None:
        begin = time.perf_counter()
        snapshot.on_devices = self._buffers.copy(snapshot.slot, snapshot.save, tensors, ready)
        snapshot.copied.set()  # where a GPU copies yet, the order of its work keeps the tensors as they are
        for copy in snapshot.on_devices:
            copy.done.synchronize()
        self._seconds["copy_s"] += time.perf_counter() - begin
        failpoint("snapshot.copied", rank=self.rank, step=snapshot.save.step)

    def _seal(self, snapshot: _Snapshot) -> None:
        writer = self._writer
        if writer is None:
            raise CheckpointError("the writer process is gone")
        order = {"slot": snapshot.slot, "state": snapshot.state, "durable": snapshot.durable}
        writer.send(seal=snapshot.save.name, **order)
        snapshot.digested.wait()

    # --- the writer process ----------------------------------------------------------------------------------------

    def _start_writer(self) -> WriterProcess:
        orders = Orders(
            rank=self.rank,
            world_size=self.world_size,
            epoch=self.epoch,
            disk=str(self.tiers.disk),
            memory=None if self.memory is None else str(self.memory.folder),
            remote=self.tiers.remote,
            keep=self.tiers.keep,
            keep_every=self.tiers.keep_every,
            timeout_s=self.timeout_s,
            slots=tuple(slot.descriptor for slot in self._buffers.own),
            pieces=tuple(astuple(piece) for piece in self.layout.pieces),
        )
        return WriterProcess(orders, self._hear, self._bury)

    def _hear(self, answer: dict[str, Any]) -> None:
        """An answer of the writer, in the thread that listens to it."""
        if "said" in answer:
            log.warning("%s", answer["said"])
            return
        if "finished" in answer:
            with self._heard:
                self._finished = answer["finished"]
                self._heard.notify_all()
            return
        act = next(act for act in ("sealed", "flushed", "committed", "uploaded", "failed") if act in answer)
        if act != "failed":
            self._seconds[f"{act}_s"] += answer["seconds"]
        snapshot = self._snapshot(answer[act])
        if snapshot is None:
            return
        if act == "failed":
            self._fail(snapshot, f"{answer['act']} of step {snapshot.save.step}: {answer['why']}")
        elif act == "sealed":
            snapshot.sealed_here = True
            snapshot.digested.set()
        with self._heard:
            if act == "flushed":
                snapshot.flushed = True
            if act == ("committed" if self.rank == 0 else "flushed"):
                self._failures, self._why = 0, None
            if act == "committed":
                self._committed = snapshot.save

    def _snapshot(self, name: str) -> _Snapshot | None:
        """The one that an answer is about, if it is known here yet."""
        save, current = SaveId.parse(name), self._current
        assert save is not None
        return current if current is not None and current.save == save else self._durable.get(save)

    def _fail(self, snapshot: _Snapshot, why: str) -> None:
        log.warning("%s", why)
        with self._heard:
            if snapshot.failure is None:
                snapshot.failure = why
                if snapshot.durable:
                    self._failed, self._why = snapshot.save.sequence, why
                    self._failures += 1
        snapshot.digested.set()

    def _bury(self, writer: WriterProcess, status: int) -> None:
        """The writer died; what it had in hand came to nothing, and rank 0 is told so."""
        if self._writer is not writer:
            return
        self._writer = None
        why = f"the writer process {writer.pid} of rank {self.rank} died with status {status}"
        log.warning("%s", why)
        current = self._current
        lost = [*self._durable.values(), *([current] if current is not None and not current.digested.is_set() else [])]
        for snapshot in dict.fromkeys(lost):
            if snapshot.failure is None and not (snapshot.flushed and self.rank != 0):
                self._fail(snapshot, f"save of step {snapshot.save.step}: {why}")
                if snapshot.durable:
                    store.report_failure(self.place, snapshot.save, self.rank, why)
        with self._heard:
            self._finished = False
            self._heard.notify_all()

    def _finish_remote(self) -> None:
        if self.tiers.remote is None or self._writer is None:
            return
        self._writer.send(finish=None if self._asked is None else self._asked.name)
        with self._heard:
            self._heard.wait_for(lambda: self._finished is not None, self.timeout_s)

    def _stalled(self, begin: float) -> None:
        seconds = time.perf_counter() - begin
        self._seconds["stall_s"] += seconds
        self._seconds["longest_stall_s"] = max(self._seconds["longest_stall_s"], seconds)

    _failing: int | None = None  # a rank whose durable saves fail again and again
    _why: str | None = None  # what failed here last
