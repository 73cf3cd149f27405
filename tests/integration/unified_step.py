"""One private step of a small unified model under each backend; started by test_unified_backends.py under torchrun.

    torchrun --nproc-per-node 2 tests/integration/unified_step.py FOLDER KIND:ENGINE:BACKEND [...]

Each rank writes the clipped sums of the shards that it owns to `FOLDER/KIND-ENGINE-BACKEND.RANK.pt`, as (name, offset,
values).
"""

import faulthandler
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from models.unified import Unified
from models.unified_objective import Totals, UnifiedObjective
from privacy.clipping import make_clipper
from tests.models.documents import LAYOUT, config, draws, rows
from train.config import Optim, Parallel
from train.parallel import Shard, World, build_model, join_world
from train.state import initialise

BOUND = 0.5
OBJECTIVE = UnifiedObjective(balancing="row")


def step(kind: str, engine: str, backend_name: str, world: World) -> list[tuple[str, int, Tensor]]:
    """The clipped sum over four rows, two a rank, in two microbatches; weights start the same everywhere."""
    name, _, checkpointed = backend_name.partition("+")
    parallel = Parallel(backend=name, nproc=world.size, activation_checkpointing=bool(checkpointed))  # type: ignore[arg-type]
    backend = build_model(
        lambda: Unified(config(kind)), world, parallel, Optim(learning_rate=1e-3),
        microbatch_size=1, bf16=False,
    )  # fmt: skip
    initialise(backend, seed=0)
    clipper = make_clipper(engine, backend.module, BOUND)  # type: ignore[arg-type]
    batch = LAYOUT.pack(rows())
    noise, times = draws(batch)
    mine = torch.arange(4).chunk(world.size)[world.rank]
    for row in mine:
        own = row[None]

        def losses(network: nn.Module, own: Tensor = own) -> Tensor:
            found = OBJECTIVE.losses(network, batch.rows(own), noise[own], times[own])
            return OBJECTIVE.weighed(found, Totals(text=20, patches=15, tokens=80))

        clipper.accumulate(backend, losses, torch.ones(1, dtype=torch.bool), last=bool(row == mine[-1]))
    sums: list[tuple[str, int, Tensor]] = []

    def keep(shard: Shard, gradient: Tensor) -> None:
        sums.append((shard.name, shard.offset, gradient.detach().flatten().clone()))

    backend.update(1e-3, keep)
    return sums


def main() -> None:
    folder, world = Path(sys.argv[1]), join_world()
    faulthandler.dump_traceback_later(270, exit=True)
    for case in sys.argv[2:]:
        sums = step(*case.split(":"), world)  # type: ignore[arg-type]
        torch.save(sums, folder / f"{case.replace(':', '-')}.{world.rank}.pt")
    world.barrier()
    os._exit(0)  # DeepSpeed's engines would be torn down one by one


if __name__ == "__main__":
    main()
