"""The model families: how each one's records become microbatches; their modules are in `models.registry`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from checkpointing.store import write_durably
from models.registry import CONFIGS, ModelConfig
from models.unified import UnifiedConfig
from train.autoencoding import Autoencoding
from train.config import TrainStage, check_model
from train.data import ShardDataset
from train.documents import Documents
from train.labelled_images import LabelledImages
from train.parallel import World
from train.run_folder import RunFolder
from train.step import Batches

TOKENIZER_FILE = "tokenizer.json"  # a copy of the tokenizer's file, in a stage's folder and in an export

BATCHES: dict[str, type[Batches]] = {"dit": LabelledImages, "unified": Documents, "vae": Autoencoding}


def batches_of(stage: TrainStage, config: ModelConfig, world: World, dataset: ShardDataset) -> Batches:
    """The stage's batches for this model. Raises ValueError where stage, model and records do not fit together."""
    check_model(stage, config)
    batches = BATCHES[config.name](stage, config, world, dataset)
    batches.require_fit()
    return batches


def written(config: ModelConfig) -> dict[str, Any]:
    """What is written of a model's configuration beside its weights. Of a tokenizer's file `keep_tokenizer` has to put
    a copy there.
    """
    section = config.model_dump(mode="json")
    return section if section.get("tokenizer", "bytes") == "bytes" else section | {"tokenizer": TOKENIZER_FILE}


def read_config(section: dict[str, Any], folder: Path) -> ModelConfig:
    """A model's configuration from what was written of it in `folder`, its name included.

    A tokenizer's file is the folder's own copy, from wherever that is read, or in folders of before there were copies
    the one that the section names. ValueError where it is another than the one that the model was made with.
    """
    named, copy = section.get("tokenizer", "bytes"), folder / TOKENIZER_FILE
    if named != "bytes" and (named == TOKENIZER_FILE or copy.is_file()):
        section = {**section, "tokenizer": str(copy)}
    return CONFIGS[section["name"]](**section)


def keep_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Copy the file of the model's tokenizer, if it has one, into `folder`."""
    if not isinstance(config, UnifiedConfig) or config.tokenizer == "bytes":
        return
    content, copy = Path(config.tokenizer).read_bytes(), folder / TOKENIZER_FILE
    if hashlib.sha256(content).hexdigest() != config.tokenizer_sha256:
        raise ValueError(f"{config.tokenizer} was changed since it was read: put it back, or start again")
    if not copy.is_file() or copy.read_bytes() != content:
        write_durably(copy, content)


def architecture(run: RunFolder, stage: TrainStage) -> ModelConfig:
    """The model's configuration: the stage's own, or that of the stage it starts from."""
    section, source = stage.model, stage.init_from
    while section is None:
        assert source is not None, "checked when the stage was loaded"
        manifest = run.read_manifest(source)
        if manifest is None:
            raise ValueError(f"stage {stage.name} starts from {source}, which is not finished: run it first")
        config = manifest["config"]
        section, source = config["model"] and read_config(config["model"], run.path / source), config["init_from"]
    return section
