"""The empirical check: canaries through the private step itself, and what its noised gradients show of them.

A throwaway run on public records, with the model, the clipper, the sampler, the noise and the step of the private
stage, and with a ledger and keys of its own: what it audits is the code, so it reads no private record and costs no
budget. Among its records stand canaries, each in the data set or not by a fair coin. An attacker who sees every
gradient that AdamW sees scores each canary and guesses; `privacy.empirical` makes of the guesses a lower bound on
epsilon.

A canary is a record with as much gradient as clipping lets through, in a direction known beforehand: at every linear
and embedding layer its input is replaced by a probe of its own, and its loss is a signed sum of these layers' outputs.
So its gradient is spread evenly over the layers, nearly orthogonal to every other canary's, and a hundred times the
bound; and it goes the way of every record's gradient, whatever the clipping engine.
Source: gradient-space canaries, Nasr et al. 2023 (arXiv:2302.07956) and Steinke et al. 2023 (arXiv:2305.08846).
"""

# m canaries, B records of a microbatch, K rows a record, R = B K, D output features of a layer

from __future__ import annotations

import hashlib
import hmac
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor, nn

from models.layers import TiedEmbedding
from models.registry import ModelConfig, build_module
from privacy.empirical import EngineCheck, audit_one_run, epsilon_lower_bound, fair_coins
from privacy.ledger import Charge, Ledger
from privacy.mechanism import Mechanism, OwnedShard
from privacy.secrets import signing_seed
from train.config import FinetuneStage
from train.evaluation import one_thread
from train.families import BATCHES
from train.images import encode_png
from train.latent_shards import LatentHeader
from train.optim import ExponentialMovingAverage
from train.parallel import World, join_world, shard_model
from train.private import mechanism_terms, stage_clipper
from train.run_folder import code_version
from train.shards import Record
from train.step import Batches, Microbatch, PrivateStep, Slots

Indices = NDArray[np.int64]

MOST_RECORDS = 100  # public records beside the canaries
_BLANK = " "  # a canary's caption: a unified model has no document for a record without one
OVERSHOOT = 100.0  # a canary's gradient norm before clipping, in clipping bounds


def check_engine(
    stage: FinetuneStage,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    records: Records,
    secret: bytes,
    *,
    canaries: int,
    guesses: int,
    steps: int,
    sampling_rate: float,
    target_epsilon: float,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> EngineCheck:
    """Audit the engine of `stage` in a throwaway run from `weights`, and the same engine with its noise left out.

    `records` are public, and `secret` is the throwaway run's own master secret. The result is a function of the
    arguments and of the throwaway ledger's id. The unit is a record, whatever it is in `stage`.
    """
    delta = stage.privacy.delta
    best = epsilon_lower_bound(canaries, guesses, guesses, delta)
    if best <= target_epsilon:
        raise ValueError(
            f"empirical.guesses is {guesses} on {canaries} canaries: all right, they show epsilon {best:.2f}, no more "
            f"than empirical.target_epsilon {target_epsilon:g}: raise guesses and canaries, or lower the target"
        )
    split = CanarySplit(records, min(len(records), MOST_RECORDS), canaries)
    throwaway = throwaway_stage(stage, steps, sampling_rate, len(split), target_epsilon)

    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.jsonl"
        with open_mechanism(Observed, throwaway, split, ledger, secret):
            pass  # the plan is in the ledger: both attacks take it up, with the same coins and the same draws
        planned = ledger.read_bytes()

        def attack(engine: type[Observed], before: int, text: str) -> Attack:
            ledger.write_bytes(planned)
            model = build_module(config)
            model.load_state_dict(weights, strict=True)
            return attack_engine(
                engine, throwaway, model, split, ledger, secret, lambda done: progress(before + done, 2 * steps, text)
            )

        with_noise = attack(Observed, 0, "canaries against the engine")
        without = attack(Noiseless, steps, "the same without noise")
    return EngineCheck(
        engine=audit_one_run(with_noise.scores, with_noise.included, guesses, delta),
        control=audit_one_run(without.scores, without.included, guesses, delta),
        epsilon=with_noise.epsilon,
        noise_multiplier=with_noise.noise_multiplier,
        sampling_rate=throwaway.train.batch_size / len(split),
        steps=steps,
    )


# --- the throwaway run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """What came of one throwaway run: each canary's score and whether it was in, and what the run's ledger says."""

    scores: NDArray[np.float64]
    included: NDArray[np.bool_]
    epsilon: float
    noise_multiplier: float


class Records(Protocol):
    """What the check needs of a public split; a `ShardDataset` has it."""

    @property
    def caption_bytes(self) -> Indices: ...
    @property
    def latents(self) -> LatentHeader | None: ...
    def __len__(self) -> int: ...
    def digest(self, index: int) -> str: ...
    def read(self, index: int) -> Record: ...
    def batch(self, indices: Indices, channels: int, image_size: int) -> tuple[Tensor, Tensor]: ...
    def cropped(
        self, indices: Indices, channels: int, sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], list[str | None]]: ...


@dataclass(frozen=True)
class CanarySplit:
    """The throwaway run's units: the first public records, then the canaries, whose images and captions are blank."""

    records: Records
    num_records: int
    num_canaries: int

    def __len__(self) -> int:
        return self.num_records + self.num_canaries

    def digest(self, index: int) -> str:
        public = index < self.num_records
        return self.records.digest(index) if public else f"canary {index - self.num_records}"

    @property
    def caption_bytes(self) -> Indices:
        """As a `ShardDataset`'s."""
        blank = np.full(self.num_canaries, len(_BLANK.encode()), np.int64)
        return np.concatenate([self.records.caption_bytes[: self.num_records], blank])

    @property
    def latents(self) -> LatentHeader | None:
        """As a `ShardDataset`'s."""
        return self.records.latents

    def read(self, index: int) -> Record:
        """A public record, or a blank one."""
        if index < self.num_records:
            return self.records.read(index)
        return Record("canary", "canary", encode_png(Image.new("L", (1, 1))), None, _BLANK)

    def batch(self, indices: Indices, channels: int, image_size: int) -> tuple[Tensor, Tensor]:
        """Of ascending indices."""
        images, labels = self.records.batch(indices[indices < self.num_records], channels, image_size)
        blank = len(indices) - len(images)
        images = torch.cat([images, images.new_zeros(blank, channels, image_size, image_size)])
        return images, torch.cat([labels, labels.new_zeros(blank)])

    def cropped(
        self, indices: ArrayLike, channels: int, sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], list[str | None]]:
        """Of ascending indices."""
        chosen = np.asarray(indices, np.int64)
        public = chosen[chosen < self.num_records]
        images, captions = self.records.cropped(public, channels, sizes[: len(public)])
        blank = [torch.zeros(channels, *size) for size in sizes[len(public) :]]
        return [*images, *blank], [*captions, *[_BLANK] * len(blank)]


def throwaway_stage(
    stage: FinetuneStage, steps: int, sampling_rate: float, num_units: int, target_epsilon: float
) -> FinetuneStage:
    """The private stage in one process, with a length, a batch and a budget of its own; its ways are the stage's."""
    values, sampling = stage.model_dump(mode="json"), stage.privacy.sampling
    batch_size = max(1, min(round(sampling_rate * num_units), num_units // (sampling.cycle or 1)))
    values["train"] |= {"steps": steps, "batch_size": batch_size}
    values["optim"] |= {"warmup_steps": 0}
    values["parallel"] |= {"backend": "single", "nproc": 1, "activation_checkpointing": False, "compile": False}
    values["privacy"] |= {"target_epsilon": target_epsilon, "dataset_cap": None, "replay_steps": 0, "charge_ahead": 1}
    values["privacy"] |= {"unit": "record", "max_records_per_user": None}
    if sampling.max_batch_size is not None:  # as far above the expected batch as in the stage
        most = round(batch_size * sampling.max_batch_size / stage.train.batch_size)
        values["privacy"]["sampling"] |= {"max_batch_size": most}
    return FinetuneStage(**values)


class Observed(Mechanism):
    """The mechanism over a data set that lacks the canaries whose coin fell so; what AdamW gets to see is kept."""

    present: NDArray[np.bool_]  # of every record of the split
    released: dict[str, Tensor]  # of the last step, by the parameter's name

    def draw(self, charge: Charge) -> Slots:
        slots = super().draw(charge)
        return slots[self.present[slots[:, 0]]]

    def privatise(self, charge: Charge, num_elements: int) -> Callable[[OwnedShard, Tensor], None]:
        make_private, self.released = super().privatise(charge, num_elements), {}

        def observe(shard: OwnedShard, gradient: Tensor) -> None:
            make_private(shard, gradient)
            self.released[shard.name] = gradient.clone()

        return observe


class Noiseless(Observed):
    """The positive control: an engine that leaves its noise out. Nothing but the empirical check may make one."""

    def privatise(self, charge: Charge, num_elements: int) -> Callable[[OwnedShard, Tensor], None]:
        self.released = {}

        def leave_bare(shard: OwnedShard, gradient: Tensor) -> None:
            gradient.div_(self.terms.expected_batch_size)
            self.released[shard.name] = gradient.clone()

        return leave_bare


@contextmanager
def open_mechanism(
    engine: type[Observed], stage: FinetuneStage, split: CanarySplit, ledger_path: Path, secret: bytes
) -> Iterator[Observed]:
    """The mechanism over a ledger of its own; the coins are a function of the secret and of the ledger's id."""
    privacy, root = stage.privacy, hashlib.sha256(f"{split.num_records} {split.num_canaries}".encode())
    with Ledger.open(
        ledger_path,
        delta=privacy.delta,
        unit=privacy.unit,
        dataset_root=f"sha256:{root.hexdigest()}",
        signing_seed=signing_seed(secret),
        fencing_epoch=1,
    ) as ledger:
        mechanism = engine(
            mechanism_terms(stage, f"empirical/{stage.name}", len(split)),
            secret,
            ledger,
            lambda value: value,
            code_version=code_version(),
            config_sha256=stage.sha256(),
        )
        coins = fair_coins(hmac.digest(secret, ledger.ledger_id.encode(), "sha256"), split.num_canaries)
        mechanism.present = np.concatenate([np.ones(split.num_records, dtype=np.bool_), coins])
        yield mechanism


def attack_engine(
    engine: type[Observed],
    stage: FinetuneStage,
    model: nn.Module,
    split: CanarySplit,
    ledger_path: Path,
    secret: bytes,
    told: Callable[[int], None] = lambda done: None,
) -> Attack:
    """Every step of `stage` as `train.step` runs it; a canary's score is the sum, over the steps, of its direction's
    inner product with what was released, in clipping bounds."""
    microbatch_size = stage.train.microbatch_size
    with (
        one_thread(),
        _alone() as world,
        open_mechanism(engine, stage, split, ledger_path, secret) as mechanism,
    ):
        backend = shard_model(model, world, stage.parallel, stage.optim, microbatch_size=microbatch_size, bf16=False)
        config: Any = model.config
        # a CanarySplit has all that they ask of a ShardDataset
        plain = BATCHES[config.name](stage, config, world, split)  # type: ignore[arg-type]
        with Canaries(model, split.num_canaries, OVERSHOOT * stage.privacy.max_grad_norm) as canaries:
            step_once = PrivateStep(
                stage,
                CanaryBatches(plain, canaries, split.num_records),
                backend,
                ExponentialMovingAverage(backend, stage.optim.ema_decay),
                stage_clipper(stage, config, backend, None),
                mechanism,
            )
            scores = np.zeros(split.num_canaries)
            for step in range(stage.train.steps):
                step_once(step)
                scores += canaries.along(mechanism.released)
                told(step + 1)
        return Attack(
            scores * stage.train.batch_size / stage.privacy.max_grad_norm,
            mechanism.present[split.num_records :],
            mechanism.summary()["epsilon"],
            mechanism.noise_multiplier,
        )


@contextmanager
def _alone() -> Iterator[World]:
    """A world of one process, with a process group that ends with the context."""
    found = dist.is_initialized()
    world = join_world()
    try:
        yield world
    finally:
        if not found:
            dist.destroy_process_group()


# --- the canaries --------------------------------------------------------------------------------------------------


class Canaries:
    """What makes canaries of a model's records: hooks on its linear and embedding layers while the context lasts.

    Canary i's direction is, in each layer, its signs at the outputs times its probe at the inputs (signs too; of an
    embedding, one row), with an equal share for each layer. Before clipping, its gradient is `norm` times that.
    """

    def __init__(self, model: nn.Module, num_canaries: int, norm: float) -> None:
        self.layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | nn.Embedding)
            and layer.weight.requires_grad
            # which is used twice a forward, as no other layer is: what it gets of canaries is nothing
            and not isinstance(layer, TiedEmbedding)
        }
        generator = torch.Generator().manual_seed(0)  # the attacker's choice, known to all
        self._probes: dict[str, Tensor] = {}
        self._signs: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            device, num_outputs = layer.weight.device, _num_outputs(layer)
            if isinstance(layer, nn.Embedding):
                probes = torch.arange(num_canaries) % layer.num_embeddings
            else:
                probes = _random_signs(num_canaries, layer.in_features, generator)
            self._probes[name] = probes.to(device)
            self._signs[name] = _random_signs(num_canaries, num_outputs, generator).to(device)
        self._num_canaries, self._norm = num_canaries, norm
        self._canary_B: Tensor | None = None  # of the microbatch in its forward
        self._losses_B = torch.empty(0)

    def __enter__(self) -> Canaries:
        self._handles = [
            handle
            for name, layer in self.layers.items()
            for handle in (
                layer.register_forward_pre_hook(partial(self._replace_input, name)),
                layer.register_forward_hook(partial(self._read_output, name)),
            )
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def losses(self, plain: Callable[[nn.Module], Tensor], canary_B: Tensor, network: nn.Module) -> Tensor:
        """A microbatch's losses (B,): `plain`'s, but a canary's own where `canary_B` holds its number and not -1."""
        self._canary_B, self._losses_B = canary_B, torch.zeros(len(canary_B), device=canary_B.device)
        try:
            plain_B = plain(network)
        finally:
            self._canary_B = None
        return torch.where(canary_B >= 0, self._losses_B, plain_B)

    @torch.no_grad()
    def along(self, gradient: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """The inner product of each canary's unit direction with a gradient, given by parameter: (m,)."""
        total = np.zeros(self._num_canaries)
        for name, layer in self.layers.items():
            own = {local: gradient[f"{name}.{local}"].view_as(value) for local, value in layer.named_parameters()}
            probes = self._probes[name]
            probes = probes if isinstance(layer, nn.Embedding) else probes.to(layer.weight.dtype)
            # A layer is linear in its parameters: run with the gradient in their place, it gives the inner products.
            response_mD = torch.func.functional_call(layer, own, (probes,))
            total += (self._signs[name] * response_mD).double().sum(1).cpu().numpy() * self._share(layer)
        return total

    def _share(self, layer: nn.Linear | nn.Embedding) -> float:
        """What makes the directions of all layers together one of length 1."""
        num_inputs = 1 if isinstance(layer, nn.Embedding) else layer.in_features + (layer.bias is not None)
        return (_num_outputs(layer) * num_inputs * len(self.layers)) ** -0.5

    def _canary_rows(self, num_rows: int) -> Tensor:
        assert self._canary_B is not None
        return self._canary_B.repeat_interleave(num_rows // len(self._canary_B))

    def _replace_input(self, name: str, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._canary_B is None:
            return None
        (x,) = inputs
        canary_R = self._canary_rows(len(x))
        probes = self._probes[name][canary_R.clamp(min=0)].to(x.dtype)
        over_tokens = [1] * (x.dim() - probes.dim())
        probes = probes.view(len(x), *over_tokens, *probes.shape[1:])
        return (torch.where((canary_R >= 0).view(-1, *[1] * (x.dim() - 1)), probes, x),)

    def _read_output(self, name: str, layer: nn.Linear | nn.Embedding, _: tuple[Tensor], y: Tensor) -> None:
        if self._canary_B is None:
            return
        signs_RD = self._signs[name][self._canary_rows(len(y)).clamp(min=0)]
        read_R = (signs_RD * y.float().reshape(len(y), -1, y.shape[-1]).mean(1)).sum(1)
        read_B = read_R.view(len(self._canary_B), -1).mean(1)
        self._losses_B = self._losses_B + self._norm * self._share(layer) * read_B


def _num_outputs(layer: nn.Linear | nn.Embedding) -> int:
    return layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.out_features


def _random_signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, (rows, columns), generator=generator) - 1).to(torch.int8)


class CanaryBatches(Batches):
    """A family's microbatches, with the canaries among the records made canaries."""

    def __init__(self, plain: Batches, canaries: Canaries, num_records: int) -> None:
        super().__init__(plain.stage, plain.config, plain.world, plain.dataset)
        self._plain, self._canaries, self._num_records = plain, canaries, num_records
        self.unit_flops = plain.unit_flops

    def require_fit(self) -> None:
        self._plain.require_fit()

    def load(self, step: int, slots: Slots) -> Any:
        return self._plain.load(step, slots)

    def of(self, loaded: Any) -> Iterator[Microbatch]:
        for plain in self._plain.of(loaded):
            canary_B = torch.from_numpy(plain.slots_BR[:, 0] - self._num_records).clamp(min=-1).to(self.world.device)
            yield replace(plain, losses=partial(self._canaries.losses, plain.losses, canary_B))
