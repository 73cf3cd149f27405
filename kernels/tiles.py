"""Tiles: what a kernel's file chooses by itself, or what was measured to be faster on this GPU.

`scripts/bench.py kernels --tune` measures and writes one file for a GPU and a Triton version into `kernels/tuned/`:

    nvidia-h200.triton-3.6.json
    {"attention.forward": {"K=72 bf16": {"constants": {"BLOCK_M": 64}, "num_warps": 4, "num_stages": 3}}}

Nothing is ever tuned in a run: a tile changes the order of sums and with it a result's last bits, so a run's tiles are
a function of the code, the GPU and the Triton version alone.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tuned"
WARPS = (1, 2, 4, 8, 16)

Key = tuple[str, str]  # op, shape class


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work: its constants that are free to choose, and the launch's warps and stages."""

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int


_trial: Mapping[Key, Tile] = {}
_given: dict[Key, Tile] | None = None


def tuned(op: str, shape_class: str, default: Tile) -> Tile:
    """The tile that was measured for this GPU and Triton version, or `default`; without a GPU always `default`.

    The GPU is this process's current one when first asked. Raises ValueError where the tile file is malformed, or
    where it names other constants than the kernel now has.
    """
    key = (op, shape_class)
    tile = _trial.get(key) or _of_this_gpu().get(key, default)
    if tile.constants.keys() != default.constants.keys():
        raise ValueError(
            f"{op} ({shape_class}): the tuned tile has the constants {sorted(tile.constants)}, the kernel "
            f"{sorted(default.constants)}: tune again (scripts/bench.py kernels --tune) or delete it from {FOLDER}"
        )
    if _given is not None:
        _given[key] = tile
    return tile


@contextmanager
def trial(tiles: Mapping[Key, Tile]) -> Iterator[Mapping[Key, Tile]]:
    """For whoever tunes: within, `tuned` gives out `tiles` first, and what it gave out is seen in what this yields."""
    global _trial, _given
    before = _trial, _given
    _trial, _given = tiles, {}
    try:
        yield _given
    finally:
        _trial, _given = before


def tile_file(gpu: str, triton_version: str) -> Path:
    """Where the tiles of a GPU, by its full name, and of a Triton version, whose patch level is left out, are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return FOLDER / f"{name}.triton-{'.'.join(triton_version.split('.')[:2])}.json"


def read_tiles(path: Path) -> dict[Key, Tile]:
    """What `write_tiles` wrote; nothing where there is no such file. Raises ValueError naming file and entry."""
    if not path.exists():
        return {}
    try:
        ops = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): mend or delete it") from error
    tiles = dict[Key, Tile]()
    for op, classes in _items(ops, path, "the file"):
        for shape_class, entry in _items(classes, path, op):
            tiles[op, shape_class] = _tile(entry, path, f"{op} ({shape_class})")
    return tiles


def write_tiles(path: Path, tiles: Mapping[Key, Tile]) -> None:
    """Write `tiles` for `read_tiles`, sorted, so that a tuning's differences can be read. They hold from now on."""
    ops = dict[str, dict[str, object]]()
    for (op, shape_class), tile in sorted(tiles.items()):
        entry = {"constants": dict(tile.constants), "num_warps": tile.num_warps, "num_stages": tile.num_stages}
        ops.setdefault(op, {})[shape_class] = entry
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(ops, indent=1) + "\n", encoding="utf-8")
    _of_this_gpu.cache_clear()


@functools.cache
def _of_this_gpu() -> Mapping[Key, Tile]:
    import torch  # not on top: Triton files import this module, and they compile without torch

    if not torch.cuda.is_available():
        return {}
    return read_tiles(tile_file(torch.cuda.get_device_name(), importlib.metadata.version("triton")))


def _items(value: object, path: Path, where: str) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where} is {value!r}: give a mapping")
    yield from value.items()


def _tile(entry: object, path: Path, where: str) -> Tile:
    fields = dict(_items(entry, path, where))
    if fields.keys() != {"constants", "num_warps", "num_stages"}:
        raise ValueError(f"{path}: {where} has {sorted(fields)}: give constants, num_warps and num_stages")
    constants = dict(_items(fields["constants"], path, f"constants of {where}"))
    numbers = {**constants, "num_warps": fields["num_warps"], "num_stages": fields["num_stages"]}
    for name, value in numbers.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{path}: {name} of {where} is {value!r}: give a whole number")
    if numbers["num_warps"] not in WARPS or not numbers["num_stages"]:
        raise ValueError(
            f"{path}: {where} has num_warps {numbers['num_warps']} and num_stages {numbers['num_stages']}: "
            f"give one of {', '.join(map(str, WARPS))} warps, and one stage or more"
        )
    return Tile(constants, numbers["num_warps"], numbers["num_stages"])  # type: ignore[arg-type]
