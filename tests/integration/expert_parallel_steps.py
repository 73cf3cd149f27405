"""A few public steps of a small unified model, its experts spread over ranks; started by test_expert_parallel.py.

    torchrun --nproc-per-node 2 tests/integration/expert_parallel_steps.py FOLDER KIND:BACKEND:PARTS[:HOW] [...]

HOW: `starved`, where routers send every token to the first experts; `checkpointed`, `compiled`, `bf16`; or `onward`,
which starts from the checkpoint `FOLDER/start`. Every rank writes its part of the state after the steps to the
checkpoint `FOLDER/KIND-BACKEND-PARTS-HOW`, and beside it the losses and the first step's gradients.
"""

import faulthandler
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpointing.layout import SaveId
from checkpointing.places import LocalPlace
from checkpointing.sharded import Chunk, latest, save_now
from models.packed import Packed
from models.unified import Unified, UnifiedConfig
from models.unified_objective import Totals, UnifiedObjective
from tests.models.documents import LAYOUT, SMALL, draws, rows
from train.config import Optim, Parallel
from train.optim import ExponentialMovingAverage
from train.parallel import Backend, Shard, World, build_model, join_world
from train.state import initialise, pieces, restore, tensors

STEPS, NUM_ROWS = 3, 8
KINDS = {
    "four": {"num_experts": 4, "top_k": 2},
    "modalities": {"modality_experts": True},
    "both": {"num_experts": 2, "modality_experts": True},
}
OBJECTIVE = UnifiedObjective(balancing="row")
OPTIM = Optim(learning_rate=1e-2, weight_decay=0.1, eps=1e-3)  # a small eps would turn rounding into whole updates
CLIPPED = 0.05  # far below the gradients' norm


@dataclass(frozen=True)
class Case:
    kind: str
    backend: str
    parts: int
    how: str = "plainly"

    @classmethod
    def of(cls, said: str) -> "Case":
        kind, backend, parts, *how = said.split(":")
        return cls(kind, backend, int(parts), *how)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.backend}-{self.parts}-{self.how}"


def run(case: Case, folder: Path, world: World) -> None:
    parallel = Parallel(
        backend=case.backend, nproc=world.size, expert_parallel=case.parts,  # type: ignore[arg-type]
        activation_checkpointing=case.how == "checkpointed", compile=case.how == "compiled",
    )  # fmt: skip
    config = config_of(case.kind)
    backend = build_model(
        lambda: Unified(config), world, parallel, OPTIM,
        microbatch_size=1, bf16=case.how == "bf16", max_grad_norm=CLIPPED,
    )  # fmt: skip
    average = ExponentialMovingAverage(backend, 0.9)
    if case.how == "onward":
        start = latest(folder / "start")
        assert start is not None
        restore(start, backend, average)
    else:
        initialise(backend, seed=0)
        if case.how == "starved":
            for shard in backend.shards:
                if shard.name.endswith("router.weight"):
                    shard.value.zero_()  # among equals the first experts are chosen, all on the first rank
            backend.publish()
        average.restart()
    losses, gradients = list[float](), list[tuple[str, int, Tensor]]()
    held = dict[str, int]()

    def keep(shard: Shard, gradient: Tensor) -> None:
        held.update(gradients=bytes_of(each.holder.grad for each in backend.shards))
        gradients.append((shard.name, shard.offset, gradient.detach().clone()))

    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16) if case.how == "bf16" else nullcontext():
            losses.append(take(backend, step))
        backend.update(1e-2, keep if step == 0 else None, average)
    held |= {
        "parameters": bytes_of(backend.module.parameters()),
        "optimizer": bytes_of(moments for _, _, moments in backend.optimizer_tensors()),
        "ema": bytes_of(values for _, values in average.averages),
    }
    if case.backend == "ddp":
        sizes = backend.model._get_ddp_logging_data()["rebuilt_bucket_sizes"]  # type: ignore[operator]
        held["gradients"] += sum(map(int, sizes.split(",")))
    told = {"losses": losses, "gradients": gradients, "held": held}
    torch.save(told, folder / f"{case.name}.{world.rank}.pt")
    save(backend, average, folder / case.name)


def config_of(kind: str) -> UnifiedConfig:
    return UnifiedConfig(**{**SMALL.model_dump(), **KINDS[kind]})


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Of the memory behind tensors, each piece once."""
    held = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    storages = [each.untyped_storage() for each in held if each is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def take(backend: Backend, step: int) -> float:
    """One step's gradients, in two microbatches a rank of the same rows whatever the ranks; returns its loss."""
    world, batch = backend.world, batch_of(step)
    noise, times = draws(batch, step)
    totals, loss = Totals.of(batch), torch.zeros(())
    microbatches = torch.arange(NUM_ROWS).chunk(world.size)[world.rank].chunk(2)
    for number, own in enumerate(microbatches):
        with backend.microbatch(last=number == 1):
            found = OBJECTIVE.losses(backend.model, batch.rows(own), noise[own], times[own])
            of_rows = OBJECTIVE.weighed(found, totals).sum()
            backend.backward(of_rows)
        loss += of_rows.detach()
    return float(world.sum(loss))


def batch_of(step: int) -> Packed:
    """Rows of which the last ones are empty: their rank sends padding alone."""
    packed = LAYOUT.pack(rows() + rows())
    return packed.rows(torch.arange(NUM_ROWS).roll(step))


def save(backend: Backend, average: ExponentialMovingAverage, root: Path) -> None:
    world = backend.world
    chunks = [
        Chunk(piece.kind, piece.name, piece.offset, piece.shape, tensor.detach())
        for piece, tensor in zip(pieces(backend, average), tensors(backend, average), strict=True)
    ]
    place, state = LocalPlace(root), {"num_updates": backend.num_updates}
    save_now(place, SaveId(1, 1, STEPS), chunks, state, rank=world.rank, world_size=world.size, timeout_s=60)


def main() -> None:
    folder, world = Path(sys.argv[1]), join_world()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(270, exit=True)
    for said in sys.argv[2:]:
        run(Case.of(said), folder, world)
        world.barrier()
    os._exit(0)  # DeepSpeed's engines would be torn down one by one


if __name__ == "__main__":
    main()
