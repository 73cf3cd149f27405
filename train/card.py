"""What travels with exported weights: a privacy card for machines, a model card for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privacy.audit import AuditReport
from train.config import FilterStage, LatentsStage
from train.run_folder import RunFolder

MECHANISM = ("sampling", "expected_batch_size", "num_units", "noise_multiplier", "max_grad_norm", "steps")


def privacy_card(report: AuditReport, manifest: Mapping[str, Any], run: RunFolder) -> dict[str, Any]:
    """The guarantee and its evidence, as JSON values; without a private stage it says that nothing is promised."""
    stage, metrics = manifest["stage"], manifest["metrics"]
    card: dict[str, Any] = {"format": 1, "stage": stage, "code_version": manifest["code_version"], "guarantee": None}
    if report.spending is not None and manifest["ledger"] is not None:
        spending = report.spending
        card["guarantee"] = {
            "definition": "(epsilon, delta)-differential privacy",
            "epsilon": spending.epsilon,
            "delta": spending.delta,
            "unit": spending.unit,
            "relation": spending.relation,
            "accountant": spending.accountant,
            "mechanism": {key: metrics[key] for key in MECHANISM},
            "dataset_root": spending.dataset_root,
        }
        card["ledger"] = {"id": spending.ledger_id, "head": spending.head, "charges": spending.charges}
        card["caveats"] = report.caveats
    card["audit"] = {"verdict": report.verdict, "claims": [{"claim": c.claim, "holds": c.holds} for c in report.claims]}
    card["trained_on"] = _sources(manifest, run)
    card["filter"] = _filters(manifest, run)
    return card


def _filters(manifest: Mapping[str, Any], run: RunFolder) -> list[dict[str, Any]]:
    """The filter stages that the training stages read, each with what binds its shards: digests, no values."""
    read = dict.fromkeys(stage["data_from"] for stage in _sources(manifest, run))
    filters: list[dict[str, Any]] = []
    for name in read:
        stage, written = name, run.read_manifest(name)
        if written is not None and written["kind"] == LatentsStage.kind:  # made of what it read
            stage = written["config"]["data_from"]
            written = run.read_manifest(stage)
        if written is not None and written["kind"] == FilterStage.kind:
            metrics = written["metrics"]
            named = {key: metrics.get(key) for key in ("shards_root", "policy_sha256", "detectors")}
            filters.append({"stage": stage, **named})
    return filters


def _sources(manifest: Mapping[str, Any], run: RunFolder) -> list[dict[str, Any]]:
    """Every training stage behind the weights, the last first, with the split it read."""
    stages = []
    current: Mapping[str, Any] | None = manifest
    while current is not None:
        config = current["config"]
        private = current["ledger"] is not None
        stages.append(
            {
                "stage": current["stage"],
                "data_from": config["data_from"],
                "split": config["split"],
                "private": private,
                "steps": current["metrics"]["steps"],
            }
        )
        current = run.read_manifest(config["init_from"]) if config["init_from"] else None
    return stages


def model_card(config: Mapping[str, Any], card: Mapping[str, Any], manifest: Mapping[str, Any], run: RunFolder) -> str:
    """A page for whoever finds the weights: what they are, what they promise, how to use them."""
    model, guarantee = config["model"], card["guarantee"]
    if guarantee is None:
        promise = "Trained without differential privacy: these weights promise nothing about their training records."
    else:
        promise = (
            f"Adding or removing one {guarantee['unit']} of the private training data changes the distribution of "
            f"these weights by at most (ε, δ) = ({guarantee['epsilon']:.3f}, {guarantee['delta']:g}), computed by "
            f"{guarantee['accountant']}. Audit: {card['audit']['verdict']}.\n\n"
            "What the guarantee leaves out:\n\n" + "\n".join(f"- {caveat}" for caveat in card["caveats"])
        )
    trained = "\n".join(
        f"| {source['stage']} | {source['split']} | {'yes' if source['private'] else 'no'} | {source['steps']} |"
        for source in card["trained_on"]
    )
    filtered = "".join(
        f"Filtered by stage `{filter['stage']}`, policy `{filter['policy_sha256']}`; Merkle root over its shards' "
        f"manifests: `{filter['shards_root']}`.\n\n"
        for filter in card["filter"]
        if filter["shards_root"] is not None
    )
    read = run.read_manifest(manifest["config"]["data_from"])
    latents = read is not None and read["kind"] == LatentsStage.kind
    described, use = (_unified if model["name"] == "unified" else _classes)(model, latents=latents)
    return f"""# {described} \
The weights are the moving average (EMA) of stage `{manifest["stage"]}` in recipe `{run.recipe}`.

## Privacy

{promise}

## Training

| stage | split | private | steps |
|---|---|---|---|
{trained}

{filtered}Code: `{manifest["code_version"]}`.

## Use

```python
import torch
from pathlib import Path
{use}
```
"""


# What a use says more where the model was trained on a VAE's latents: what makes these of images, and images of these.
OPEN_VAE = """from train.autoencoding import open_decoder

vae = open_decoder(Path("model/vae"))
"""


def _classes(model: Mapping[str, Any], *, latents: bool) -> tuple[str, str]:
    """What the card says of a class-conditional model: its heading with a line below, and how it is used."""
    described = f"""Class-conditional diffusion transformer

{_size(model, latents)}, {model["num_classes"]} classes; \
DiT of width {model["width"]}, depth {model["depth"]}, {model["heads"]} heads, patches of {model["patch_size"]}."""
    use = f"""from train.generation import generate, load_export
{OPEN_VAE if latents else ""}
model, objective, _ = load_export(Path("model"))
labels = torch.arange({model["num_classes"]})
images = generate(model, objective, labels, seed=0, sampler="heun", steps=30, guidance=2.0{", decode=vae" * latents})
# fp32 [N, C, H, W] in [-1, 1]"""
    return described, use


def _unified(model: Mapping[str, Any], *, latents: bool) -> tuple[str, str]:
    """As `_classes`, of a unified model."""
    experts = model["num_experts"] * (2 if model["modality_experts"] else 1)
    described = f"""Unified model of text and images

{_size(model, latents)} and captions of up to \
{model["max_caption_tokens"]} tokens, either made of the other; one transformer of width {model["width"]}, depth \
{model["depth"]}, {model["heads"]} heads, patches of {model["patch_size"]}\
{f", {experts} experts a layer" if experts > 1 else ""}; tokens: {model["tokenizer"]}."""
    use = f"""from models.packed import Image, Text
from train.documents import layout_of
from train.generation import draw, load_export, write
{OPEN_VAE if latents else ""}
model, objective, _ = load_export(Path("model"))
caption = Text(layout_of(model.config).tokenizer.encode("what to draw").tokens)
how = {{"seed": 0, "sampler": "heun", "steps": 30, "guidance": 2.0{', "decode": vae' * latents}}}
images = draw(model, objective, [[caption]], **how)  # [N, C, H, W] in [-1, 1]
captions = write(model, [[Image(image)] for image in {"vae.encode(images)" if latents else "images"}])
```

```
python scripts/sample.py --model model --prompt "what to draw"
python scripts/sample.py --model model --image picture.png"""
    return described, use


def _size(model: Mapping[str, Any], latents: bool) -> str:
    what = "latents of images" if latents else "images"
    return f"{model['channels']} x {model['image_size']} x {model['image_size']} {what}"
