"""What a recipe says: YAML files read into frozen models, every mistake named by file and dotted key.

A recipe is a folder of stage files run in the order of their numbers; `configs/digits/40_finetune_dp.yaml` is the stage
named `finetune_dp`. This file holds the stages a recipe may have; `train/recipe.py` reads them.
"""

# One file: it is the reference of every key that a recipe may have, and stages share their sections.

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kernels.dispatch import Choice
from models.registry import ModelConfig
from models.unified import UnifiedConfig
from privacy.pii.duplicates import DuplicatesConfig
from privacy.pii.policy import Policy
from train.executors import Executor
from train.expert_parallel import require_even
from train.source_config import SourceConfig

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]

# What says how and where a stage runs, not what it computes. A stage may be resumed with other values of these (another
# world size gives the same records, and weights that differ by rounding only), so its identity leaves them out.
OPERATIONAL = (
    "parallel",
    "log",
    "checkpoint",
    "supervision",
    "train.microbatch_size",
    "privacy.key_file",
    "privacy.charge_ahead",
    "expected_records",
    "key_file",
    "executor",
)


class Section(BaseModel):
    """A mapping of a stage file: immutable, with unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Objective(Section):
    """What the network predicts, at which timesteps, and how often label or caption is dropped for guidance.

    The weights and the experts' balance are a unified model's (`models.unified_objective`).
    """

    prediction: Literal["flow", "x0", "epsilon", "v"] = "flow"
    timesteps: Literal["logit_normal", "uniform"] = "logit_normal"
    label_dropout: Fraction = 0.1
    noise_draws: Positive = 1  # (timestep, noise) pairs a record and step; in a private stage all are one unit
    patches_weight: Weight = 1.0
    balancing: Literal["none", "row", "batch"] = "none"
    balance_weight: Weight = 0.01
    z_weight: Weight = 0.001
    kl_weight: Weight = 0.001  # of a VAE's latents, in nats a latent, beside the mean absolute error of the pixels


class Documents(Section):
    """How the records of a unified model's stage become documents, and these rows of tokens."""

    tasks: Annotated[tuple[Literal["image_to_text", "text_to_image"], ...], Field(min_length=1)] = (
        "image_to_text",
        "text_to_image",
    )
    row_tokens: Positive  # of a row; in a private stage, where a row is one unit, of the longest
    bounds: tuple[Positive, ...] | None = None  # private: a row is padded to the least that holds it; null: row_tokens
    too_long: Literal["truncate", "leave_out"] = "truncate"  # captions of more than model.max_caption_tokens
    # Images keep their form: each is cropped to the nearest of `train.packing.image_buckets`, which have about as many
    # patches as the model's square; every image's header is read once at the start. false: all are squares.
    buckets: bool = False
    # What a record's text loss is divided by in a private stage, where it may not depend on the batch: the public
    # captions' mean tokens, say; null: model.max_caption_tokens.
    caption_tokens: PositiveFloat | None = None

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        bounds = self.bounds
        if bounds is not None and (list(bounds) != sorted(set(bounds)) or bounds[-1:] != (self.row_tokens,)):
            raise ValueError(
                f"bounds are {list(bounds)}: give ascending numbers of tokens, the last of them row_tokens "
                f"({self.row_tokens})"
            )
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks are {', '.join(self.tasks)}: name each once")
        return self


class Train(Section):
    """How long and on what: batch_size is global and logical; in a private stage it is the expected Poisson batch."""

    steps: Positive
    batch_size: Positive
    microbatch_size: Positive  # records a rank puts through one forward; of a unified model, rows
    seed: Natural
    precision: Literal["fp32", "bf16"] = "fp32"
    max_grad_norm: PositiveFloat | None = None  # non-private gradient clipping


class Optim(Section):
    """AdamW, its learning-rate schedule and the weights' moving average."""

    learning_rate: PositiveFloat
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Natural = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    ema_decay: Fraction = 0.999


class Parallel(Section):
    """How a training stage is spread over processes; none of it changes which records a step reads."""

    backend: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
    nproc: Positive = 1  # processes a node
    min_ranks: Positive | None = None  # over all nodes: a restart goes on without lost ones down to it; null: all
    expert_parallel: Positive = 1  # ranks that share each layer's experts, which tokens then travel to
    activation_checkpointing: bool = False
    compile: bool = False
    kernels: Choice = "auto"  # Triton's, where a GPU runs them; triton or reference: these, or an error
    hardware: str = "auto"  # a file of configs/hardware, for MFU and the memory plan

    @model_validator(mode="after")
    def _single_is_one_process(self) -> Self:
        if self.backend == "single" and self.nproc != 1:
            raise ValueError(
                f"parallel.nproc is {self.nproc} but parallel.backend is single, which is one process: "
                "set parallel.nproc to 1 or parallel.backend to ddp, fsdp2, zero1, zero2 or zero3"
            )
        return self

    @model_validator(mode="after")
    def _experts_have_their_ranks(self) -> Self:
        size = self.expert_parallel
        if size == 1:
            return self
        if self.backend not in ("ddp", "fsdp2"):
            raise ValueError(
                f"parallel.expert_parallel is {size} under parallel.backend {self.backend}, which keeps all experts "
                "together: choose ddp, or fsdp2 where all other weights are to be sharded too"
            )
        if self.nproc % size and size % self.nproc:
            raise ValueError(
                f"parallel.expert_parallel is {size}, and parallel.nproc {self.nproc}: let one divide the other, so "
                "that experts are shared within a node or by whole nodes"
            )
        if self.min_ranks is not None:
            raise ValueError(
                f"parallel.min_ranks is {self.min_ranks} with parallel.expert_parallel {size}: whoever is left after a "
                "loss may be no multiple of it, so leave min_ranks out"
            )
        return self


class Checkpoint(Section):
    """How often a training stage saves, and how many saves it keeps."""

    every: Positive | Literal["auto"] = 100  # steps between saves on disk; auto: from what a step and a save take here
    keep: Positive = 3
    keep_every: Positive | None = None  # saves of every so many steps are kept for ever
    memory_every: Natural = 10  # steps between snapshots in memory, which outlive a process; 0: none
    remote: str | None = None  # fsspec URL of a folder that the saves on disk are copied to


class Supervision(Section):
    """What the launch does about a stage that does not get on: limits are seconds without a sign of life."""

    start_s: PositiveFloat = 180
    load_s: PositiveFloat = 900
    step_s: PositiveFloat = 300
    save_s: PositiveFloat = 600
    grace_s: PositiveFloat = 30  # from SIGTERM to SIGKILL: what the last save may take
    stalled_restarts: Natural = 3  # restarts in a row that bring nothing before the stage is given up
    straggler: Annotated[float, Field(gt=1)] = 1.5  # a rank that takes so many times the others' median is named
    bad_steps: Literal["stop", "replay", "skip"] = "stop"  # a loss or weight that is not finite, or a loss spike
    spike: Annotated[float, Field(gt=1)] | None = None  # a loss of so many times the median of the last spike_window
    spike_window: Positive = 50


class Log(Section):
    """How often a line goes to metrics.jsonl, and what wandb does."""

    every: Positive = 10
    wandb: Literal["offline", "online", "disabled"] = "offline"


class Sampling(Section):
    """How a private stage draws its batches; the event each draw is charged as follows from it."""

    method: Literal["poisson", "truncated_poisson", "cyclic_poisson", "shuffled"] = "poisson"
    max_batch_size: Positive | None = None  # of truncated_poisson: what is drawn beyond it is dropped, by chance
    cycle: Positive | None = None  # of cyclic_poisson: the data are read in so many parts, one a step, in turn

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Self:
        for key, value, owner in (
            ("max_batch_size", self.max_batch_size, "truncated_poisson"),
            ("cycle", self.cycle, "cyclic_poisson"),
        ):
            if (value is None) == (self.method == owner):
                has = "is missing" if value is None else f"is {value}"
                raise ValueError(f"{key} {has} with method {self.method}: it goes with {owner}, and only there")
        return self


class AdaptiveBounds(Section):
    """Group-wise bounds that follow a quantile of each group's norms, by counts that are noised and charged."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    rate: PositiveFloat = 0.2  # of each bound's logarithm, a step
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.02  # of the privacy cost 1/sigma^2, as loss_share


class Privacy(Section):
    """The promise of a private stage: (target_epsilon, delta) for adding or removing one `unit`."""

    target_epsilon: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: PositiveFloat  # each unit's gradient is clipped to this L2 norm
    # two_pass and kept_gradients clip whole gradients, and auto takes the faster one that fits; group_wise clips layers
    clipping: Literal["auto", "two_pass", "kept_gradients", "group_wise"] = "auto"
    adaptive_bounds: AdaptiveBounds | None = None  # of group_wise
    loss_bound: PositiveFloat = 2.0  # each unit's loss is clipped to [0, loss_bound] for the noised loss curve
    # The share of the privacy cost 1/sigma^2 that buys the loss curve: 1/sigma_loss^2 = loss_share / sigma^2.
    loss_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    replay_steps: Natural  # budget kept back for steps run again after a restart, in steps; calibrated in
    charge_ahead: Positive = 1  # steps charged by one write to the ledger; a crash wastes at most these
    sampling: Sampling = Sampling()
    bands: Positive = 1  # of noise correlated over steps (DP-BandMF), with cyclic_poisson; 1: independent noise
    unit: Literal["record", "user"] = "record"
    max_records_per_user: Positive | None = None  # of unit user: how many of one user's records a step reads
    dataset_cap: PositiveFloat | None = None  # epsilon that all runs on this data set together may spend
    ledger: str | None = None  # null: ledger.jsonl in the run folder
    key_file: str | None = None  # null: secret.key in the run folder, or the environment's SFUMATO_SECRET
    secure_noise: bool = True  # ChaCha20; false: Philox, which the audit says
    operator_metrics: bool = False  # true shows raw losses and clip fractions, outside the guarantee

    @model_validator(mode="after")
    def _target_is_within_the_cap(self) -> Self:
        if self.dataset_cap is not None and self.target_epsilon > self.dataset_cap:
            raise ValueError(
                f"privacy.target_epsilon is {self.target_epsilon:g}, above privacy.dataset_cap {self.dataset_cap:g}: "
                "lower the target or raise the cap"
            )
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.adaptive_bounds is not None and self.clipping != "group_wise":
            raise ValueError(f"privacy.adaptive_bounds needs clipping group_wise, and it is {self.clipping}")
        if self.bands > (self.sampling.cycle or 1):
            raise ValueError(
                f"privacy.bands is {self.bands}: correlated noise protects units that stay away for as many steps, so "
                "set privacy.sampling to cyclic_poisson with a cycle no shorter"
            )
        if (self.unit == "user") != (self.max_records_per_user is not None):
            raise ValueError(
                f"privacy.unit is {self.unit} and privacy.max_records_per_user {self.max_records_per_user}: "
                "unit user needs the number, and unit record takes none"
            )
        return self


class StageConfig(Section):
    """One stage of a recipe. `name` is the file's stem without its number and is never written in the file."""

    kind: ClassVar[str]
    name: StageName

    def inputs(self) -> tuple[str, ...]:
        """The earlier stages whose manifests this stage reads, each once."""
        named: list[str] = []
        for key in ("data_from", "init_from"):
            value = getattr(self, key, None)
            named += [value] if isinstance(value, str) else list(value or ())
        return tuple(dict.fromkeys(named))

    def identity(self) -> dict[str, Any]:
        """What decides the stage's result: `identity_of` the resolved configuration."""
        return identity_of(self.model_dump(mode="json"))

    def sha256(self) -> str:
        """Hex SHA-256 of the canonical JSON of `identity()`."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class IngestStage(StageConfig):
    """Raw images and captions into indexed shards, split into public, private and test."""

    kind = "ingest"
    stage: Literal["ingest"]
    source: SourceConfig
    shard_size: Positive = 512  # records a shard
    seed: Natural = 0


class FilterStage(StageConfig):
    """Personal data out of captions and images, metadata out of the images, record by record; then duplicates."""

    kind = "filter"
    stage: Literal["filter"]
    data_from: StageName
    policy: Policy
    duplicates: DuplicatesConfig | None = None  # null: every record is kept, however often it comes
    # More damaged records than this share of all stop the stage; what the policy quarantines is no damage.
    max_quarantine_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    key_file: str | None = None  # of pseudonyms; null: secret.key in the run folder, or SFUMATO_SECRET
    executor: Executor = Executor()

    @model_validator(mode="after")
    def _a_key_has_a_use(self) -> Self:
        for key, value in (("key_file", self.key_file), ("policy.pseudonyms", self.policy.pseudonyms)):
            if value is not None and not self.policy.pseudonymises:
                raise ValueError(
                    f"{key} names a key, and policy.captions pseudonymises nothing: leave {key} out, or set an entity "
                    "to pseudonymise"
                )
        return self


class DiffusersVae(Section):
    """A folder of `diffusers` AutoencoderKL weights. digest: of its files; an error tells the right one."""

    folder: str
    digest: Annotated[str, Field(pattern=r"^blake3:[0-9a-f]{64}$")]
    image_size: Positive


class LatentsStage(StageConfig):
    """Every split's images as latents, of a VAE trained here (init_from) or elsewhere (diffusers)."""

    kind = "latents"
    stage: Literal["latents"]
    init_from: StageName | None = None
    diffusers: DiffusersVae | None = None
    data_from: StageName
    executor: Executor = Executor()

    @model_validator(mode="after")
    def _one_vae(self) -> Self:
        if (self.init_from is None) == (self.diffusers is None):
            has = "both init_from and diffusers" if self.diffusers else "neither init_from nor diffusers"
            raise ValueError(f"the stage has {has}: name a pretrain stage of a vae, or give a folder of weights")
        return self


class TrainStage(StageConfig):
    """What both kinds of training share; `model` is null where init_from names the stage that has it."""

    init_from: StageName | None = None
    data_from: StageName
    split: str
    expected_records: Positive | None = None  # for --dry-run only, where the data is not there yet
    model: Annotated[ModelConfig, Field(discriminator="name")] | None = None
    documents: Documents | None = None  # of a unified model, and of no other
    objective: Objective = Objective()
    train: Train
    optim: Optim
    parallel: Parallel
    checkpoint: Checkpoint = Checkpoint()
    supervision: Supervision = Supervision()
    log: Log = Log()

    @model_validator(mode="after")
    def _model_or_init_from(self) -> Self:
        if (self.model is None) == (self.init_from is None):
            has = "both model and init_from" if self.model else "neither model nor init_from"
            raise ValueError(f"the stage has {has}: give model to start anew, or init_from to go on from a stage")
        return self

    @model_validator(mode="after")
    def _has_what_its_model_needs(self) -> Self:
        if self.model is not None:
            check_model(self, self.model)
        return self

    @model_validator(mode="after")
    def _reads_no_held_out_record(self) -> Self:
        if self.split.endswith("test"):
            raise ValueError(
                f"split is {self.split}, which is held out: eval stages show its records as they are. Set it to "
                "public, or in a finetune_dp stage to private"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, more than train.steps {self.train.steps}: "
                "the schedule would never reach optim.learning_rate"
            )
        return self


class PretrainStage(TrainStage):
    """Training without privacy, on public data only."""

    kind = "pretrain"
    stage: Literal["pretrain"]

    @model_validator(mode="after")
    def _reads_public_data(self) -> Self:
        if self.split.startswith("private"):
            raise ValueError(
                f"split is {self.split}, but a pretrain stage gives no privacy: set split to public, or stage to "
                "finetune_dp"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        check_batch(self, self.parallel.nproc)
        return self


class FinetuneStage(TrainStage):
    """Training under (epsilon, delta)-differential privacy; its batches are Poisson, so no size has to divide."""

    kind = "finetune_dp"
    stage: Literal["finetune_dp"]
    privacy: Privacy

    @model_validator(mode="after")
    def _nothing_undoes_the_mechanism(self) -> Self:
        if self.train.max_grad_norm is not None:
            raise ValueError(
                f"train.max_grad_norm is {self.train.max_grad_norm:g} in a private stage, which clips each record by "
                "privacy.max_grad_norm and never the noised sum: set train.max_grad_norm to null"
            )
        if self.supervision.bad_steps == "skip":
            raise ValueError(
                "supervision.bad_steps is skip in a private stage, whose every attempt draws other records anyway: "
                "set it to replay or stop"
            )
        if self.parallel.expert_parallel > 1:
            raise ValueError(
                f"parallel.expert_parallel is {self.parallel.expert_parallel} in a private stage, where a record's "
                "tokens would spread its gradient over ranks and none could tell its norm: set it to 1; fsdp2 shards "
                "experts too"
            )
        if self.privacy.clipping == "kept_gradients" and self.parallel.backend == "zero3":
            raise ValueError(
                "privacy.clipping is kept_gradients under parallel.backend zero3, which releases each weight after one "
                "backward: set privacy.clipping to auto, or parallel.backend to fsdp2"
            )
        return self


class EvalStage(StageConfig):
    """Samples from each stage of `init_from`, measured on features of a classifier trained on public data."""

    kind = "eval"
    stage: Literal["eval"]
    init_from: Annotated[tuple[StageName, ...], Field(min_length=1)]
    data_from: StageName
    samples_per_class: Positive
    reference_images: Positive = 2000  # real images of each split that the figures use, at most
    batch_size: Positive = 250
    sampler: Literal["euler", "heun", "ddim"] = "euler"
    sampler_steps: Positive = 30
    guidance: Annotated[float, Field(ge=0)] = 2.0
    minimum_fidelity: dict[StageName, Annotated[float, Field(ge=0, le=1)]] = {}  # below it the launch says "missed"
    seed: Natural = 0


class EvalUnifiedStage(StageConfig):
    """Captions and images of each stage of `init_from`, measured on records of `splits` (`train.unified_evaluation`).

    A figure below its threshold in at_least, or above that in at_most, makes the launch say "missed". Thresholds are by
    stage and figure: {pretrain: {captions_exact.test: 0.9}}.
    """

    kind = "eval_unified"
    stage: Literal["eval_unified"]
    init_from: Annotated[tuple[StageName, ...], Field(min_length=1)]
    data_from: StageName
    splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("test", "public")
    captions: Positive = 250  # images of a split that are told in words
    images: Positive = 100  # captions of a split that are drawn
    reference_images: Positive = 2000  # real images that train the classifier, and that drawn ones are compared with
    batch_size: Positive = 100
    sampler: Literal["euler", "heun"] = "euler"
    sampler_steps: Positive = 30
    guidance: Annotated[float, Field(ge=0)] = 2.0
    retrieval: bool = False  # also by an encoder of images and captions, trained on the public split
    at_least: dict[StageName, dict[str, float]] = {}
    at_most: dict[StageName, dict[str, float]] = {}
    seed: Natural = 0

    @model_validator(mode="after")
    def _shows_no_private_record(self) -> Self:
        if "private" in self.splits:
            raise ValueError(
                "splits names private, whose figures and pictures would be raw ones of private records: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _thresholds_are_of_its_models(self) -> Self:
        for key, thresholds in (("at_least", self.at_least), ("at_most", self.at_most)):
            if unknown := sorted(set(thresholds) - set(self.init_from)):
                raise ValueError(f"{key} names {unknown[0]}, which is not in init_from ({', '.join(self.init_from)})")
        return self


class EvalPiiStage(StageConfig):
    """A policy's detectors on planted captions, pictures and metadata: recall, precision, leaks, with their intervals.

    Fails where a figure of `train.pii_evaluation` is below its threshold in at_least, or above that in at_most.
    """

    kind = "eval_pii"
    stage: Literal["eval_pii"]
    data_from: StageName | None = None  # the filter stage whose policy is measured; null: `policy`
    policy: Policy | None = None
    captions: Natural = 3000  # in English, and as many in other languages
    pictures: Natural = 40  # of each size of face and of text
    at_least: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    at_most: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    seed: Natural = 0

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if (self.policy is None) == (self.data_from is None):
            has = "both policy and data_from" if self.policy else "neither policy nor data_from"
            raise ValueError(f"the stage has {has}: give a policy, or name in data_from the filter stage that has it")
        return self


class Empirical(Section):
    """A throwaway run on public records with canaries among them, which shows how much epsilon an attack can prove."""

    canaries: Positive = 1000
    guesses: Annotated[int, Field(gt=0, multiple_of=2)] = 200  # fixed beforehand; on the others the attacker abstains
    steps: Positive = 30
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    target_epsilon: PositiveFloat = 2.0  # of the throwaway run's own ledger


class Extraction(Section):
    """Samples beside their nearest training images: how many are copies."""

    samples_per_class: Positive = 20
    samples: Positive = 200  # of a unified model, which draws training images' captions
    reference_images: Positive = 2000
    sampler_steps: Positive = 30
    seed: Natural = 0


class AuditStage(StageConfig):
    """The ledger read again by itself: what was spent, and whether the run folder bears it out; and two attacks."""

    kind = "audit"
    stage: Literal["audit"]
    init_from: StageName | None = None  # the private stage whose engine is attacked and whose samples are searched
    data_from: StageName | None = None  # whose public split the attacks use
    empirical: Empirical | None = None
    extraction: Extraction | None = None

    @model_validator(mode="after")
    def _attacks_have_what_they_need(self) -> Self:
        if (self.empirical or self.extraction) and not (self.init_from and self.data_from):
            raise ValueError("empirical and extraction need init_from, a finetune_dp stage, and data_from: name both")
        return self


class ExportStage(StageConfig):
    """The EMA weights as safetensors, with the privacy card and the model card."""

    kind = "export"
    stage: Literal["export"]
    init_from: StageName


STAGES: dict[str, type[StageConfig]] = {
    model.kind: model
    for model in (
        IngestStage,
        FilterStage,
        LatentsStage,
        PretrainStage,
        FinetuneStage,
        EvalStage,
        EvalUnifiedStage,
        EvalPiiStage,
        AuditStage,
        ExportStage,
    )
}


def identity_of(dump: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped stage configuration, of this run or of a manifest, without the OPERATIONAL keys."""
    identity: dict[str, Any] = copy.deepcopy(dict(dump))
    for dotted in OPERATIONAL:
        *sections, key = dotted.split(".")
        holder: Any = identity
        for section in sections:
            holder = holder.get(section) or {}
        holder.pop(key, None)
    return identity


# Which models a key of `objective` is for.
_OBJECTIVE_OF = {
    **dict.fromkeys(("prediction", "timesteps", "label_dropout", "noise_draws"), ("dit", "unified")),
    **dict.fromkeys(("patches_weight", "balancing", "balance_weight", "z_weight"), ("unified",)),
    "kl_weight": ("vae",),
}


def check_model(stage: TrainStage, model: ModelConfig) -> None:
    """Refuse a stage that lacks a section its model needs, or has another model's."""
    unified = model.name == "unified"
    if unified != (stage.documents is not None):
        has = "is missing" if unified else "is given"
        raise ValueError(f"documents {has}, and the model is {model.name}: it goes with unified, and only there")
    for key, models in _OBJECTIVE_OF.items():
        value = getattr(stage.objective, key)
        if model.name not in models and value != Objective.model_fields[key].default:
            raise ValueError(f"objective.{key} is {value}, which a model {model.name} does not have: leave it out")
    if model.name == "vae" and stage.kind == FinetuneStage.kind:
        raise ValueError(
            "the model is a vae in a private stage: what makes latents and decodes them is trained on public data, so "
            "set stage to pretrain"
        )
    if stage.parallel.expert_parallel > 1:
        require_even(model.experts_a_layer if isinstance(model, UnifiedConfig) else 0, stage.parallel.expert_parallel)


def check_batch(stage: TrainStage, world_size: int) -> None:
    """Refuse a non-private batch that does not fall evenly on `world_size` ranks and their microbatches.

    A private stage passes, for its batches are Poisson draws, whatever their size; and one of documents, for its rows
    are shared out, and not its records.
    """
    if stage.kind == "finetune_dp" or stage.documents is not None:
        return
    batch, micro = stage.train.batch_size, stage.train.microbatch_size
    share, rest = divmod(batch, world_size)
    if rest:
        raise ValueError(
            f"train.batch_size is {batch}, which {world_size} ranks (parallel.nproc a node) cannot share evenly; "
            f"nearest valid with train.microbatch_size {micro}: {_choices(_multiples_near(batch, world_size * micro))}"
        )
    if share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        below = max(d for d in divisors if d <= micro)
        above = min((d for d in divisors if d >= micro), default=below)
        raise ValueError(
            f"train.microbatch_size is {micro}, which does not divide a rank's share of train.batch_size "
            f"({batch} / {world_size} ranks = {share}): nearest valid: {_choices([below, above])}"
        )


def _multiples_near(value: int, step: int) -> list[int]:
    below = value // step * step
    return [candidate for candidate in (below, below + step) if candidate > 0]


def _choices(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in dict.fromkeys(values))
