"""torchrun, with the first failed rank's exit status as its own.

    python -m train.torchrun --standalone --nproc-per-node 2 -m train configs/digits/30_pretrain.yaml

Plain torchrun ends with 1 whatever a rank ended with, so nobody could tell a bad config from a killed rank.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from train.supervisor import EXIT_PREEMPTED


def main() -> int:
    """Run torchrun's own main on this command line and return an exit status; 128 + N for a rank ended by signal N."""
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        print(f"torchrun: rank {rank} was the first to fail, with status {first.exitcode}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        print(f"torchrun was asked to stop by {error.sigval.name}; its ranks were told", file=sys.stderr)
        return EXIT_PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
