"""The background process of one rank's saves, without torch: digests, disk, commit, remote.

`python -m checkpointing.writer` maps the two slots that the training process copies its state into (it inherits their
descriptors), so no payload goes through a pipe. Orders and answers are JSON, one a line, on stdin and stdout:

    first line    the `Orders` below
    {"seal": SAVE, "slot": 0, "state": {...}, "durable": true}     -> {"sealed": SAVE}, and if durable
                                                                      {"flushed": SAVE} {"committed": SAVE}
    {"finish": SAVE or null}     nothing more will come            -> {"finished": whether the remote store has it}
    at any time                                                    -> {"failed": SAVE, "act", "why"} {"said": TEXT}

Answers carry "seconds". Only rank 0 commits, prunes, and says which save is to go to the remote store; each rank
uploads its part of it. The process runs at a low priority, so that the training step goes first.

When stdin ends (the training process is gone, however it went), what was copied is sealed yet, so that the snapshot in
memory counts; a write to the disk is left torn, and is never committed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpointing import disk, store
from checkpointing.failpoints import failpoint
from checkpointing.layout import CheckpointError, Index, Piece, SaveId, ShardLayout, seal_index
from checkpointing.memory import Memory
from checkpointing.places import (
    LocalPlace,
    Place,
    Unreachable,
    index_file,
    open_place,
    read_verified,
    shard_file,
)

UPLOADING = "uploading"  # beside the saves: the name of the one that all ranks upload now
_NICE = 5  # among busy processes 19 would get a second of processor time in two minutes, and the loop waits for it
_POLL_S, _LONGEST_PAUSE_S = 0.5, 60.0
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Orders:
    """What a writer is told once."""

    rank: int
    world_size: int
    epoch: int
    disk: str
    memory: str | None
    remote: str | None
    keep: int
    keep_every: int | None
    timeout_s: float
    slots: tuple[int, ...]  # descriptors
    pieces: tuple[tuple[Any, ...], ...]

    def line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, line: str) -> Orders:
        return cls(**json.loads(line))


def main() -> int:
    os.nice(_NICE)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the training process, which tells us when to end
    writer = _Writer(Orders.parse(sys.stdin.readline()))
    for line in sys.stdin:
        order = json.loads(line)
        if "finish" in order:
            writer.finish(order["finish"])
        else:
            writer.seal(order)
    writer.end()
    return 0


def say(**answer: Any) -> None:
    with _speaking, suppress(BrokenPipeError):
        print(json.dumps(answer), flush=True)


_speaking = threading.Lock()


class _Writer:
    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        pieces = [
            Piece(kind, name, offset, length, tuple(shape)) for kind, name, offset, length, shape in orders.pieces
        ]
        self.layout = ShardLayout.of(pieces)
        self.views = [_map(slot, self.layout.size_bytes) for slot in orders.slots]
        self.place = LocalPlace(Path(orders.disk))
        self.memory = None if orders.memory is None else Memory(Path(orders.memory))
        self.seals: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.flushes: queue.Queue[tuple[SaveId, dict[str, Any], bytes]] = queue.Queue()
        self.sealing = threading.Thread(target=self._seal_all)
        self.sealing.start()
        threading.Thread(target=self._flush_all, daemon=True).start()
        self.uploads = None if orders.remote is None else _Uploads(orders, self.place)

    def seal(self, order: dict[str, Any]) -> None:
        self.seals.put(order)

    def finish(self, name: str | None) -> None:
        """Every save is committed; what is left is the remote store."""
        if self.uploads is None:
            say(finished=True)
        else:
            self.uploads.finish(name)

    def end(self) -> None:
        """Seal what was copied; whatever else runs ends with the process."""
        self.seals.put(None)
        self.sealing.join()

    def _seal_all(self) -> None:
        while (order := self.seals.get()) is not None:
            save, slot = _parse(order["seal"]), int(order["slot"])
            with _telling(save, "seal"):
                begin = time.perf_counter()
                index = seal_index(
                    self.layout, save, self.orders.rank, self.orders.world_size, self.views[slot], order["state"]
                )
                if self.memory is not None:
                    self.memory.seal(save, self.orders.rank, index)
                failpoint("shard.sealed", rank=self.orders.rank, step=save.step)
                say(sealed=save.name, seconds=time.perf_counter() - begin)
                if order["durable"]:
                    self.flushes.put((save, order, index))

    def _flush_all(self) -> None:
        orders, size_bytes = self.orders, self.layout.size_bytes
        while True:
            save, order, index = self.flushes.get()
            with _telling(save, "flush"), self._giving_up(save):
                begin = time.perf_counter()
                self.place.open(save, size_bytes * orders.world_size)  # ranks' shares are about equal
                _write_past_cache(self.place, save, orders.rank, self.views[int(order["slot"])])
                self.place.put(save, index_file(orders.rank), index)
                say(flushed=save.name, seconds=time.perf_counter() - begin)
                if orders.rank == 0:
                    self._commit(save, order["state"])

    @contextmanager
    def _giving_up(self, save: SaveId) -> Generator[None]:
        """A save that fails is told of to the other ranks, and its room on the disk is given back."""
        try:
            yield
        except Exception as error:
            store.give_up(self.place, save, self.orders.rank, self.orders.world_size, str(error))
            raise

    def _commit(self, save: SaveId, state: dict[str, Any]) -> None:
        orders, begin = self.orders, time.perf_counter()
        store.commit(
            self.place,
            save,
            orders.world_size,
            state,
            timeout_s=orders.timeout_s,
            still_mine=lambda: store.holds_fence(self.place, orders.epoch),
        )
        say(committed=save.name, seconds=time.perf_counter() - begin)
        busy = self.uploads.current if self.uploads is not None else None
        if busy is not None and busy not in store.committed(self.place)[: orders.keep]:
            return  # it is being uploaded: the next save prunes
        try:
            store.prune(self.place, orders.keep, orders.keep_every, whole=save)
        except CheckpointError as error:
            say(said=f"older checkpoints in {self.place} stay: {error}")


class _Uploads:
    """Brings the newest committed save to the remote store, again and again until it is there.

    A store that does not answer stops nothing: it is said once, and what it missed is made up for by the newest save.
    """

    def __init__(self, orders: Orders, disk: Place) -> None:
        self.orders, self.disk = orders, disk
        self.current: SaveId | None = None
        self.remote: Place | None = None
        self.last: SaveId | None = None  # the newest whose part is up there
        self.awaited: str | None = None  # by `finish`
        self.finishing = threading.Event()
        threading.Thread(target=self._upload_all, daemon=True).start()

    def finish(self, name: str | None) -> None:
        self.awaited = name
        self.finishing.set()

    def _upload_all(self) -> None:
        failures, pause_s = 0, _POLL_S
        while True:
            try:
                save = self._next()
                if save is not None:
                    begin = time.perf_counter()
                    self._upload(save)
                    say(uploaded=save.name, seconds=time.perf_counter() - begin)
                    if failures:
                        say(said=f"remote store {self.orders.remote} has caught up: {save} is there")
                failures, pause_s = 0, _POLL_S
            except Exception as error:
                if not failures:
                    unreachable = isinstance(error, Unreachable)
                    what = "is unreachable" if unreachable else "has not got the newest save"
                    say(said=f"remote store {self.orders.remote} {what}: going on without, and trying again ({error})")
                failures, pause_s = failures + 1, min(2 * pause_s, _LONGEST_PAUSE_S)
            self.current = None
            if self.finishing.is_set():
                done = self.last is not None and self.last.name == self.awaited
                if done or failures or self.awaited is None:
                    say(finished=done or self.awaited is None)
                    return
            self.finishing.wait(pause_s)
            if self.finishing.is_set() and not failures:
                time.sleep(_POLL_S / 10)  # for the others to see which save it is

    def _next(self) -> SaveId | None:
        """The save to upload now, the same on all ranks; None where the last one is the newest."""
        if self.orders.rank == 0:
            save = next(iter(store.committed(self.disk)), None)
            if save is None or save == self.last:
                return None
            self.current = save
            self.disk.put(None, UPLOADING, save.name.encode())
            return save
        if not self.disk.has(None, UPLOADING):
            return None
        save = SaveId.parse(self.disk.read(None, UPLOADING).decode())
        if save is None or save == self.last or not self.disk.has(save, store.MANIFEST):
            return None
        return save

    def _upload(self, save: SaveId) -> None:
        if self.remote is None:
            remote = open_place(str(self.orders.remote))
            if self.orders.rank == 0:
                store.fence(remote, self.orders.epoch)
            self.remote = remote
        if not self.remote.has(save, store.MANIFEST):
            manifest = store.read_manifest(self.disk, save)
            for index in store.read_indexes(manifest):
                if index.rank % self.orders.world_size == self.orders.rank:
                    self._upload_shard(save, index)
            if self.orders.rank == 0:
                remote = self.remote
                store.commit(
                    remote,
                    save,
                    manifest.world_size,
                    manifest.state,
                    timeout_s=self.orders.timeout_s,
                    still_mine=lambda: store.holds_fence(remote, self.orders.epoch),
                )
                store.prune(remote, self.orders.keep, self.orders.keep_every, whole=save)
        self.last = save

    def _upload_shard(self, save: SaveId, index: Index) -> None:
        """One shard, each chunk verified on its way, then its index."""
        assert self.remote is not None
        if self.remote.has(save, index_file(index.rank)):
            return
        with closing(self.disk.source(save, shard_file(index.rank))) as shard:

            def blocks() -> Iterator[memoryview]:
                buffer = bytearray(index.header_bytes)
                read_verified(shard, 0, memoryview(buffer), index.header_digest)
                yield memoryview(buffer)
                buffer = bytearray(max((chunk.size_bytes for chunk in index.chunks), default=0))
                for chunk in index.chunks:
                    block = memoryview(buffer)[: chunk.size_bytes]
                    read_verified(shard, chunk.begin, block, chunk.digest)
                    yield block

            self.remote.open(save, index.size_bytes)
            self.remote.write(save, shard_file(index.rank), blocks())
        self.remote.put(save, index_file(index.rank), self.disk.read(save, index_file(index.rank)))


class _telling:  # noqa: N801  (a context manager)
    """Answers with the failure of an act, whatever it was: the training process decides what it means."""

    def __init__(self, save: SaveId, act: str) -> None:
        self.save, self.act = save, act

    def __enter__(self) -> None: ...

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        why = str(error) if isinstance(error, CheckpointError | OSError) else repr(error)
        say(failed=self.save.name, act=self.act, why=why)
        return True


def _write_past_cache(place: LocalPlace, save: SaveId, rank: int, slot: memoryview) -> None:
    """Write a slot as a rank's shard, durable on return, straight from its pages to the disk.

    By way of the page cache the same takes ten times the processor time, from a training step that needs it, and as
    much memory again.
    """
    path, begin = place.folder(save) / shard_file(rank), 0
    try:
        disk.unlink(path)
        descriptor = disk.create(path)
        try:
            direct = _set_direct(descriptor, True)
            while begin < len(slot):
                part = slot[begin : begin + _BLOCK_BYTES]
                if direct and len(part) % mmap.PAGESIZE:  # the end: disks are written by whole pages
                    direct = _set_direct(descriptor, False)
                try:
                    disk.pwrite(descriptor, part, begin)
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
                    direct = _set_direct(descriptor, False)  # not on this file system
                    continue
                begin += len(part)
                failpoint("shard.half_written", rank=rank, step=save.step)
            disk.sync_file(descriptor)
        finally:
            disk.close(descriptor)
        disk.sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written past byte {begin:,}: {error.strerror}") from error
    failpoint("shard.synced", rank=rank, step=save.step)


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Whether writes go past the page cache from now on."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return wanted


def _map(descriptor: int, size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ)).cast("B")


def _parse(name: str) -> SaveId:
    save = SaveId.parse(name)
    assert save is not None, name
    return save


class WriterProcess:
    """The training process's side: starts a writer, orders it about, and has a thread that listens to it."""

    def __init__(
        self, orders: Orders, hear: Callable[[dict[str, Any]], None], bury: Callable[[WriterProcess, int], None]
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

    def _listen(self, hear: Callable[[dict[str, Any]], None], bury: Callable[[WriterProcess, int], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            hear(json.loads(line))
        bury(self, self._process.wait())


if __name__ == "__main__":
    sys.exit(main())
