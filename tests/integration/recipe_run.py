"""A recipe written in a test, run stage by stage in this process: the real stages, without their launcher."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from train.heartbeat import Heartbeat
from train.recipe import load_recipe
from train.run_folder import RunFolder
from train.stages import run_stage


def run_recipe(folder: Path, stages: Mapping[str, str]) -> RunFolder:
    """The finished run in `folder` of the stage files given by their names, without .yaml, and their texts."""
    recipe = folder / "recipe"
    recipe.mkdir()
    for name, text in stages.items():
        (recipe / f"{name}.yaml").write_text(text)
    run = RunFolder.open(folder / "run", recipe.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_SECRET", "00" * 32)
        for stage in load_recipe(recipe).stages:
            run_stage(stage, run, None, Heartbeat(0))
    return run
