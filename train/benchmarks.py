"""What this machine does with the parts that matter, each measured beside what it is compared to, in one run.

Rivals are interleaved, and ratios are medians of pairs: machines drift, pairs drift together.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpointing.sharded import Chunk, latest, save
from checkpointing.store import newest_whole
from kernels.noise import KEYSTREAMS, gaussian
from models.dit import DiT, DiTConfig
from models.flow import Objective
from privacy.clipping import Clipper, make_clipper
from privacy.pii.patterns import detect
from train.config import Optim, Parallel
from train.data import ShardDataset
from train.measurements import Row
from train.parallel import Backend, join_world, shard_model
from train.planted import plant
from train.shards import Record, write_shards
from train.sources import DigitsSource, digits

Work = Callable[[], object]


def seconds(work: Work) -> float:
    """Wall-clock time of one call, the device's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired_ratio(work: Work, rival: Work, pairs: int = 7) -> float:
    """Median over pairs of work's time over rival's, after one uncounted call of each."""
    for warm_up in (work, rival):
        warm_up()
    return statistics.median(seconds(work) / seconds(rival) for _ in range(pairs))


def dp() -> list[Row]:
    """Two-pass clipping over the non-private forward and backward of a 16M DiT; noise over torch.randn."""
    config = DiTConfig(width=384, depth=6, heads=6, image_size=16, channels=4, patch_size=2, num_classes=10)
    rows: list[Row] = []
    for records, image_size in ((16, 16), (16, 32)):
        backend = _one_process(config.model_copy(update={"image_size": image_size}))
        clipper = make_clipper("two_pass", backend.module, 1.0)
        losses = _losses(backend.module, records)
        present = torch.ones(records, dtype=torch.bool, device=backend.world.device)

        def plain(backend: Backend = backend, losses: Callable[[nn.Module], Tensor] = losses) -> None:
            backend.backward(losses(backend.model).mean())

        def private(
            backend: Backend = backend, losses: Callable[[nn.Module], Tensor] = losses,
            clipper: Clipper = clipper, present: Tensor = present,
        ) -> None:  # fmt: skip
            clipper.accumulate(backend, losses, present, last=True)

        ratio = paired_ratio(private, plain)
        name = f"dp.two_pass_over_non_private.B{records}_T{(image_size // 2) ** 2}"
        rows.append(Row(name=name, value=ratio, unit="1", target=1.5, ok=ratio <= 1.5))
    key, count = bytes(range(32)), 1 << 22
    for generator in KEYSTREAMS:
        ratio = paired_ratio(lambda: torch.randn(count), lambda g=generator: gaussian(key, 0, count, g))
        rows.append(Row(name=f"dp.{generator}_noise_rate_over_torch_randn", value=ratio, unit="1"))
    return rows


def train() -> list[Row]:
    """One non-private step of the digits recipe's model on one process: images and model FLOPs a second."""
    config = DiTConfig(size="nano", image_size=8, channels=1, patch_size=2, num_classes=10)
    backend, records = _one_process(config), 64
    losses = _losses(backend.module, records)

    def step() -> None:
        backend.backward(losses(backend.model).mean())
        backend.update(1e-3)

    step()
    elapsed = statistics.median(seconds(step) for _ in range(15))
    flops = 3 * backend.module.forward_flops(records)  # type: ignore[operator]
    return [
        Row(name="train.nano_images_a_second", value=records / elapsed, unit="images/s"),
        Row(name="train.nano_model_flops", value=flops / elapsed / 1e12, unit="TFLOP/s"),
    ]


def checkpoint(size_bytes: int = 1 << 28) -> list[Row]:
    """A synchronous save, a verification and a read of 256 MiB, over a plain torch.save of the same tensor."""
    data = torch.randn(size_bytes // 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chunk = Chunk("param", "weight", 0, (len(data),), data)

        def rival() -> None:
            with (folder / "rival.pt").open("wb") as file:
                torch.save(data, file)
                file.flush()

        ratio = paired_ratio(lambda: save(folder / "ours", 1, [chunk], {}), rival, pairs=3)
        verified = seconds(lambda: newest_whole(folder / "ours"))
        found = latest(folder / "ours")
        assert found is not None
        read = seconds(lambda: found.read("param", "weight"))
    return [
        Row(name="checkpoint.synced_save_over_unsynced_torch_save", value=ratio, unit="1"),
        Row(name="checkpoint.verify", value=size_bytes / verified / 1e9, unit="GB/s"),
        Row(name="checkpoint.read", value=size_bytes / read / 1e9, unit="GB/s"),
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


def pii() -> list[Row]:
    """Captions a second through every pattern, half of them with planted personal data."""
    captions = [plant(f"a handwritten {n % 10}", 0, str(n)).caption for n in range(4000)]
    elapsed = statistics.median(seconds(lambda: [detect(caption) for caption in captions]) for _ in range(3))
    return [Row(name="pii.captions_a_second", value=len(captions) / elapsed, unit="captions/s")]


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "dp": dp, "train": train, "checkpoint": checkpoint, "data": data, "pii": pii
}  # fmt: skip


def _one_process(config: DiTConfig) -> Backend:
    model = DiT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # zero gates would give zero gradients, whose products some processors speed up
        for parameter in model.parameters():
            parameter.add_(0.02)
    parallel, optim = Parallel(backend="single"), Optim(learning_rate=1e-3)
    return shard_model(model, join_world(), parallel, optim, microbatch_size=16, bf16=False)


def _losses(model: nn.Module, records: int) -> Callable[[nn.Module], Tensor]:
    config: DiTConfig = model.config  # type: ignore[assignment]
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    shape = (records, config.channels, config.image_size, config.image_size)
    images, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    times = torch.rand(records, generator=generator).to(device)
    labels = torch.randint(config.num_classes, (records,), generator=generator).to(device)
    return lambda network: Objective().losses(network, images, labels, times, noise)
