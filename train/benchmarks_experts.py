"""What a mixture of experts costs beside a dense network that does as much for a token; and what it costs and saves to
spread its experts over two ranks of this machine: time, memory, what goes between them.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.packed import Image, Layout, Text
from models.tokenizer import ByteTokenizer
from models.unified import Unified, UnifiedConfig
from models.unified_objective import Totals, UnifiedObjective
from train import ROOT
from train.benchmarks import Work, interleaved, ratio
from train.config import Optim, Parallel
from train.measurements import Row
from train.parallel import Backend, World, build_model, join_world
from train.state import initialise

ROUNDS = 10
MOST_OVER_DENSE = 1.25
NUM_ROWS, CAPTION_BYTES, IMAGE_SIZE, PATCH = 8, 95, 16, 2
MODEL = UnifiedConfig(
    width=256, depth=4, heads=4, channels=1, patch_size=PATCH, image_size=IMAGE_SIZE,
    max_caption_tokens=CAPTION_BYTES + 2, num_experts=8, top_k=2,
)  # fmt: skip


def experts() -> list[Row]:
    """A step of 8 experts over a dense one's, and steps of two ranks that share the experts over those that do not."""
    return [_over_dense(), *_spread_over_two()]


def _over_dense() -> Row:
    """One process, all its cores: forward, backward and update, the dense hidden width being that of the chosen two."""
    world, dense = join_world(), MODEL.model_copy(update={"num_experts": 1, "top_k": 1})
    take = _Step(world)
    backends = {name: _build(world, "single", 1, config) for name, config in (("mixture", MODEL), ("dense", dense))}
    works: dict[str, Work] = {name: functools.partial(take, backend) for name, backend in backends.items()}
    for work in works.values():
        work()
    value = ratio(interleaved(works, ROUNDS), "mixture", "dense")
    return Row(
        name="experts.step_over_dense", value=value, unit="x", target=MOST_OVER_DENSE, ok=value <= MOST_OVER_DENSE
    )


def _spread_over_two() -> list[Row]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", __name__]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the two ranks ended with status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(world: World) -> list[Row]:
    rows: list[Row] = []
    take = _Step(world)
    for name in ("ddp", "fsdp2"):
        whole, spread = (_build(world, name, parts) for parts in (1, 2))
        times = {backend: list[tuple[float, float]]() for backend in (whole, spread)}
        for _ in range(ROUNDS + 1):  # in turn, so that what else the machine does meets both
            for backend, measured in times.items():
                world.barrier()
                began = time.perf_counter(), time.process_time()
                take(backend)
                measured.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        for unit, clock in (("wall", 0), ("CPU", 1)):
            each = (b[clock] / a[clock] for a, b in zip(times[whole][1:], times[spread][1:], strict=True))
            rows.append({"name": f"experts.{name}.{unit}_time", "value": statistics.median(each), "unit": "of whole"})
        held = [sum(shard.numel for shard in backend.shards) for backend in (whole, spread)]
        rows.append({"name": f"experts.{name}.elements_held", "value": held[1] / held[0], "unit": "of whole"})
        with _counted() as sent:
            take(spread)
        rows.append({"name": f"experts.{name}.exchanged", "value": sum(sent) / 2**20, "unit": "MiB a rank and step"})
        reduced = 4 * sum(math.prod(shape) for name, shape in whole.shapes.items() if ".experts." in name)
    rows.append({"name": "experts.no_longer_reduced", "value": reduced / 2**20, "unit": "MiB a rank and step"})
    return rows


def _build(world: World, name: str, parts: int, config: UnifiedConfig = MODEL) -> Backend:
    parallel = Parallel(backend=name, nproc=world.size, expert_parallel=parts)  # type: ignore[arg-type]
    optim = Optim(learning_rate=1e-3)
    backend = build_model(lambda: Unified(config), world, parallel, optim, microbatch_size=NUM_ROWS, bf16=False)
    initialise(backend, seed=0)
    return backend


class _Step:
    """A public step on the same captioned images of noise each time, others on every rank."""

    def __init__(self, world: World) -> None:
        generator = torch.Generator().manual_seed(world.rank)
        layout, caption = Layout(ByteTokenizer(), 1, PATCH), Text([ord("x")] * CAPTION_BYTES, learn=True)
        images = torch.randn(NUM_ROWS, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        self.batch = layout.pack([[[caption, Image(image, noised=True)]] for image in images]).to(world.device)
        self.noise, self.times = torch.randn_like(self.batch.patches_BNF), torch.full(self.batch.noised_BI.shape, 0.5)
        self.times = self.times.to(world.device)
        self.objective, self.totals = UnifiedObjective(balancing="row"), Totals.of(self.batch)

    def __call__(self, backend: Backend) -> None:
        with backend.microbatch(last=True):
            found = self.objective.losses(backend.model, self.batch, self.noise, self.times)
            backend.backward(self.objective.weighed(found, self.totals).sum())
        backend.update(1e-3)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes of each exchange meanwhile: what a rank hands over, its own part among it."""
    sent, exchange = list[int](), dist.all_to_all_single

    def counted(received: Tensor, given: Tensor, *arguments: Any, **named: Any) -> Any:
        sent.append(given.numel() * given.element_size())
        return exchange(received, given, *arguments, **named)

    dist.all_to_all_single = counted
    try:
        yield sent
    finally:
        dist.all_to_all_single = exchange


if __name__ == "__main__":
    world = join_world()
    measured = _measure(world)
    if world.rank == 0:
        print(json.dumps(measured), flush=True)
