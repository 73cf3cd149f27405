"""torchrun, with the exit status of the rank that caused the failure as its own.

    python -m train.torchrun --standalone --nproc-per-node 2 -m train configs/digits/30_pretrain.yaml

Plain torchrun ends with 1 whatever a rank ended with, so nobody could tell a bad config from a killed rank.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from train.supervisor import EXIT_PREEMPTED, EXIT_USER_ERROR


def main() -> int:
    """Run torchrun's own main on this command line and return an exit status; 128 + N for a rank ended by signal N."""
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        print(f"torchrun: exit statuses by rank: {codes}", file=sys.stderr)
        code = cause(codes.values())
        return code if code > 0 else 128 - code
    except SignalException as error:
        print(f"torchrun was asked to stop by {error.sigval.name}; its ranks were told", file=sys.stderr)
        return EXIT_PREEMPTED
    return 0


def cause(exit_codes: Iterable[int]) -> int:
    """The exit code, of those of all failed ranks, that says why they failed; -N is signal N.

    torchrun tells failures apart by the second, so the first in time is not known. A refusal brings its peers down, by
    lost connections and then torchrun's own signals; so does a killed rank, whose peers end by errors of their own.
    """

    def doubt(code: int) -> int:
        if code == EXIT_USER_ERROR:
            return 0
        if code == -signal.SIGTERM:
            return 3  # torchrun's own way of ending the others
        return 1 if code < 0 else 2

    return min(exit_codes, key=doubt)


if __name__ == "__main__":
    sys.exit(main())
