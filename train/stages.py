"""The stages of a recipe: each reads its inputs' manifests, fills its own folder, and writes its manifest last."""

# One file: a stage is a page of glue between the parts, and reads best beside its neighbours.

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from checkpointing.export import DIFFUSERS_WEIGHTS_FILE, ExportError, to_diffusers, write_export
from models.dit import DiTConfig
from models.registry import ModelConfig
from models.unified import UnifiedConfig
from models.vae import VAE
from privacy.audit import AuditReport, Claim, audit_run, write_report
from privacy.empirical import EngineCheck
from privacy.pii.policy import Policy
from privacy.pii.report import write_filter_report
from train.autoencoding import VAE_FOLDER, decoder_in, decoder_of, pinned_vae
from train.card import model_card, privacy_card
from train.config import (
    AuditStage,
    EvalPiiStage,
    EvalStage,
    EvalUnifiedStage,
    ExportStage,
    Extraction,
    FilterStage,
    FinetuneStage,
    IngestStage,
    LatentsStage,
    StageConfig,
    TrainStage,
)
from train.data import ShardDataset
from train.empirical import check_engine
from train.evaluation import evaluate, image_grid, train_classifier, validation_loss
from train.executors import run_job
from train.extraction import find_copies
from train.families import TOKENIZER_FILE
from train.filtering import filter_shards, open_tools, plan_filter
from train.generation import build, draw, exported, generate, objective_of
from train.heartbeat import Heartbeat
from train.latent_shards import HEADER
from train.latents import encode_shards, plan_latents, reconstruction_psnr
from train.loop import load_average, train
from train.measurements import Row, judged, measurement
from train.metrics import format_mfu
from train.parallel import World, join_world
from train.pii_evaluation import judge, measure_policy, missed, open_policy, pii_headline, recall_picture
from train.progress import Progress
from train.run_folder import RunFolder, digests, now, write_json
from train.sources import ingest
from train.unified_evaluation import Source, measure, prompt, side_by_side


@dataclass(frozen=True)
class Result:
    """What a stage tells its manifest: figures (with a `headline` for people), the digests of files made, public seeds,
    the ledger.
    """

    metrics: dict[str, Any]
    outputs: Mapping[Path, str] = field(default_factory=dict[Path, str])
    seeds: dict[str, int] = field(default_factory=dict)
    ledger: dict[str, Any] | None = None


def run_stage(stage: StageConfig, run: RunFolder, fencing_epoch: int | None, heartbeat: Heartbeat) -> None:
    """Run one stage to its manifest; a finished one is left as it is.

    Training stages run on every rank of the process group; only rank 0 locks the stage and writes the manifest.
    """
    world = join_world() if isinstance(stage, TrainStage) else None
    first_rank = world is None or world.rank == 0
    with run.stage_lock(stage.name) if first_rank else nullcontext(), _together(world):
        if run.finished(stage):
            if first_rank:
                print(f"stage {stage.name} is finished: {run.manifest_path(stage.name)}")
            return
        started, clock = now(), time.monotonic()
        inputs = run.input_hashes(stage)
        if isinstance(stage, TrainStage):
            assert world is not None
            result = _train(stage, run, world, fencing_epoch, heartbeat)
        else:
            heartbeat.section("evaluate")
            progress = Progress(run.stage_folder(stage.name), heartbeat)
            result = STAGES[type(stage)](stage, run, progress)
        if first_rank:
            run.write_manifest(
                stage,
                inputs=inputs,
                started=started,
                seconds=time.monotonic() - clock,
                metrics=result.metrics,
                outputs={str(path.relative_to(run.path)): digest for path, digest in result.outputs.items()},
                seeds=result.seeds,
                ledger=result.ledger,
            )


@contextmanager
def _together(world: World | None) -> Iterator[None]:
    """No rank goes on before rank 0 holds the stage's lock, nor ends before its manifest is written."""
    if world is not None:
        world.barrier()
    yield
    if world is not None:
        world.barrier()
        dist.destroy_process_group()


def _train(stage: TrainStage, run: RunFolder, world: World, fencing_epoch: int | None, heartbeat: Heartbeat) -> Result:
    if fencing_epoch is None:  # started by hand
        epoch = run.next_fencing_epoch(run.ledger_path(stage)) if world.rank == 0 else None
        fencing_epoch = int(world.broadcast(epoch))
    trained = train(stage, run, world, fencing_epoch, heartbeat)
    # Saves carry checksums of their own; these also tell weights that someone changed from the ones that were trained.
    saved = sorted(trained.checkpoint.iterdir())
    outputs = {
        path: digest for part in world.gather(digests(saved[world.rank :: world.size])) for path, digest in part.items()
    }
    if world.rank != 0:
        return Result({})
    metrics = trained.metrics
    headline = {"steps": str(metrics["steps"]), "loss": f"{metrics['loss']:.3f}"}
    if "epsilon" in metrics:
        target = f"(target {metrics['target_epsilon']:g})"
        headline["epsilon"] = f"{metrics['epsilon']:.3f} at delta {metrics['delta']:g} {target}"
        headline["noise multiplier"] = f"{metrics['noise_multiplier']:.3f}"
    headline["throughput"] = f"{metrics['images_per_s']:,.0f} images/s, MFU {format_mfu(metrics['mfu'])}"
    pictures = sorted((run.path / stage.name).glob("*.png"))
    headline |= {picture.stem.replace("_", " "): str(picture) for picture in pictures}
    outputs |= digests([*pictures, *(run.path / stage.name).glob(TOKENIZER_FILE)])
    return Result(metrics | {"headline": headline}, outputs, {"train": stage.train.seed}, trained.ledger)


def _ingest(stage: IngestStage, run: RunFolder, progress: Progress) -> Result:
    folder = run.stage_folder(stage.name)
    metrics = ingest(stage, folder, progress)
    headline = _records(metrics) | {"quarantined": _tally(metrics["quarantined"])}
    return Result(metrics | {"headline": headline}, digests([folder / "quarantine.jsonl"]), {"ingest": stage.seed})


def _filter(stage: FilterStage, run: RunFolder, progress: Progress) -> Result:
    source, folder = run.read_manifest(stage.data_from), run.stage_folder(stage.name)
    assert source is not None
    key_file = Path(stage.key_file) if stage.key_file else run.path / "secret.key"
    job = plan_filter(
        run.path / stage.data_from,
        folder,
        list(source["metrics"]["splits"]),
        stage.policy,
        key_file,
        duplicates=stage.duplicates,
        max_quarantine_fraction=stage.max_quarantine_fraction,
    )
    metrics = filter_shards(job, lambda job: run_job(job, stage.executor, progress))
    headline = _records(metrics) | {"found in captions": _tally(metrics["entities"])}
    if job.image_entities:
        headline["found in images"] = _tally(metrics["boxes"])
    headline["stripped from images"] = _tally(metrics["metadata"])
    headline["dropped or quarantined"] = _tally(metrics["reasons"])
    if job.pseudonym_key_id is not None:
        headline["pseudonyms"] = f"key {job.pseudonym_key_id}"
    report = write_filter_report(folder, stage.name, metrics, stage.policy, open_tools(stage.policy, key_file))
    headline["report"] = str(report)
    return Result(metrics | {"headline": headline}, digests([folder / "quarantine.jsonl", report]))


def _latents(stage: LatentsStage, run: RunFolder, progress: Progress) -> Result:
    """Every split's images through the VAE; what its latents are worth is shown on public records."""
    source, folder = run.read_manifest(stage.data_from), run.stage_folder(stage.name)
    assert source is not None
    vae = pinned_vae(stage.diffusers) if stage.diffusers else _trained_vae(run, str(stage.init_from))
    job = plan_latents(run.path / stage.data_from, folder, list(source["metrics"]["splits"]), vae)
    metrics = encode_shards(job, lambda job: run_job(job, stage.executor, progress))
    decode = decoder_in(folder)
    images, latents = (ShardDataset(run.path / name / "public", "public") for name in (stage.data_from, stage.name))
    psnr = reconstruction_psnr(images, latents, decode)
    row = Row(name=f"{stage.name}.psnr", value=psnr, unit="dB", target=None, ok=None)
    headline = _records(metrics) | {
        "latents": " x ".join(map(str, metrics["shape"])),
        "public images decoded again": f"PSNR {psnr:.1f} dB",
        "vae": str(folder / VAE_FOLDER),
    }
    written = [*(folder / VAE_FOLDER).iterdir(), *(folder / split / HEADER for split in job.splits)]
    return Result(metrics | {"headline": headline, "rows": [row]}, digests(sorted(written)))


def _trained_vae(run: RunFolder, stage_name: str) -> VAE:
    config, weights, _ = load_average(run, stage_name)
    vae = build(config, weights)
    if not isinstance(vae, VAE):
        raise ValueError(f"init_from is {stage_name}, whose model is a {config.name}: name a stage that trained a vae")
    return vae


def _records(metrics: Mapping[str, Any]) -> dict[str, str]:
    records = ", ".join(f"{name} {split['records']:,}" for name, split in metrics["splits"].items())
    return {"records": records}


def _tally(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()) if count) or "none"


def _eval(stage: EvalStage, run: RunFolder, progress: Progress) -> Result:
    """Samples of each model, judged on held-out and public records; the private split is never read."""
    folder, data = run.stage_folder(stage.name), Source.of(run, stage.data_from)
    metrics: dict[str, Any] = {"headline": {}, "rows": []}
    outputs: list[Path] = []
    classifier = None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for place, source in enumerate(stage.init_from):
        config, weights, _ = load_average(run, source)
        if not isinstance(config, DiTConfig):
            raise ValueError(
                f"init_from of {stage.name} names {source}, a model {config.name}: name it in a stage eval_unified"
            )
        shape, number = data.pixels_shape(config), stage.reference_images
        public, public_labels = _images(data.pixels, "public", number, *shape)
        test, test_labels = _images(data.pixels, "test", number, *shape)
        if classifier is None:
            progress(0, None, "training the classifier on the public half")
            classifier = train_classifier(public, public_labels, stage.seed)
        model, objective = build(config, weights).to(device), objective_of(run, source, config)
        labels = torch.arange(config.num_classes).repeat_interleave(stage.samples_per_class)
        total, done = len(labels) * len(stage.init_from), len(labels) * place
        samples = generate(
            model,
            objective,
            labels,
            seed=stage.seed,
            sampler=stage.sampler,
            steps=stage.sampler_steps,
            guidance=stage.guidance,
            decode=data.decode,
            batch_size=stage.batch_size,
            progress=lambda n, source=source, done=done, total=total: progress(done + n, total, f"sampling {source}"),
        )
        figures = evaluate(samples, labels, test, test_labels, public, classifier, seed=stage.seed)
        held_out, _ = _images(data.data, "test", number, config.channels, config.image_size)
        figures |= validation_loss(model, objective, held_out, test_labels)
        fidelity = float(figures["class_fidelity"])
        grid = _grid(
            samples, stage.samples_per_class, folder / f"{source}.png", f"{source}: {_epsilon_of(run, source)}"
        )
        target = stage.minimum_fidelity.get(source)
        metrics["rows"].append(
            Row(
                name=f"{stage.name}.{source}.class_fidelity",
                value=fidelity,
                unit="share",
                target=target,
                ok=None if target is None else fidelity >= target,
            )
        )
        metrics[source] = {key: value for key, value in figures.items() if key != "class_fidelity"}
        metrics["headline"] |= _quality(source, figures, grid)
        outputs.append(grid)
    return Result(metrics, digests(outputs), {"eval": stage.seed})


def _images(data: Path, split: str, limit: int, channels: int, image_size: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a split: all of them, or `limit` spread evenly over it."""
    dataset = ShardDataset(data / split, split)
    chosen = np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(np.int64)
    return dataset.batch(chosen, channels, image_size)


def _grid(samples: torch.Tensor, per_class: int, path: Path, title: str) -> Path:
    """The first ten samples of each class, a class a row."""
    columns = min(10, per_class)
    chosen = samples.unflatten(0, (-1, per_class))[:, :columns].flatten(0, 1)
    return image_grid(chosen, columns, path, title)


def _epsilon_of(run: RunFolder, stage_name: str) -> str:
    manifest = run.read_manifest(stage_name)
    assert manifest is not None
    metrics = manifest["metrics"]
    return f"ε {metrics['epsilon']:.2f}, δ {metrics['delta']:g}" if "epsilon" in metrics else "public data"


def _quality(source: str, figures: Mapping[str, Any], grid: Path) -> dict[str, str]:
    """The figures a person looks for, each beside its value for real images."""

    def beside(name: str, form: str) -> str:
        return f"{figures[name]:{form}} (real {figures[name + '_real']:{form}})"

    return {
        f"{source}: class fidelity": beside("class_fidelity", ".3f"),
        f"{source}: Fréchet distance": beside("frechet_distance", ".2f"),
        f"{source}: kernel distance": beside("kernel_distance", ".3f"),
        f"{source}: precision / recall": f"{beside('precision', '.2f')} / {beside('recall', '.2f')}",
        f"{source}: copy rate of public images": beside("copy_rate", ".3f"),
        f"{source}: validation loss": f"{figures['validation_loss']:.4f}",
        f"{source}: samples": str(grid),
    }


def _eval_unified(stage: EvalUnifiedStage, run: RunFolder, progress: Progress) -> Result:
    """Captions and images of each model side by side, so that one sees what a stage did to both abilities."""
    folder, source = run.stage_folder(stage.name), Source.of(run, stage.data_from)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures, outputs = dict[str, list[Row]](), list[Path]()
    judges = None
    total = len(stage.init_from) * len(stage.splits) * (stage.captions + stage.images)
    for name in stage.init_from:
        config, weights, _ = load_average(run, name)
        if not isinstance(config, UnifiedConfig):
            raise ValueError(
                f"init_from of {stage.name} names {name}, a model {config.name}: measure it in a stage eval"
            )
        if judges is None:
            progress(0, None, "training judges on the public half")
            judges = source.judges(stage, config)
        model, objective = build(config, weights).to(device), objective_of(run, name, config)
        rows, title = list[Row](), f"{name}: {_epsilon_of(run, name)}"
        for split in stage.splits:
            done = (len(figures) * len(stage.splits) + stage.splits.index(split)) * (stage.captions + stage.images)
            measured = measure(
                model, objective, stage, split, source, judges,
                lambda n, text, done=done, name=name: progress(done + n, total, f"{name}: {text}"),
            )  # fmt: skip
            rows += measured.rows
            outputs.append(
                measured.show_samples(folder / f"{name}_{split}_images.png", f"{title}, captions of {split}")
            )
            outputs.append(
                measured.show_captions(folder / f"{name}_{split}_captions.png", f"{title}, images of {split}")
            )
        figures[name] = rows
    rows = [
        row
        for name, of_model in figures.items()
        for row in judged(f"{stage.name}.{name}", of_model, stage.at_least.get(name, {}), stage.at_most.get(name, {}))
    ]
    headline = side_by_side(figures) | {"pictures": str(folder)}
    assert judges is not None
    metrics = {"headline": headline, "rows": rows, **judges.sha256()}
    return Result(metrics, digests(outputs), {"eval_unified": stage.seed})


def _eval_pii(stage: EvalPiiStage, run: RunFolder, progress: Progress) -> Result:
    """What the policy's detectors find of what is planted; raises where a threshold is missed, the figures written."""
    folder, policy = run.stage_folder(stage.name), _measured_policy(stage, run)
    tools = open_policy(policy)
    figures = measure_policy(
        policy,
        tools,
        captions=stage.captions,
        pictures=stage.pictures,
        seed=stage.seed,
        progress=lambda part: progress(0, None, part),
    )
    rows = judge(stage.name, figures, stage.at_least, stage.at_most)
    write_json(folder / "figures.json", measurement(rows))
    picture = recall_picture(figures, stage.at_least, folder / "recall.png", f"{run.recipe}: {stage.name}")
    num_thresholds = len(stage.at_least) + len(stage.at_most)
    if failed := missed(rows):
        raise ValueError(
            f"{len(failed)} of {num_thresholds} thresholds missed: {'; '.join(failed)}; all figures are in "
            f"{folder / 'figures.json'}"
        )
    detectors = {detector.name: detector.version for detector in (*tools.texts, *tools.images)}
    headline = pii_headline(figures) | {"thresholds": f"all {num_thresholds} met", "picture": str(picture)}
    if "names" in detectors:
        headline["names found by"] = detectors["names"]
    metrics = {"headline": headline, "rows": rows, "detectors": detectors, "policy_sha256": policy.digest()}
    return Result(metrics, digests([folder / "figures.json", picture]), {"eval_pii": stage.seed})


def _measured_policy(stage: EvalPiiStage, run: RunFolder) -> Policy:
    if stage.policy is not None:
        return stage.policy
    manifest = run.read_manifest(stage.data_from or "")
    if manifest is None or manifest["kind"] != FilterStage.kind:
        raise ValueError(
            f"data_from of {stage.name} is {stage.data_from}: name a filter stage, whose policy is measured"
        )
    return FilterStage(**manifest["config"]).policy


def _audit(stage: AuditStage, run: RunFolder, progress: Progress) -> Result:
    progress(0, None, "recomputing epsilon from the ledger alone")
    report = audit_run(run.path)
    folder = run.stage_folder(stage.name)
    headline, rows = {}, list[Row]()
    attacks = report.attacks
    if stage.empirical is not None:
        check = _attack_engine(stage, run, progress)
        attacks["empirical"] = asdict(check) | {"verdict": check.verdict, "holds": check.holds}
        claim = "an attack on the engine shows no more epsilon than its ledger says, and sees where noise is missing"
        report.claims.append(Claim(claim, check.holds, check.verdict))
        headline["attack on the engine"] = check.verdict
        bound = check.engine.epsilon_lower_bound
        rows.append(Row(name=f"{stage.name}.epsilon_lower_bound", value=bound, unit="epsilon", target=check.epsilon,
                        ok=bound <= check.epsilon))  # fmt: skip
    if stage.extraction is not None:
        attacks["extraction"] = _search_copies(stage, run, progress)
        headline["copies among the samples"] = attacks["extraction"]["verdict"]
    outputs = write_report(report, folder)
    _refuse_false_claims(report)
    headline = {"verdict": report.verdict, "report": str(outputs[-1]), **headline}
    return Result({"claims": len(report.claims), "headline": headline, "rows": rows, **attacks}, digests(outputs))


def _audited(stage: AuditStage, run: RunFolder) -> FinetuneStage:
    """The private stage that the attacks are about."""
    manifest = run.read_manifest(stage.init_from or "")
    if manifest is None or manifest["kind"] != FinetuneStage.kind:
        raise ValueError(f"init_from of {stage.name} is {stage.init_from}: the attacks need a finished private stage")
    return FinetuneStage(**manifest["config"])


def _attack_engine(stage: AuditStage, run: RunFolder, progress: Progress) -> EngineCheck:
    assert stage.empirical is not None
    assert stage.init_from is not None
    config, weights, _ = load_average(run, stage.init_from)
    public = ShardDataset(run.path / str(stage.data_from) / "public", "public")
    settings = stage.empirical.model_dump()
    return check_engine(
        _audited(stage, run), config, weights, public, secrets.token_bytes(32), progress=progress, **settings
    )


def _search_copies(stage: AuditStage, run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Copies of training images among the samples: of private ones only where operator metrics are allowed."""
    assert stage.extraction is not None
    assert stage.init_from is not None
    settings, audited = stage.extraction, _audited(stage, run)
    config, weights, _ = load_average(run, stage.init_from)
    outside = audited.privacy.operator_metrics
    split = audited.split if outside else "public"
    progress(0, None, f"searching the samples for copies of {split} images")
    found = find_copies(*_searched(stage, settings, run, config, weights, split))
    note = "operator-only, outside the guarantee" if outside else "private ones are not looked at"
    verdict = (
        f"{found.samples.rate:.3f} [{found.samples.low:.3f}, {found.samples.high:.3f}] of {split} images, and "
        f"{found.held_out.rate:.3f} of held-out images ({note})"
    )
    return asdict(found) | {"split": split, "outside_guarantee": outside, "found": found.found, "verdict": verdict}


def _searched(
    stage: AuditStage, settings: Extraction, run: RunFolder, config: ModelConfig, weights: dict[str, Tensor], split: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, training images and held-out ones. A unified model draws the training images' own captions: whoever
    knows a record's caption asks with it."""
    how: dict[str, Any] = {"seed": settings.seed, "sampler": "euler", "steps": settings.sampler_steps, "guidance": 1.0}
    number, name = settings.reference_images, str(stage.init_from)
    source = Source.of(run, str(stage.data_from))
    if isinstance(config, UnifiedConfig):
        training = source.records(split, number, settings.seed, config)
        model = build(config, weights)
        prompts = [prompt(model, caption) for caption in training.captions[: settings.samples]]
        samples = draw(model, objective_of(run, name, config), prompts, decode=source.decode, **how)
        return samples, training.pixels, source.records("test", number, settings.seed, config).pixels
    assert isinstance(config, DiTConfig), "no other model has private stages"
    labels = torch.arange(config.num_classes).repeat_interleave(settings.samples_per_class)
    samples = generate(build(config, weights), objective_of(run, name, config), labels, decode=source.decode, **how)
    shape = source.pixels_shape(config)
    (training, _), (held_out, _) = (_images(source.pixels, part, number, *shape) for part in (split, "test"))
    return samples, training, held_out


def _refuse_false_claims(report: AuditReport) -> None:
    false = [f"{claim.claim}: {claim.evidence}" for claim in report.claims if not claim.holds]
    if false:
        raise ValueError(f"the audit of {report.run} found that {report.verdict}: {'; '.join(false)}")


def _export(stage: ExportStage, run: RunFolder, progress: Progress) -> Result:
    """The EMA weights with everything needed to sample from them, and the cards that say what they cost.

    Refused where the audit finds a claim false: no card may promise what the ledger does not bear out.
    """
    report = audit_run(run.path)
    _refuse_false_claims(report)
    config, weights, checkpoint = load_average(run, stage.init_from)
    manifest = run.read_manifest(stage.init_from)
    assert manifest is not None
    objective = objective_of(run, stage.init_from, config)
    card = privacy_card(report, manifest, run)
    section, extra_files = exported(config)
    described = {"model": section, "objective": objective.model_dump(), "source": checkpoint.name}
    extra_files["privacy_card.json"] = (json.dumps(card, indent=2) + "\n").encode()
    extra_files["MODEL_CARD.md"] = model_card(described, card, manifest, run).encode()
    folder = run.stage_folder(stage.name) / "model"
    write_export(folder, weights, described, extra_files=extra_files)
    headline = {"model": str(folder)}
    outputs = [folder / name for name in ("model.safetensors", "config.json", *extra_files)]
    decoder = decoder_of(run, manifest["config"]["data_from"])
    if decoder is not None:
        decoder.write(folder / VAE_FOLDER)
        outputs += sorted((folder / VAE_FOLDER).iterdir())
    try:
        if not isinstance(config, DiTConfig):
            raise ExportError(f"it has no model {config.name}")
        tensors, diffusers_config = to_diffusers(weights, config.model_dump())
    except ExportError as error:  # said, not hidden: our own format is complete without it
        headline["diffusers"] = f"none: {error}"
    else:
        twin = folder.with_name("diffusers")
        write_export(twin, tensors, diffusers_config, weights_file=DIFFUSERS_WEIGHTS_FILE)
        headline["diffusers"] = str(twin)
        outputs.append(twin / DIFFUSERS_WEIGHTS_FILE)
    progress(1, 1)
    parameters = sum(tensor.numel() for tensor in weights.values())
    return Result({"parameters": parameters, "headline": headline}, digests(outputs))


STAGES: dict[type[StageConfig], Callable[[Any, RunFolder, Progress], Result]] = {
    IngestStage: _ingest,
    FilterStage: _filter,
    LatentsStage: _latents,
    EvalStage: _eval,
    EvalUnifiedStage: _eval_unified,
    EvalPiiStage: _eval_pii,
    AuditStage: _audit,
    ExportStage: _export,
}
