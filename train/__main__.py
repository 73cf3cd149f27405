"""One stage, by hand or under a launcher:

    python -m train configs/digits/10_ingest.yaml --run-dir runs/x
    torchrun --nproc-per-node 2 -m train configs/digits/40_finetune_dp.yaml --run-dir runs/x
    deepspeed --num_gpus 8 --module train configs/digits/40_finetune_dp.yaml --run-dir runs/x

Exit status: 0 done; 2 a bad configuration, input or budget, told on the last line; 75 told to stop, saved, can go on;
76 a bad step (a loss or weight that is not finite, or a loss spike): go on from the newest save; 77 a bad step, and a
person must look, by the stage's policy or because it came again.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from train import check_packages
from train.heartbeat import install
from train.processes import follow_supervisor
from train.run_folder import RunFolder
from train.supervisor import EXIT_BAD_STEP, EXIT_BAD_STEPS, EXIT_PREEMPTED, EXIT_USER_ERROR


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Run one stage of a recipe; run again after anything, it goes on where it was.",
    )
    parser.add_argument("stage", type=Path, help="stage file, such as configs/digits/30_pretrain.yaml")
    parser.add_argument("--run-dir", type=Path, help="run folder (default: runs/RECIPE)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, such as train.steps=10"
    )
    parser.add_argument("--fencing-epoch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    follow_supervisor()
    heartbeat = install()
    status = 0
    try:
        check_packages()
        from train.recipe import load_stage
        from train.stages import run_stage

        recipe = arguments.stage.resolve().parent.name
        run = RunFolder.open(arguments.run_dir or Path("runs") / recipe, recipe)
        run_stage(load_stage(arguments.stage, arguments.set), run, arguments.fencing_epoch, heartbeat)
    except Exception as error:
        status = _exit_status(error)
    heartbeat.exiting(status)
    return status


def _exit_status(error: Exception) -> int:
    """Say what happened, shortly where the user can mend it, and classify it for the supervisor."""
    from train.health import BadStep, BadStepsEndTheStage
    from train.loop import Preempted

    if isinstance(error, Preempted | BadStep):
        print(error, flush=True)
        return EXIT_PREEMPTED if isinstance(error, Preempted) else EXIT_BAD_STEP
    if isinstance(error, ValueError):  # what we raise for the user; everything else is a failure worth a restart
        if os.environ.get("SFUMATO_TRACEBACK"):
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")  # one write: ranks share the log
        return EXIT_BAD_STEPS if isinstance(error, BadStepsEndTheStage) else EXIT_USER_ERROR
    traceback.print_exc()
    return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A peer that is gone leaves collectives that destructors would wait for; everything is saved and synced by now.
    os._exit(status)
