"""What privacy costs: clipping, whole steps, ledger and noise in time, clipping in memory, beside plain training.

The model is a DiT of 16M parameters on microbatches of 16 records of 64 or 256 tokens. Every row's name says on how
many threads it was measured (or that it was on a GPU, where the targets, which are of a CPU, do not apply).
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kernels.noise import KEYSTREAMS, gaussian
from models.dit import DiTConfig
from models.layers import Embedding, Linear
from privacy.clipping import EngineName, make_clipper
from privacy.ledger import Ledger
from privacy.mechanism import Mechanism
from privacy.noise import GaussianNoise
from privacy.secrets import signing_seed
from train.benchmarks import Work, fixed_losses, initialised, interleaved, one_process, ratio, seconds
from train.config import OPERATIONAL, FinetuneStage, Optim, Parallel, PretrainStage, Privacy, Train
from train.data import Prefetcher, ShardDataset, public_batch
from train.health import Health
from train.images import encode_png
from train.labelled_images import LabelledImages, Loaded
from train.measurements import Row
from train.optim import ExponentialMovingAverage
from train.parallel import Backend
from train.private import mechanism_terms, stage_clipper
from train.run_folder import code_version
from train.shards import Record, write_shards
from train.step import PrivateStep, PublicStep

ENGINES: tuple[EngineName, ...] = get_args(EngineName)
TARGETS = {"two_pass": 1.5, "kept_gradients": 1.15, "group_wise": 1.15}  # of forward, backward and clipping
# pip finds no fastDP, and its README asks for a git clone and torch <= 1.11: its rows stay empty.
RIVALS = ("opacus_ghost", "opacus_per_sample", "fastdp")
BOUND = 1.0
MICROBATCH, MICROBATCHES = 16, 8
RUN_STEPS = 1000  # of the run over which what the ledger and the gate do once is spread
SAME_SUM = 1e-4  # relative; fp32 norms by Gram matrices of 256 tokens, ours guarded and Opacus' not, part by 2e-5

Losses = Callable[[nn.Module], Tensor]
log = logging.getLogger(__name__)


def dp() -> list[Row]:
    """Issue 3's measurements; under 8 minutes on two cores that have nothing else to do."""
    rows = [*_clipping(image_size=16, rounds=7), *_clipping(image_size=32, rounds=4)]
    rows += _logical_step(rounds=3)
    for threads in sorted({1, torch.get_num_threads()}):
        rows += _noise(threads)
    return [*rows, *_peak_memory(image_size=16, repeats=3), *_peak_memory(image_size=32, repeats=3)]


def _clipping(image_size: int, rounds: int) -> list[Row]:
    """Forward, backward and clipping of one microbatch, by engine and by rival, over forward and backward alone."""
    config = _model(image_size)
    backend = one_process(config)
    losses = fixed_losses(config, MICROBATCH, backend.world.device)
    ours: dict[str, Work] = {name: _microbatch(name, backend, losses) for name in ("non_private", *ENGINES)}
    works = ours | _timeable(_opacus(config, losses, backend.world.device), backend, ours)
    ours["non_private"]()  # the others have been called
    ours["group_wise"]()
    times = interleaved(works, rounds)
    place = f"B{MICROBATCH}_T{config.num_tokens}_{_where()}"
    rows = [Row(name=f"dp.non_private.{place}", value=statistics.median(times["non_private"]), unit="s")]
    for name in (*ENGINES, *RIVALS):
        cost = ratio(times, name, "non_private") if name in times else None
        rows.append(_cost(f"dp.{name}_over_non_private.{place}", cost, TARGETS.get(name)))
    return rows


def _microbatch(name: str, backend: Backend, losses: Losses) -> Work:
    """One microbatch added to the backend's gradients: clipped by an engine, or as it is."""
    if name == "non_private":
        return lambda: backend.backward(losses(backend.model).sum())
    clipper = make_clipper(name, backend.module, BOUND)  # type: ignore[arg-type]
    present = torch.ones(MICROBATCH, dtype=torch.bool, device=backend.world.device)
    return lambda: clipper.accumulate(backend, losses, present, last=True)


@dataclass(frozen=True)
class _Rival:
    """Another library's clipped sum over one microbatch, left in an attribute of each parameter."""

    parameters: list[nn.Parameter]
    work: Work
    attribute: str = "grad"

    def clipped_sum(self) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        self.work()
        return torch.cat([getattr(parameter, self.attribute).flatten() for parameter in self.parameters])


def _timeable(rivals: Mapping[str, _Rival], backend: Backend, ours: Mapping[str, Work]) -> dict[str, Work]:
    """The rivals that compute what two_pass and kept_gradients do; what computes something else is no rival."""
    parameters = list(backend.module.parameters())
    expected = _Rival(parameters, ours["two_pass"]).clipped_sum()
    found: dict[str, Work] = {}
    for name, rival in {"kept_gradients": _Rival(parameters, ours["kept_gradients"]), **rivals}.items():
        error = float((rival.clipped_sum() - expected).norm() / expected.norm())
        log.info("%s gives our clipped sum up to a relative %.1e", name, error)
        if error <= SAME_SUM:
            found[name] = rival.work
        else:
            log.warning("%s sums to something else than two_pass (relative %.1e): not timed", name, error)
    return found


def _opacus(config: DiTConfig, losses: Losses, device: torch.device) -> dict[str, _Rival]:
    """Opacus' two ways to a clipped sum, by its own modules and optimizers; none where it is not installed."""
    if importlib.util.find_spec("opacus") is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    # Its hooks warn of inputs without gradients, which our first layers have, at every call.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    terms: dict[str, Any] = {"max_grad_norm": BOUND, "loss_reduction": "sum"}

    def optimizer_of(kind: type[Any], module: nn.Module) -> Any:
        sgd = torch.optim.SGD(module.parameters())
        return kind(sgd, noise_multiplier=0.0, expected_batch_size=MICROBATCH, **terms)

    # strict refuses every buffer, and ours are constants
    ghost = GradSampleModuleFastGradientClipping(_plain(config).to(device), strict=False, **terms)
    of_ghost = optimizer_of(DPOptimizerFastGradientClipping, ghost)
    per_sample = GradSampleModule(_plain(config).to(device), strict=False, loss_reduction="sum")
    of_per_sample = optimizer_of(DPOptimizer, per_sample)

    def clip_by_ghost_norms() -> None:
        DPTensorFastGradientClipping(ghost, of_ghost, losses(ghost), "sum").backward()

    def clip_per_sample_gradients() -> None:
        of_per_sample.zero_grad(set_to_none=True)  # the last call's sum and per-sample gradients
        losses(per_sample).sum().backward()
        of_per_sample.clip_and_accumulate()

    return {
        "opacus_ghost": _Rival(list(ghost.parameters()), clip_by_ghost_norms),
        "opacus_per_sample": _Rival(list(per_sample.parameters()), clip_per_sample_gradients, "summed_grad"),
    }


def _plain(config: DiTConfig) -> nn.Module:
    """The same model with torch's own layers, by whose exact types other libraries choose their rules."""
    model = initialised(config)
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif isinstance(module, Embedding):
            module.__class__ = nn.Embedding  # type: ignore[assignment]
    return model


def _logical_step(rounds: int) -> list[Row]:
    """A whole private step over a whole public one, and the share that ledger and gate have in it.

    `auto` is what a stage takes that names no engine.
    """
    config = _model(16)
    with tempfile.TemporaryDirectory() as folder, _logical_steps(config, Path(folder)) as works:
        works["non_private"]()
        works["auto"]()
        times = interleaved(works, rounds)
        step_s = statistics.median(times["auto"])
        ledger_s = _ledger_and_gate(config, Path(folder) / "ledger-of-many.jsonl")
    place = f"B{MICROBATCH}x{MICROBATCHES}_T{config.num_tokens}_{_where()}"
    rows = [Row(name=f"dp.logical_step.auto.{place}", value=step_s, unit="s")]
    for name in list(works)[1:]:
        cost, target = ratio(times, name, "non_private"), 1.25 if name == "auto" else None
        rows.append(_cost(f"dp.logical_step.{name}_over_non_private.{place}", cost, target))
    return [*rows, _cost(f"dp.ledger_and_gate_share_of_logical_step.{place}", ledger_s / step_s, 0.01)]


@contextmanager
def _logical_steps(config: DiTConfig, folder: Path) -> Iterator[dict[str, Work]]:
    """The real public and private steps over the same 128 records, with one model, optimizer and average for all.

    Every unit is drawn, at sampling rate 1, so that each step has 8 microbatches.
    """
    num_records = MICROBATCH * MICROBATCHES
    write_shards(folder / "data", "private", _records(num_records, config), shard_size=num_records)
    dataset = ShardDataset(folder / "data", "private")
    private, public = _private_stage(config), _public_stage(config)
    backend = one_process(config)
    average = ExponentialMovingAverage(backend, private.optim.ema_decay)
    clippers = {"auto": stage_clipper(private, config, backend, None)}
    clippers |= {name: make_clipper(name, backend.module, BOUND) for name in ENGINES if name != "kept_gradients"}

    batches = LabelledImages(private, config, backend.world, dataset)
    batches_public = LabelledImages(public, config, backend.world, dataset)

    def load(step: int) -> Loaded:
        records = public_batch(public.train.seed, step, num_records, num_records)
        return batches_public.load(step, records[:, None])

    def counting(step: Callable[[int], object], numbers: Iterator[int]) -> Work:
        return lambda: step(next(numbers))

    with (
        Prefetcher(load, RUN_STEPS) as prefetcher,
        _mechanism(private, folder / "ledger.jsonl", num_records) as mechanism,
    ):
        health, numbers = Health(public, folder, backend.world, None), itertools.count()
        public_step = PublicStep(public, batches_public, backend, average, prefetcher, health)
        yield {
            "non_private": counting(public_step, itertools.count()),
            **{  # the engines take turns in one run: a mechanism's steps follow each other
                name: counting(PrivateStep(private, batches, backend, average, clipper, mechanism), numbers)
                for name, clipper in clippers.items()
            },
        }


def _ledger_and_gate(config: DiTConfig, ledger: Path) -> float:
    """Seconds a step, on average over a run, of charging it, marking it done, syncing and reading off its epsilon.

    All that is done once a run is in it: how many steps the budget affords, and every point of the epsilon curve.
    """
    log.info("ledger and gate over a run of %d steps", RUN_STEPS)
    digests = ["blake3:" + "0" * 64] * (MICROBATCH * MICROBATCHES)
    with _mechanism(_private_stage(config), ledger, num_units=50_000) as mechanism:

        def run() -> None:
            for step in range(RUN_STEPS):
                mechanism.done(mechanism.charge(step), digests)
                mechanism.spent()
                _ = mechanism.head  # syncs

        return seconds(run) / RUN_STEPS


def _noise(threads: int, count: int = 1 << 23) -> list[Row]:
    """Normals a second on the CPU, alone and added to a shard, over torch.randn's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shard, key = torch.zeros(count), bytes(range(32))
        works: dict[str, Work] = {"torch_randn": lambda: torch.randn(count)}
        for generator in KEYSTREAMS:
            noise = GaussianNoise(key, "bench", generator)
            works[generator] = lambda g=generator: gaussian(key, 0, count, g)
            works[f"{generator}_added"] = lambda n=noise: n.add_(shard, name="w", offset=0, step=0, attempt=0, std=1.0)
        for work in works.values():
            work()
        times = interleaved(works, rounds=9)
    finally:
        torch.set_num_threads(before)
    rows = [
        Row(name=f"dp.noise.{name}.threads{threads}", value=count / statistics.median(times[name]), unit="normals/s")
        for name in works
    ]
    for name in list(works)[1:]:
        rate = ratio(times, "torch_randn", name)
        row = Row(name=f"dp.noise.{name}_rate_over_torch_randn.threads{threads}", value=rate, unit="1")
        if name == "chacha20":  # the default; Philox is there for who wants no cryptography
            row["target"], row["ok"] = 0.5, rate >= 0.5
        rows.append(row)
    return rows


def _peak_memory(image_size: int, repeats: int) -> list[Row]:
    """Peak memory beyond the weights while three microbatches are added up, after which it grows no more.

    Beyond the weights: gradients, activations, what an engine keeps, and what the libraries allocate. Without AdamW's
    states and EMA, which are the same for all. On a CPU it is resident memory, in a fresh process each, with the holes
    in glibc's heap: hence several microbatches and the median over processes.
    """
    names = ("non_private", *ENGINES)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once
    peaks: dict[str, list[int]] = {name: [] for name in names}
    for repeat, name in itertools.product(range(repeats), names):
        log.info("peak memory, image size %d, repeat %d of %d: %s", image_size, repeat + 1, repeats, name)
        with ProcessPoolExecutor(1, mp_context=context) as process:
            peaks[name].append(process.submit(_peak_beyond_weights, name, image_size, torch.get_num_threads()).result())
    place = f"B{MICROBATCH}_T{_model(image_size).num_tokens}_{_where()}"
    plain = statistics.median(peaks["non_private"])
    rows = [Row(name=f"dp.peak_memory_beyond_weights.non_private.{place}", value=plain, unit="bytes")]
    for name in ENGINES:
        cost, target = statistics.median(peaks[name]) / plain, 1.1 if name == "two_pass" else None
        rows.append(_cost(f"dp.peak_memory_beyond_weights.{name}_over_non_private.{place}", cost, target))
    return rows


def _peak_beyond_weights(name: str, image_size: int, threads: int) -> int:
    """Bytes; runs in a process of its own."""
    torch.set_num_threads(threads)
    config = _model(image_size)
    backend = one_process(config)
    microbatch = _microbatch(name, backend, fixed_losses(config, MICROBATCH, backend.world.device))
    before = _memory(peak=False)
    for _ in range(3):
        microbatch()
    return _memory(peak=True) - before


def _memory(*, peak: bool) -> int:
    """Bytes that this process holds, or the most that it held: allocated on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    # Not ru_maxrss: it begins with what the process was forked from.
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _model(image_size: int) -> DiTConfig:
    return DiTConfig(width=384, depth=6, heads=6, image_size=image_size, channels=3, num_classes=10)


def _private_stage(config: DiTConfig) -> FinetuneStage:
    privacy = Privacy(target_epsilon=10.0, max_grad_norm=BOUND, replay_steps=0)
    return FinetuneStage(
        name="finetune_dp", stage="finetune_dp", split="private", privacy=privacy, **_training(config)
    )  # fmt: skip


def _public_stage(config: DiTConfig) -> PretrainStage:
    return PretrainStage(name="pretrain", stage="pretrain", split="public", **_training(config))


def _training(config: DiTConfig) -> dict[str, Any]:
    train = Train(steps=RUN_STEPS, batch_size=MICROBATCH * MICROBATCHES, microbatch_size=MICROBATCH, seed=0)
    optim, parallel = Optim(learning_rate=1e-4), Parallel(backend="single")
    return {"data_from": "data", "model": config, "train": train, "optim": optim, "parallel": parallel}


def _records(number: int, config: DiTConfig) -> Iterator[Record]:
    generator = np.random.default_rng(0)
    for index in range(number):
        pixels = generator.integers(0, 256, (config.image_size, config.image_size, 3), dtype=np.uint8)
        yield Record(f"{index:03d}", f"{index:03d}", encode_png(Image.fromarray(pixels)), index % 10, None)


@contextmanager
def _mechanism(stage: FinetuneStage, ledger: Path, num_units: int) -> Iterator[Mechanism]:
    """A mechanism over a new ledger, on whatever disk holds it."""
    secret = bytes(range(32))
    with Ledger.open(
        ledger,
        delta=stage.privacy.delta,
        unit="record",
        dataset_root="bench",
        signing_seed=signing_seed(secret),
        fencing_epoch=1,
    ) as opened:
        yield Mechanism(
            mechanism_terms(stage, stage.name, num_units),
            secret,
            opened,
            lambda value: value,
            code_version=code_version(),
            config_sha256=stage.sha256(),
            operational=OPERATIONAL,
        )


def _where() -> str:
    return "cuda" if torch.cuda.is_available() else f"threads{torch.get_num_threads()}"


def _cost(name: str, value: float | None, target: float | None) -> Row:
    """A ratio that may be at most its target, where it has one; None where it was not measured."""
    ok = None if value is None or target is None else value <= target
    return Row(name=name, value=value, unit="1", target=target, ok=ok)
