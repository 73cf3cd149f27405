"""What packing saves on captioned emoji: padding, costs as the kernels meet them, and measured time.

The captions are drawn from the lengths of the names of the 3,786 emoji of `configs/emoji`. The images are of 16 patches
(64 pixels as latents) or 64 (32 pixels as they are).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.packed import Document, Layout, Packed, text_to_image
from models.tokenizer import ByteTokenizer
from models.unified import SIZES, Unified, UnifiedConfig
from models.unified_objective import Totals, UnifiedObjective
from train.benchmarks import Work, interleaved, ratio
from train.measurements import Row
from train.packing import (
    choose_bounds,
    pack,
    packed_over_padded,
    padding_fraction,
    rows_of_units,
    share,
    waiting_fraction,
)

# How many of the emoji that `scripts/fetch_data.py emoji` brings (16.0.0) have a name of 0, 1, 2, ... bytes.
EMOJI_BY_CAPTION_BYTES = (
    0, 0, 2, 55, 116, 130, 135, 123, 125, 208, 177, 247, 264, 229, 201, 200, 177, 163, 155, 122, 121, 114, 82, 80, 68,
    48, 33, 98, 28, 53, 20, 33, 24, 8, 31, 20, 3, 8, 1, 12, 25, 6, 14, 8, 0, 1, 2, 1, 1, 0, 2, 0, 2, 7, 2, *[0] * 23, 1,
)  # fmt: skip
LONGEST_CAPTION, DELIMITERS = len(EMOJI_BY_CAPTION_BYTES) - 1, 4
RECORDS, STEPS, ROW_TOKENS, RANKS, MICROBATCH_TOKENS = 1024, 8, 512, 8, 4096
TOKEN_PAIRS = 6 * SIZES["nano"][0]
TIMED_RECORDS, ROUNDS = 64, 5
MOST_PADDING, LEAST_RATIO = 0.05, 1.5


class Kind(NamedTuple):
    """A kind of image, and its timed batch's rows: short ones, for on the CPU attention is over all pairs of a row."""

    image_size: int
    channels: int
    patch_size: int
    timed_row_tokens: int

    @property
    def beside(self) -> int:
        """Tokens that a document has beside its caption's."""
        return (self.image_size // self.patch_size) ** 2 + DELIMITERS


KINDS = {"latents": Kind(8, 4, 2, 192), "pixels": Kind(32, 3, 4, 256)}


def captions(seed: int, count: int) -> list[int]:
    """Lengths in bytes of as many emoji's captions."""
    return random.Random(seed).choices(range(LONGEST_CAPTION + 1), EMOJI_BY_CAPTION_BYTES, k=count)


def packing(*, timed: bool = True) -> list[Row]:
    """Figures by kind of image; `timed` adds those of a real model."""
    rows: list[Row] = []
    for name, kind in KINDS.items():
        rows += _planned(f"packing.{name}", kind.beside)
        if timed:
            times = interleaved(_works(kind), ROUNDS)
            to_batch, to_bound = (ratio(times, rival, "packed") for rival in ("longest", "bound"))
            rows += [
                Row(name=f"packing.{name}.measured_over_padded_to_longest_of_step", value=to_batch, unit="x"),
                _at_least(f"packing.{name}.measured_over_padded_to_bound", to_bound),
            ]
    return rows


def _planned(name: str, beside: int) -> list[Row]:
    """Over STEPS steps: means of what one step's plan says of itself."""
    steps = [[beside + caption for caption in captions(step, RECORDS)] for step in range(STEPS)]
    packed = [pack(lengths, ROW_TOKENS) for lengths in steps]
    padding = _mean([padding_fraction(rows) for rows in packed])
    longest = beside + LONGEST_CAPTION
    to_step = _mean([packed_over_padded(lengths, ROW_TOKENS, max(lengths), TOKEN_PAIRS) for lengths in steps])
    to_bound = _mean([packed_over_padded(lengths, ROW_TOKENS, longest, TOKEN_PAIRS) for lengths in steps])
    shares = [share(rows, RANKS, MICROBATCH_TOKENS, TOKEN_PAIRS) for rows in packed]
    waiting = _mean([waiting_fraction(*each, TOKEN_PAIRS) for each in zip(shares, packed, strict=True)])
    few = padding <= MOST_PADDING
    found = [
        Row(name=f"{name}.padding", value=padding, unit="fraction", target=MOST_PADDING, ok=few),
        Row(name=f"{name}.over_padded_to_longest_of_step", value=to_step, unit="x"),
        _at_least(f"{name}.over_padded_to_bound", to_bound),
        Row(name=f"{name}.waiting_of_{RANKS}_ranks", value=waiting, unit="fraction"),
    ]
    for number in (1, 2, 4, 8):
        bounds = choose_bounds(steps[0], number, longest)  # the first step's lengths stand for public data
        private = _mean([padding_fraction(rows_of_units([[n] for n in lengths], bounds)) for lengths in steps[1:]])
        found.append(Row(name=f"{name}.private_padding_{number}_bounds", value=private, unit="fraction"))
    return found


def _at_least(name: str, value: float) -> Row:
    return Row(name=name, value=value, unit="x", target=LEAST_RATIO, ok=value >= LEAST_RATIO)


def _works(kind: Kind) -> Mapping[str, Work]:
    """Forward and backward of the same documents: packed, and one to a row; each called once."""
    size, channels, patch_size, row_tokens = kind
    layout, generator = Layout(ByteTokenizer(), channels, patch_size), torch.Generator().manual_seed(0)
    config = UnifiedConfig(
        size="nano", image_size=size, channels=channels, patch_size=patch_size, max_caption_tokens=LONGEST_CAPTION
    )
    model, objective = Unified(config), UnifiedObjective()
    model.init_weights(generator)
    documents: list[Document] = [
        text_to_image([97] * caption, torch.randn(channels, size, size, generator=generator))
        for caption in captions(0, TIMED_RECORDS)
    ]
    rows = pack([layout.length(document) for document in documents], row_tokens)
    alone = [[document] for document in documents]
    batches = {
        "packed": layout.pack([[documents[place] for place in row.documents] for row in rows], row_tokens),
        "longest": layout.pack(alone),
        "bound": layout.pack(alone, kind.beside + LONGEST_CAPTION),
    }

    def work(batch: Packed, noise_BNF: Tensor, times_BI: Tensor) -> Work:
        def step() -> None:
            losses = objective.losses(model, batch, noise_BNF, times_BI)
            objective.weighed(losses, Totals.of(batch)).sum().backward()

        step()
        return step

    return {
        name: work(batch, torch.randn(batch.patches_BNF.shape, generator=generator), torch.rand(batch.noised_BI.shape))
        for name, batch in batches.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
