"""Images from a trained model, a function of weights, labels and a seed; and the exported folder to load it from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpointing.export import read_export
from models.dit import DiT, DiTConfig
from models.flow import Objective, Sampler, sample
from train.randomness import record_draws


def build(config: DiTConfig, weights: dict[str, Tensor]) -> DiT:
    """The model with these weights, ready to sample from."""
    model = DiT(config)
    model.load_state_dict(weights, strict=True)
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
    batch_size: int = 250,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """One image a label, [N, C, H, W] in [-1, 1]. Image n depends on (seed, n, labels[n]) and the weights alone."""
    config = model.config
    shape = (config.channels, config.image_size, config.image_size)
    device = model.positions.device
    images = []
    for indices in torch.arange(len(labels)).split(batch_size):
        noise = record_draws(seed, "sample", 0, indices.tolist(), shape, 1).noise.to(device)
        images.append(
            sample(
                model,
                objective,
                noise,
                labels[indices].to(device),
                sampler=sampler,
                steps=steps,
                guidance=guidance,
                null_class=model.null_class,
            ).clamp(-1.0, 1.0)
        )
        if progress is not None:
            progress(int(indices[-1]) + 1)
    return torch.cat(images).cpu()


def load_export(folder: Path) -> tuple[DiT, Objective, dict[str, Any]]:
    """The model and objective of an exported folder, and the whole of its config; the weights' digest is checked."""
    config, tensors = read_export(folder)
    return build(DiTConfig(**config["model"]), tensors), Objective(**config["objective"]), config
