"""A unified model small enough for any test, and shards of drawn shapes that it can read."""

from pathlib import Path

import torch

from models.unified import Unified, UnifiedConfig
from train.config import IngestStage
from train.sources import ingest

IMAGE_SIZE, MAX_TOKENS = 16, 40


def config(**changes: object) -> UnifiedConfig:
    values = {"width": 32, "depth": 1, "heads": 2, "channels": 3, "patch_size": 8}
    return UnifiedConfig(**{**values, "image_size": IMAGE_SIZE, "max_caption_tokens": MAX_TOKENS, **changes})


def filled(of: UnifiedConfig | None = None, seed: int = 0) -> Unified:
    """A model with no zero weights."""
    model, generator = Unified(of or config()), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def shapes(folder: Path) -> Path:
    """Splits public and test, 24 records each, of one form an image."""
    source = {"kind": "shapes", "records": {"public": 24, "test": 24}, "image_size": IMAGE_SIZE, "max_count": 1}
    ingest(IngestStage(name="ingest", stage="ingest", source=source), folder, lambda *_: None)  # type: ignore[arg-type]
    return folder
