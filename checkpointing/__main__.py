"""Look at checkpoints from the command line, without torch: `python -m checkpointing verify|list|show FOLDER`.

FOLDER is a folder of checkpoints, or one checkpoint. Exit status: 0 all is well, 1 a checkpoint is broken,
2 there is nothing to read.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpointing import store


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m checkpointing", description="Look at checkpoints.")
    parser.add_argument("command", choices=COMMANDS, help="; ".join(f"{n}: {c.__doc__}" for n, c in COMMANDS.items()))
    parser.add_argument("folder", type=Path, help="a folder of checkpoints, or one checkpoint")
    parsed = parser.parse_args(arguments)
    folder: Path = parsed.folder.resolve()
    if not folder.is_dir():
        print(f"{folder} is not a folder", file=sys.stderr)
        return 2
    folders = [folder] if (folder / store.MANIFEST).exists() else store.committed_folders(folder)
    if not folders:
        print(f"{folder} holds no committed checkpoint", file=sys.stderr)
        return 2
    return COMMANDS[parsed.command](folders)


def verify(folders: Sequence[Path]) -> int:
    """check every file against its digest"""
    broken = 0
    for folder in folders:
        reason = store.reason_broken(folder)
        broken += reason is not None
        print(f"{'whole ' if reason is None else 'BROKEN'}  {folder.name}" + (f"  {reason}" if reason else ""))
    return 1 if broken else 0


def list_(folders: Sequence[Path]) -> int:
    """the newest first, with step, size and time of saving; the payload is not read"""
    status = 0
    print(f"{'step':>10}  {'ranks':>5}  {'tensors':>7}  {'MiB':>10}  {'saved':<19}  folder")
    for folder in folders:
        try:
            manifest = store.read_manifest(folder)
        except store.CheckpointError as error:
            print(f"{'BROKEN':>10}  {error}")
            status = 1
            continue
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / store.MANIFEST).stat().st_mtime))
        ranks, tensors = len(manifest.body["files"]), len(manifest.body["tensors"])
        size_mib = manifest.size_bytes / 2**20
        print(f"{manifest.step:>10}  {ranks:>5}  {tensors:>7}  {size_mib:>10,.1f}  {saved:<19}  {folder.name}")
    return status


def show(folders: Sequence[Path]) -> int:
    """the newest one's state and tensors; the payload is not read"""
    try:
        manifest = store.read_manifest(folders[0])
    except store.CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{manifest.folder}\nstate: {json.dumps(manifest.body['state'], indent=2, sort_keys=True)}")
    for tensor in manifest.body["tensors"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        print(f"{tensor['kind']:<10}  {math.prod(tensor['shape']):>12,}  {shape:<16}  {tensor['name']}")
    return 0


COMMANDS = {"verify": verify, "list": list_, "show": show}

if __name__ == "__main__":
    sys.exit(main())
