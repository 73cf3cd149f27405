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

from checkpointing.export import DIFFUSERS_WEIGHTS_FILE, ExportError, to_diffusers, write_export
from models.dit import DiTConfig
from models.flow import Objective
from privacy.audit import AuditReport, Claim, audit_run, write_report
from privacy.empirical import EngineCheck
from privacy.pii.policy import Policy
from privacy.pii.report import write_filter_report
from train.card import model_card, privacy_card
from train.config import (
    AuditStage,
    EvalPiiStage,
    EvalStage,
    ExportStage,
    FilterStage,
    FinetuneStage,
    IngestStage,
    StageConfig,
    TrainStage,
)
from train.data import ShardDataset
from train.empirical import check_engine
from train.evaluation import evaluate, image_grid, train_classifier, validation_loss
from train.executors import run_job
from train.extraction import find_copies
from train.filtering import filter_shards, open_tools, plan_filter
from train.generation import build, generate
from train.heartbeat import Heartbeat
from train.loop import load_average, train
from train.measurements import Row, measurement
from train.metrics import format_mfu
from train.parallel import World, join_world
from train.pii_evaluation import judge, measure_policy, missed, open_policy, pii_headline, recall_picture
from train.progress import Progress
from train.run_folder import RunFolder, digests, now, write_json
from train.sources import ingest


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
    headline["curves"] = str(run.path / stage.name / "curves.png")
    outputs |= digests([run.path / stage.name / "curves.png"])
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


def _records(metrics: Mapping[str, Any]) -> dict[str, str]:
    records = ", ".join(f"{name} {split['records']:,}" for name, split in metrics["splits"].items())
    return {"records": records}


def _tally(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()) if count) or "none"


def _eval(stage: EvalStage, run: RunFolder, progress: Progress) -> Result:
    """Samples of each model, judged on held-out and public records; the private split is never read."""
    folder, data = run.stage_folder(stage.name), run.path / stage.data_from
    metrics: dict[str, Any] = {"headline": {}, "rows": []}
    outputs: list[Path] = []
    classifier = None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for place, source in enumerate(stage.init_from):
        config, weights, _ = load_average(run, source)
        public, public_labels = _images(data, "public", stage.reference_images, config)
        test, test_labels = _images(data, "test", stage.reference_images, config)
        if classifier is None:
            progress(0, None, "training the classifier on the public half")
            classifier = train_classifier(public, public_labels, stage.seed)
        model, objective = build(config, weights).to(device), objective_of(run, source)
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
            batch_size=stage.batch_size,
            progress=lambda n, source=source, done=done, total=total: progress(done + n, total, f"sampling {source}"),
        )
        figures = evaluate(samples, labels, test, test_labels, public, classifier, seed=stage.seed)
        figures |= validation_loss(model, objective, test, test_labels)
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


def objective_of(run: RunFolder, stage_name: str) -> Objective:
    """What the stage's model was trained to predict."""
    manifest = run.read_manifest(stage_name)
    assert manifest is not None
    section = manifest["config"]["objective"]
    return Objective(prediction=section["prediction"], timesteps=section["timesteps"])


def _images(data: Path, split: str, limit: int, config: DiTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a split: all of them, or `limit` spread evenly over it."""
    dataset = ShardDataset(data / split, split)
    chosen = np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(np.int64)
    return dataset.batch(chosen, config.channels, config.image_size)


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
    settings, audited, data = stage.extraction, _audited(stage, run), run.path / str(stage.data_from)
    config, weights, _ = load_average(run, stage.init_from)
    outside = audited.privacy.operator_metrics
    split = audited.split if outside else "public"
    labels = torch.arange(config.num_classes).repeat_interleave(settings.samples_per_class)
    progress(0, None, f"searching the samples for copies of {split} images")
    samples = generate(
        build(config, weights),
        objective_of(run, stage.init_from),
        labels,
        seed=settings.seed,
        sampler="euler",
        steps=settings.sampler_steps,
        guidance=1.0,
    )
    training, _ = _images(data, split, settings.reference_images, config)
    held_out, _ = _images(data, "test", settings.reference_images, config)
    found = find_copies(samples, training, held_out)
    note = "operator-only, outside the guarantee" if outside else "private ones are not looked at"
    verdict = (
        f"{found.samples.rate:.3f} [{found.samples.low:.3f}, {found.samples.high:.3f}] of {split} images, and "
        f"{found.held_out.rate:.3f} of held-out images ({note})"
    )
    return asdict(found) | {"split": split, "outside_guarantee": outside, "found": found.found, "verdict": verdict}


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
    objective = objective_of(run, stage.init_from)
    card = privacy_card(report, manifest, run)
    described = {"model": config.model_dump(), "objective": objective.model_dump(), "source": checkpoint.name}
    folder = run.stage_folder(stage.name) / "model"
    write_export(
        folder,
        weights,
        described,
        extra_files={
            "privacy_card.json": (json.dumps(card, indent=2) + "\n").encode(),
            "MODEL_CARD.md": model_card(described, card, manifest, run).encode(),
        },
    )
    headline = {"model": str(folder)}
    outputs = [folder / name for name in ("model.safetensors", "config.json", "privacy_card.json", "MODEL_CARD.md")]
    try:
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
    EvalStage: _eval,
    EvalPiiStage: _eval_pii,
    AuditStage: _audit,
    ExportStage: _export,
}
