"""Foreign tars, damaged ones too: every record that is whole, and a reason code for each that is not.

Past damage the reading goes on at the next block of 512 bytes that is a header with a right checksum. Our own shards
are read by `train.shards` instead, which takes nothing but what was written.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from train.shards import END_OF_TAR, MEMBER, ShardError

REASONS = (
    "damaged_tar", "truncated_tar", "unsafe_path", "not_a_file", "no_extension", "duplicate_key", "member_too_large",
)  # fmt: skip
MAX_MEMBER_BYTES = 1 << 28  # of a file that is read
_BLOCK, _MAGIC_AT, _CHUNK = 512, 257, 1 << 20


class Salvaged(NamedTuple):
    """A record's own key and members {extension: content}, or the reason why it cannot be used."""

    key: str
    members: dict[str, bytes]
    reason: str | None


class _Member(NamedTuple):
    key: str
    extension: str
    content: bytes
    reason: str | None


class _Hole(NamedTuple):
    """Nothing can be read from byte `offset` on, until a header."""

    offset: int
    reason: str


@dataclass
class _Group:
    """The members of a key that lie side by side, and the holes among and beside them."""

    key: str
    holes: list[_Hole]
    members: dict[str, bytes] = field(default_factory=dict[str, bytes])
    reason: str | None = None

    def add(self, member: _Member) -> None:
        twice = "duplicate_key" if member.extension in self.members else None
        self.reason = self.reason or member.reason or twice
        self.members[member.extension] = member.content


def salvage_tar(file: IO[bytes], name: str) -> Iterator[Salvaged]:
    """The records of an uncompressed tar in order, whatever its state; `file` must seek.

    A record beside a hole is given only where it has every kind of member that those before it had: what it lacks may
    have been in the hole. A hole that swallowed whole records, nobody knows how many, is one more "record" at the end,
    named after `name` and its place. A key that comes again elsewhere is given again.
    Raises ShardError where no header can be read at all: that is another kind of file.
    """
    usual: set[str] = set()
    holes: list[_Hole] = []
    told: set[_Hole] = set()  # by a record that is refused on their account
    for group in _groups(file, holes):
        if group.holes and (not usual or not usual <= group.members.keys()):
            group.reason = group.reason or group.holes[0].reason
        if group.reason is not None:
            told.update(group.holes)
            yield Salvaged(group.key, {}, group.reason)
        else:
            usual |= group.members.keys()
            yield Salvaged(group.key, group.members, None)
    for hole in holes:
        if hole.offset == 0 and not usual and not told:
            raise ShardError(f"{name} is no uncompressed tar: unpack it, fetch it again, or leave it out of the source")
        if hole not in told:
            yield Salvaged(f"{name}@{hole.offset}", {}, hole.reason)


def _groups(file: IO[bytes], holes: list[_Hole]) -> Iterator[_Group]:
    """Members by key; all holes are added to `holes`."""
    group, before = None, list[_Hole]()
    for piece in _pieces(file):
        if isinstance(piece, _Hole):
            holes.append(piece)
            before = [piece]
            if group is not None:
                group.holes.append(piece)
            continue
        if group is None or piece.key != group.key:
            if group is not None:
                yield group
            group = _Group(piece.key, before)
        group.add(piece)
        before = []
    if group is not None:
        yield group


def _pieces(file: IO[bytes]) -> Iterator[_Member | _Hole]:
    """Members and holes in order."""
    size = file.seek(0, 2)
    start: int | None = 0
    while start is not None:
        end = start
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None and tar.offset > end:
                    end = tar.offset
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - or it remembers all
                    if not member.isdir():
                        yield _read(tar, member)
        except (tarfile.TarError, ValueError, OverflowError):  # damage: what came before it was given
            pass
        file.seek(end)
        whole = file.read(len(END_OF_TAR)) == END_OF_TAR
        following = _next_header(file, end if end > start else start + _BLOCK)
        if following is not None or not whole:
            cut = following is None and size - end < len(END_OF_TAR)
            yield _Hole(end, "truncated_tar" if cut else "damaged_tar")
        start = following


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> _Member:
    path = member.name.removeprefix("./")
    matched = MEMBER.fullmatch(path)
    key, extension = (matched["key"], matched["extension"].lower()) if matched else (path, "")
    content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if path.startswith("/") or ".." in path.split("/"):
        return _Member(key, extension, b"", "unsafe_path")
    if content is None:
        return _Member(key, extension, b"", "not_a_file")
    if not extension:
        return _Member(key, extension, b"", "no_extension")
    if member.size > MAX_MEMBER_BYTES:
        return _Member(key, extension, b"", "member_too_large")
    data = content.read()
    return _Member(key, extension, data, None if len(data) == member.size else "truncated_tar")


def _next_header(file: IO[bytes], start: int) -> int | None:
    """Where the first header lies at `start` or after it, in blocks from the file's beginning."""
    start += -start % _BLOCK
    file.seek(start)
    while chunk := file.read(_CHUNK):
        place = chunk.find(b"ustar")
        while place >= 0:
            at = place - _MAGIC_AT
            if at >= 0 and at % _BLOCK == 0 and _is_header(chunk[at : at + _BLOCK]):
                return start + at
            place = chunk.find(b"ustar", place + 1)
        start += len(chunk)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
