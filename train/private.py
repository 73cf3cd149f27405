"""What a private stage has beyond a public one: its terms, its ledger, its clipping engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from checkpointing.sharded import Checkpoint
from models.registry import ModelConfig
from privacy.accounting import delta_warning
from privacy.clipping import Clipper, GroupWiseClipper, make_clipper
from privacy.ledger import Ledger, LedgerError, read_ledger
from privacy.mechanism import Mechanism, Terms
from privacy.secrets import load_master_secret, signing_seed
from train.config import OPERATIONAL, FinetuneStage
from train.data import ShardDataset
from train.parallel import Backend, World
from train.plan import tokens_at_once
from train.run_folder import RunFolder, code_version


def ledger_name(run: RunFolder, stage: FinetuneStage) -> str:
    """The stage's name in a ledger that several runs may share."""
    return f"{run.run_id}/{stage.name}"


def mechanism_terms(stage: FinetuneStage, name: str, num_units: int) -> Terms:
    """The mechanism's terms, from the stage's configuration, its name in the ledger, and the size of its data set."""
    privacy = stage.privacy
    same = (
        "replay_steps", "charge_ahead", "unit", "bands", "clipping", "max_grad_norm", "loss_bound", "loss_share",
        "target_epsilon", "delta", "dataset_cap", "secure_noise", "operator_metrics",
    )  # fmt: skip
    return Terms(
        stage=name,
        steps=stage.train.steps,
        max_records=privacy.max_records_per_user or 1,
        num_units=num_units,
        expected_batch_size=stage.train.batch_size,
        sampling=privacy.sampling.method,
        max_batch_size=privacy.sampling.max_batch_size,
        cycle=privacy.sampling.cycle,
        counts_share=privacy.adaptive_bounds.share if privacy.adaptive_bounds else 0.0,
        **{key: getattr(privacy, key) for key in same},
    )


def num_units(stage: FinetuneStage, dataset: ShardDataset) -> int:
    """How many privacy units the data set holds."""
    return len(dataset.units) if stage.privacy.unit == "user" else len(dataset)


@contextmanager
def open_mechanism(
    stage: FinetuneStage,
    run: RunFolder,
    world: World,
    dataset: ShardDataset,
    fencing_epoch: int,
    resumed: Checkpoint | None,
) -> Iterator[Mechanism]:
    """The stage's mechanism, with the ledger open on rank 0 for as long as the context lasts."""
    privacy, path = stage.privacy, run.ledger_path(stage)
    assert path is not None
    secret = load_master_secret(Path(privacy.key_file) if privacy.key_file else run.path / "secret.key")
    warning = delta_warning(privacy.delta, num_units(stage, dataset))
    with ExitStack() as stack:
        ledger = None
        if world.rank == 0:
            if warning is not None:
                print(f"warning: {warning}", flush=True)
            if resumed is not None:
                _require_ledger_of(resumed, path)
            ledger = stack.enter_context(
                Ledger.open(
                    path,
                    delta=privacy.delta,
                    unit=privacy.unit,
                    dataset_root=dataset.root,
                    signing_seed=signing_seed(secret),
                    dataset_cap=privacy.dataset_cap,
                    fencing_epoch=fencing_epoch,
                )
            )
        yield Mechanism(
            mechanism_terms(stage, ledger_name(run, stage), num_units(stage, dataset)),
            secret,
            ledger,
            world.broadcast,
            code_version=code_version(),
            config_sha256=stage.sha256(),
            operational=OPERATIONAL,
            shards_root=run.shards_root(stage.data_from),
            unit_of=dataset.unit_of if privacy.unit == "user" else None,
        )


def _require_ledger_of(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse a ledger that does not know of the checkpoint: a lost one would begin the budget anew."""
    head = checkpoint.state["ledger_head"]
    if not path.exists() or head not in read_ledger(path, [head]).heads:
        raise LedgerError(
            f"{checkpoint.folder} was charged to a ledger that held {head[:12]}.., and {path} does not: "
            "restore the ledger; without it nobody can say what these weights have cost"
        )


def stage_clipper(stage: FinetuneStage, model: ModelConfig, backend: Backend, resumed: Checkpoint | None) -> Clipper:
    """The clipping engine that the stage names, or that fits it; said on rank 0."""
    privacy, engine, why = stage.privacy, stage.privacy.clipping, "as configured"
    if engine == "auto":
        engine, why = _fitting_engine(stage, model, backend)
    if stage.parallel.compile:  # compiled parts would free their buffers after the first of two backwards
        torch._functorch.config.donated_buffer = False  # pyright: ignore[reportAttributeAccessIssue]
    if backend.world.rank == 0:
        print(f"clipping: {engine} ({why})", flush=True)
    if engine != "group_wise":
        return make_clipper(engine, backend.module, privacy.max_grad_norm)
    adaptive = privacy.adaptive_bounds
    follows = {} if adaptive is None else {"quantile": adaptive.quantile, "rate": adaptive.rate}
    clipper = GroupWiseClipper(backend.module, privacy.max_grad_norm, **follows)
    if resumed is not None:
        clipper.bounds = resumed.state["group_bounds"]
    return clipper


def clipping_state(clipper: Clipper | None) -> dict[str, Any]:
    """What a checkpoint must hold of the clipper: group bounds, which are noised and so may be shown."""
    return {"group_bounds": clipper.bounds} if isinstance(clipper, GroupWiseClipper) else {}


def _fitting_engine(stage: FinetuneStage, model: ModelConfig, backend: Backend) -> tuple[Any, str]:
    """The faster of the two flat engines that fits, and why: they give the same sum."""
    if not backend.forward_once:
        return "two_pass", f"auto: {stage.parallel.backend} cannot run two backwards over one forward"
    if stage.parallel.activation_checkpointing:
        return "two_pass", "auto: kept gradients would undo activation checkpointing"
    element = 2 if stage.train.precision == "bf16" else 4
    needed = tokens_at_once(stage, model) * model.linear_outputs * element
    # Every rank must decide alike: what rank 0 has free, were all ranks of this machine to share it.
    free = backend.world.broadcast(_free_memory(backend.world.device) // _ranks_here(backend.world.device))
    fits = 2 * needed <= free
    said = f"auto: kept gradients take about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB a rank are free"
    return ("kept_gradients" if fits else "two_pass"), said


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _ranks_here(device: torch.device) -> int:
    """Ranks that share the device's memory: a GPU has one, the processor's memory all of this machine's."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
