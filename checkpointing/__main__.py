"""Look after checkpoints from the command line, without torch.

WHERE is a folder of checkpoints, or one checkpoint in it, or the URL of either. Exit status: 0 all is well, 1 a
checkpoint is broken or could not be written, 2 there is nothing to read.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from checkpointing import store
from checkpointing.layout import CheckpointError, SaveId
from checkpointing.places import MANIFEST, LocalPlace, Place, Unreachable, open_place
from checkpointing.sharded import Checkpoint, reshard


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        place, saves = _find(parsed.where)
        if not saves:
            print(f"{place} holds no committed checkpoint", file=sys.stderr)
            return 2
        if parsed.command == "reshard":
            return reshard_(place, saves, parsed.num_ranks, parsed.out)
        if parsed.command == "prune":
            return prune(place, saves, parsed.keep, parsed.keep_every)
        return {"verify": verify, "list": list_, "show": show}[parsed.command](place, saves)
    except Unreachable as error:
        print(error, file=sys.stderr)
        return 2
    except (CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checkpointing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (verify, list_, show, reshard_, prune):
        chosen = commands.add_parser(command.__name__.rstrip("_"), help=command.__doc__)
        chosen.add_argument("where", help="a folder of checkpoints, or one checkpoint, or a URL of either")
        if command is reshard_:
            chosen.add_argument("num_ranks", type=int, help="how many ranks the new one is to be for")
            chosen.add_argument("out", help="another folder or URL to write it to")
        if command is prune:
            chosen.add_argument("--keep", type=int, required=True, help="how many of the newest stay")
            chosen.add_argument("--keep-every", type=int, help="checkpoints of every so many steps stay for ever")
    return parser


def _find(where: str) -> tuple[Place, list[SaveId]]:
    """The place, and its committed saves, the newest first, or the one save that was named."""
    parent, _, name = where.rstrip("/").rpartition("/")
    save = SaveId.parse(name)
    if save is None:
        place = open_place(where)
        return place, store.committed(place)
    place = open_place(parent or ".")
    return place, [save] if place.has(save, MANIFEST) else []


def verify(place: Place, saves: Sequence[SaveId]) -> int:
    """check every byte of every file against its digest"""
    num_broken = 0
    for save in saves:
        with _progress(save.name, _size_of(place, save)) as progress:
            try:
                store.verify(place, save, progress)
                reason = None
            except Unreachable:
                raise
            except CheckpointError as error:
                reason = str(error)
        num_broken += reason is not None
        print(f"{'whole ' if reason is None else 'BROKEN'}  {save}" + (f"  {reason}" if reason else ""))
    return 1 if num_broken else 0


def list_(place: Place, saves: Sequence[SaveId]) -> int:
    """the newest first, with step, ranks, size and time of saving; only manifests are read"""
    status = 0
    print(f"{'step':>10}  {'ranks':>5}  {'MiB':>10}  {'saved':<19}  checkpoint")
    for save in saves:
        try:
            manifest = store.read_manifest(place, save)
        except Unreachable:
            raise
        except CheckpointError as error:
            print(f"{'BROKEN':>10}  {error}")
            status = 1
            continue
        saved = "-"
        if isinstance(place, LocalPlace):
            seconds = Path(place.path(save, MANIFEST)).stat().st_mtime
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
        size_mib = manifest.size_bytes / 2**20
        print(f"{save.step:>10}  {manifest.world_size:>5}  {size_mib:>10,.1f}  {saved:<19}  {save}")
    return status


def show(place: Place, saves: Sequence[SaveId]) -> int:
    """the newest one's state and tensors; payloads are not read"""
    checkpoint = Checkpoint.open(place, saves[0])
    print(f"{checkpoint.name}\nstate: {json.dumps(checkpoint.state, indent=2, sort_keys=True)}")
    for (kind, name), shape in checkpoint.tensors().items():
        print(f"{kind:<10}  {math.prod(shape):>12,}  {'x'.join(map(str, shape)) or 'scalar':<16}  {name}")
    return 0


def reshard_(place: Place, saves: Sequence[SaveId], num_ranks: int, out: str) -> int:
    """write the newest one again, as another number of ranks would have; verified on the way"""
    checkpoint = Checkpoint.open(place, saves[0])
    target = open_place(out)
    with _progress(f"{saves[0]} for {num_ranks} ranks", _size_of(place, saves[0])) as progress:
        reshard(checkpoint, target, num_ranks, progress)
    print(target.path(saves[0]))
    return 0


def prune(place: Place, saves: Sequence[SaveId], keep: int, keep_every: int | None) -> int:
    """remove all but the newest ones; the newest whole one always stays"""
    for save in store.prune(place, keep, keep_every):
        print(f"removed {place.path(save)}")
    return 0


def _size_of(place: Place, save: SaveId) -> int:
    try:
        return store.read_manifest(place, save).size_bytes
    except CheckpointError:
        return 0


@contextmanager
def _progress(text: str, size_bytes: int) -> Generator[Callable[[int], object]]:
    """A bar on a terminal, and nothing anywhere else."""
    if not sys.stderr.isatty():
        yield lambda size_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(text), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=size_bytes)
        yield lambda done_bytes: bar.advance(task, done_bytes)


if __name__ == "__main__":
    sys.exit(main())
