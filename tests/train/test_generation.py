"""Images and captions of a unified model: what they are functions of, and that an export gives the same ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.export import ExportError, write_export
from models.packed import Document, Image, Text
from models.tokenizer import SPECIALS
from models.unified import Unified
from models.unified_objective import UnifiedObjective
from tests.models.test_tokenizer import a_file
from tests.train.unified_models import IMAGE_SIZE, config, filled
from train.generation import draw, exported, load_export, write

OBJECTIVE = UnifiedObjective()
HOW = {"seed": 3, "sampler": "heun", "steps": 2, "guidance": 2.0}


def pictures(number: int) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    return [[Image(image)] for image in torch.rand(number, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1]


def prompts() -> list[Document]:
    """Of other lengths, the longest first."""
    return [[Text([*b"three words here"])], [Text([*b"one"])], [*pictures(1)[0], Text([*b"two"])]]


def test_an_image_depends_on_its_seed_place_and_prompt_and_not_on_how_it_was_batched() -> None:
    model, told = filled(), list[int]()
    images = draw(model, OBJECTIVE, prompts(), batch_size=2, progress=told.append, **HOW)
    assert images.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE) and images.abs().max() <= 1
    assert told == sorted(told) and told[-1] == 3
    torch.testing.assert_close(images, draw(model, OBJECTIVE, prompts(), **HOW), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images[:1], draw(model, OBJECTIVE, prompts()[:1], **HOW), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(images, draw(model, OBJECTIVE, prompts(), **{**HOW, "seed": 4}))
    assert not torch.allclose(images[:2], draw(model, OBJECTIVE, prompts()[1::-1], **HOW))


def test_what_makes_images_of_latents_is_given_them_unclamped() -> None:
    seen = list[float]()

    def decode(latents: torch.Tensor) -> torch.Tensor:
        seen.append(float(latents.abs().max()))
        return latents.new_zeros(len(latents), 1, 2, 2)

    assert draw(filled(), OBJECTIVE, prompts(), decode=decode, **HOW).shape == (3, 1, 2, 2)
    assert max(seen) > 1


def test_a_caption_depends_on_its_image_and_above_temperature_0_on_the_seed() -> None:
    model, images = filled(), pictures(3)
    greedy = write(model, images)
    assert greedy == write(model, images, batch_size=1, seed=9) and len(set(greedy)) > 1
    drawn = write(model, images, temperature=1.0, seed=1)
    assert drawn == write(model, images, temperature=1.0, seed=1, batch_size=2)
    assert drawn != greedy and drawn != write(model, images, temperature=1.0, seed=2)


def export(folder: Path, model: Unified) -> Path:
    section, files = exported(model.config)
    described = {"model": section, "objective": OBJECTIVE.model_dump(), "source": "test"}
    write_export(folder, model.state_dict(), described, extra_files=files)
    return folder


@pytest.mark.parametrize("tokens", ["bytes", "file"])
def test_an_export_gives_the_same_samples_and_captions_to_the_bit(tmp_path: Path, tokens: str) -> None:
    changes = {} if tokens == "bytes" else {"tokenizer": str(a_file(tmp_path, list(SPECIALS.values())))}
    model = filled(config(modality_experts=True, **changes))
    folder = export(tmp_path / "model", model)
    images, captions = draw(model, OBJECTIVE, prompts(), **HOW), write(model, pictures(2))
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)  # the export has its own copy
    loaded, objective, _ = load_export(folder)
    assert isinstance(loaded, Unified) and objective == OBJECTIVE
    assert torch.equal(draw(loaded, OBJECTIVE, prompts(), **HOW), images)
    assert write(loaded, pictures(2)) == captions


def test_another_tokenizer_than_the_model_was_trained_with_is_refused(tmp_path: Path) -> None:
    folder = export(tmp_path / "model", filled(config(tokenizer=str(a_file(tmp_path, list(SPECIALS.values()))))))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ExportError, match="tokenizer_sha256"):
        load_export(folder)
    file.unlink()
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        load_export(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"depth": 2}}, "config and weights are not of one model"),
        ({"model": {"name": "gan"}}, "'gan'"),
        ({"model": None}, "is no whole export"),
        ({"objective": None}, "is no whole export"),
        ({"objective": {"flow": 1}}, "flow"),
    ],
)
def test_a_config_of_another_model_than_the_weights_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = export(tmp_path / "model", filled())
    described = json.loads((folder / "config.json").read_bytes())
    for name, section in changes.items():
        described[name] = section and described[name] | section
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ExportError, match=said) as caught:
        load_export(folder)
    assert str(folder) in str(caught.value)
