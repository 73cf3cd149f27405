"""Images and texts from a trained model, functions of weights, prompts and a seed; and the exports to load it from.

images = generate(dit, objective, labels, seed=0, sampler="heun", steps=30, guidance=2.0)
images = draw(unified, objective, [[Text(tokens)]], seed=0, sampler="heun", steps=30, guidance=2.0)
captions = write(unified, [[Image(pixels)]])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from checkpointing.export import ExportError, read_export
from models.dit import DiT, DiTConfig
from models.flow import Objective, Sampler, sample
from models.packed import Document, Layout
from models.registry import ModelConfig, build_module
from models.unified import Unified, UnifiedConfig
from models.unified_generation import draw_images, write_texts
from models.unified_objective import UnifiedObjective
from train.config import Objective as ObjectiveSection
from train.documents import layout_of
from train.documents import objective_of as objective_of_documents
from train.families import TOKENIZER_FILE, read_config, written
from train.randomness import record_draws
from train.run_folder import RunFolder


@overload
def build(config: DiTConfig, weights: dict[str, Tensor]) -> DiT: ...
@overload
def build(config: UnifiedConfig, weights: dict[str, Tensor]) -> Unified: ...
@overload
def build(config: ModelConfig, weights: dict[str, Tensor]) -> nn.Module: ...
def build(config: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
    """The model with these weights, ready to sample from. Raises ValueError for those of another model."""
    model = build_module(config)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        told = str(error).splitlines()[-1].strip()
        raise ValueError(f"config and weights are not of one model ({told})") from None
    return model.eval()


def generate(
    model: DiT,
    objective: Objective,
    labels: Tensor,
    *,
    seed: int,
    sampler: Sampler,
    steps: int,
    guidance: float,
    decode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 250,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """One image a label, [N, C, H, W] in [-1, 1]; `decode` makes it of a model's latents.

    Image n depends on (seed, n, labels[n]) and the weights alone.
    """
    config = model.config
    shape = (config.channels, config.image_size, config.image_size)
    device = model.positions.device
    images = []
    for indices in torch.arange(len(labels)).split(batch_size):
        noise = record_draws(seed, "sample", 0, indices.tolist(), shape, 1).noise.to(device)
        drawn = sample(
            model,
            objective,
            noise,
            labels[indices].to(device),
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            null_class=model.null_class,
        )
        images.append(drawn.clamp(-1.0, 1.0) if decode is None else decode(drawn))
        if progress is not None:
            progress(int(indices[-1]) + 1)
    return torch.cat(images).cpu()


def draw(
    model: Unified,
    objective: UnifiedObjective,
    documents: Sequence[Document],
    *,
    seed: int,
    sampler: Sampler,
    steps: int,
    guidance: float,
    decode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 100,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The image that each document goes on with, [N, C, H, W] in [-1, 1]; `decode` makes it of a model's latents.

    Image n depends on (seed, n, documents[n]) and the weights alone. `progress` is told, at each step of the sampler,
    how many images that is the work of. Raises ValueError as `draw_images`.
    """
    config, layout, device = model.config, layout_of(model.config), model.embed.weight.device
    shape = (config.channels, config.image_size, config.image_size)
    images = list[Tensor](torch.empty(len(documents), 0))
    for done, chosen in _alike(layout, documents, batch_size):

        def told(step: int, of: int, done: int = done, size: int = len(chosen)) -> None:
            if progress is not None:
                progress(done + size * step // of)

        drawn = draw_images(
            model,
            layout,
            objective,
            [documents[n] for n in chosen],
            record_draws(seed, "sample", 0, chosen, shape, 1).noise.to(device),
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            progress=told,
        )
        drawn = drawn.clamp(-1.0, 1.0) if decode is None else decode(drawn)
        for n, image in zip(chosen, drawn.cpu(), strict=True):
            images[n] = image
    return torch.stack(images)


def write(
    model: Unified,
    documents: Sequence[Document],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 100,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The text that each document goes on with, of as many tokens as a caption may have.

    Text n depends on (seed, n, documents[n]) and the weights alone, at temperature 0 not on the seed. Raises ValueError
    as `write_texts`.
    """
    layout, most = layout_of(model.config), model.config.max_caption_tokens
    texts = [""] * len(documents)
    for done, chosen in _alike(layout, documents, batch_size):
        normals_BT = record_draws(seed, "write", 0, chosen, (most,), 1).noise
        written = write_texts(
            model,
            layout,
            [documents[n] for n in chosen],
            most,
            temperature=temperature,
            uniforms_BT=torch.special.ndtr(normals_BT.double()),
        )
        for n, tokens in zip(chosen, written, strict=True):
            texts[n] = layout.tokenizer.decode(tokens)
        if progress is not None:
            progress(done + len(chosen))
    return texts


def _alike(layout: Layout, documents: Sequence[Document], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Places in `documents`, those of like length together, and how many came before: less padding, less work."""
    order = sorted(range(len(documents)), key=lambda n: layout.length(documents[n]))
    for start in range(0, len(order), batch_size):
        yield start, order[start : start + batch_size]


@overload
def objective_of(run: RunFolder, stage_name: str, config: DiTConfig) -> Objective: ...
@overload
def objective_of(run: RunFolder, stage_name: str, config: UnifiedConfig) -> UnifiedObjective: ...
@overload
def objective_of(run: RunFolder, stage_name: str, config: ModelConfig) -> Objective | UnifiedObjective: ...
def objective_of(run: RunFolder, stage_name: str, config: ModelConfig) -> Objective | UnifiedObjective:
    """What a finished training stage's model, which `config` describes, was trained to predict."""
    manifest = run.read_manifest(stage_name)
    assert manifest is not None
    section = ObjectiveSection(**manifest["config"]["objective"])
    if isinstance(config, UnifiedConfig):
        return objective_of_documents(section)
    return Objective(prediction=section.prediction, timesteps=section.timesteps)


def exported(config: ModelConfig) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What an export's config says of its model, and the files beside it that `load_export` needs: the tokenizer's."""
    section = written(config)
    if not isinstance(config, UnifiedConfig) or config.tokenizer == "bytes":
        return section, {}
    return section, {TOKENIZER_FILE: Path(config.tokenizer).read_bytes()}


def load_export(folder: Path) -> tuple[nn.Module, Objective | UnifiedObjective, dict[str, Any]]:
    """The model and objective of an exported folder, and the whole of its config.

    The digests of the weights and, where the model has one, of the tokenizer's file are checked, and that the config is
    of a model with such weights: ExportError.
    """
    config, tensors = read_export(folder)
    try:
        model = build(read_config(config["model"], folder), tensors)
        objective = (UnifiedObjective if isinstance(model, Unified) else Objective)(**config["objective"])
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{folder} is no whole export ({type(error).__name__}: {error}): export the model again"
        ) from None
    return model, objective, config
