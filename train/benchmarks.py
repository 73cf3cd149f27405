"""What this machine does with the parts that matter, each measured beside what it is compared to, in one run.

Rivals run in turn, and a ratio is the median over rounds of the two times in one round: machines drift, and what runs
side by side drifts together. What privacy costs is in `train.benchmarks_privacy`, what saves cost in
`train.benchmarks_checkpoint`, and what the filter finds, and how fast, in `train.benchmarks_pii`.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.dit import DiT, DiTConfig
from models.flow import Objective
from train.config import Optim, Parallel
from train.data import ShardDataset
from train.measurements import Row
from train.parallel import Backend, join_world, shard_model
from train.shards import Record, write_shards
from train.source_config import DigitsSource
from train.sources import digits

Work = Callable[[], object]
Times = Mapping[str, Sequence[float]]  # seconds of each work in each round

log = logging.getLogger(__name__)


def seconds(work: Work, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call by a clock, the wall's by default, the device's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def interleaved(works: Mapping[str, Work], rounds: int, clock: Callable[[], float] = time.perf_counter) -> Times:
    """Seconds of every work in each round; each round begins with another. Call each once before, uncounted."""
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        log.info("round %d of %d: %s", number + 1, rounds, ", ".join(names))
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(works[name], clock))
    return times


def ratio(times: Times, work: str, rival: str) -> float:
    """Median over rounds of one work's time over another's."""
    return statistics.median(a / b for a, b in zip(times[work], times[rival], strict=True))


def train() -> list[Row]:
    """One non-private step of the digits recipe's model on one process: images and model FLOPs a second."""
    config = DiTConfig(size="nano", image_size=8, channels=1, patch_size=2, num_classes=10)
    backend, records = one_process(config), 64
    losses = fixed_losses(config, records, backend.world.device)

    def step() -> None:
        backend.backward(losses(backend.model).mean())
        backend.update(1e-3)

    step()
    elapsed = statistics.median(seconds(step) for _ in range(15))
    flops = 3 * config.forward_flops(records)
    return [
        Row(name="train.nano_images_a_second", value=records / elapsed, unit="images/s"),
        Row(name="train.nano_model_flops", value=flops / elapsed / 1e12, unit="TFLOP/s"),
    ]


def data() -> list[Row]:
    """Random reads of verified, decoded records from shards."""
    with tempfile.TemporaryDirectory() as name:
        items = digits(DigitsSource(kind="digits"), 0).items
        records = [item for split, item in items if split == "public" and isinstance(item, Record)]
        folder = Path(name) / "public"
        write_shards(folder, "public", records, shard_size=256)
        dataset = ShardDataset(folder, "public")
        indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).numpy()
        elapsed = statistics.median(seconds(lambda: dataset.batch(indices, 1, 8)) for _ in range(5))
    return [Row(name="data.random_records_a_second", value=len(indices) / elapsed, unit="records/s")]


def initialised(config: DiTConfig) -> DiT:
    """A DiT with the same weights at every call, none of them zero."""
    model = DiT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # zero gates would give zero gradients, whose products some processors speed up
        for parameter in model.parameters():
            parameter.add_(0.02)
    return model


def one_process(config: DiTConfig) -> Backend:
    """That DiT under the `single` backend."""
    parallel, optim = Parallel(backend="single"), Optim(learning_rate=1e-3)
    return shard_model(initialised(config), join_world(), parallel, optim, microbatch_size=16, bf16=False)


def fixed_losses(config: DiTConfig, records: int, device: torch.device) -> Callable[[nn.Module], Tensor]:
    """From a model to the losses (records,) of a batch that is the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (records, config.channels, config.image_size, config.image_size)
    images, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    times = torch.rand(records, generator=generator).to(device)
    labels = torch.randint(config.num_classes, (records,), generator=generator).to(device)
    return lambda network: Objective().losses(network, images, labels, times, noise)
