"""A disk with faults, or with a witness, under `checkpointing.disk`: production code has no hook for it.

`install()` replaces the functions of that module, in a process that `environment(...)` was given to; the ones of
`tests/chaos/injected` do it in every Python process that is started with that environment, writers included.

    fault        at the n-th fitting operation of a process
    kill         SIGKILL in the middle of it: half of a write is done
    stop, term   SIGSTOP, SIGTERM before it
    enospc       OSError after half of a write
    eio          OSError. Where fsync fails, what was not yet durable is zeros, and the next fsync says all is well, as
                 Linux does (Rebello et al., "Can applications recover from fsync failures?", ATC 2020)
    slow         takes `seconds` longer
    torn         silently: the second half of a write is not what was given
    zero_hole    silently: a part of a write is zeros
    bit_flip     silently: one bit of a write is another
    lost_rename  silently: the name is not given
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import itertools
import json
import os
import random
import signal
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from checkpointing import disk
from tests.chaos.power_loss import Operation

ROOT = Path(__file__).resolve().parents[2]
FAULTS, JOURNAL = "SFUMATO_CHAOS_FAULTS", "SFUMATO_CHAOS_JOURNAL"
Kind = Literal["kill", "stop", "term", "enospc", "eio", "slow", "torn", "zero_hole", "bit_flip", "lost_rename"]
_OPERATIONS = ("create", "append", "pwrite", "sync_file", "sync_folder", "mkdir", "rename", "unlink", "rmtree")
_OPERATIONS += ("read_into", "free_bytes")
_WRITES = ("append", "pwrite", "read_into")
SILENT = {"torn": _WRITES, "zero_hole": _WRITES, "bit_flip": _WRITES, "lost_rename": ("rename",)}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}


@dataclass(frozen=True)
class DiskFault:
    """What befalls the operations of `checkpointing.disk` that fit, from the `visit`-th of a process on."""

    kind: Kind
    operation: str = "*"  # a function of checkpointing.disk, as a pattern; "write" is append and pwrite
    file: str = "*"  # its path, as a pattern
    visit: int = 1
    times: int | None = 1  # None: from then on
    rank: int | None = None
    process: Literal["rank", "writer"] | None = None
    marker: str | None = None  # a file: only the process that makes it has the fault
    seconds: float = 0.2
    visits: Iterator[int] = field(default_factory=lambda: itertools.count(1), compare=False, repr=False)

    def befalls(self, operation: str, path: Path) -> bool:
        called = [operation, *(["write"] if operation in ("append", "pwrite") else [])]
        if not (fnmatch.filter(called, self.operation) and fnmatch.fnmatch(str(path), self.file)):
            return False
        if operation not in SILENT.get(self.kind, _OPERATIONS):
            return False
        if self.rank not in (None, int(os.environ.get("RANK", "0"))) or self.process not in (None, _process()):
            return False
        visit = next(self.visits)
        if visit < self.visit or (self.times is not None and visit >= self.visit + self.times):
            return False
        return self.marker is None or self._is_ours(Path(self.marker))

    def _is_ours(self, marker: Path) -> bool:
        me = str(os.getpid())
        try:
            with marker.open("x") as file:
                file.write(me)
        except FileExistsError:
            return marker.read_text() == me
        return True

    def spoil(self, data: bytes) -> bytes:
        """What reaches the disk in place of `data`; differs from it in at least one bit."""
        spoiled, generator = bytearray(data), random.Random(len(data))
        match self.kind:
            case "torn":
                half = len(data) // 2
                spoiled[half:] = bytes(byte ^ 0xFF for byte in data[half:])
            case "zero_hole":
                full = [at for at in range(0, len(data), 512) if any(data[at : at + 512])]
                at = generator.choice(full) if full else 0
                spoiled[at : at + 512] = bytes(len(spoiled[at : at + 512]))
            case "bit_flip":
                spoiled[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        return bytes(spoiled)


def _process() -> str:
    return "writer" if "checkpointing.writer" in sys.orig_argv else "rank"


def environment(faults: Sequence[DiskFault] = (), journal: tuple[Path, Path] | None = None) -> dict[str, str]:
    """What a process needs in its environment to have these faults, or to tell a journal what it does in a folder."""
    path = os.pathsep.join([str(Path(__file__).parent / "injected"), str(ROOT)])
    given = {"PYTHONPATH": path}
    if faults:
        fields = [{key: value for key, value in vars(fault).items() if key != "visits"} for fault in faults]
        given[FAULTS] = json.dumps(fields)
    if journal is not None:
        given[JOURNAL] = json.dumps([str(path) for path in journal])
    return given


def install() -> None:
    """Replace the functions of `checkpointing.disk` in this process, as its environment asks for; else do nothing."""
    if not {FAULTS, JOURNAL} & set(os.environ):
        return
    faults = [DiskFault(**one) for one in json.loads(os.environ.get(FAULTS, "[]"))]
    journal = _Journal(*map(Path, json.loads(os.environ[JOURNAL]))) if JOURNAL in os.environ else None
    shim = _Shim(faults, journal)
    for name in _OPERATIONS:
        setattr(disk, name, getattr(shim, name))


def mark(text: str) -> None:
    """Say something in the journal, in its place among the operations; nothing where there is no journal."""
    if JOURNAL in os.environ:
        with _Journal(*map(Path, json.loads(os.environ[JOURNAL]))).order() as tell:
            tell(Operation("mark", text))


def read_journal(journal: Path) -> list[Operation]:
    lines = journal.read_bytes().splitlines() if journal.exists() else []
    return [Operation(**{**fields, "data": b64decode(fields["data"])}) for fields in map(json.loads, lines)]


class _Journal:
    """The operations of all processes on one folder, in the one order in which they were done."""

    def __init__(self, path: Path, watched: Path) -> None:
        self.path, self.watched = path, watched

    def name(self, path: Path) -> str | None:
        """The path as the journal has it, or None where it is not watched."""
        return str(path.relative_to(self.watched)) if path.is_relative_to(self.watched) else None

    @contextmanager
    def order(self) -> Iterator[_Tell]:
        """Nobody else's operation is done, or told of, within the block."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield _Tell(file)
        finally:
            os.close(file)


class _Tell:
    def __init__(self, file: int) -> None:
        self.file = file

    def __call__(self, operation: Operation) -> None:
        fields = {**asdict(operation), "data": b64encode(operation.data).decode()}
        os.write(self.file, json.dumps(fields).encode() + b"\n")


class _Shim:
    """The functions of `checkpointing.disk`, on the real ones."""

    def __init__(self, faults: Sequence[DiskFault], journal: _Journal | None) -> None:
        self.faults, self.journal = faults, journal
        self.real = {name: getattr(disk, name) for name in dir(disk) if callable(getattr(disk, name))}
        self.unsynced: dict[Path, list[tuple[int, int]]] = {}  # offset and length of what a failing fsync loses

    def create(self, path: Path) -> int:
        self._meet("create", path)
        with self._told(Operation("create", self._name(path))):
            return self.real["create"](path)

    def append(self, descriptor: int, data: disk.Buffer) -> None:
        self._write("append", descriptor, data, os.lseek(descriptor, 0, os.SEEK_CUR))

    def pwrite(self, descriptor: int, data: disk.Buffer, begin: int) -> None:
        self._write("pwrite", descriptor, data, begin)

    def _write(self, name: str, descriptor: int, data: disk.Buffer, begin: int) -> None:
        path = _path_of(descriptor)

        def write(data: disk.Buffer) -> None:
            with self._told(Operation("write", self._name(path), offset=begin, data=bytes(data))):
                self.real[name](descriptor, data, *([begin] if name == "pwrite" else []))
            self.unsynced.setdefault(path, []).append((begin, len(data)))

        def write_other(data: bytes) -> None:
            # what is not the caller's own buffer lies anywhere in memory, which O_DIRECT refuses
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            write(data)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)

        if not data:
            return
        fault = self._meet(name, path, lambda: write_other(bytes(data[: len(data) // 2])))
        write(data) if fault is None else write_other(fault.spoil(bytes(data)))

    def sync_file(self, descriptor: int) -> None:
        path = _path_of(descriptor)
        self._meet("sync_file", path, lambda: self._lose_unsynced(path))
        with self._told(Operation("sync_file", self._name(path))):
            self.real["sync_file"](descriptor)
        self.unsynced.pop(path, None)

    def _lose_unsynced(self, path: Path) -> None:
        with path.open("r+b", buffering=0) as file:
            for begin, length in self.unsynced.pop(path, []):
                os.pwrite(file.fileno(), bytes(length), begin)

    def sync_folder(self, folder: Path) -> None:
        self._meet("sync_folder", folder)
        with self._told(Operation("sync_folder", self._name(folder))):
            self.real["sync_folder"](folder)

    def mkdir(self, folder: Path) -> None:
        self._meet("mkdir", folder)
        with self._told(Operation("mkdir", self._name(folder)), unless=folder.is_dir):
            self.real["mkdir"](folder)

    def rename(self, old: Path, new: Path) -> None:
        if self._meet("rename", new) is not None:
            return
        with self._told(Operation("rename", self._name(old), target=self._name(new))):
            self.real["rename"](old, new)

    def unlink(self, path: Path) -> None:
        self._meet("unlink", path)
        with self._told(Operation("unlink", self._name(path)), unless=lambda: not path.exists()):
            self.real["unlink"](path)

    def rmtree(self, folder: Path) -> None:
        """A step at a time, as the real one does it: a crash may come between any two."""
        for path in sorted(folder.glob("*")):
            self.rmtree(path) if path.is_dir() else self.unlink(path)
        self._meet("rmtree", folder)
        with self._told(Operation("rmdir", self._name(folder)), unless=lambda: not folder.exists()):
            self.real["rmtree"](folder)

    def read_into(self, descriptor: int, begin: int, out: memoryview) -> int:
        fault = self._meet("read_into", _path_of(descriptor))
        filled = self.real["read_into"](descriptor, begin, out)
        if fault is not None and filled:
            out[:filled] = fault.spoil(bytes(out[:filled]))
        return filled

    def free_bytes(self, folder: Path) -> int:
        full = any(fault.kind == "enospc" and fault.befalls("free_bytes", folder) for fault in self.faults)
        return 0 if full else self.real["free_bytes"](folder)

    # --- what befalls them ---

    def _meet(self, operation: str, path: Path, begun: Callable[[], None] = lambda: None) -> DiskFault | None:
        """Let what befalls this operation happen; returns the fault that is to spoil it silently, if there is one.

        `begun` does what is done of the operation when it fails, or when the process dies in it.
        """
        for fault in self.faults:
            if not fault.befalls(operation, path):
                continue
            if fault.kind in SILENT:
                return fault
            if fault.kind == "slow":
                time.sleep(fault.seconds)
                continue
            if fault.kind in _ERRORS:
                begun()
                number = _ERRORS[fault.kind]
                raise OSError(number, f"{os.strerror(number)} (by the chaos harness)", str(path))
            if fault.kind == "kill" and operation in _WRITES:
                begun()
            os.kill(os.getpid(), _SIGNALS[fault.kind])
        return None

    def _name(self, path: Path) -> str:
        return "" if self.journal is None else self.journal.name(path) or ""

    @contextmanager
    def _told(self, operation: Operation, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """The block does the operation, and the journal tells of it; `unless`: it will change nothing."""
        if self.journal is None or not operation.path or (operation.kind == "rename" and not operation.target):
            yield
            return
        with self.journal.order() as tell:
            if unless():
                yield
            else:
                yield
                tell(operation)


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()
