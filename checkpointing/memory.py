"""This node's memory as a place for saves, without torch: shards on tmpfs, which outlive the processes that wrote them.

    FOLDER/step-00000100.attempt-000003-000012/
        rank-00000.safetensors      a slot: one mapped file, renamed from save to save so that its pages stay
        rank-00000.json             its sealed index: what lies there is a shard only while this does
    FOLDER/free-00000-0                a slot that holds nothing yet

Guarantee: a shard with an index has the bytes that were sealed, whenever a process is killed, because the index is
removed before the first byte is changed and written after the last. Power loss takes the folder as a whole.
"""

import mmap
import os
import shutil
from contextlib import suppress
from pathlib import Path

from checkpointing.layout import CheckpointError, Index, SaveId
from checkpointing.places import index_file, shard_file

_SHARED_MEMORY = Path("/dev/shm")
_PAGE_BYTES = mmap.PAGESIZE


def memory_folder(run_id: str, stage: str, node: int) -> Path:
    """Where a node keeps a stage's snapshots by default. `run_id` must tell this run from any other on the machine."""
    return _SHARED_MEMORY / f"sfumato-{os.getuid()}" / run_id / stage / f"node-{node}"


class Slot:
    """Room for one rank's shard, mapped and touched: every page is there, so that a copy into it never waits for one.

    With a folder it is a file that a later process can find, without one it is anonymous.
    """

    def __init__(self, descriptor: int, size_bytes: int, memory: "Memory | None", rank: int, path: Path | None) -> None:
        self.descriptor, self.size_bytes, self.memory, self.rank, self.path = descriptor, size_bytes, memory, rank, path
        self.save: SaveId | None = None
        os.posix_fallocate(descriptor, 0, size_bytes)  # here ENOSPC is an error; under a map it would be SIGBUS
        self.map = mmap.mmap(descriptor, size_bytes)
        view = memoryview(self.map)
        view[::_PAGE_BYTES] = bytes(view[::_PAGE_BYTES])

    @classmethod
    def anonymous(cls, rank: int, size_bytes: int) -> "Slot":
        return cls(os.memfd_create(f"sfumato-rank-{rank}"), size_bytes, None, rank, None)

    def begin(self, save: SaveId) -> None:
        """What the slot held is no shard any more, and what is written from now on will be this save's."""
        if self.memory is not None and self.path is not None:
            self.memory.invalidate(self.save, self.rank)
            target = self.memory.path(save, self.rank)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            self.path.replace(target)
            _remove_if_empty(self.path.parent)
            self.path = target
        self.save = save

    def close(self) -> None:
        with suppress(BufferError):  # a tensor over the map lives: the pages go with the process
            self.map.close()
        os.close(self.descriptor)


class Memory:
    """One node's folder of shards on tmpfs, its own ranks' and copies of other nodes'."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self) -> None:
        """Make the folder, for this user only: it holds weights."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def path(self, save: SaveId, rank: int) -> Path:
        return self.folder / save.name / shard_file(rank)

    def held(self) -> dict[SaveId, dict[int, tuple[Index, bytes]]]:
        """The shards that lie here by save and rank, each with its index and the index's text.

        Index and size are checked, not the payload's digests. What does not match is no shard.
        """
        found: dict[SaveId, dict[int, tuple[Index, bytes]]] = {}
        for folder in self._save_folders():
            for path in folder.glob("rank-*.json"):
                try:
                    sealed = path.read_bytes()
                    index = Index.parse(sealed, str(path))
                    size = self.path(index.save, index.rank).stat().st_size
                except (CheckpointError, OSError):
                    continue
                whole = path.name == index_file(index.rank) and size == index.size_bytes
                if whole and index.save.name == folder.name:
                    found.setdefault(index.save, {})[index.rank] = index, sealed
        return found

    def seal(self, save: SaveId, rank: int, index: bytes) -> None:
        """The shard is whole from now on: `index` speaks for it."""
        path = self.folder / save.name / index_file(rank)
        aside = path.with_suffix(".aside")
        aside.write_bytes(index)
        aside.replace(path)

    def invalidate(self, save: SaveId | None, rank: int) -> None:
        """The rank's part of the save is no shard any more."""
        if save is not None:
            (self.folder / save.name / index_file(rank)).unlink(missing_ok=True)

    def slots(self, rank: int, size_bytes: int, keep: SaveId | None) -> tuple[Slot, Slot]:
        """Two slots for the rank's shards. Where there is `keep`, the second holds it; old slots serve again.

        Raises OSError where the memory does not suffice.
        """
        old = [*self.folder.glob(f"*/{shard_file(rank)}"), *self.folder.glob(f"free-{rank:05d}-*")]
        kept = [path for path in old if keep is not None and path.parent.name == keep.name]
        unsealed = [path for path in old if path not in kept and not path.with_suffix(".json").exists()]
        number = 1 if kept else 2
        serving = [self._freed(path, rank) for path in unsealed if path.stat().st_size == size_bytes][:number]
        for path in unsealed:
            if path not in serving:
                path.unlink(missing_ok=True)
                _remove_if_empty(path.parent)
        made: list[Slot] = []
        try:
            made += [self._open_slot(path, rank, size_bytes) for path in serving]
            while len(made) < number:
                made.append(self.new_slot(rank, size_bytes))
            made += [self._open_slot(path, rank, size_bytes) for path in kept]
        except OSError:
            for slot in made:
                slot.close()
            raise
        made[1].save = keep if kept else None
        return made[0], made[1]

    def new_slot(self, rank: int, size_bytes: int) -> Slot:
        """A slot of fresh pages. Raises OSError where the memory does not suffice."""
        path = self._free_path(rank)
        try:
            return self._open_slot(path, rank, size_bytes)
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _open_slot(self, path: Path, rank: int, size_bytes: int) -> Slot:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            return Slot(descriptor, size_bytes, self, rank, path)
        except OSError:
            os.close(descriptor)
            raise

    def _freed(self, path: Path, rank: int) -> Path:
        """The file under a name that says that it holds nothing."""
        free = self._free_path(rank)
        path.replace(free)
        _remove_if_empty(path.parent)
        return free

    def _free_path(self, rank: int) -> Path:
        taken = {path.name for path in self.folder.glob(f"free-{rank:05d}-*")}
        return self.folder / next(name for n in range(len(taken) + 1) if (name := f"free-{rank:05d}-{n}") not in taken)

    def remove_before(self, epoch: int, but: SaveId | None) -> None:
        """Give back what earlier runs left: shards of ranks or sizes that are no more."""
        for folder in self._save_folders():
            save = SaveId.parse(folder.name)
            if save is not None and save.epoch < epoch and save != but:
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Give all of it back, and the folders above it that are then empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in list(self.folder.parents)[:3]:
            if _SHARED_MEMORY in parent.parents:
                _remove_if_empty(parent)

    def _save_folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if SaveId.parse(path.name) is not None]


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
