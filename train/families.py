"""The model families: how each one's records become microbatches; their modules are in `models.registry`."""

from __future__ import annotations

from typing import Any

from models.registry import CONFIGS, ModelConfig
from train.autoencoding import Autoencoding
from train.config import TrainStage, check_model
from train.data import ShardDataset
from train.documents import Documents
from train.labelled_images import LabelledImages
from train.parallel import World
from train.run_folder import RunFolder
from train.step import Batches

BATCHES: dict[str, type[Batches]] = {"dit": LabelledImages, "unified": Documents, "vae": Autoencoding}


def batches_of(stage: TrainStage, config: ModelConfig, world: World, dataset: ShardDataset) -> Batches:
    """The stage's batches for this model. Raises ValueError where stage, model and records do not fit together."""
    check_model(stage, config)
    batches = BATCHES[config.name](stage, config, world, dataset)
    batches.require_fit()
    return batches


def read_config(section: dict[str, Any]) -> ModelConfig:
    """A model's configuration from what was written of it, its name included."""
    return CONFIGS[section["name"]](**section)


def architecture(run: RunFolder, stage: TrainStage) -> ModelConfig:
    """The model's configuration: the stage's own, or that of the stage it starts from."""
    section, source = stage.model, stage.init_from
    while section is None:
        assert source is not None, "checked when the stage was loaded"
        manifest = run.read_manifest(source)
        if manifest is None:
            raise ValueError(f"stage {stage.name} starts from {source}, which is not finished: run it first")
        config = manifest["config"]
        section, source = config["model"] and read_config(config["model"]), config["init_from"]
    return section
