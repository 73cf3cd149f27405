#!/usr/bin/env python3
"""Run a recipe from raw shards to an audited export: the one command.

Run again after anything, and it goes on where it was: finished stages are skipped, a broken one resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  launch.py configs/digits                                   the whole recipe, into runs/digits
  launch.py configs/digits --set privacy.target_epsilon=4    a key of every stage that has it
  launch.py configs/digits --set pretrain.train.steps=100    a key of one stage
  launch.py configs/digits --only eval                       one stage again where it was left
  launch.py configs/imagenet_dit_xl2 --dry-run               plan, parameters, memory, epsilon; starts nothing
  launch.py configs/imagenet_dit_xl2 --launcher slurm --nnodes 2 --submit
  launch.py configs/imagenet_dit_xl2 --launcher kubernetes --nnodes 2 --image registry.example/sfumato:1

On several nodes start it once a node, with the run folder on a shared disk, MASTER_ADDR naming the first node and
NODE_RANK counting from 0 (under Slurm both are found). Ctrl-C saves and stops; twice stops at once.

exit status: 0 done, 1 a figure missed its target, 2 something for you to mend, 129 the launch of node 0 is gone,
3 given up after crashes, 4 after hangs, 5 after bad steps (each: restarts brought nothing), 130 or 143 stopped
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from train import check_packages

    try:
        check_packages()
        from train.launch import launch

        return launch(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", type=Path, help="folder of numbered stage files, such as configs/digits")
    add("--run-dir", type=Path, help="where everything goes (default: runs/RECIPE)")
    add("--only", metavar="STAGE", help="run this stage alone")
    add("--from", metavar="STAGE", dest="first", help="begin at this stage")
    add("--until", metavar="STAGE", dest="last", help="end after this stage")
    add("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key; repeatable")
    launchers = ("torchrun", "deepspeed", "slurm", "kubernetes")
    add("--launcher", choices=launchers, default="torchrun", help="(default: %(default)s); the last two write a job")
    add("--nproc", type=int, help="processes a node, instead of parallel.nproc")
    add("--nnodes", type=int, default=1, help="nodes (default: %(default)s)")
    add("--port", type=int, help="where ranks meet (default: a free one; on several nodes MASTER_PORT or 29500)")
    add("--dry-run", action="store_true", help="print the plan, the memory and the epsilon; start nothing")
    add("--submit", action="store_true", help="with --launcher slurm: submit the script too")
    add("--image", help="with --launcher kubernetes: an image with this repository as its working directory")
    add("--claim", default="sfumato-runs", help="likewise: the volume claim for run folders (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
