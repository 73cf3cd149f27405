"""A run folder that a training stage can go on from: forty invented images in the filter stage's shards."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.images import encode_png
from train.recipe import load_stage
from train.run_folder import RunFolder, now
from train.shards import Record, write_shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.open(tmp_path / "run", "digits")
    shades = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    records = (Record(f"r{i}", f"r{i}", encode_png(Image.fromarray(shades[i])), i % 10, None) for i in range(40))
    written = write_shards(folder.stage_folder("filter") / "public", "public", records, shard_size=16)
    config = load_stage(ROOT / "configs/digits/20_filter.yaml")
    metrics = {"splits": {"public": {"root": written.root}}}
    folder.write_manifest(config, inputs={}, started=now(), seconds=0.0, metrics=metrics, outputs={})
    return folder
