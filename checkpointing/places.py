"""Where saves lie: a folder on a disk, or a URL of any store that fsspec knows.

PLACE/latest                                     name of the newest checkpoint: a hint for people, never trusted
PLACE/fence-000003.json                          the newest epoch that may commit here
PLACE/step-00000100.attempt-000003-000012/       one save; the name is never used twice
    rank-00000.safetensors, rank-00000.json      a rank's shard, then its sealed index
    MANIFEST.json                                written last: the commit mark
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from checkpointing import disk
from checkpointing.disk import Buffer
from checkpointing.failpoints import failpoint
from checkpointing.layout import CheckpointError, SaveId, checksum_of

MANIFEST = "MANIFEST.json"
POINTER = "latest"

# What a save writes beside its tensors, generously: headers, indexes, manifest and the file system's own blocks.
_OVERHEAD_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 23  # 8 MiB: large for a disk or a ranged GET


class Unreachable(CheckpointError):
    """The place does not answer: what lies there is not known, and nothing may be concluded from it."""


class Place(ABC):
    """A set of saves, each a folder of files. `save=None` means the place's own folder.

    Every method raises CheckpointError naming the file, and Unreachable where a remote store gives no answer.
    """

    @abstractmethod
    def path(self, save: SaveId | None = None, file: str = "") -> str:
        """For people: where this is."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the place's folders; none where the place does not exist yet."""

    @abstractmethod
    def files(self, save: SaveId | None) -> list[str]:
        """Names of the files in a folder; none where it does not exist."""

    @abstractmethod
    def size(self, save: SaveId | None, file: str) -> int | None:
        """The file's size in bytes; None where there is no such file."""

    @abstractmethod
    def read(self, save: SaveId | None, file: str) -> bytes:
        """A whole small file."""

    @abstractmethod
    def source(self, save: SaveId | None, file: str) -> Source:
        """A file to read ranges of."""

    @abstractmethod
    def put(self, save: SaveId | None, file: str, data: bytes) -> None:
        """A whole small file, atomically: readers see all of the old or all of the new. Durable on return."""

    @abstractmethod
    def write(self, save: SaveId, file: str, blocks: Iterable[Buffer]) -> int:
        """A new file from a stream of blocks; returns its size. Durable on return, torn if interrupted.

        A block need not outlive the next one's asking. What an interrupted write left under the name is replaced.
        """

    @abstractmethod
    def open(self, save: SaveId, payload_bytes: int) -> None:
        """Make the save's folder; any rank may call it, at any time before the commit.

        Raises CheckpointError, with nothing written, where the save is committed already, and where there is no room
        for `payload_bytes` more.
        """

    @abstractmethod
    def sync(self, save: SaveId) -> None:
        """Make the names of all files in the save durable, whoever wrote them."""

    @abstractmethod
    def delete(self, file: str) -> None:
        """Remove a file of the place's own folder, if it is there."""

    @abstractmethod
    def remove(self, save: SaveId) -> None:
        """Remove a save or the remains of one. The manifest goes first: half a checkpoint never has one."""

    def has(self, save: SaveId | None, file: str) -> bool:
        return self.size(save, file) is not None

    def _require_uncommitted(self, save: SaveId) -> None:
        if self.has(save, MANIFEST):
            raise CheckpointError(f"{self.path(save)} is committed already: no id is used twice, nothing was changed")

    def saves(self) -> list[SaveId]:
        """All saves, the newest first, committed or not."""
        return sorted((save for name in self.folders() if (save := SaveId.parse(name))), reverse=True)

    def __str__(self) -> str:
        return self.path()


class LocalPlace(Place):
    """A folder on a disk: durable by fsync, atomic by rename."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, save: SaveId | None) -> Path:
        return self.root if save is None else self.root / save.name

    def path(self, save: SaveId | None = None, file: str = "") -> str:
        return str(self.folder(save) / file)

    def folders(self) -> list[str]:
        return [path.name for path in self._list(self.root) if path.is_dir()]

    def files(self, save: SaveId | None) -> list[str]:
        return [path.name for path in self._list(self.folder(save)) if not path.is_dir()]

    def _list(self, folder: Path) -> list[Path]:
        with _named(folder, "listed"):
            try:
                return sorted(folder.iterdir())
            except FileNotFoundError:
                return []

    def size(self, save: SaveId | None, file: str) -> int | None:
        path = self.folder(save) / file
        with _named(path, "read"):
            try:
                return path.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read(self, save: SaveId | None, file: str) -> bytes:
        path = self.folder(save) / file
        size = self.size(save, file)
        if size is None:
            raise CheckpointError(f"{path} is missing")
        data = bytearray(size)
        with closing(self.source(save, file)) as source:
            source.read_into(0, memoryview(data))
        return bytes(data)

    def source(self, save: SaveId | None, file: str) -> Source:
        return _LocalFile(self.folder(save) / file)

    def put(self, save: SaveId | None, file: str, data: bytes) -> None:
        path = self.folder(save) / file
        where = {} if save is None else {"step": save.step}
        with _named(path, "written"):
            if save is None and not self.root.is_dir():
                disk.make_folder(self.root)
            disk.write_durably(path, data, _failpoint_of(file), **where)

    def write(self, save: SaveId, file: str, blocks: Iterable[Buffer]) -> int:
        path, size = self.folder(save) / file, 0
        self._require_uncommitted(save)
        try:
            disk.unlink(path)  # rather than truncate: a late writer that holds the old file cannot touch the new one
            descriptor = disk.create(path)
            try:
                for block in blocks:
                    view = memoryview(block)
                    for start in range(0, len(view), _BLOCK_BYTES):
                        part = view[start : start + _BLOCK_BYTES]
                        disk.append(descriptor, part)
                        disk.start_writing(descriptor, size, len(part))
                        size += len(part)
                        failpoint("shard.half_written", step=save.step)
                disk.sync_file(descriptor)
            finally:
                disk.close(descriptor)
            disk.sync_folder(path.parent)
            failpoint("shard.synced", step=save.step)
        except OSError as error:
            raise CheckpointError(f"{path} could not be written past byte {size:,}: {error.strerror}") from error
        return size

    def open(self, save: SaveId, payload_bytes: int) -> None:
        self._require_uncommitted(save)
        with _named(self.root, "written"):
            disk.make_folder(self.root)
            needed, free = payload_bytes + _OVERHEAD_BYTES, disk.free_bytes(self.root)
            if free < needed:
                raise CheckpointError(
                    f"{self.root} has {free:,} bytes free and the checkpoint of step {save.step} needs {needed:,}: "
                    "free some space; nothing was written, and earlier checkpoints are as they were"
                )
            disk.make_folder(self.folder(save))
            failpoint("attempt.opened", step=save.step)

    def sync(self, save: SaveId) -> None:
        with _named(self.folder(save), "synced"):
            disk.sync_folder(self.folder(save))

    def delete(self, file: str) -> None:
        with _named(self.root / file, "removed"):
            disk.unlink(self.root / file)

    def remove(self, save: SaveId) -> None:
        folder = self.folder(save)
        with _named(folder, "removed"):
            if self.has(save, MANIFEST):
                disk.unlink(folder / MANIFEST)
                disk.sync_folder(folder)
                failpoint("remove.manifest_gone", step=save.step)
            disk.rmtree(folder)  # what stays is debris, and the next removal tries again


class RemotePlace(Place):
    """A URL of a store that fsspec knows (s3://, gs://, abfs://, memory://, file://): the manifest's PUT is the commit.

    Durable and atomic as far as the store's PUT is. `file://` is neither: for a disk, give a path.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # pyright: ignore[reportMissingTypeStubs]

        self.url = url.rstrip("/")
        with self._answering(url):
            self._store, root = cast(Any, fsspec.core).url_to_fs(url)
        self._root: str = root.rstrip("/")

    def path(self, save: SaveId | None = None, file: str = "") -> str:
        return "/".join([self.url, *([] if save is None else [save.name]), *([file] if file else [])])

    def _key(self, save: SaveId | None, file: str = "") -> str:
        return "/".join([self._root, *([] if save is None else [save.name]), *([file] if file else [])])

    def folders(self) -> list[str]:
        return self._list(None, "directory")

    def files(self, save: SaveId | None) -> list[str]:
        return self._list(save, "file")

    def _list(self, save: SaveId | None, type_: str) -> list[str]:
        with self._answering(self.path(save)):
            self._store.invalidate_cache()
            try:
                entries: list[dict[str, Any]] = self._store.ls(self._key(save), detail=True)
            except FileNotFoundError:
                return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == type_)

    def size(self, save: SaveId | None, file: str) -> int | None:
        with self._answering(self.path(save, file)):
            self._store.invalidate_cache()
            try:
                return int(self._store.info(self._key(save, file))["size"])
            except FileNotFoundError:
                return None

    def read(self, save: SaveId | None, file: str) -> bytes:
        with self._answering(self.path(save, file)):
            return self._store.cat_file(self._key(save, file))

    def source(self, save: SaveId | None, file: str) -> Source:
        return _RemoteObject(self, self._key(save, file), self.path(save, file))

    def cat(self, key: str, path: str, begin: int, end: int) -> bytes:
        with self._answering(f"{path}, bytes {begin:,} to {end:,},"):
            return self._store.cat_file(key, start=begin, end=end)

    def put(self, save: SaveId | None, file: str, data: bytes) -> None:
        where = {} if save is None else {"step": save.step}
        with self._answering(self.path(save, file)):
            failpoint(f"{_failpoint_of(file)}.synced", **where)
            self._store.makedirs(self._key(save), exist_ok=True)
            self._store.pipe_file(self._key(save, file), data)
            failpoint(f"{_failpoint_of(file)}.renamed", **where)

    def write(self, save: SaveId, file: str, blocks: Iterable[Buffer]) -> int:
        size = 0
        self._require_uncommitted(save)
        with self._answering(self.path(save, file)):
            self._store.makedirs(self._key(save), exist_ok=True)
            with self._store.open(self._key(save, file), "wb") as out:
                for block in blocks:
                    size += out.write(block)
                    failpoint("upload.half_done", step=save.step)
        return size

    def open(self, save: SaveId, payload_bytes: int) -> None:
        self._require_uncommitted(save)
        with self._answering(self.path(save)):
            self._store.makedirs(self._key(save), exist_ok=True)

    def sync(self, save: SaveId) -> None:
        """Nothing: a write that returned is in the store."""

    def delete(self, file: str) -> None:
        self._delete(None, file)

    def _delete(self, save: SaveId | None, file: str) -> None:
        with self._answering(self.path(save, file)):
            try:
                self._store.rm_file(self._key(save, file))
            except FileNotFoundError:
                return

    def remove(self, save: SaveId) -> None:
        if self.has(save, MANIFEST):
            self._delete(save, MANIFEST)
            failpoint("remove.manifest_gone", step=save.step)
        with self._answering(self.path(save)):
            try:
                self._store.rm(self._key(save), recursive=True)
            except FileNotFoundError:
                return

    @contextmanager
    def _answering(self, what: str) -> Generator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(f"{what} is missing") from error
        except Exception as error:  # each store has its own errors, and few of them are OSErrors
            raise Unreachable(f"{what} cannot be reached: {type(error).__name__}: {error}") from error


def open_place(where: Place | Path | str) -> Place:
    """The place that a path or a URL names."""
    if isinstance(where, Place):
        return where
    if isinstance(where, str) and "://" in where:
        return RemotePlace(where)
    return LocalPlace(Path(where))


# --- reading a shard -----------------------------------------------------------------------------------------------


class Source(Protocol):
    """The bytes of one file, wherever they lie; its `str` is its name in errors."""

    def read_into(self, begin: int, out: memoryview) -> None:
        """Fill `out` from byte `begin` on, or raise CheckpointError naming the file and the range."""
        ...

    def close(self) -> None:
        """Hold nothing open; reading opens it again."""
        ...


class _LocalFile:
    """Open from the first read on: a disk reads ahead for who reads on, and begins anew for who opens anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def read_into(self, begin: int, out: memoryview) -> None:
        with _named(f"{self.path}, bytes {begin:,} to {begin + len(out):,},", "read"):
            if self._descriptor is None:
                self._descriptor = disk.open_to_read(self.path)
            filled = disk.read_into(self._descriptor, begin, out)
        if filled < len(out):
            raise _cut_short(self, begin, len(out), filled)

    def close(self) -> None:
        if self._descriptor is not None:
            disk.close(self._descriptor)
            self._descriptor = None

    __del__ = close

    def __str__(self) -> str:
        return str(self.path)


class _RemoteObject:
    def __init__(self, place: RemotePlace, key: str, path: str) -> None:
        self.place, self.key, self.path = place, key, path

    def read_into(self, begin: int, out: memoryview) -> None:
        for start in range(0, len(out), _BLOCK_BYTES):
            part = out[start : start + _BLOCK_BYTES]
            data = self.place.cat(self.key, self.path, begin + start, begin + start + len(part))
            if len(data) != len(part):
                raise _cut_short(self, begin, len(out), start + len(data))
            part[:] = data

    def close(self) -> None: ...

    def __str__(self) -> str:
        return self.path


def read_verified(source: Source, begin: int, out: memoryview, digest: str) -> None:
    """Fill `out` from byte `begin` on, and raise CheckpointError unless the bytes have this digest."""
    source.read_into(begin, out)
    if (found := checksum_of(out)) != digest:
        raise CheckpointError(
            f"{source}, bytes {begin:,} to {begin + len(out):,}, is damaged: digest {found}, and {digest} was saved"
        )


def shard_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def index_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _cut_short(source: Source, begin: int, length: int, found: int) -> CheckpointError:
    return CheckpointError(f"{source}, bytes {begin:,} to {begin + length:,}: the file ends after {found:,} of them")


def _failpoint_of(file: str) -> str:
    """What a file is called among the failpoints: manifest, pointer, index or fence."""
    named = {MANIFEST: "manifest", POINTER: "pointer"}
    return named.get(file) or {"rank": "index", "fence": "fence"}.get(file.partition("-")[0], "file")


@contextmanager
def _named(path: Path | str, act: str) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be {act}: {error.strerror}") from error
