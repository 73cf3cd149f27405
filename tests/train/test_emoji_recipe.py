"""What `configs/emoji` promises of itself: who reads what, and that its tokenizer tells any text."""

from pathlib import Path

import pytest
import torch

from models.packed import image_to_text, text_to_image
from models.tokenizer import open_tokenizer
from models.unified import UnifiedConfig
from train.config import EvalUnifiedStage, FinetuneStage, PretrainStage
from train.documents import layout_of
from train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes name their files from there


@pytest.mark.usefixtures("at_the_root")
def test_public_stages_read_public_drawings_and_no_figure_is_of_a_private_record() -> None:
    stages = load_recipe(ROOT / "configs/emoji").stages
    assert {stage.split for stage in stages if isinstance(stage, PretrainStage)} == {"public"}
    assert [stage.split for stage in stages if isinstance(stage, FinetuneStage)] == ["private"]
    (evaluated,) = (stage for stage in stages if isinstance(stage, EvalUnifiedStage))
    assert evaluated.splits == ("public", "test", "private_test")


@pytest.mark.usefixtures("at_the_root")
def test_a_private_row_holds_both_documents_of_the_longest_caption_and_no_more() -> None:
    stages = load_recipe(ROOT / "configs/emoji").stages
    (model,) = (stage.model for stage in stages if isinstance(stage, PretrainStage) and stage.model is not None)
    (private,) = (stage for stage in stages if isinstance(stage, FinetuneStage))
    assert isinstance(model, UnifiedConfig) and private.documents is not None
    layout, image = layout_of(model), torch.zeros(model.channels, model.image_size, model.image_size)
    caption = list(range(model.max_caption_tokens))
    both = [image_to_text(image, caption), text_to_image(caption, image, 1)]
    assert sum(map(layout.length, both)) == private.documents.row_tokens


@pytest.mark.parametrize("text", ["grinning face", "côte d’ivoire flag", "日本 <|end_text|>", "a  b", "UPPER lower"])
def test_any_text_comes_back_from_the_tokenizer_of_the_public_names(text: str) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = open_tokenizer(str(ROOT / "configs/emoji/tokenizer.json"))
    tokens = tokenizer.encode(text).tokens
    assert tokenizer.decode(tokens) == text
    assert not set(tokens) & set(tokenizer.specials.values())


def test_the_tokenizer_knows_no_word_that_only_private_names_have() -> None:
    """It was trained on the public split: a flag's country or a person's trade would be there whole if it had not."""
    pytest.importorskip("tokenizers")
    tokenizer = open_tokenizer(str(ROOT / "configs/emoji/tokenizer.json"))
    for word in ("afghanistan", "firefighter", "astronaut", "juggling"):
        assert len(tokenizer.encode(word).tokens) > 1, word
    assert len(tokenizer.encode("face").tokens) == 1
