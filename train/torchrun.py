"""torchrun, with its store in the launch and the exit status of the rank that caused the failure as its own.

    python -m train.torchrun --standalone --nproc-per-node 2 -m train configs/digits/30_pretrain.yaml

Plain torchrun ends with 1 whatever a rank ended with, so nobody could tell a bad config from a killed rank; and its
agent serves the store at which ranks meet. With `--rdzv-backend launch` the agent is a client of a store that the
launch serves, and node and rank numbers are what the launch says.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.run import parse_args, run

from train.supervisor import EXIT_PREEMPTED, EXIT_USER_ERROR

LAUNCH_BACKEND = "launch"


class LaunchRendezvous(StaticTCPRendezvous):
    """Who takes part is settled before the agents start; they only meet, at the launch's store."""

    def get_backend(self) -> str:
        return LAUNCH_BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        store = TCPStore(self.master_addr, self.master_port, is_master=False, timeout=self.timeout)
        meeting_place = RendezvousStoreInfo(self.master_addr, self.master_port)
        return RendezvousInfo(PrefixStore(self.run_id, store), self.rank, self.world_size, meeting_place)


def _launch_rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    address, port = parameters.endpoint.rsplit(":", 1)
    node_rank, timeout_s = int(parameters.config["node_rank"]), int(parameters.config["timeout"])
    return LaunchRendezvous(address, int(port), node_rank, parameters.max_nodes, parameters.run_id, timeout_s)


def main() -> int:
    """Run torchrun's own main on this command line and return an exit status; 128 + N for a rank ended by signal N."""
    rendezvous_handler_registry.register(LAUNCH_BACKEND, _launch_rendezvous)
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
