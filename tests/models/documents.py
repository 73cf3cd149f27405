"""Documents for the unified model's tests: random ones, and what each of their tokens may see, said in plain sight."""

# B rows, N tokens, I images
from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from models.packed import Document, Image, Layout, Packed, Text
from models.tokenizer import ByteTokenizer
from models.unified import Unified, UnifiedConfig

CHANNELS, PATCH = 2, 2
LAYOUT = Layout(ByteTokenizer(), CHANNELS, PATCH)
SMALL = UnifiedConfig(
    width=32, depth=2, heads=2, image_size=8, max_caption_tokens=64, channels=CHANNELS, patch_size=PATCH
)
KINDS = {
    "dense": {},
    "modality_experts": {"modality_experts": True},
    "mixture": {"num_experts": 3, "top_k": 2},
    "both": {"modality_experts": True, "num_experts": 2, "top_k": 1},
}


def config(kind: str) -> UnifiedConfig:
    return UnifiedConfig(**{**SMALL.model_dump(), **KINDS[kind]})


def filled(kind: str = "dense", seed: int = 0) -> Unified:
    """A model with no zero weights, so that every path through it shows in its output."""
    model, generator = Unified(config(kind)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """An image of so many patches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CHANNELS, PATCH * height, PATCH * width, generator=generator)


def text(characters: str, *, learn: bool = False) -> Text:
    return Text([*characters.encode()], learn)


def rows() -> list[list[Document]]:
    """A row of three documents, one of text alone, one of an image alone, and one of nothing."""
    captioned: Document = [Image(picture(2, 3, 1)), text("a cat", learn=True)]
    drawn: Document = [text("dog"), Image(picture(3, 2, 2), noised=True)]
    interleaved: Document = [
        text("ab", learn=True), Image(picture(2, 2, 3), noised=True), Image(picture(2, 2, 3)),
        text("c", learn=True), Image(picture(1, 3, 4), noised=True),
    ]  # fmt: skip
    return [[captioned, drawn, interleaved], [[text("only words", learn=True)]], [[Image(picture(4, 1, 5), True)]], []]


def draws(batch: Packed, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise [B, N, F] and times [B, I]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch.patches_BNF.shape, generator=generator)
    return noise, torch.rand(batch.noised_BI.shape, generator=generator)


def visible(documents: Sequence[Document], num_tokens: int) -> Tensor:
    """Bool [num_tokens, num_tokens]: whether a query (row) sees a key, from the documents alone."""
    tokens: list[tuple[int, int, Text | Image]] = []
    for number, document in enumerate(documents):
        for place, part in enumerate(document):
            tokens += [(number, place, part)] * LAYOUT.length([part])
    found = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for i, (document, place, part) in enumerate(tokens):
        for j, (other_document, other_place, other) in enumerate(tokens):
            own_part = (document, place) == (other_document, other_place)
            if isinstance(other, Image) and (other.noised or own_part):
                found[i, j] = own_part
            else:
                found[i, j] = document == other_document and j <= i
            assert not (found[i, j] and isinstance(part, Text) and j > i), "text never looks ahead"
    return found


def parts() -> st.SearchStrategy[Text | Image]:
    texts = st.builds(Text, st.lists(st.integers(0, 255), max_size=4), st.booleans())
    images = st.builds(
        lambda height, width, seed, noised: Image(picture(height, width, seed), noised),
        st.integers(1, 3), st.integers(1, 3), st.integers(0, 99), st.booleans(),
    )  # fmt: skip
    return texts | images


def random_rows() -> st.SearchStrategy[list[list[list[Text | Image]]]]:
    """One to three rows of up to three documents of up to four parts."""
    document = st.lists(parts(), min_size=1, max_size=4)
    return st.lists(st.lists(document, max_size=3), min_size=1, max_size=3)
