"""What a machine that loses its power may leave of a recorded sequence of file operations.

`states(operations)` yields, for a crash after each operation, the trees that POSIX allows the next start to find:

- what was written to a file and not fsynced is there, or not, or in part, or its bytes are zeros;
- a name that was made, replaced or removed and whose folder was not fsynced since may be as it was before, whichever
  of the folder's other changes were kept; a rename within a folder happens or does not, and never by half;
- fsync of a file says nothing of its name, and fsync of a folder nothing of the folder's own name.

That is weaker than what ext4, XFS or Btrfs do in practice: who survives it owes nothing to one file system's habits.
After the model of ALICE (Pillai et al., OSDI 2014) and CrashMonkey (Mohan et al., OSDI 2018).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

Kind = Literal["mkdir", "create", "write", "truncate", "sync_file", "sync_folder", "rename", "unlink", "rmdir", "mark"]
SECTOR = 512


@dataclass(frozen=True)
class Operation:
    """One file operation; paths are relative to the root that is watched. A mark is something the writer said."""

    kind: Kind
    path: str
    target: str = ""  # of a rename
    offset: int = 0  # of a write; the length of a truncate
    data: bytes = b""

    def __str__(self) -> str:
        end = f" -> {self.target}" if self.target else f" [{self.offset}+{len(self.data)}]" if self.data else ""
        return f"{self.kind} {self.path}{end}"


Tree = Mapping[str, bytes | None]  # content by path; None is a folder


@dataclass(frozen=True)
class Crash:
    """One state that may be found: the crash came after `operations[:after]`."""

    after: int
    how: str
    tree: Tree

    def lay_out(self, root: Path) -> None:
        """Make the tree under `root`, which must not exist."""
        root.mkdir(parents=True)
        for path, content in sorted(self.tree.items()):
            if content is None:
                (root / path).mkdir()
            else:
                (root / path).write_bytes(content)


# --- the model of a disk with a cache ----------------------------------------------------------------------------

Write = tuple[int, bytes]  # offset and data
Change = dict[str, "File | Folder | None"]  # names as they are after it; None: no longer there


@dataclass(eq=False)
class File:
    durable: bytes = b""
    pending: list[Write] = field(default_factory=list)

    def content(self, writes: Iterable[Write]) -> bytes:
        data = bytearray(self.durable)
        for offset, block in writes:
            data.extend(bytes(max(0, offset - len(data))))
            data[offset : offset + len(block)] = block
        return bytes(data)


@dataclass(eq=False)
class Folder:
    now: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        self.pending.append(change)
        _apply(self.now, change)


def _apply(names: dict[str, File | Folder], change: Change) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """What programs see of the watched folder, and what of it is durable."""

    def __init__(self) -> None:
        self.root = Folder()

    def apply(self, operation: Operation) -> None:
        if operation.kind == "mark":
            return
        folder, name = self._parent(operation.path)
        match operation.kind:
            case "mkdir":
                folder.change({name: Folder()})
            case "create":
                folder.change({name: File()})
            case "write":
                self._file(operation.path).pending.append((operation.offset, operation.data))
            case "truncate":
                file = self._file(operation.path)
                # no way back to the longer file is modelled: nothing here shortens a file that it has to read again
                file.durable = file.content(file.pending)[: operation.offset]
                file.pending.clear()
            case "sync_file":
                file = self._file(operation.path)
                file.durable = file.content(file.pending)
                file.pending.clear()
            case "sync_folder":
                synced = self._folder(operation.path)
                synced.durable = dict(synced.now)
                synced.pending.clear()
            case "unlink" | "rmdir":
                folder.change({name: None})
            case "rename":
                target, new_name = self._parent(operation.target)
                node = folder.now[name]
                if folder is target:
                    folder.change({name: None, new_name: node})
                else:
                    target.change({new_name: node})
                    folder.change({name: None})

    def _folder(self, path: str) -> Folder:
        node: File | Folder = self.root
        for part in PurePosixPath(path).parts:
            assert isinstance(node, Folder)
            node = node.now[part]
        assert isinstance(node, Folder), path
        return node

    def _parent(self, path: str) -> tuple[Folder, str]:
        pure = PurePosixPath(path)
        return self._folder(str(pure.parent)), pure.name

    def _file(self, path: str) -> File:
        folder, name = self._parent(path)
        file = folder.now[name]
        assert isinstance(file, File), path
        return file

    def found(self, keep_writes: Callable[[File], list[Write]], keep_changes: Callable[[Folder], list[Change]]) -> Tree:
        """The tree found after a crash that kept these of the pending writes and changes."""
        tree: dict[str, bytes | None] = {}

        def visit(folder: Folder, prefix: str) -> None:
            names = dict(folder.durable)
            for change in keep_changes(folder):
                _apply(names, change)
            for name, node in names.items():
                if isinstance(node, Folder):
                    tree[prefix + name] = None
                    visit(node, f"{prefix}{name}/")
                else:
                    tree[prefix + name] = node.content(keep_writes(node))

        visit(self.root, "")
        return tree


# --- what may be kept --------------------------------------------------------------------------------------------


def _torn(write: Write) -> Write:
    offset, data = write
    half = len(data) // 2
    return offset, data[: half - half % SECTOR if half > SECTOR else half]


_WRITES: dict[str, Callable[[File], list[Write]]] = {
    "lost": lambda file: [],
    "kept": lambda file: list(file.pending),
    "torn": lambda file: [_torn(write) for write in file.pending],
    "zeros": lambda file: [(offset, bytes(len(data))) for offset, data in file.pending],
    "last block only": lambda file: file.pending[-1:],  # the blocks before it are a hole
}
_CHANGES: dict[str, Callable[[Folder], list[Change]]] = {
    "lost": lambda folder: [],
    "kept": lambda folder: list(folder.pending),
    "last only": lambda folder: folder.pending[-1:],
    "all but the last": lambda folder: folder.pending[:-1],
    "every other": lambda folder: folder.pending[::2],
}


def states(operations: Sequence[Operation], *, mixtures: int = 8, seed: int = 0) -> Iterator[Crash]:
    """Every state that differs, for a crash after each number of operations; after a mark all are told again.

    All pairs of one fate for all unsynced writes and one for all unsynced names, and `mixtures` draws in which each
    file and each folder has a fate of its own.
    """
    disk = Disk()
    seen: set[int] = set()
    generator = random.Random(seed)
    for after, operation in enumerate([Operation("mark", ""), *operations]):
        disk.apply(operation)
        if operation.kind == "mark":
            seen.clear()  # what must hold from here on may differ
        for how, tree in _trees(disk, mixtures, generator):
            key = hash(frozenset(tree.items()))
            if key not in seen:
                seen.add(key)
                yield Crash(after, how, tree)


def _trees(disk: Disk, mixtures: int, generator: random.Random) -> Iterator[tuple[str, Tree]]:
    for data, keep_writes in _WRITES.items():
        for names, keep_changes in _CHANGES.items():
            yield f"data {data}, names {names}", disk.found(keep_writes, keep_changes)
    for _ in range(mixtures):
        # a fate is drawn once for each file and folder, and holds for the whole tree
        salt = generator.getrandbits(64)
        yield f"mixture {salt:#x}", disk.found(_mixed_writes(salt), _mixed_changes(salt))


def _mixed_writes(salt: int) -> Callable[[File], list[Write]]:
    drawn = random.Random(salt)

    def keep(file: File) -> list[Write]:
        kept = []
        for offset, data in file.pending:
            fate = drawn.choice(("lost", "kept", "torn", "zeros"))
            if fate == "torn" and data:
                kept.append((offset, data[: drawn.randrange(len(data))]))
            elif fate != "lost":
                kept.append((offset, data if fate == "kept" else bytes(len(data))))
        return kept

    return keep


def _mixed_changes(salt: int) -> Callable[[Folder], list[Change]]:
    drawn = random.Random(~salt)
    return lambda folder: [change for change in folder.pending if drawn.random() < 0.5]
