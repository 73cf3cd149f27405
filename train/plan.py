"""What a recipe will do, said before anything starts: command lines, parameters, memory a device, epsilon.

Needs no data, no device and no process group: models are built on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.registry import ModelConfig
from train.config import FinetuneStage, IngestStage, StageConfig, TrainStage, check_batch
from train.expert_parallel import require_shared
from train.hardware import Hardware, find_hardware, known_hardware
from train.launchers import Placement, stage_command, worker_arguments
from train.recipe import ConfigError, Recipe, model_of
from train.shards import parse_entry
from train.source_config import DigitsSource, ShapesSource
from train.sources import DIGITS_SPLITS

FP32 = 4  # bytes


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, of all its experts, and of its largest block and the experts in it."""

    all: int
    experts: int
    experts_a_layer: int  # how many
    block: int
    block_experts: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device of a training stage; see `plan_memory` for the formula."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, without the allocator's slack and the libraries' own buffers."""
        return self.parameters + self.gradients + self.optimizer + self.ema + self.gathered + self.activations


@dataclass(frozen=True)
class PrivacyPlan:
    """What a private stage will spend at `delta`: `epsilon` for its steps alone, at most `target` with all before it.

    `spent` is what its ledger holds already, of this run or of others on the same data set.
    """

    num_units: int
    sampling_rate: float
    noise_multiplier: float
    epsilon: float
    spent: float
    target: float
    delta: float


@dataclass(frozen=True)
class StagePlan:
    """One row of the plan; what a stage does not have, or what cannot be known yet, is None and said in `notes`."""

    name: str
    kind: str
    command: tuple[str, ...]
    world_size: int = 1
    num_parameters: int | None = None
    memory: MemoryPlan | None = None
    fits: tuple[str, ...] = ()
    privacy: PrivacyPlan | None = None
    notes: tuple[str, ...] = ()


def plan(
    recipe: Recipe, run_dir: Path, placement: Placement, stages: Sequence[StageConfig] | None = None
) -> list[StagePlan]:
    """The plan of `stages`, by default of the whole recipe, as they would be started."""
    return [_plan_stage(recipe, stage, run_dir, placement) for stage in (recipe.stages if stages is None else stages)]


def _plan_stage(recipe: Recipe, stage: StageConfig, run_dir: Path, placement: Placement) -> StagePlan:
    worker = worker_arguments(recipe.paths[stage.name], run_dir, recipe.overrides[stage.name], None)
    command = tuple(stage_command(stage, placement, worker))
    if not isinstance(stage, TrainStage):
        return StagePlan(stage.name, stage.kind, command)
    world_size = stage.parallel.nproc * placement.nnodes
    check_batch(stage, world_size)
    require_shared(world_size, stage.parallel.expert_parallel)
    model = model_of(recipe, stage).model
    assert model is not None, "a stage without init_from has a model"
    counts = count_parameters(model)
    memory = plan_memory(stage, model, counts, world_size)
    privacy, notes = None, []
    if isinstance(stage, FinetuneStage):
        from privacy.accounting import delta_warning

        users = stage.privacy.unit == "user"
        num_units = count_users(stage, run_dir) if users else count_records(recipe, stage, run_dir)
        if num_units is None:
            mend = "" if users else "; set expected_records"
            notes.append(f"epsilon: the number of {stage.privacy.unit}s is not known before the data is there{mend}")
        else:
            ledger = Path(stage.privacy.ledger) if stage.privacy.ledger else run_dir / "ledger.jsonl"
            privacy = plan_privacy(stage, num_units, ledger)
            if privacy is None:
                notes.append(f"epsilon: all that is allowed on this data set is spent ({ledger})")
            warning = delta_warning(stage.privacy.delta, num_units)
            notes += [warning] if warning else []
    return StagePlan(
        stage.name, stage.kind, command, world_size, counts.all, memory, _fits(stage, memory), privacy, tuple(notes)
    )


def plan_memory(stage: TrainStage, model: ModelConfig, counts: ParameterCounts, world_size: int) -> MemoryPlan:
    """Bytes on one device of a model's training, an estimate; of the rank that holds most.

    P parameters, W ranks, all states fp32: weights 4P, gradients 4P, AdamW's two moments 8P, EMA 4P, where
      single   holds all of them
      ddp      holds all of them, and 4P of reduction buckets
      fsdp2    holds a W-th of each, and two gathered blocks; of experts whole ones, for they are its rows
      zero1    shards moments, EMA and its fp32 master copy (4P/W more)
      zero2    shards the gradients too
      zero3    shards the weights too, and holds two gathered blocks
    With expert_parallel N, ddp holds an N-th of the experts, for which it has no buckets, and fsdp2 cuts that N-th up
    among W/N ranks, and gathers it alone.
    Activations: what the model's configuration says of a token, times the tokens of a microbatch.
    """
    backend, parts = stage.parallel.backend, stage.parallel.expert_parallel
    common, experts = counts.all - counts.experts, counts.experts // parts
    full = FP32 * (common + experts)
    shard = math.ceil(full / world_size)
    if backend == "fsdp2" and experts:
        ours = counts.experts_a_layer // parts
        rows = math.ceil(ours / (world_size // parts))
        shard = FP32 * (math.ceil(common / world_size) + experts * rows // ours)
    states_sharded = backend not in ("single", "ddp")
    weights = shard if backend in ("fsdp2", "zero3") else full
    masters = shard if backend.startswith("zero") else 0
    gradients = shard if backend in ("fsdp2", "zero2", "zero3") else full
    buckets = FP32 * (counts.all if parts == 1 else common) if backend == "ddp" else 0
    state = shard if states_sharded else full
    element = 2 if stage.train.precision == "bf16" else FP32
    kept = model.kept_elements(checkpointed=stage.parallel.activation_checkpointing)
    block = counts.block - counts.block_experts + counts.block_experts // parts
    gathered = 2 * block * element if backend in ("fsdp2", "zero3") else 0
    return MemoryPlan(
        parameters=weights + masters,
        gradients=gradients + buckets,
        optimizer=2 * state,
        ema=state,
        gathered=gathered,
        activations=tokens_at_once(stage, model) * kept * element,
    )


def tokens_at_once(stage: TrainStage, model: ModelConfig) -> int:
    """The most tokens that a rank puts through one forward."""
    if stage.documents is not None:
        return stage.train.microbatch_size * stage.documents.row_tokens
    rows = stage.train.microbatch_size * stage.objective.noise_draws
    records = stage.privacy.max_records_per_user if isinstance(stage, FinetuneStage) else None
    return rows * (records or 1) * model.num_tokens


def plan_privacy(stage: FinetuneStage, num_units: int, ledger: Path) -> PrivacyPlan | None:
    """Calibrate the noise as the stage will, after what its ledger holds: the target holds with every replay used.

    None where nothing is left to spend.
    """
    from privacy.accounting import epsilon
    from privacy.ledger import read_ledger
    from train.private import mechanism_terms

    if stage.train.batch_size > num_units:
        raise ConfigError(
            f"{stage.name}: train.batch_size is {stage.train.batch_size}, but split {stage.split} has {num_units} "
            f"units: lower it to at most {num_units}"
        )
    terms = mechanism_terms(stage, stage.name, num_units)
    counts = read_ledger(ledger).counts if ledger.exists() else {}
    spent = epsilon(counts, terms.delta)
    if spent >= terms.allowed_epsilon:
        return None
    noise = terms.calibrate(counts)
    cost = epsilon(terms.sampler(bytes(32)).planned(0, terms.steps, noise), terms.delta)
    rate = terms.expected_batch_size / num_units
    return PrivacyPlan(num_units, rate, noise, cost, spent, terms.allowed_epsilon, terms.delta)


def count_records(recipe: Recipe, stage: TrainStage, run_dir: Path) -> int | None:
    """Records of the stage's split: counted where the shards are there, else as the stage or the source tells; or None.

    What a filter will drop is not known beforehand, so the source's number is an upper bound and epsilon a lower one.
    """
    if indexes := _indexes(stage, run_dir):
        return sum(index.read_bytes().count(b"\n") for index in indexes)
    if stage.expected_records is not None:
        return stage.expected_records
    source: StageConfig = recipe.stage(stage.data_from)
    while not isinstance(source, IngestStage):
        source = recipe.stage(source.inputs()[0])
    if isinstance(source.source, DigitsSource):
        return next((count for split, count in DIGITS_SPLITS.items() if split == stage.split), None)
    if isinstance(source.source, ShapesSource):
        return next((count for split, count in source.source.records.items() if split == stage.split), None)
    return None


def count_users(stage: TrainStage, run_dir: Path) -> int | None:
    """Users of the stage's split, where its shards are there; None before."""
    indexes = _indexes(stage, run_dir)
    users = {parse_entry(line, str(index))["unit"] for index in indexes for line in index.read_bytes().splitlines()}
    return len(users) if indexes else None


def _indexes(stage: TrainStage, run_dir: Path) -> list[Path]:
    return sorted((run_dir / stage.data_from / stage.split).glob("*.index.jsonl"))


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """The parameters of a model, which is built on the meta device for that."""
    import torch
    from torch import nn

    from models.registry import build_module
    from train.expert_parallel import spread_layers

    def count(modules: Iterable[nn.Module]) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    with torch.device("meta"):
        built = build_module(model)
    blocks = [(count([block]), count(spread_layers(block).values())) for block in built.blocks]  # type: ignore[union-attr]
    layers = spread_layers(built).values()
    return ParameterCounts(
        count([built]), count(layers), max((len(layer.up) for layer in layers), default=0), *max(blocks)
    )


def _fits(stage: TrainStage, memory: MemoryPlan) -> tuple[str, ...]:
    """The devices of configs/hardware that hold the plan: the one the stage names, or with "auto" any."""
    named = stage.parallel.hardware
    hardware: list[Hardware | None] = (
        list(known_hardware().values()) if named == "auto" else [find_hardware(named, None)]
    )
    return tuple(
        entry.name
        for entry in hardware
        if entry is not None and entry.memory_bytes is not None and memory.total <= entry.memory_bytes
    )
