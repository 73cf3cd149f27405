"""What disks, copies and people do to files that were whole: each fault changes what is read, and says where."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

SECTOR = 512
Harm = tuple[int, int]  # first byte harmed, and the one after the last


def corrupt(kind: str, path: Path, generator: random.Random) -> list[Path]:
    """Do it; returns the files that are harmed: none where there is no other to change places with."""
    before = {other: other.read_bytes() for other in path.parent.parent.glob("*/*") if other.is_file()}
    FAULTS[kind](path, generator)
    return [path for path, data in before.items() if not path.exists() or path.read_bytes() != data]


def bit_flip(path: Path, generator: random.Random) -> Harm:
    data = bytearray(path.read_bytes())
    at = generator.randrange(len(data))
    data[at] ^= 1 << generator.randrange(8)
    path.write_bytes(data)
    return at, at + 1


def torn(path: Path, generator: random.Random) -> Harm:
    """From some byte on, what lay on these sectors before: the file's length is as it was."""
    data = path.read_bytes()
    at = generator.randrange(len(data))
    stale = generator.randbytes(len(data) - at)
    path.write_bytes(data[:at] + (stale if stale != data[at:] else bytes(byte ^ 1 for byte in stale)))
    return at, len(data)


def zero_hole(path: Path, generator: random.Random) -> Harm:
    """A sector that was never written reads as zeros; where a file has only zeros there, one byte that differs."""
    data = path.read_bytes()
    size = min(SECTOR, len(data))
    begins = [at for at in range(0, len(data) - size + 1, size) if any(data[at : at + size])]
    at = generator.choice(begins)
    path.write_bytes(data[:at] + bytes(size) + data[at + size :])
    return at, at + size


def truncated(path: Path, generator: random.Random) -> Harm:
    size = path.stat().st_size
    at = generator.randrange(size)
    os.truncate(path, at)
    return at, size


def extended(path: Path, generator: random.Random) -> Harm:
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(generator.randbytes(1 + generator.randrange(SECTOR)))
    return size, path.stat().st_size


def missing(path: Path, _: random.Random) -> Harm:
    size = path.stat().st_size
    path.unlink()
    return 0, size


def swapped_between_ranks(path: Path, _: random.Random) -> Harm:
    """Changes places with another rank's file of its kind in the same folder."""
    return _swap(path, [other for other in path.parent.glob(f"rank-*{path.suffix}") if other != path])


def swapped_between_saves(path: Path, _: random.Random) -> Harm:
    """Changes places with the file of the same name in another save."""
    return _swap(path, [other for other in path.parent.parent.glob(f"*/{path.name}") if other != path])


def _swap(path: Path, others: list[Path]) -> Harm:
    if not others:
        return 0, 0
    other = sorted(others)[0]
    aside = path.with_name("aside")
    shutil.move(path, aside)
    shutil.move(other, path)
    shutil.move(aside, other)
    return 0, path.stat().st_size


FAULTS: dict[str, Callable[[Path, random.Random], Harm]] = {
    fault.__name__: fault
    for fault in (
        bit_flip,
        torn,
        zero_hole,
        truncated,
        extended,
        missing,
        swapped_between_ranks,
        swapped_between_saves,
    )
}
