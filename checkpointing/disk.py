"""Every operation by which checkpointing touches a disk, and what each makes durable.

The rest of `checkpointing` calls these as attributes of this module, at call time, and nothing of `os` beside them: a
fault injector that replaces them sees every write, sync and rename, in order.
"""

import os
import shutil
from pathlib import Path

from checkpointing.failpoints import failpoint

Buffer = bytes | bytearray | memoryview


def create(path: Path) -> int:
    """A descriptor to write a new file with; FileExistsError where the name is taken."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def append(descriptor: int, data: Buffer) -> None:
    """Write all of `data` where the last write ended. Not durable until `sync_file`."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def pwrite(descriptor: int, data: Buffer, begin: int) -> None:
    """Write all of `data` from byte `begin` on. Not durable until `sync_file`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, begin)
        view, begin = view[written:], begin + written


def start_writing(descriptor: int, begin: int, length: int) -> None:
    """Let the disk begin with these bytes now rather than at `sync_file`: a hint, which promises nothing."""
    # Linux: starts the write-back of dirty pages, without waiting, and frees clean ones.
    os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)


def sync_file(descriptor: int) -> None:
    """Make what was written durable; on an error nothing is known of it, and the file must not be used."""
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new, renamed and removed names) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mkdir(folder: Path) -> None:
    """Make one folder, if it is not there. Not durable until `sync_folder` of its parent."""
    folder.mkdir(exist_ok=True)


def rename(old: Path, new: Path) -> None:
    """Give `old` the name `new`, in place of what has it. Not durable until `sync_folder`."""
    os.replace(old, new)  # noqa: PTH105  (one spelling for what a fault injector stands in for)


def unlink(path: Path) -> None:
    """Remove the file's name, if it is there. Not durable until `sync_folder`."""
    path.unlink(missing_ok=True)


def rmtree(folder: Path) -> None:
    """Remove the folder and all in it, as far as that can be done."""
    shutil.rmtree(folder, ignore_errors=True)


def open_to_read(path: Path) -> int:
    """A descriptor to read a file with."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read_into(descriptor: int, begin: int, out: memoryview) -> int:
    """Fill `out` from byte `begin` on; returns how many bytes there were, fewer only where the file ends.

    By read, not by memory map: a file cut short under a map kills the process.
    """
    filled = 0
    while filled < len(out) and (got := os.preadv(descriptor, [out[filled:]], begin + filled)):
        filled += got
    return filled


def free_bytes(folder: Path) -> int:
    """What a user may still write to the folder's file system."""
    return shutil.disk_usage(folder).free


# --- made of those -------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Create the folder and its missing parents, each durable in its parent."""
    if not folder.is_dir():
        make_folder(folder.parent)
        mkdir(folder)
    sync_folder(folder.parent)  # of an existing one, too: who made it may have died before its name was durable


def write_durably(path: Path, data: Buffer, place: str = "file", **where: int) -> None:
    """Replace the file's content so that a reader, now or after a crash, sees all of the old or all of the new."""
    aside = path.with_name(path.name + ".aside")
    try:
        unlink(aside)
        descriptor = create(aside)
        try:
            half = len(data) // 2
            append(descriptor, data[:half])
            failpoint(f"{place}.half_written", **where)
            append(descriptor, data[half:])
            sync_file(descriptor)
        finally:
            close(descriptor)
        failpoint(f"{place}.synced", **where)
        rename(aside, path)
    except OSError:
        unlink(aside)
        raise
    failpoint(f"{place}.renamed", **where)
    sync_folder(path.parent)
