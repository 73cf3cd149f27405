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

import ctypes
import json
import logging
import math
import os
import queue
import subprocess
import sys
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
from checkpointing.layout import CheckpointError, Index, Piece, SaveId, ShardLayout, digest_of, require_plain
from checkpointing.memory import Memory, Slot, memory_folder
from checkpointing.peers import PeerLink
from checkpointing.places import LocalPlace, index_file
from checkpointing.writer import Orders

__all__ = ["Agree", "Checkpointer", "Tiers", "memory_folder"]

# Elementwise minimum over ranks, at every rank: a collective, of the training process's main thread.
Agree = Callable[[list[float]], list[float]]

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
    device_copied: list[tuple[torch.device, torch.cuda.Event]] = field(default_factory=list)
    digested: threading.Event = field(default_factory=threading.Event)  # the writer sealed it, or failed to
    ended: bool = False  # copied, sealed and at the partner, or failed
    sealed: bool = False
    flushed: bool = False
    committed: bool = False
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
        self.memory = None if tiers.memory is None else Memory(tiers.memory)
        self._slots, self._peer_slots, kept = self._make_slots(peer)
        if num_nodes > 1 and self.memory is not None and peer is None:
            log.warning("node %d has no peer link: if it is lost, so are its snapshots in memory", node)
        self.peer = peer if self.memory is not None else None
        self._parts = [self._fill_header(slot) for slot in self._slots]

        self._sequence = 0
        self._whole = [False, kept]  # of each slot: whether it holds a save that is whole on all ranks
        self._newest_slot = 1
        self._leftovers = self.memory is not None
        self._kept = self._slots[1].save
        self._current: _Snapshot | None = None
        self._durable: dict[SaveId, _Snapshot] = {}  # asked for and not committed, as far as this rank knows
        self._asked: SaveId | None = None
        self._committed: SaveId | None = None
        self._failed = -1  # sequence of the newest durable save that failed here
        self._failures = 0  # in a row
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._heard = threading.Condition()
        self._finished: bool | None = None
        self._writer: _WriterProcess | None = self._start_writer()
        self._jobs: queue.Queue[tuple[_Snapshot, list[Tensor], list[torch.cuda.Event]] | None] = queue.Queue()
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
        self._jobs.put((snapshot, [tensor.detach() for tensor in tensors], self._ready(tensors)))
        self._counts["durable" if durable else "in_memory"] += 1
        self._stalled(begin)
        return True

    def settle(self) -> None:
        """On return the last snapshot's tensors may change. On a GPU, its stream waits and this thread does not."""
        snapshot = self._current
        if snapshot is None or (snapshot.copied.is_set() and not snapshot.device_copied):
            return
        begin = time.perf_counter()
        snapshot.copied.wait()
        for device, event in snapshot.device_copied:
            torch.cuda.current_stream(device).wait_event(event)
        snapshot.device_copied = []
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
        """What saves have cost so far: seconds (of the loop: stall_s, wait_s, asking_s, drain_s; beside it: the rest)."""
        return {**self._seconds, **self._counts, "shard_bytes": self.layout.size_bytes}

    def close(self) -> None:
        """End the background work where it is; what was copied is sealed yet."""
        if self._copying.is_alive():
            self._jobs.put(None)
            self._copying.join(timeout=10)
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._parts = []
        for slot in [*self._slots, *(slot for pair in self._peer_slots.values() for slot in pair)]:
            slot.close()
        self._slots, self._peer_slots = (), {}

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
            self.memory.remove_before(self.epoch, self._kept)

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
                if save.sequence == committed:
                    self._committed = save
                if save.sequence <= committed or (save.sequence <= failed and not snapshot.reading_slot):
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

    # --- buffers ---------------------------------------------------------------------------------------------------

    def _make_slots(self, peer: PeerLink | None) -> tuple[tuple[Slot, ...], dict[int, tuple[Slot, Slot]], bool]:
        """Own slots, the partners' slots by rank, and whether the second slots hold a save that is whole everywhere."""
        own, size_bytes = self.rank, self.layout.size_bytes
        if self.memory is not None:
            memory, held = self.memory, {}
            sizes = peer.gather_sizes(size_bytes) if peer is not None else []
            try:
                memory.create()
                held = memory.held()
            except OSError as error:
                log.warning("memory folder %s: %s", memory.folder, error)
            # `recover` left at most one save here: the one that the run goes on from.
            kept = next((save for save, shards in held.items() if self._fits(shards.get(own))), None)
            both = self.agree([float(kept.epoch), float(kept.sequence), -float(kept.epoch), -float(kept.sequence)]
                              if kept is not None else [-1.0, -1.0, -1.0, -1.0])  # fmt: skip
            if kept is None or both[0] < 0 or both[0] != -both[2] or both[1] != -both[3]:
                kept = None  # not all ranks have it: it stays aside until a new snapshot is whole
            slots: dict[int, tuple[Slot, Slot]] = {}
            try:
                for rank in [own, *(peer.sources if peer is not None else ())]:
                    expected = size_bytes if rank == own else sizes[rank]
                    fits = rank == own or (kept is not None and rank in held[kept])
                    slots[rank] = memory.slots(rank, expected, kept if fits else None)
                error = None
            except OSError as caught:
                error = caught
            if self.agree([float(error is None)])[0]:
                return slots.pop(own), slots, kept is not None
            for slot in [slot for pair in slots.values() for slot in pair]:
                slot.close()
                if slot.path is not None and slot.save is None:
                    slot.path.unlink(missing_ok=True)
            log.warning(
                "%s has no room for two snapshots of %s bytes%s: going on without the memory tier; give the machine "
                "or container more shared memory (--shm-size), or set checkpoint.memory_every to 0",
                memory.folder, f"{size_bytes:,}", f" ({error.strerror})" if error else " on another rank",
            )  # fmt: skip
            self.memory = None
        return (Slot.anonymous(own, size_bytes), Slot.anonymous(own, size_bytes)), {}, False

    def _fits(self, shard: tuple[Index, bytes] | None) -> bool:
        if shard is None:
            return False
        index, _ = shard
        theirs = index.world_size, index.size_bytes, index.header_digest
        return theirs == (self.world_size, self.layout.size_bytes, digest_of(self.layout.header))

    def _fill_header(self, slot: Slot) -> list[Tensor]:
        """Each piece's place in the slot. The header is the same for every save, so it is written once."""
        view, layout = memoryview(slot.map), self.layout
        if slot.save is None:
            view[: len(layout.header)] = layout.header
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            _pin(slot)
        return [
            torch.frombuffer(view, dtype=torch.float32, count=piece.length, offset=begin)
            if piece.length
            else torch.empty(0)
            for piece, begin in zip(layout.pieces, layout.begins, strict=True)
        ]

    # --- the background thread -------------------------------------------------------------------------------------

    def _ready(self, tensors: Sequence[Tensor]) -> list[torch.cuda.Event]:
        """For each GPU an event after which its tensors have the values to save."""
        events: list[torch.cuda.Event] = []
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            self._streams.setdefault(device, torch.cuda.Stream(device))
            events.append(torch.cuda.current_stream(device).record_event())
        return events

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
            try:
                sealed = self._send_to_partner(snapshot)  # in any case: the others count on it
            except Exception as error:
                log.warning("snapshot of step %d did not reach the other nodes: %s", snapshot.save.step, error)
                sealed = False
            with self._heard:
                snapshot.sealed, snapshot.ended = sealed, True

    def _copy(self, snapshot: _Snapshot, tensors: list[Tensor], ready: list[torch.cuda.Event]) -> None:
        begin, step = time.perf_counter(), snapshot.save.step
        slot, parts = self._slots[snapshot.slot], self._parts[snapshot.slot]
        slot.begin(snapshot.save)
        for stream in self._streams.values():
            for event in ready:
                stream.wait_event(event)
        half = len(parts) // 2
        for number, (part, tensor) in enumerate(zip(parts, tensors, strict=True)):
            if number == half:
                failpoint("snapshot.copying", rank=self.rank, step=step)
            if tensor.is_cuda:
                with torch.cuda.stream(self._streams[tensor.device]):
                    part.copy_(tensor, non_blocking=True)
            else:
                _copy_on_cpu(part, tensor)
        on_devices = [(device, stream.record_event()) for device, stream in self._streams.items()]
        snapshot.device_copied = on_devices
        snapshot.copied.set()  # where a GPU copies yet, the order of its work keeps the tensors as they are
        for _, event in on_devices:
            event.synchronize()
        self._seconds["copy_s"] += time.perf_counter() - begin
        failpoint("snapshot.copied", rank=self.rank, step=step)

    def _seal(self, snapshot: _Snapshot) -> None:
        writer = self._writer
        if writer is None:
            raise CheckpointError("the writer process is gone")
        order = {"slot": snapshot.slot, "state": snapshot.state, "durable": snapshot.durable}
        writer.send(seal=snapshot.save.name, **order)
        snapshot.digested.wait()

    def _send_to_partner(self, snapshot: _Snapshot) -> bool:
        """Whether the snapshot is sealed here, and what the other nodes send is too."""
        if self.peer is None or self.memory is None:
            return snapshot.failure is None
        begin, save = time.perf_counter(), snapshot.save
        pairs = {source: pair[snapshot.slot] for source, pair in self._peer_slots.items()}
        for slot in pairs.values():
            slot.begin(save)
        failpoint("peer.sending", rank=self.rank, step=save.step)
        shard, index = None, b""
        if snapshot.failure is None:
            shard = memoryview(self._slots[snapshot.slot].map)
            index = (self.memory.folder / save.name / index_file(self.rank)).read_bytes()
        received = self.peer.exchange(shard, index, {source: memoryview(slot.map) for source, slot in pairs.items()})
        for source, text in received.items():
            self.memory.seal(save, source, text)
        self._seconds["peer_s"] += time.perf_counter() - begin
        return snapshot.failure is None and len(received) == len(pairs)

    # --- the writer process ----------------------------------------------------------------------------------------

    def _start_writer(self) -> _WriterProcess:
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
            slots=tuple(slot.descriptor for slot in self._slots),
            pieces=tuple(astuple(piece) for piece in self.layout.pieces),
        )
        return _WriterProcess(orders, self._hear, self._bury)

    def _hear(self, answer: dict[str, Any]) -> None:
        """An answer of the writer, in the thread that listens to it."""
        if "said" in answer:
            log.warning("%s", answer["said"])
        if "finished" in answer:
            with self._heard:
                self._finished = answer["finished"]
                self._heard.notify_all()
        for act in ("sealed", "flushed", "committed", "uploaded"):
            if act in answer:
                self._seconds[f"{act}_s"] += answer["seconds"]
        current = self._current
        snapshot = None
        for act in ("sealed", "flushed", "committed", "failed"):
            if act in answer:
                save = SaveId.parse(answer[act])
                assert save is not None
                snapshot = self._durable.get(save)
                if snapshot is None and current is not None and current.save == save:
                    snapshot = current
        if snapshot is None:
            return
        if "failed" in answer:
            self._fail(snapshot, f"{answer['act']} of step {snapshot.save.step}: {answer['why']}")
        with self._heard:
            if "flushed" in answer:
                snapshot.flushed = True
                if self.rank != 0:
                    self._failures = 0
            if "committed" in answer:
                snapshot.committed, self._committed, self._failures = True, snapshot.save, 0
        if "sealed" in answer:
            snapshot.digested.set()

    def _fail(self, snapshot: _Snapshot, why: str) -> None:
        log.warning("%s", why)
        with self._heard:
            if snapshot.failure is None:
                snapshot.failure = why
                if snapshot.durable:
                    self._failed, self._why = snapshot.save.sequence, why
                    self._failures += 1
        snapshot.digested.set()

    def _bury(self, writer: _WriterProcess, status: int) -> None:
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


class _WriterProcess:
    """A `checkpointing.writer`, and the thread that listens to it."""

    def __init__(
        self, orders: Orders, hear: Callable[[dict[str, Any]], None], bury: Callable[[_WriterProcess, int], None]
    ) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "checkpointing.writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=orders.slots,
            env={**os.environ, "PYTHONPATH": path, "RANK": str(orders.rank)},
        )
        self.pid = self._process.pid
        self._sending = threading.Lock()
        self._write(orders.line())
        self._listening = threading.Thread(target=self._listen, args=(hear, bury), daemon=True)
        self._listening.start()

    def send(self, **order: Any) -> None:
        self._write(json.dumps(order))

    def close(self) -> None:
        """End it; it seals yet what it was told to."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._listening.join(timeout=5)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            with self._sending:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
        except OSError as error:
            raise CheckpointError(f"the writer process {self.pid} is gone: {error.strerror}") from error

    def _listen(self, hear: Callable[[dict[str, Any]], None], bury: Callable[[_WriterProcess, int], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            hear(json.loads(line))
        bury(self, self._process.wait())


def _copy_on_cpu(part: Tensor, tensor: Tensor) -> None:
    # A plain memmove: torch would copy with a team of threads, which the step's own team needs. ctypes lets go of the GIL.
    if not tensor.is_contiguous() or tensor.dtype != torch.float32:
        raise CheckpointError(f"a snapshot is of flat fp32 tensors, not {tensor.dtype} of stride {tensor.stride()}")
    if tensor.numel() != part.numel():
        raise CheckpointError(f"a piece has {part.numel():,} elements, and the tensor for it {tensor.numel():,}")
    ctypes.memmove(part.data_ptr(), tensor.data_ptr(), part.nbytes)


def _pin(slot: Slot) -> None:
    """Let the GPU copy straight into the slot."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(slot.map))
    status = torch.cuda.cudart().cudaHostRegister(address, slot.size_bytes, 0)
    if int(status) != 0:
        log.warning(
            "snapshot memory could not be pinned (CUDA error %d): copies from the GPU will be slower", int(status)
        )
