"""What packing saves on documents like captioned emoji: padding, costs as the kernels meet them, and measured time.

The captions are invented, with the distribution of the 3,786 emoji's names (bytes: median 15, mean 16.5, deviation 8.3,
longest 79). The images are 64 pixels: 16 patches as latents, 64 patches as pixels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

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

LONGEST_CAPTION, DELIMITERS = 79, 4
PATCHES = {"latents": 16, "pixels": 64}
RECORDS, STEPS, ROW_TOKENS, RANKS, MICROBATCH_TOKENS = 1024, 8, 512, 8, 4096
TOKEN_PAIRS = 6 * SIZES["nano"][0]
TIMED_RECORDS, TIMED_ROW_TOKENS, ROUNDS = 64, 256, 5  # on the CPU attention is over all pairs of a row
MOST_PADDING, LEAST_RATIO = 0.05, 1.5


def captions(seed: int, count: int) -> list[int]:
    """Invented lengths of captions in bytes."""
    chance = random.Random(seed)
    return [min(LONGEST_CAPTION, max(1, round(chance.lognormvariate(2.69, 0.475)))) for _ in range(count)]


def packing(*, timed: bool = True) -> list[Row]:
    """Figures by kind of image; `timed` adds those of a real model."""
    rows: list[Row] = []
    for kind, patches in PATCHES.items():
        rows += _planned(f"packing.{kind}", patches + DELIMITERS)
    if timed:
        times = interleaved(_works(), ROUNDS)
        rows.append(Row(name="packing.latents.measured_over_padded", value=ratio(times, "padded", "packed"), unit="x"))
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
    few, cheap = padding <= MOST_PADDING, to_bound >= LEAST_RATIO
    found = [
        Row(name=f"{name}.padding", value=padding, unit="fraction", target=MOST_PADDING, ok=few),
        Row(name=f"{name}.over_padded_to_longest_of_step", value=to_step, unit="x"),
        Row(name=f"{name}.over_padded_to_bound", value=to_bound, unit="x", target=LEAST_RATIO, ok=cheap),
        Row(name=f"{name}.waiting_of_{RANKS}_ranks", value=waiting, unit="fraction"),
    ]
    for number in (1, 2, 4, 8):
        bounds = choose_bounds(steps[0], number, longest)  # the first step's lengths stand for public data
        private = _mean([padding_fraction(rows_of_units([[n] for n in lengths], bounds)) for lengths in steps[1:]])
        found.append(Row(name=f"{name}.private_padding_{number}_bounds", value=private, unit="fraction"))
    return found


def _works() -> Mapping[str, Work]:
    """Forward and backward of the same documents, packed and one to a row as long as the longest; each called once."""
    tokenizer, patch = ByteTokenizer(), 2
    layout, generator = Layout(tokenizer, channels=4, patch_size=patch), torch.Generator().manual_seed(0)
    config = UnifiedConfig(size="nano", vocab_size=tokenizer.vocab_size, channels=4, patch_size=patch)
    model, objective = Unified(config), UnifiedObjective()
    model.init_weights(generator)
    texts = captions(0, TIMED_RECORDS)
    documents: list[Document] = [
        text_to_image([97] * caption, torch.randn(4, 8, 8, generator=generator)) for caption in texts
    ]
    rows = pack([layout.length(document) for document in documents], TIMED_ROW_TOKENS)
    batches = {
        "packed": layout.pack([[documents[place] for place in row.documents] for row in rows], TIMED_ROW_TOKENS),
        "padded": layout.pack([[document] for document in documents]),
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
